"""Noise on the word embeddings of chosen positions, wherever a method takes the input's rows.

Shapes: N rows, T tokens, P positions that get noise, E width of the word embedding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from calig.pipeline.attribution.model import ExplainableModel, UnsupportedModelError
from calig.pipeline.attribution.structure import embedding_tables
from calig.pipeline.attribution.wrapping import replaced

_SHIFT = 30  # no vocabulary reaches 2**30, so a number above it can hold the token in its lower bits


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
    position therefore gets a number of its own above its token id, which the word embedding turns back into the token,
    plus the noise (`Inputs.content_of` still reads the token). A baseline that replaces the position replaces the
    noise with it.

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
    tables = embedding_tables(model.module, _word_embedding(model))
    ids, where = ids.to(model.device).long(), where.to(model.device)
    noise = noise.to(model.device)
    count = int(where.sum())
    numbered = ids.clone()
    numbered[where] += torch.arange(1, count + 1, device=ids.device) << _SHIFT
    used = False

    def noisy(original: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def forward(fed: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            nonlocal used
            number = fed >> _SHIFT
            if not number.any():
                return original(fed, *args, **kwargs)
            used = True
            output = original(fed & (2**_SHIFT - 1), *args, **kwargs)
            added = torch.zeros_like(output)
            added[number > 0] = noise[number[number > 0] - 1].to(output.dtype)
            return output + added

        return forward

    with ExitStack() as stack:
        for table in tables:
            stack.enter_context(replaced(table, noisy(table.forward)))
        yield numbered
    if not used and count:
        # Else the noise would be none, and every method perfectly stable without a word.
        raise UnsupportedModelError(
            f"the word embedding of '{model.structure.family}' does not run in its "
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
