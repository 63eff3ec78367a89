"""What is explained: a callable from a model's output to one scalar per row."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Protocol, cast

import torch
from torch import Tensor

from calig.pipeline.errors import InputError

if TYPE_CHECKING:
    from calig.pipeline.attribution.model import Inputs


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


class Unbound(Protocol):
    """An objective as the user writes it, which has to see the batch to become one scalar per row."""

    def bind(self, inputs: Inputs) -> Objective:
        """Make the objective of a batch; raises InputError where it does not fit."""
        ...


@dataclass(frozen=True)
class BoundObjective:
    """An objective that has seen its batch.

    Attributes:
        read: Maps the output for N rows, and the example of each row (N,), to (N,).
        target: (B,) index of what is explained in each example.
    """

    read: Callable[[Any, Tensor], Tensor]
    target: Tensor

    def __call__(self, output: Any, rows: Tensor) -> Tensor:
        """Read it; see `Objective`."""
        return self.read(output, rows)


@dataclass(frozen=True)
class ClassLogit:
    """The logit of a class, or its log-probability; a model with one output (regression) has class 0 only.

    Attributes:
        target: (B,) class index per example; fixed for the baseline, every node and every perturbed input.
        log_prob: Take the log-probability, which the other classes have a part in.
    """

    target: Tensor
    log_prob: bool = False

    def __call__(self, output: Any, rows: Tensor) -> Tensor:
        """Read the logit of each row's class; see `Objective`."""
        logits = logits_of(output)
        return pick(logits.log_softmax(dim=1) if self.log_prob else logits, self.target, rows, "class")

    def bind(self, inputs: Inputs) -> ClassLogit:
        """See `Unbound`."""
        return replace(self, target=per_example(self.target, len(inputs), "target"))


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


def as_objective(objective: Objective | Unbound | Callable[[Any], Tensor], inputs: Inputs) -> Objective:
    """Make the objective of a batch: bind what asks for it, wrap a plain callable.

    Raises:
        InputError: The objective does not fit the batch.
    """
    if hasattr(objective, "bind"):
        return objective.bind(inputs)
    if hasattr(objective, "target"):
        return cast(Objective, objective)
    return OutputFunction(cast(Callable[[Any], Tensor], objective), torch.zeros(len(inputs), dtype=torch.long))


def per_example(value: Any, batch: int, name: str) -> Tensor:
    """Turn one index for all examples, or one per example, into (B,) long on the host.

    Raises:
        InputError: Not integers, or of another shape.
    """
    indices = torch.as_tensor(value).detach().cpu()
    if indices.is_floating_point() or indices.dtype == torch.bool:
        raise InputError(f"{name} takes integers, got {indices.dtype}.")
    if indices.shape not in ((), (batch,)):
        raise InputError(f"{name} has shape {tuple(indices.shape)}; expected one integer, or ({batch},).")
    # A clone, because what is made under inference mode cannot be saved for a backward pass.
    return indices.long().expand(batch).clone()


def pick(values: Tensor, index: Tensor, rows: Tensor, what: str) -> Tensor:
    """Each row's own column (N,) of values (N, C), by the index (B,) of its example.

    Raises:
        InputError: An index without a column.
    """
    size = values.shape[1]
    if bool(((index < 0) | (index >= size)).any()):
        raise InputError(f"{index.tolist()} names a {what} that is not there; the model has {size}, counted from 0.")
    return values.gather(1, index.to(values.device)[rows, None]).squeeze(1)


def raw_logits(output: Any) -> Tensor:
    """The logits in what a model returned: a tensor, an output object or mapping with `logits`, or a tuple."""
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
    return logits


def logits_of(output: Any) -> Tensor:
    """The (N, C) logits of a classifier; see `raw_logits`."""
    logits = raw_logits(output)
    if logits.ndim != 2:
        hint = " A language model is explained by objective=NextToken(token_ids)." if logits.ndim == 3 else ""
        raise InputError(f"the model's logits have shape {tuple(logits.shape)}; expected (batch, classes).{hint}")
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
