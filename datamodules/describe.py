"""The labels of a split in words, for the line that a run says of its data."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from calig.pipeline.tasks import Task

_SHOWN = 8


def describe_labels(task: Task, names: Sequence[str], labels: Sequence[Any]) -> list[str]:
    """Classes with their shares, labels with theirs and how many a text has, or the range of a number.

    Args:
        task: What the labels are.
        names: The class or label names, or that of the number.
        labels: As the encoded rows hold them; may be empty.

    Returns:
        One part, or none where nothing is known.

    Example:
        >>> describe_labels("multi_label", ["joy", "love"], [[1.0, 0.0], [1.0, 1.0]])
        ['2 labels (joy 100 %, love 50 %), 1.5 per text']
        >>> describe_labels("regression", ["stars"], [1.0, 4.0])
        ['stars from 1 to 4, mean 2.5']
    """
    if task == "regression":
        name = names[0] if names else "a number"
        if not labels:
            return [name]
        return [f"{name} from {min(labels):g} to {max(labels):g}, mean {sum(labels) / len(labels):.3g}"]
    if task == "multi_label":
        counts = Counter(i for label in labels for i, value in enumerate(label) if value)
        kind = "label" if len(names) == 1 else "labels"
    else:
        counts, kind = Counter(labels), "classes"
    total = len(labels)
    shares = [f"{name} {100 * counts[i] / total:.0f} %" if total else name for i, name in enumerate(names)]
    if not shares:
        return []
    more = f", {len(shares) - _SHOWN} more" if len(shares) > _SHOWN else ""
    text = f"{len(shares)} {kind} ({', '.join(shares[:_SHOWN])}{more})"
    return [text + f", {counts.total() / total:.2g} per text" if task == "multi_label" and total else text]
