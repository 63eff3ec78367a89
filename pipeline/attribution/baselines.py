"""Baselines (METHODS 0): the word-embedding rows at content positions are replaced; ids, mask and positions stay."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from calig.pipeline.attribution.methods.base import Baseline
from calig.pipeline.attribution.model import ExplainableModel, Inputs, Trace, UnsupportedModelError
from calig.pipeline.errors import InputError


def baseline_trace(model: ExplainableModel, inputs: Inputs, rows: Tensor, baseline: Baseline) -> Trace:
    """Run the baseline x' of some examples, without a graph.

    Args:
        model: In an open session.
        inputs: B examples.
        rows: (N,) examples to run.
        baseline: Which baseline.

    Returns:
        The pass of x': its states are b^0 to b^L, its output holds f(x').

    Raises:
        InputError: The baseline needs a token that the model or tokenizer does not have.
    """
    batch, content = inputs.select(rows), inputs.content[rows]
    with torch.no_grad():
        if baseline == "zero":
            entry = model.trace(batch).states[0]
            assert entry is not None  # a pass from layer 0 records its entry
            return model.trace(batch, state=torch.where(content[..., None], torch.zeros_like(entry), entry))
        embedding = model.structure.embedding
        if embedding is None:
            raise UnsupportedModelError(f"'{model.structure.family}' has no word embedding to put a baseline into.")
        row = _embedding_row(model, baseline)

        def replace(_module: Any, _args: Any, output: Tensor) -> Tensor:
            return torch.where(content[..., None], row.to(output.dtype), output)

        handle = embedding.register_forward_hook(replace)
        try:
            return model.trace(batch)
        finally:
            handle.remove()


def _embedding_row(model: ExplainableModel, baseline: Baseline) -> Tensor:
    weight: Tensor = model.structure.embedding.weight  # type: ignore[union-attr,assignment]
    if baseline == "mean":
        return weight.mean(dim=0)
    token = getattr(model.tokenizer, f"{baseline}_token_id", None)
    if token is None and baseline == "pad":
        token = getattr(model.structure.config, "pad_token_id", None)
        if token is None:
            return weight.mean(dim=0)
    if token is None:
        raise InputError(
            f"baseline '{baseline}' needs a tokenizer with a {baseline} token; pass `tokenizer=` or take 'mean'."
        )
    # A model may embed through more than a look-up (a scale, say): let its own module embed the token.
    ids = torch.tensor([[token]], device=weight.device)
    return model.structure.embedding(ids)[0, 0]  # type: ignore[misc]
