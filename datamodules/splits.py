"""Splits that the source does not have, cut from its training rows; limits; what train and test share."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from typing import Protocol, TypeVar

from calig.pipeline.errors import InputError

SPLITS = ("train", "val", "test")


class Example(Protocol):
    """An example of any kind."""

    @property
    def content(self) -> str | bytes:
        """What makes two examples equal."""


AnyExample = TypeVar("AnyExample", bound=Example)


def cut_missing(
    splits: Mapping[str, list[AnyExample]], val_fraction: float, test_fraction: float, seed: int
) -> dict[str, list[AnyExample]]:
    """Cut the splits that are not there from ``train``: a seeded draw of rows, each part in row order.

    Rows of equal content end in the same part, or a model would be tested on what it was trained on. A fraction counts
    rows of the whole training split; 0 leaves the split out.

    Raises:
        InputError: A fraction is no share, or the training split is too small.
    """
    fractions = {"test": test_fraction, "val": val_fraction}
    missing = {split: fraction for split, fraction in fractions.items() if split not in splits and fraction}
    for split, fraction in missing.items():
        if not 0 <= fraction < 1:
            raise InputError(f"data.{split}_fraction={fraction} is not a share of the training rows: 0 <= share < 1.")
    train = splits["train"]
    groups: dict[str | bytes, list[int]] = {}
    for row, example in enumerate(train):
        groups.setdefault(example.content, []).append(row)
    members = list(groups.values())
    room = {split: max(1, round(fraction * len(train))) for split, fraction in missing.items()}
    parts: dict[str, list[int]] = {split: [] for split in (*missing, "train")}
    for index in _shuffled(len(members), f"{seed}/cut"):
        group = members[index]
        part = next((split for split, left in room.items() if len(group) <= left), "train")
        parts[part] += group
        if part != "train":
            room[part] -= len(group)
    if not all(parts.values()):
        different = (
            "" if len(members) == len(train) else f" ({len(members)} different ones, whose copies stay together)"
        )
        raise InputError(
            f"the training split has {len(train)} rows{different}: too few to cut "
            f"{' and '.join(missing) or 'anything'} from it. "
            "Give the splits as files, or lower data.val_fraction and data.test_fraction."
        )
    return dict(splits) | {part: [train[row] for row in sorted(rows)] for part, rows in parts.items()}


def limit(examples: list[AnyExample], count: int | None, key: str, seed: str) -> list[AnyExample]:
    """A seeded random subset in row order; a smaller ``count`` gives a part of the larger one's rows."""
    if count is None or count >= len(examples):
        return examples
    if count < 1:
        raise InputError(f"{key}={count} leaves nothing: expected 1 or more, or null for all rows.")
    return [examples[row] for row in sorted(_shuffled(len(examples), seed)[:count])]


def shared_examples(splits: Mapping[str, Sequence[Example]], noun: str) -> list[str]:
    """Remarks on examples of val and test that train has too."""
    seen = {example.content for example in splits.get("train", ())}
    remarks = []
    for split in SPLITS[1:]:
        shared = sum(example.content in seen for example in splits.get(split, ()))
        if shared:
            remarks.append(f"{shared:,} of the {len(splits[split]):,} {split} {noun}s are in train too")
    return remarks


def _shuffled(count: int, seed: str) -> list[int]:
    order = list(range(count))
    random.Random(seed).shuffle(order)
    return order
