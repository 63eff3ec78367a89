"""What training and evaluation measure of a model, by its task, and the loss that calig computes itself.

Shapes: B examples, C classes or labels.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor, nn
from torchmetrics import MeanSquaredError, MetricCollection, PearsonCorrCoef, SpearmanCorrCoef
from torchmetrics.classification import (
    BinaryAccuracy,
    BinaryF1Score,
    MulticlassAccuracy,
    MulticlassF1Score,
    MultilabelExactMatch,
    MultilabelF1Score,
)

from calig.pipeline.tasks import THRESHOLD, Task


class Pearson(PearsonCorrCoef):
    """Pearson's correlation; 0 where one side is constant, as it is of a model that has learned nothing yet.

    A NaN would read as a training that diverged; one that did has a loss that is not finite either.
    """

    def compute(self) -> Tensor:
        """The correlation."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of a variance near 0, which is what the class is for
            return torch.nan_to_num(super().compute())


class Spearman(SpearmanCorrCoef):
    """Spearman's correlation; 0 where one side is constant (see `Pearson`)."""

    def __init__(self) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of its memory: two numbers per text
            super().__init__()

    def compute(self) -> Tensor:
        """The correlation."""
        return torch.nan_to_num(super().compute())


def task_metrics(task: Task, outputs: int, threshold: float = THRESHOLD) -> MetricCollection:
    """The metrics of a task.

    - classification: `accuracy`, `f1` (macro).
    - multi_label: `accuracy` (of whole sets: all labels of a text are right), `f1` (macro), `f1_micro`.
    - regression: `pearson`, `spearman`, `rmse`.

    Args:
        task: The task.
        outputs: C.
        threshold: The probability from which a label of several is predicted.
    """
    if task == "regression":
        return MetricCollection({"pearson": Pearson(), "spearman": Spearman(), "rmse": MeanSquaredError(squared=False)})
    if task == "classification":
        classes = max(2, outputs)
        return MetricCollection(
            {
                "accuracy": MulticlassAccuracy(classes, average="micro"),
                "f1": MulticlassF1Score(classes, average="macro"),
            }
        )
    if outputs == 1:  # torchmetrics' multi-label metrics begin with two
        f1 = {name: BinaryF1Score(threshold) for name in ("f1", "f1_micro")}
        return MetricCollection({"accuracy": BinaryAccuracy(threshold), **f1})
    return MetricCollection(
        {
            "accuracy": MultilabelExactMatch(outputs, threshold=threshold),
            "f1": MultilabelF1Score(outputs, threshold=threshold, average="macro"),
            "f1_micro": MultilabelF1Score(outputs, threshold=threshold, average="micro"),
        }
    )


def measured_pair(task: Task, logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Predictions and targets as the task's metrics take them.

    Args:
        task: The task.
        logits: (B, C).
        labels: (B,) classes or numbers, or (B, C) indicators.
    """
    values = logits.float()
    if task == "regression":
        return values.reshape(-1), labels.float().reshape(-1)
    if task == "multi_label":
        # Probabilities, because torchmetrics takes numbers that happen to lie in [0, 1] for such.
        found, given = values.sigmoid(), labels.long()
        return (found.squeeze(1), given.squeeze(1)) if values.shape[1] == 1 else (found, given)
    return values, labels


def task_loss(task: Task, logits: Tensor, labels: Tensor, weights: Tensor | None, label_smoothing: float) -> Any:
    """The loss where weights or smoothing are asked for; else the model computes its own.

    Args:
        task: `classification` or `multi_label`.
        logits: (B, C).
        labels: (B,) classes, or (B, C) indicators.
        weights: (C,) of the classes in the cross entropy; of the positives of each label in the binary one.
        label_smoothing: Of the cross entropy.
    """
    if task == "multi_label":
        return nn.functional.binary_cross_entropy_with_logits(logits.float(), labels.float(), pos_weight=weights)
    return nn.functional.cross_entropy(logits.float(), labels, weight=weights, label_smoothing=label_smoothing)
