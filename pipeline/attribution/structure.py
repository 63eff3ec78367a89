"""Finding a model's blocks and its word embedding by structure, at run time."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn


class UnsupportedModelError(ValueError):
    """The engine cannot work on this model; the message says what was looked for and what does work."""


@dataclass(frozen=True)
class Structure:
    """Where a transformer's parts are.

    Attributes:
        blocks: The distinct block modules in the order of their first call. A family that shares weights (ALBERT)
            has fewer modules than blocks, each called several times.
        embedding: The word embedding; None where the input is not token ids.
        family: The name used in messages: `config.model_type`, else the class name.
    """

    blocks: tuple[nn.Module, ...]
    embedding: nn.Module | None
    family: str


def find_structure(model: nn.Module) -> Structure:
    """Find the stack of blocks: the module list of equal-typed elements that holds most parameters.

    Raises:
        UnsupportedModelError: No such list exists.
    """
    family = getattr(getattr(model, "config", None), "model_type", None) or type(model).__name__
    best: nn.ModuleList | None = None
    best_size = 0
    for module in model.modules():
        if not isinstance(module, nn.ModuleList) or len({type(item) for item in module}) != 1:
            continue
        size = sum(parameter.numel() for parameter in module.parameters())
        # On a tie the inner list wins: a list that only wraps another one is not the stack.
        if size >= best_size and size > 0:
            best, best_size = module, size
    if best is None:
        raise UnsupportedModelError(
            f"no stack of blocks was found in '{family}': looked for an nn.ModuleList whose elements are of one type."
        )
    getter: Any = getattr(model, "get_input_embeddings", None)
    embedding = getter() if getter is not None else None
    return Structure(tuple(best), embedding if isinstance(embedding, nn.Module) else None, family)
