"""Finding a model's blocks and its word embedding by structure, at run time."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from calig.pipeline.attribution.wrapping import UnsupportedModelError, unwrap


@dataclass(frozen=True)
class Structure:
    """Where a transformer's parts are.

    Attributes:
        blocks: The distinct block modules in the order of their first call. A family that shares weights (ALBERT)
            has fewer modules than blocks, each called several times.
        embedding: The word embedding; None where the input is not token ids.
        host: The Hugging Face model that holds the blocks: the model itself, or the one inside a user's own module.
        family: The name used in messages: `config.model_type`, else the class name.
    """

    blocks: tuple[nn.Module, ...]
    embedding: nn.Module | None
    host: PreTrainedModel | None
    family: str

    @property
    def config(self) -> Any:
        """The configuration of the Hugging Face model, None for a plain module."""
        return None if self.host is None else self.host.config


def find_structure(model: nn.Module) -> Structure:
    """Find the stack of blocks: the module list of equal-typed elements that holds most parameters.

    Raises:
        UnsupportedModelError: No such list exists.
    """
    hosts = [module for module in model.modules() if isinstance(module, PreTrainedModel)]
    host = hosts[0] if hosts else None  # the outermost comes first
    family = type(model).__name__ if host is None else host.config.model_type
    best: nn.ModuleList | None = None
    best_size = 0
    for module in model.modules():
        # A block may be compiled on its own.
        if not isinstance(module, nn.ModuleList) or len({type(unwrap(item)) for item in module}) != 1:
            continue
        size = sum(parameter.numel() for parameter in module.parameters())
        # On a tie the inner list wins: a list that only wraps another one is not the stack.
        if size >= best_size and size > 0:
            best, best_size = module, size
    if best is None:
        raise UnsupportedModelError(
            f"no stack of blocks was found in '{family}': looked for an nn.ModuleList whose elements are of one type."
        )
    return Structure(tuple(unwrap(item) for item in best), _word_embedding(model, host), host, family)


def _word_embedding(model: nn.Module, host: PreTrainedModel | None) -> nn.Module | None:
    if host is not None:
        embedding = host.get_input_embeddings()
        return embedding if isinstance(embedding, nn.Module) else None
    # In a plain module the vocabulary is the largest table.
    tables = [module for module in model.modules() if isinstance(module, nn.Embedding)]
    return max(tables, key=lambda table: table.num_embeddings, default=None)
