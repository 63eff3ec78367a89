"""Baselines (METHODS 0): the word-embedding rows at content positions are replaced; ids, mask and positions stay.

Of images the pixels are replaced, so that patches, positions and special tokens are embedded by the model itself.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from calig.pipeline.attribution.cuts import require_cuts
from calig.pipeline.attribution.methods.base import Baseline
from calig.pipeline.attribution.model import ExplainableModel, Inputs, Trace, UnsupportedModelError
from calig.pipeline.attribution.pixels import baseline_pixels
from calig.pipeline.attribution.structure import embedding_tables
from calig.pipeline.errors import InputError


def baseline_trace(
    model: ExplainableModel, inputs: Inputs, rows: Tensor, baseline: Baseline, *, graph: bool = False
) -> Trace:
    """Run the baseline x' of some examples.

    Args:
        model: In an open session.
        inputs: B examples.
        rows: (N,) examples to run.
        baseline: Which baseline.
        graph: Keep the graph behind the embedding output, for gradients.

    Returns:
        The pass of x': its states are b^0 to b^L, its output holds f(x').

    Raises:
        InputError: The baseline needs a token that the model or tokenizer does not have, or is not one of this input.
        UnsupportedModelError: There is nowhere to put it, or what enters the blocks is not all that the output sees.
    """
    batch, content = inputs.select(rows), inputs.content[rows]
    with torch.set_grad_enabled(graph):
        if baseline == "zero":
            entry = model.trace(batch).states[0]
            assert entry is not None  # a pass from layer 0 records its entry
            return model.trace(batch, state=torch.where(content[..., None], torch.zeros_like(entry), entry))
        if inputs.pixels is None:
            trace = _text_trace(model, batch, content, baseline)
        else:
            trace = model.trace(
                {**batch, inputs.pixels: baseline_pixels(batch[inputs.pixels], baseline, model.tokenizer)}
            )
        require_cuts(model, inputs.select(rows[:1]), trace.output, {0: trace.states[0]})
        return trace


def _text_trace(model: ExplainableModel, batch: dict[str, Any], content: Tensor, baseline: Baseline) -> Trace:
    embedding = model.structure.embedding
    if embedding is None:
        raise UnsupportedModelError(
            f"'{model.structure.family}' has no word embedding to put a baseline into; name it with `embedding=`, or "
            "take baseline='zero'."
        )
    row = _embedding_row(model, baseline)
    used = False

    def tokens_first(fed: Tensor) -> bool:
        if fed.shape == content.shape == content.T.shape:
            # As many rows as tokens say nothing about which come first, so what was fed must.
            ids = batch.get("input_ids", fed)
            return bool((fed == ids.T).sum() > (fed == ids).sum())
        return fed.shape == content.T.shape

    def replace(_module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> Tensor:
        nonlocal used
        used = True
        where = content.T if tokens_first(args[0] if args else next(iter(kwargs.values()))) else content
        if output.shape[:2] != where.shape:
            raise UnsupportedModelError(
                f"the word embedding of '{model.structure.family}' ({type(embedding).__name__}) returned shape "
                f"{tuple(output.shape)} for tokens of shape {tuple(content.shape)}, so the baseline '{baseline}' "
                "cannot be put there; name another with `embedding=`, or take baseline='zero'."
            )
        return torch.where(where[..., None], row.to(output.dtype), output)

    tables = embedding_tables(model.module, embedding)
    handles = [table.register_forward_hook(replace, with_kwargs=True) for table in tables]
    try:
        trace = model.trace(batch)
    finally:
        for handle in handles:
            handle.remove()
    if not used:
        # Else the baseline would be the input, and every score 0 without a word.
        raise UnsupportedModelError(
            f"the word embedding of '{model.structure.family}' ({type(embedding).__name__}) does not run in its "
            f"forward pass, so the baseline '{baseline}' cannot be put there; name another with `embedding=`, or take "
            "baseline='zero'."
        )
    return trace


def _embedding_row(model: ExplainableModel, baseline: Baseline) -> Tensor:
    embedding = model.structure.embedding
    assert embedding is not None  # the caller checked
    if baseline in ("black", "blur"):
        raise InputError(f"baseline '{baseline}' is for images; text takes pad, mask, unk, mean or zero.")
    weight = getattr(embedding, "weight", None)
    if not isinstance(weight, Tensor):
        raise UnsupportedModelError(
            f"the embedding of '{model.structure.family}' ({type(embedding).__name__}) has no table of word vectors; "
            "name one with `embedding=`, or take baseline='zero'."
        )
    if baseline == "mean":
        return _mean_row(embedding, weight)
    token = getattr(model.tokenizer, f"{baseline}_token_id", None)
    if token is None and baseline == "pad":
        token = getattr(model.structure.config, "pad_token_id", getattr(embedding, "padding_idx", None))
        if token is None:
            return _mean_row(embedding, weight)
    if token is None:
        raise InputError(
            f"baseline '{baseline}' needs a tokenizer with a {baseline} token; pass `tokenizer=` or take 'mean'."
        )
    # A model may embed through more than a look-up (a scale, an adapter): let its own module embed the token.
    return embedding(torch.tensor([[token]], device=weight.device))[0, 0]


def _mean_row(embedding: nn.Module, weight: Tensor) -> Tensor:
    if type(embedding) is nn.Embedding:
        return weight.mean(dim=0)
    return embedding(torch.arange(weight.shape[0], device=weight.device)[None])[0].mean(dim=0)
