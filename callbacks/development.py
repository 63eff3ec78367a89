"""How explanations develop from probe to probe: the scalars, and what is kept to compare the next probe with."""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from calig.pipeline.costs import COSTS
from calig.pipeline.explainer import scalar_key
from calig.pipeline.metrics import drift, layer_profile, metric_key, summarise
from calig.pipeline.records import SampleKey, explained_key, measured_key

Rows = Sequence[Mapping[str, Any]]
# Has a column of its own, is no quality of the explanation, or is a part of another metric.
_NOT_IN_TABLES = ("completeness_gap", "auprc_base_rate", "iou_precision", "iou_recall", *COSTS)


@dataclass
class Development:
    """What a probe is held against: the last one, and the course of the training so far.

    Attributes:
        scores: Sample (where a text may have several labels: sample and label) -> token scores.
        texts: Sample -> a number that tells texts apart: only the same text is compared.
        epoch: Of the last probe, -1 before the first.
        profiles: Epoch -> share of the relevance per block, of all probes; empty for methods without layers.
    """

    scores: dict[SampleKey, list[float]] = field(default_factory=dict)
    texts: dict[SampleKey, int] = field(default_factory=dict)
    epoch: int = -1
    profiles: dict[int, list[float]] = field(default_factory=dict)

    def state(self) -> dict[str, Any]:
        """Plain values, which a checkpoint can hold."""
        return {
            "ids": [list(key) if isinstance(key, tuple) else key for key in self.scores],
            "scores": list(self.scores.values()),
            "texts": list(self.texts.values()),
            "epoch": self.epoch,
            "profiles": dict(self.profiles),
        }

    @classmethod
    def restore(cls, state: Mapping[str, Any]) -> Development:
        """Take up what `state` gave."""
        ids = [tuple(key) if isinstance(key, list) else key for key in state.get("ids", [])]
        return cls(
            dict(zip(ids, state.get("scores", []), strict=True)),
            dict(zip(ids, state.get("texts", []), strict=False)),
            state.get("epoch", -1),
            dict(state.get("profiles", {})),
        )

    def advance(self, explanations: Rows, epoch: int) -> float | None:
        """Take a probe's rows for the last probe; returns their mean drift, None where nothing can be compared."""
        texts = {explained_key(row): zlib.crc32("\0".join(row["tokens"]).encode()) for row in explanations}
        moved = []
        for row in explanations:
            number = explained_key(row)
            if number not in self.scores or self.texts.get(number) != texts[number]:
                continue
            content = torch.tensor([word is not None for word in row["word_ids"]])
            moved.append(float(drift(_row(row["scores"]), _row(self.scores[number]), content[None])[0]))
        self.scores = {explained_key(row): row["scores"] for row in explanations}
        self.texts, self.epoch = texts, epoch
        moved = [value for value in moved if value == value]  # NaN: nothing to correlate
        return sum(moved) / len(moved) if moved else None


def layer_shares(explanations: Rows) -> list[float]:
    """Mean share of the absolute relevance per block; empty for methods without layers."""
    layered = [torch.tensor(row["layer_scores"]) for row in explanations if row["layer_scores"] is not None]
    shares = [layer_profile(one[None], torch.ones(1, one.shape[1], dtype=torch.bool))[0] for one in layered]
    return torch.stack(shares).mean(dim=0).tolist() if shares else []


def sample_metrics(metrics: Rows) -> dict[SampleKey, dict[str, float]]:
    """Sample -> the method's own metrics on it, under the names of the scalars; without logits and variants."""
    values: dict[SampleKey, dict[str, float]] = {}
    for row in metrics:
        own = row["control"] == "none" and row["q"] is None and row["space"] != "logit"
        variant = row["metric"].endswith("@absolute") or row["metric"] in _NOT_IN_TABLES
        if own and row["value"] is not None and not variant:
            values.setdefault(measured_key(row), {})[metric_key(row)] = row["value"]
    return values


def probe_scalars(method: str, explanations: Rows, metrics: Rows, profile: Sequence[float]) -> dict[str, float]:
    """The scalars of a probe under their keys (ARCHITECTURE, Scalar keys), but for the drift and the failures."""
    prefix = f"val/explain/{method}"
    scalars: dict[str, float] = {}
    for (name, control, metric), summary in summarise(metrics, resamples=1).items():
        if summary.mean is not None:
            scalars[scalar_key("val/explain", name, control, metric)] = summary.mean
    gaps = [row["completeness_gap"] for row in explanations if row["completeness_gap"] is not None]
    if gaps:
        scalars[f"{prefix}/completeness_gap_max"] = max(gaps)
    for layer, share in enumerate(profile, start=1):
        scalars[f"{prefix}/layer_profile/{layer:02d}"] = share
    return scalars


def _row(scores: Sequence[float]) -> Tensor:
    return torch.tensor(scores)[None]
