"""The names of the metrics that a configuration chooses. Loads nothing, so that it can be checked without torch."""

from __future__ import annotations

from typing import Literal, get_args

FaithfulnessMetric = Literal[
    "comprehensiveness",
    "sufficiency",
    "log_odds",
    "deletion_auc",
    "insertion_auc",
    "positive_auc",
    "negative_auc",
    "infidelity",
]
FAITHFULNESS_METRICS: tuple[FaithfulnessMetric, ...] = get_args(FaithfulnessMetric)
DEFAULT_METRICS: tuple[FaithfulnessMetric, ...] = ("comprehensiveness", "sufficiency", "log_odds")

OF_ONE_OUTPUT: tuple[FaithfulnessMetric, ...] = (
    "comprehensiveness",
    "sufficiency",
    "deletion_auc",
    "insertion_auc",
    "infidelity",
)
"""Metrics that a model of one output has: those of its logit."""

REPEATED_METRICS = ("sensitivity_max", "randomisation")
"""Metrics that explain each sample again, many times."""

METRICS: tuple[str, ...] = (*FAITHFULNESS_METRICS, *REPEATED_METRICS)
"""What `explain.metrics` may name; metrics that cost next to nothing are always measured."""

PerturbationTarget = Literal["prediction", "label"]
PERTURBATION_TARGETS: tuple[PerturbationTarget, ...] = get_args(PerturbationTarget)

IMAGE_NAMES = {"mean": "mask", "drop": "delete"}
"""Of images two operators have a second name, which says what happens to a patch; rows and keys have the first."""


def operator_name(operator: str) -> str:
    """The name that rows and keys have for an operator, whichever of its names is given.

    Example:
        >>> operator_name("mean"), operator_name("blur")
        ('mask', 'blur')
    """
    return IMAGE_NAMES.get(operator, operator)
