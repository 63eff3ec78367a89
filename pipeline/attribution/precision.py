"""Explaining in float32 what is stored in bfloat16 or float16."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


def coarse_types(module: nn.Module) -> set[torch.dtype]:
    """Floating-point types of fewer than 32 bits among a module's parameters."""
    return {parameter.dtype for parameter in module.parameters() if _is_coarse(parameter)}


@contextmanager
def float32_copies(module: nn.Module) -> Iterator[None]:
    """Within the context, coarse parameters and buffers are replaced by float32 copies of themselves.

    The module's own tensors are not touched, only taken out of their slots: what an optimizer, a gradient hook or
    DistributedDataParallel holds on to stays valid, and the very same objects are back afterwards, also after an
    exception. A tied parameter stays tied. Costs 4 bytes per coarse parameter while it lasts.
    """
    copies: dict[int, Tensor] = {}
    replaced: list[tuple[dict[str, Tensor | None], str, Tensor]] = []
    try:
        for part in module.modules():
            for slots in (part._parameters, part._buffers):
                for name, tensor in slots.items():
                    if tensor is None or not _is_coarse(tensor):
                        continue
                    if id(tensor) not in copies:
                        copies[id(tensor)] = _copy(tensor)
                    replaced.append((slots, name, tensor))  # type: ignore[arg-type]
                    slots[name] = copies[id(tensor)]  # type: ignore[assignment]
        yield
    finally:
        for slots, name, original in replaced:
            slots[name] = original


def _copy(tensor: Tensor) -> Tensor:
    copy = tensor.detach().float()
    return nn.Parameter(copy, requires_grad=tensor.requires_grad) if isinstance(tensor, nn.Parameter) else copy


def _is_coarse(tensor: Tensor) -> bool:
    return tensor.is_floating_point() and tensor.element_size() < 4
