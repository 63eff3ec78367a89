"""What a model said of a text and what is true, in words: a class, any number of labels, or a number."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Decision:
    """The decision that an explanation is of.

    Attributes:
        target: The output that is explained.
        prediction: The largest output.
        probability: Of the target; None for a regression.
        label: The true class, where known.
        predictions: The labels that are predicted, where a text may have several.
        labels: The labels that are given, where a text may have several and they are known.
        value: The output of a regression.
        label_value: The true number, where known.
    """

    target: int
    prediction: int
    probability: float | None = None
    label: int | None = None
    predictions: Sequence[int] | None = None
    labels: Sequence[int] | None = None
    value: float | None = None
    label_value: float | None = None

    @classmethod
    def of(cls, row: Mapping[str, Any]) -> Decision:
        """Of an explanation row, or of what has the same names."""
        names = ("target", "prediction", "probability", "label", "predictions", "labels", "value", "label_value")
        return cls(**{name: row[name] for name in names if name in row})

    @property
    def right(self) -> bool | None:
        """Whether the prediction is true, of several labels all of them; None where nobody knows, or of a number."""
        if self.predictions is not None:
            return None if self.labels is None else set(self.labels) == set(self.predictions)
        if self.value is not None or self.label is None or self.label < 0:
            return None
        return self.label == self.prediction

    @property
    def plain(self) -> bool:
        """Whether this is one class of several."""
        return self.predictions is None and self.value is None

    def explained(self, names: Sequence[str]) -> str:
        """What is explained, with its probability or as a number."""
        number = self.value if self.probability is None else self.probability
        return class_name(self.target, names) + ("" if number is None else f" {number:.3f}")

    def parts(self, names: Sequence[str]) -> list[str]:
        """What is explained, what was predicted where that says more, and what is true.

        Example:
            >>> Decision(1, 1, 0.9, predictions=[1], labels=[0, 1]).parts(["joy", "love"])
            ['love 0.900', 'predicted love', 'labels joy, love']
        """
        found = [self.explained(names)]
        if self.predictions is not None:
            found.append(f"predicted {_listed(self.predictions, names)}")
            return found if self.labels is None else [*found, f"labels {_listed(self.labels, names)}"]
        if self.value is not None:
            return found if self.label_value is None else [*found, f"label {self.label_value:.3f}"]
        if self.target != self.prediction:
            found.append(f"predicted {class_name(self.prediction, names)}")
        if self.label is not None and self.label >= 0:
            found.append(f"label {class_name(self.label, names)}")
        return found


def class_name(index: int, names: Sequence[str]) -> str:
    """The name of an output, or its number."""
    return names[index] if 0 <= index < len(names) else f"class {index}"


def _listed(indices: Sequence[int], names: Sequence[str]) -> str:
    return ", ".join(class_name(index, names) for index in indices) or "none"
