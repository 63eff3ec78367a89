"""What the metrics read off perturbed inputs: the explained class's logit and log-probability, and the prediction.

Shapes: B examples, T positions, R requests, U distinct inputs, C classes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from calig.pipeline.attribution.windows import Windows
from calig.pipeline.errors import InputError
from calig.pipeline.metrics.perturbation import TOKEN_BUDGET, Forward, Request, distinct_logits

if TYPE_CHECKING:
    from calig.pipeline.metrics.patches import Perturber

SPACES = ("probability", "logit")
Scale = Literal["softmax", "sigmoid"]


@dataclass(frozen=True)
class Readings:
    """What is read off each of R requests; all that stays of the logits of C classes.

    Attributes:
        logit: (R,) float64, of the explained class.
        log_probability: (R,) float64, of the explained class, from log-softmax or log-sigmoid.
        predicted: (R,) int64, the class with the largest logit, or of a label by itself 1 where it is predicted, else
            0; -1 where the logits are not finite.
    """

    logit: Tensor
    log_probability: Tensor
    predicted: Tensor

    def __getitem__(self, index: Tensor) -> Readings:
        """The readings of the requests ``index``, in its shape."""
        return Readings(self.logit[index], self.log_probability[index], self.predicted[index])

    def value(self, space: str) -> Tensor:
        """The explained class on `probability` or `logit`."""
        return self.log_probability.exp() if space == "probability" else self.logit

    def correct(self, reference: Tensor) -> Tensor:
        """1 where the prediction is ``reference``, else 0; NaN where the logits are not finite."""
        equal = (self.predicted == reference).double()
        return equal.masked_fill(self.predicted < 0, float("nan"))


def read_requests(
    forward: Forward,
    batch: Mapping[str, Tensor],
    requests: Sequence[Request],
    *,
    target: Tensor,
    labels: Tensor | None = None,
    tokens: Perturber,
    special: Tensor,
    mask: Tensor,
    token_budget: int = TOKEN_BUDGET,
    compared: bool = False,
    scale: Scale = "softmax",
    threshold: float = 0.5,
    windows: Windows | None = None,
) -> Readings:
    """Run requests through the planner and read the explained class.

    Args:
        forward: See `perturbed_logits`.
        batch: (B, T) tensors.
        requests: R requests.
        target: (B,) the explained class.
        labels: (B,) labels, checked against the number of classes.
        tokens: The ids that perturbed texts are built with.
        special: (B, T) bool, special tokens.
        mask: (B, T) bool, real positions.
        token_budget: See `perturbed_logits`.
        windows: See `perturbed_logits`.
        compared: Whether probabilities or predictions are wanted, which a softmax over one output has none of.
        scale: What makes probabilities of logits.
        threshold: Of `sigmoid`: the probability from which a label is predicted.

    Raises:
        InputError: One output where classes are compared. A target or a label is not a class.
    """
    logits, row = distinct_logits(
        forward, batch, requests, tokens=tokens, special=special, mask=mask, token_budget=token_budget, windows=windows
    )
    if compared and logits.shape[1] == 1 and scale == "softmax":
        raise InputError(
            "the model has one output, whose softmax is always 1, so its probability and its prediction never change. "
            "Take spaces=('logit',) and metrics without an accuracy."
        )
    examples = torch.tensor([request.example for request in requests])
    known = {"targets": (target, logits.shape[1]), "labels": (labels, logits.shape[1] if scale == "softmax" else 2)}
    for name, (classes, count) in known.items():
        if classes is None:
            continue
        used = classes.cpu()[examples.unique()]
        if bool(((used < 0) | (used >= count)).any()):
            raise InputError(f"{name} {used.tolist()} must be classes from 0 to {count - 1}.")
    finite = logits.isfinite().all(1)
    if scale == "sigmoid":
        logit = logits[row, target.cpu().long()[examples]].double()
        predicted = (logit.sigmoid() >= threshold).long().masked_fill(~finite[row], -1)
        return Readings(logit, torch.nn.functional.logsigmoid(logit), predicted)
    log_sum = torch.cat([part.double().logsumexp(1) for part in logits.split(4096)])
    predicted = logits.argmax(1).masked_fill(~finite, -1)
    logit = logits[row, target.cpu().long()[examples]].double()
    return Readings(logit, logit - log_sum[row], predicted[row])
