"""What a batch says of its samples, beside what the methods say."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor


@dataclass(frozen=True)
class BatchFacts:
    """What is known of a batch beside its attributions, on the host.

    Attributes:
        batch: As the model takes it, and perhaps `labels` (B,), `word_ids` (B, T), `rationale` (B, T).
        mask: (B, T) true on real positions.
        logits: (B, C).
        target: (B,) explained classes.
        ids: B sample ids.
    """

    batch: Mapping[str, Any]
    mask: Tensor
    logits: Tensor
    target: Tensor
    ids: list[int]

    def label(self, i: int) -> int | None:
        """The class of sample i, where it has one."""
        labels = self.batch.get("labels")
        # A regression's label is no class.
        return None if labels is None or labels.is_floating_point() else int(labels[i])

    def word_ids(self, i: int, special: Tensor, *, padded: bool = False) -> list[int | None]:
        """Word numbers of the real tokens (of all positions if `padded`), None on special tokens."""
        if "word_ids" in self.batch:
            words = [None if word < 0 else int(word) for word in self.batch["word_ids"][i].tolist()]
        else:
            # Without word numbers every token is its own word.
            words = [None if bool(flag) else position for position, flag in enumerate(special)]
        return [
            word if bool(real) else None for word, real in zip(words, self.mask[i], strict=True) if padded or bool(real)
        ]

    def token_rationale(self, i: int) -> list[int] | None:
        """1 per real token that people marked; None where nobody marked anything."""
        if "rationale" not in self.batch:
            return None
        marks = self.batch["rationale"][i].cpu()[self.mask[i]].tolist()
        return [max(0, mark) for mark in marks] if any(mark >= 0 for mark in marks) else None
