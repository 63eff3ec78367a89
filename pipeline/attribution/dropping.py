"""Passes without some of an image's patches (METRICS 1): dropped in front of the first block, or hidden from attention.

Positions are embedded before anything goes, so a patch that stays keeps its place; that is how a masked autoencoder
feeds its encoder. Both ways give the same output where the blocks know positions from the embedding alone. A head that
averages patches averages those that stay.

Shapes: N rows, T positions, K positions that stay in each row, D width.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from calig.pipeline.attribution.attention import hidden_keys
from calig.pipeline.attribution.entry import state_name, state_of
from calig.pipeline.attribution.model import ExplainableModel, UnsupportedModelError
from calig.pipeline.errors import InputError


@contextmanager
def dropped_positions(model: ExplainableModel, keep: Tensor) -> Iterator[None]:
    """Within the context, only the positions of `keep` enter the first block.

    Args:
        model: The model; it is as before on exit, also after an exception.
        keep: (N, T) bool, as many true in every row; passes in the context have N rows of T positions.

    Raises:
        InputError: Rows that keep different numbers, or a pass of another shape.
        UnsupportedModelError: A block that runs more than once, or one that expects all positions (BEiT's relative
            positions are a table over all pairs).
    """
    places = _places(keep)
    with _changed(model, places, keep.shape, before=True):
        try:
            yield
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            raise UnsupportedModelError(
                f"the blocks of '{model.structure.family}' do not run on fewer patches than an image has (relative "
                f"positions?): {str(error).splitlines()[0]}. Use the operator 'attention'."
            ) from error


@contextmanager
def hidden_positions(model: ExplainableModel, keep: Tensor) -> Iterator[None]:
    """Within the context, no query sees the positions outside `keep`, and they are gone behind the last block.

    Args:
        model: See `dropped_positions`.
        keep: (N, T) bool, likewise.

    Raises:
        InputError: See `dropped_positions`.
        UnsupportedModelError: The family does not use the attention interface of transformers.
    """
    places = _places(keep)
    with hidden_keys(model.require_interface(), keep), _changed(model, places, keep.shape, before=False):
        yield


def _places(keep: Tensor) -> Tensor:
    """(N, K) the positions that stay."""
    counts = keep.sum(1)
    if len(keep) and bool((counts != counts[0]).any()):
        raise InputError(f"rows of one pass keep as many positions each, got from {counts.min()} to {counts.max()}.")
    return keep.nonzero()[:, 1].view(len(keep), -1)


@contextmanager
def _changed(model: ExplainableModel, places: Tensor, shape: torch.Size, *, before: bool) -> Iterator[None]:
    """Take positions away from what enters the first block, or from what leaves the last one."""
    family = model.structure.family
    block: nn.Module = model.structure.blocks[0 if before else -1]
    calls = 0

    def taken(state: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        if calls > 1:
            raise UnsupportedModelError(f"a block of '{family}' runs more than once, so no patch can be taken away.")
        if state.shape[:2] != shape:
            raise InputError(
                f"positions of shape {tuple(shape)} are to stay, and the pass has {tuple(state.shape[:2])}."
            )
        index = places.to(state.device).unsqueeze(-1).expand(-1, -1, state.shape[-1])
        return state.gather(1, index)

    def enter(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        state = taken(state_of(module.forward, args, kwargs, model.structure))
        if args:
            return (state, *args[1:]), kwargs
        return args, {**kwargs, str(state_name(module.forward, kwargs)): state}

    def leave(_module: nn.Module, _args: Any, output: Any) -> Any:
        if isinstance(output, tuple | list):
            return (taken(output[0]), *output[1:])
        return taken(output)

    def again(_module: nn.Module, _args: Any) -> None:
        nonlocal calls
        calls = 0  # another pass in the same context

    handles = [model.module.register_forward_pre_hook(again)]
    if before:
        handles.append(block.register_forward_pre_hook(enter, with_kwargs=True))
    else:
        handles.append(block.register_forward_hook(leave))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
