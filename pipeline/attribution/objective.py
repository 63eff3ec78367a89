"""What is explained: a callable from a model's output to one scalar per row."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, cast

import torch
from torch import Tensor

from calig.pipeline.errors import InputError


class Objective(Protocol):
    """A scalar per row of a model's output."""

    @property
    def target(self) -> Tensor:
        """(B,) index of what is explained in each example."""
        ...

    def __call__(self, output: Any, rows: Tensor) -> Tensor:
        """Read the objective.

        Args:
            output: What the model's forward returned for N rows.
            rows: (N,) the example that each row stems from (a path puts many nodes of one example into a batch).

        Returns:
            (N,) in the graph of `output`.
        """
        ...


@dataclass(frozen=True)
class ClassLogit:
    """The logit of a class; a model with one output (regression) has class 0 only.

    Attributes:
        target: (B,) class index per example; fixed for the baseline, every node and every perturbed input.
    """

    target: Tensor

    def __call__(self, output: Any, rows: Tensor) -> Tensor:
        """Read the logit of each row's class; see `Objective`."""
        logits = logits_of(output)
        return logits.gather(1, self.target.to(logits.device)[rows, None]).squeeze(1)


@dataclass(frozen=True)
class OutputFunction:
    """An objective made from any callable on the model's output; its `target` is 0 for every example.

    Attributes:
        function: Maps the output for N rows to (N,).
        target: (B,) zeros.
    """

    function: Callable[[Any], Tensor]
    target: Tensor

    def __call__(self, output: Any, rows: Tensor) -> Tensor:
        """Apply the function; see `Objective`."""
        value = self.function(output)
        if value.shape != rows.shape:
            raise InputError(
                f"the objective returned shape {tuple(value.shape)}; expected one scalar per row, {len(rows)}."
            )
        return value


def as_objective(objective: Objective | Callable[[Any], Tensor], batch: int) -> Objective:
    """Take an `Objective` as it is, and wrap a plain callable."""
    if hasattr(objective, "target"):
        return cast(Objective, objective)
    return OutputFunction(objective, torch.zeros(batch, dtype=torch.long))


def logits_of(output: Any) -> Tensor:
    """The (N, C) logits in what a model returned: a tensor, an output object or mapping with `logits`, or a tuple."""
    if isinstance(output, Tensor):
        logits = output
    elif isinstance(output, Mapping) and "logits" in output:
        logits = output["logits"]
    elif hasattr(output, "logits"):
        logits = output.logits
    elif isinstance(output, tuple) and output and isinstance(output[0], Tensor):
        logits = output[0]
    else:
        raise InputError(f"the model returned {type(output).__name__}; expected a tensor or an output with `logits`.")
    if logits.ndim != 2:
        raise InputError(f"the model's logits have shape {tuple(logits.shape)}; expected (batch, classes).")
    return logits


def resolve_target(target: Any, logits: Tensor, labels: Tensor | None) -> Tensor:
    """Turn a target as the user gives it into class indices.

    Args:
        target: None or "predicted", "label", a class index, or indices of shape (B,) or (B, K).
        logits: (B, C) at the input.
        labels: (B,) labels of the batch, where it has any.

    Returns:
        (B,) or (B, K) long, on the device of `logits`.

    Raises:
        InputError: A name that does not exist, a shape that does not fit, or an index without a class.
    """
    batch, classes = logits.shape
    if target is None or (isinstance(target, str) and target == "predicted"):
        return logits.argmax(dim=1)
    if isinstance(target, str):
        if target != "label":
            raise InputError(f"target takes 'predicted', 'label' or class indices, got '{target}'.")
        if labels is None:
            raise InputError("target='label' needs `labels` in the batch; give class indices or 'predicted'.")
        target = labels
    indices = torch.as_tensor(target, device=logits.device)
    if indices.is_floating_point() or indices.dtype == torch.bool:
        raise InputError(f"target takes integer class indices, got {indices.dtype}.")
    if indices.ndim == 0:
        indices = indices.expand(batch)
    if indices.ndim > 2 or indices.shape[0] != batch:
        raise InputError(f"target has shape {tuple(indices.shape)}; expected ({batch},) or ({batch}, K).")
    if indices.numel() and (indices.min() < 0 or indices.max() >= classes):
        raise InputError(f"target {indices.tolist()} names a class that is not there; the model has {classes} classes.")
    # A clone, because labels made under inference mode cannot be saved for a backward pass.
    return indices.long().clone()
