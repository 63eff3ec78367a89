"""What enters the first block: looked at by passes that end there, so that layouts need no table.

Shapes: N rows, T tokens, D width; C channels, height H and width W of images.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from calig.pipeline.attribution.structure import Structure
from calig.pipeline.attribution.wrapping import UnsupportedModelError


class _ArrivedError(Exception):
    """Ends a pass at the first block."""


def state_name(forward: Callable[..., Any], kwargs: Mapping[str, Any]) -> str | None:
    """The keyword that holds the states in a call without positional arguments: the block's first parameter."""
    first = next(iter(inspect.signature(forward).parameters), None)
    return next((name for name in (first, "hidden_states") if name in kwargs), None)


def state_of(
    forward: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any], structure: Structure
) -> Tensor:
    """The states that a block was called with.

    Raises:
        UnsupportedModelError: They are not one tensor with tokens and a width.
    """
    name = state_name(forward, kwargs)
    entry = args[0] if args else None if name is None else kwargs[name]
    if not isinstance(entry, Tensor) or entry.ndim != 3:
        found = f"shape {tuple(entry.shape)}" if isinstance(entry, Tensor) else type(entry).__name__
        raise UnsupportedModelError(
            f"the blocks of '{structure.family}' ({type(structure.blocks[0]).__name__}) do not take a (batch, tokens, "
            f"width) tensor as their first argument, but {found}. Looked at the nn.ModuleList with most parameters; "
            "name the blocks with `blocks=` if they are others."
        )
    return entry


@torch.no_grad()
def entry_of(module: nn.Module, structure: Structure, batch: Mapping[str, Any]) -> Tensor:
    """What the first block would take in a pass, in the block's own layout; the blocks are not run.

    Raises:
        UnsupportedModelError: No block is called, or not with one tensor.
    """
    arrived: list[Tensor] = []

    def stop(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        arrived.append(state_of(block.forward, args, kwargs, structure))
        raise _ArrivedError

    handles = [block.register_forward_pre_hook(stop, with_kwargs=True) for block in dict.fromkeys(structure.blocks)]
    try:
        module(**batch)
    except _ArrivedError:
        return arrived[0]
    finally:
        for handle in handles:
            handle.remove()
    raise UnsupportedModelError(
        f"no block of '{structure.family}' ({type(structure.blocks[0]).__name__}) runs in its forward pass; name the "
        "blocks that do with `blocks=`."
    )


def fixed_positions(entry: Callable[[Tensor], Tensor], pixels: Tensor, family: str) -> Tensor:
    """Positions whose embedding does not depend on the image: [CLS], distillation and register tokens.

    Args:
        entry: Maps pixels (1, C, H, W) to what enters the blocks, (1, T, D).
        pixels: (1, C, H, W) an image, for its shape.
        family: Names the model in messages.

    Returns:
        (T,) true where two images of noise are embedded alike.

    Raises:
        UnsupportedModelError: The embedding is random, or no position depends on the image.
    """
    generator = torch.Generator().manual_seed(0)  # the caller's random state stays as it is
    one, two = (torch.randn(pixels.shape, generator=generator).to(pixels) for _ in range(2))
    here, again, there = entry(one), entry(one), entry(two)
    slack = 1e-5 * float(here.abs().max())
    if here.shape != again.shape or float((here - again).abs().max()) > slack:
        raise UnsupportedModelError(
            f"'{family}' embeds the same image differently each time (random masking?), so its patches cannot be told "
            "apart. Switch masking off (for a masked autoencoder `mask_ratio=0` and a `noise` that keeps the order, or "
            "its weights in a plain ViT)."
        )
    fixed = ((here - there).abs().amax(dim=-1) <= slack)[0]
    if fixed.all():
        raise UnsupportedModelError(f"the pixels do not reach the blocks of '{family}'; are the blocks the right ones?")
    return fixed
