"""Noise on the word embeddings of chosen positions, wherever a method takes the input's rows.

Shapes: N rows, T tokens, P positions that get noise, E width of the word embedding.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from calig.pipeline.attribution.model import ExplainableModel, UnsupportedModelError

_FIRST = 2**30  # no vocabulary reaches this number, and an int32 id holds as many above it


def embedding_width(model: ExplainableModel, ids: Tensor) -> int:
    """E, the width of what the word embedding gives for a token of `ids` (N, T); not always that of the blocks.

    Raises:
        UnsupportedModelError: The model has no word embedding.
    """
    with torch.no_grad():
        return _word_embedding(model)(ids[:1, :1].to(model.device)).shape[-1]


@contextmanager
def embedding_noise(model: ExplainableModel, ids: Tensor, where: Tensor, noise: Tensor) -> Iterator[Tensor]:
    """Within the context, add a vector to the word embedding of each chosen position.

    A method picks, repeats and orders the rows of a batch as it likes, so a hook could not tell them apart. Each noisy
    position therefore gets a number of its own in place of its token id, which the word embedding turns back into the
    token, plus the noise. A baseline that replaces the position replaces the noise with it.

    Args:
        model: The model; its word embedding is as before on exit, also after an exception.
        ids: (N, T) token ids.
        where: (N, T) bool, P positions that are neither special nor padding: families compare the ids of those.
        noise: (P, E), in the order of `where.nonzero()`.

    Yields:
        (N, T) ids to feed in place of `ids`.

    Raises:
        UnsupportedModelError: The model has no word embedding, or nothing ran through it within the context.
    """
    embedding = _word_embedding(model)
    where = where.to(ids.device)
    tokens = ids[where]
    numbered = ids.clone()
    numbered[where] = torch.arange(_FIRST, _FIRST + len(tokens), device=ids.device, dtype=ids.dtype)
    noise = noise.to(ids.device)
    original, own = embedding.forward, embedding.__dict__.get("forward")
    used = False

    def forward(fed: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        nonlocal used
        noisy = fed >= _FIRST
        if not noisy.any():
            return original(fed, *args, **kwargs)
        used = True
        index = fed[noisy] - _FIRST
        plain = fed.masked_scatter(noisy, tokens[index])
        output = original(plain, *args, **kwargs)
        added = torch.zeros_like(output)
        added[noisy] = noise[index].to(output.dtype)
        return output + added

    embedding.forward = forward
    try:
        yield numbered
    finally:
        if own is None:
            del embedding.__dict__["forward"]
        else:
            embedding.forward = own
    if not used and len(tokens):
        # Else the noise would be none, and every method perfectly stable without a word.
        raise UnsupportedModelError(
            f"the word embedding of '{model.structure.family}' ({type(embedding).__name__}) does not run in its "
            "forward pass, so no noise can be put there; take sensitivity_max out of explain.metrics."
        )


def _word_embedding(model: ExplainableModel) -> nn.Module:
    embedding = model.structure.embedding
    if embedding is None:
        raise UnsupportedModelError(
            f"'{model.structure.family}' has no word embedding to put noise on; take sensitivity_max out of "
            "explain.metrics."
        )
    return embedding
