"""Finding a model's blocks and its word embedding by structure, at run time, or where the user says they are."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from calig.pipeline.attribution.wrapping import UnsupportedModelError, unwrap
from calig.pipeline.errors import InputError

Blocks = str | Sequence[nn.Module]
"""Where the blocks are: the dotted path of a container of them, or the modules themselves in order."""


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


def find_structure(
    model: nn.Module, *, blocks: Blocks | None = None, embedding: str | nn.Module | None = None
) -> Structure:
    """Find the stack of blocks: the module list of equal-typed elements that holds most parameters.

    Args:
        model: Unwrapped.
        blocks: Where the blocks are, if the user says so: the dotted path of an `nn.ModuleList`, `nn.Sequential` or the
            like inside the model, or the block modules in order.
        embedding: The word embedding, if the user says so: its dotted path, or the module.

    Raises:
        UnsupportedModelError: No such list exists, or the model is an encoder-decoder.
        InputError: `blocks` or `embedding` name nothing inside the model.
    """
    found = _largest_stack(model) if blocks is None else _named_blocks(model, blocks)
    # A user's module may hold several models: the one that counts is the outermost around the blocks.
    host = next((one for one in _hosts(model) if any(part is found[0] for part in one.modules())), None)
    family = _family(model, host)
    if blocks is None and getattr(getattr(host, "config", None), "is_encoder_decoder", False):
        raise UnsupportedModelError(
            f"'{family}' is an encoder-decoder: its input reaches the output through two stacks of blocks, so no layer "
            "of either holds all of the decision. Put a classification head on its encoder alone and explain that."
        )
    table = _word_embedding(model, host) if embedding is None else _named_embedding(model, embedding)
    return Structure(found, table, host, family)


def candidates(model: nn.Module) -> str:
    """The containers of a model that could be a stack of blocks, spelled for a message."""
    names = [
        f"'{name}' ({len(module)} x {type(module[0]).__name__})"
        for name, module in model.named_modules()
        if name and isinstance(module, nn.ModuleList | nn.Sequential) and _of_one_type(module)
    ]
    return ", ".join(names) or "none"


def _hosts(model: nn.Module) -> list[PreTrainedModel]:
    return [module for module in model.modules() if isinstance(module, PreTrainedModel)]


def _family(model: nn.Module, host: PreTrainedModel | None) -> str:
    return type(model).__name__ if host is None else host.config.model_type


def _of_one_type(modules: Iterable[nn.Module]) -> bool:
    # A block may be compiled on its own.
    return len({type(unwrap(item)) for item in modules}) == 1


def _largest_stack(model: nn.Module) -> tuple[nn.Module, ...]:
    best: nn.ModuleList | None = None
    best_size = 0
    for module in model.modules():
        if not isinstance(module, nn.ModuleList) or not _of_one_type(module):
            continue
        size = sum(parameter.numel() for parameter in module.parameters())
        # On a tie the inner list wins: a list that only wraps another one is not the stack.
        if size >= best_size and size > 0:
            best, best_size = module, size
    if best is None:
        raise UnsupportedModelError(
            f"no stack of blocks was found in '{_family(model, next(iter(_hosts(model)), None))}': looked for an "
            "nn.ModuleList whose elements are of one type. Name it with `blocks=`, the dotted path of a container or a "
            f"list of modules; containers in this model: {candidates(model)}."
        )
    return tuple(unwrap(item) for item in best)


def _named_blocks(model: nn.Module, blocks: Blocks) -> tuple[nn.Module, ...]:
    if isinstance(blocks, str):
        container = _submodule(model, blocks)
        found = [] if container is None else list(container.children())
        if not isinstance(container, nn.ModuleList | nn.Sequential | nn.ModuleDict) or not found:
            what = "does not exist in" if container is None else f"is a {type(container).__name__}, no container, in"
            raise InputError(
                f"blocks='{blocks}' {what} '{type(model).__name__}'; containers of blocks there: {candidates(model)}."
            )
    else:
        found = list(blocks)
        inside = {id(module) for module in model.modules()}
        wrong = [type(item).__name__ for item in found if id(item) not in inside]
        if wrong or not found:
            raise InputError(
                f"blocks takes modules inside '{type(model).__name__}', got {', '.join(wrong) or 'none'}; containers "
                f"of blocks there: {candidates(model)}."
            )
    return tuple(unwrap(item) for item in found)


def _named_embedding(model: nn.Module, embedding: str | nn.Module) -> nn.Module:
    found = _submodule(model, embedding) if isinstance(embedding, str) else embedding
    if found is None or all(module is not found for module in model.modules()):
        tables = [repr(name) for name, module in model.named_modules() if isinstance(module, nn.Embedding)]
        given = repr(embedding) if isinstance(embedding, str) else type(embedding).__name__
        raise InputError(
            f"embedding={given} does not exist in '{type(model).__name__}'; embeddings there: "
            f"{', '.join(tables) or 'none'}."
        )
    return found


def _submodule(model: nn.Module, path: str) -> nn.Module | None:
    try:
        return unwrap(model.get_submodule(path))
    except AttributeError:
        return None


def embedding_tables(model: nn.Module, embedding: nn.Module) -> list[nn.Module]:
    """The word embedding, and the modules that look up the same table: T5 has one for each of its stacks."""
    weight = getattr(embedding, "weight", None)
    return [
        part
        for part in model.modules()
        if part is embedding or (isinstance(part, nn.Embedding) and part.weight is weight)
    ]


def _word_embedding(model: nn.Module, host: PreTrainedModel | None) -> nn.Module | None:
    if host is not None:
        try:
            embedding = host.get_input_embeddings()
        except NotImplementedError:  # families without a word table (CANINE hashes characters)
            return None
        return embedding if isinstance(embedding, nn.Module) else None
    # In a plain module the vocabulary is the largest table.
    tables = [module for module in model.modules() if isinstance(module, nn.Embedding)]
    return max(tables, key=lambda table: table.num_embeddings, default=None)
