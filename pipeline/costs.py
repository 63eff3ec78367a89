"""What an attribution costs: seconds, passes through the model, and the peak of memory.

A pass is counted by its linear maps, so that a pass through half of the blocks is half a pass.
"""

from __future__ import annotations

import ctypes
import functools
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from calig.pipeline.attribution import ExplainableModel

COSTS = ("seconds", "passes", "peak_memory")
"""What `explain` measures of a method, as metrics of a sample."""


@dataclass
class Cost:
    """What something cost.

    Attributes:
        seconds: On the wall.
        work: Vectors that went through a linear map of a block, forward or backward, times its size.
        peak_memory: MiB at most, beyond what was held before; None where the device does not count it.
    """

    seconds: float = 0.0
    work: int = 0
    peak_memory: float | None = None


@contextmanager
def measured(model: ExplainableModel, *, seconds_alone: bool = False) -> Iterator[Cost]:
    """Measure what runs inside.

    Args:
        model: Whose linear maps are watched. Matrix products beside them (of attention, of closed forms) do not count.
        seconds_alone: Leave the rest out, and torch's memory counter alone.

    Yields:
        The cost, complete when the context ends.
    """
    cost = Cost()
    with ExitStack() as stack:
        before, peak = (None, None) if seconds_alone else _watch_memory(model.device)
        if not seconds_alone:
            for module in _linear_maps(model):
                stack.callback(module.register_forward_hook(functools.partial(_count, cost)).remove)
        start = time.perf_counter()
        yield cost
        cost.seconds = time.perf_counter() - start
        if before is not None and peak is not None:
            cost.peak_memory = max(0.0, (peak() - before) / 2**20)


def _linear_maps(model: ExplainableModel) -> list[nn.Module]:
    """The modules of the blocks that have a matrix, once each; GPT-2's are not `nn.Linear`."""
    parts = dict.fromkeys(part for block in model.structure.blocks for part in block.modules())
    return [part for part in parts if isinstance(weight := getattr(part, "weight", None), Tensor) and weight.ndim == 2]


def _count(cost: Cost, module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
    work = output.numel() // output.shape[-1] * module.weight.numel()  # type: ignore[operator]
    cost.work += work

    def backward(_: Tensor) -> None:
        cost.work += work

    if output.requires_grad:
        output.register_hook(backward)


def _watch_memory(device: torch.device) -> tuple[int | None, Callable[[], int] | None]:
    """Bytes held now, and what tells the most that were held since."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.memory_allocated(device), functools.partial(torch.cuda.max_memory_allocated, device)
    if device.type != "cpu" or sys.platform != "linux":
        return None, None
    try:
        # What is freed stays with the process: handed back first, or the next one to need it would cost nothing.
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts from what is held now
    except (OSError, AttributeError):
        return None, None
    return _resident("VmRSS"), functools.partial(_resident, "VmHWM")


def _resident(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))
