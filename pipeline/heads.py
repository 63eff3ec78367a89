"""How the outputs of a model are read: as one class, as any number of labels, as a number.

Shapes: B examples, C outputs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from calig.pipeline.attribution.objective import resolve_target
from calig.pipeline.errors import InputError
from calig.pipeline.tasks import PROBLEM_TYPES, THRESHOLD, Task, threshold_of


@dataclass(frozen=True)
class Head:
    """The head of a model.

    Attributes:
        task: What its outputs are.
        threshold: The probability from which a label of several is predicted.
    """

    task: Task = "classification"
    threshold: float = THRESHOLD

    @classmethod
    def of(cls, model: nn.Module, outputs: int) -> Head:
        """Read it off the model's Hugging Face config; one output without any word is a regression.

        Args:
            model: The model.
            outputs: C.
        """
        config = getattr(model, "config", None)
        problem = getattr(config, "problem_type", None)
        if problem == PROBLEM_TYPES["multi_label"]:
            return cls("multi_label", threshold_of(config))
        # transformers notes a problem type by itself, from the labels that a forward pass meets.
        return cls("regression") if outputs == 1 else cls()

    def values(self, logits: Tensor) -> Tensor:
        """What faithfulness is measured on, of (..., C) logits: probabilities, or the outputs of a regression."""
        if self.task == "regression":
            return logits
        return logits.sigmoid() if self.task == "multi_label" else logits.softmax(-1)

    def predicted(self, logits: Tensor) -> list[list[int]]:
        """The labels of each example whose probability reaches the threshold, of (B, C) logits."""
        return [_indices(row) for row in logits.sigmoid() >= self.threshold]

    def targets(self, wanted: Any, logits: Tensor, labels: Tensor | None) -> list[list[int]]:
        """The outputs to explain, one or more for each example.

        Of several labels, each that is predicted (or given), the most probable first; the most probable label where
        there is none, so that every example has an explanation. Of a class the class, of a regression its output.

        Args:
            wanted: None, "predicted", "label", or indices as `resolve_target` takes them.
            logits: (B, C).
            labels: (B,) classes or numbers, or (B, C) indicators, where there are any.

        Raises:
            InputError: As `resolve_target`.
        """
        if self.task == "classification" or not (wanted is None or isinstance(wanted, str)):
            found = resolve_target(wanted, logits, labels)
            return found.unsqueeze(1).tolist() if found.ndim == 1 else found.tolist()
        if wanted == "label" and labels is None:
            raise InputError("target='label' needs `labels` in the batch; give indices or 'predicted'.")
        if wanted not in (None, "predicted", "label"):
            raise InputError(f"target takes 'predicted', 'label' or indices, got '{wanted}'.")
        if self.task == "regression":
            return [[0] for _ in logits]
        chosen = self.predicted(logits)
        if wanted == "label":
            assert labels is not None  # checked above
            if labels.shape != logits.shape:
                raise InputError(
                    f"labels have the shape {tuple(labels.shape)}; a model of several labels has one indicator for "
                    f"each, {tuple(logits.shape)}."
                )
            chosen = [_indices(row > 0) for row in labels]
        order = [
            {label: place for place, label in enumerate(row)} for row in logits.argsort(1, descending=True).tolist()
        ]
        return [
            sorted(some, key=places.__getitem__) or [min(places, key=places.__getitem__)]
            for some, places in zip(chosen, order, strict=True)
        ]

    def label_facts(self, logits: Tensor, label: Tensor | None) -> dict[str, Any]:
        """The columns of an explanation row that say what was predicted and what is true, of one example.

        Args:
            logits: (C,) on the host.
            label: (), or (C,) indicators; None where it is not known.
        """
        largest = int(logits.argmax())
        if self.task == "classification":
            known = label is not None and label.ndim == 0 and not label.is_floating_point()
            return {"prediction": largest, "label": int(label) if known and label is not None else None}
        facts: dict[str, Any] = {"prediction": largest, "label": None}
        if self.task == "regression":
            number = label is not None and label.numel() == 1
            return facts | {
                "value": float(logits[0]),
                "label_value": float(label) if number and label is not None else None,
            }
        given = label is not None and label.shape == logits.shape
        return facts | {
            "predictions": self.predicted(logits[None])[0],
            "labels": _indices(label > 0) if given and label is not None else None,
        }

    @property
    def scale(self) -> Literal["softmax", "sigmoid"] | None:
        """What makes probabilities of logits; None where there are none."""
        return {"classification": "softmax", "multi_label": "sigmoid"}.get(self.task)  # type: ignore[return-value]


def _indices(flags: Tensor) -> list[int]:
    return torch.nonzero(flags).flatten().tolist()
