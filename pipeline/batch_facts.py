"""What a batch says of its samples, beside what the methods say."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from calig.pipeline.attribution import Attribution
from calig.pipeline.attribution.windows import Windows
from calig.pipeline.heads import Head
from calig.pipeline.image_rows import ImageFacts


@dataclass(frozen=True)
class BatchFacts:
    """What is known of a batch beside its attributions, on the host.

    Attributes:
        batch: As the model takes it, and perhaps `labels` (B,), `word_ids` (B, T), `rationale` (B, T).
        mask: (B, T) true on real positions.
        logits: (B, C).
        target: (B,) explained outputs.
        ids: B sample ids.
        head: How the logits are read.
        image: What is known beside that where the input is images.
        windows: How long documents are read; None of short texts.
    """

    batch: Mapping[str, Any]
    mask: Tensor
    logits: Tensor
    target: Tensor
    ids: list[int]
    head: Head = field(default_factory=Head)
    image: ImageFacts | None = None
    windows: Windows | None = None

    def decision(self, i: int) -> dict[str, Any]:
        """What was predicted of sample i and what is true, as columns of its row."""
        labels = self.batch.get("labels")
        facts = self.head.label_facts(self.logits[i], None if labels is None else labels[i].cpu())
        known = self.head.task != "regression"
        value = float(self.head.values(self.logits[i])[int(self.target[i])])
        return facts | {"target": int(self.target[i]), "probability": value if known else None}

    def segment(self, i: int) -> list[int | None] | None:
        """0 on the real tokens of the first text of a pair, 1 on those of the second, None on special ones."""
        segment = self.batch.get("segment")
        if segment is None:
            return None
        return [None if of < 0 else of for of in segment[i].cpu()[self.mask[i]].tolist()]

    def true_classes(self) -> Tensor | None:
        """(B,) what the prediction is compared with: the class, or whether the explained label is given."""
        labels = self.batch.get("labels")
        if labels is None or self.head.task == "regression":
            return None
        if self.head.task == "classification":
            return labels.cpu()
        if labels.shape != self.logits.shape:
            return None
        return labels.cpu().gather(1, self.target.cpu()[:, None]).squeeze(1).long()

    def flow_row(self, result: Attribution, i: int, kept_of: Collection[int]) -> dict[str, Any] | None:
        """What is kept of the flow of sample i: its maps if `kept_of` has it; None where there is nothing to keep."""
        kept = result.flow is not None and self.ids[i] in kept_of
        agreement = (result.parts or {}).get("agreement")
        if result.flow is None or not (kept or agreement is not None):
            return None
        real = self.mask[i]
        return {
            "sample_id": self.ids[i],
            "method": result.method,
            "layers": result.options.get("layers") or list(range(result.flow.shape[1])),
            "flow": result.flow[i][:, real][:, :, real].tolist() if kept else None,
            "agreement": None if agreement is None else agreement[i].tolist(),
        }

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

    def placed(self, i: int) -> dict[str, Any]:
        """Of a long document: how many windows it was read in, and where its tokens stand in its text."""
        if self.windows is None:
            return {}
        found: dict[str, Any] = {"window": int(self.windows.counts[i])}
        for key in ("char_start", "char_end"):
            if key in self.batch:
                offsets = self.batch[key][i].cpu()[self.mask[i]].tolist()
                found[key] = [None if offset < 0 else offset for offset in offsets]
        return found

    def token_rationale(self, i: int) -> list[int] | None:
        """1 per real token that people marked; None where nobody marked anything."""
        if "rationale" not in self.batch:
            return None
        marks = self.batch["rationale"][i].cpu()[self.mask[i]].tolist()
        return [max(0, mark) for mark in marks] if any(mark >= 0 for mark in marks) else None
