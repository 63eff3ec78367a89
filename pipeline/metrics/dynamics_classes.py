"""The metrics over training as thin `torchmetrics` classes (METRICS 4). Shapes: B examples, L layers, T positions."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from calig.pipeline.errors import InputError
from calig.pipeline.metrics import dynamics
from calig.pipeline.metrics.sample_metric import SampleIds, SampleMetric, SampleStates, finite_items
from calig.pipeline.metrics.statistics import Summary, rank_correlation, summary_of


class RankCorrelation(SampleMetric):
    """Mean Spearman correlation of two sets of scores; examples where it is undefined are skipped."""

    def _correlate(self, a: Tensor, b: Tensor, evaluable: Tensor, sample_id: SampleIds) -> None:
        for scores in (a, b):
            _check_finite(scores, evaluable, sample_id)
        values = rank_correlation(a, b, evaluable).tolist()
        self._record([None if value != value else value for value in values], sample_id)


class Drift(RankCorrelation):
    """Mean rank correlation of the scores at two moments of a training, see `dynamics.drift`; 1: the ranking stayed.

    Neither direction is better. Examples with fewer than two evaluable positions, or equal scores only, are skipped.

    Example:
        >>> metric = Drift()
        >>> metric.update(torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0, 4.0]]), torch.ones(1, 2).bool(), [0])
        >>> metric.compute()
        tensor(1.)
    """

    higher_is_better = None

    def update(self, scores_now: Tensor, scores_before: Tensor, evaluable: Tensor, sample_id: SampleIds) -> None:
        """Add examples: (B, T) scores, (B, T) scores at the other moment, (B, T) bool, B ids."""
        self._correlate(scores_now, scores_before, evaluable, sample_id)


class SpecialShare(SampleMetric):
    """Mean share of the absolute relevance on special tokens, see `dynamics.special_share`; neither way is better.

    Example:
        >>> metric = SpecialShare()
        >>> special, mask = torch.tensor([[True, False]]), torch.tensor([[True, True]])
        >>> metric.update(torch.tensor([[-3.0, 1.0]]), special, mask, sample_id=[0])
        >>> metric.compute()
        tensor(0.7500)
    """

    higher_is_better = None

    def update(self, scores: Tensor, special: Tensor, mask: Tensor, sample_id: SampleIds) -> None:
        """Add examples: (B, T) scores, (B, T) bool special tokens, (B, T) bool real positions, B ids."""
        _check_finite(scores, mask, sample_id)
        self._record(dynamics.special_share(scores, special, mask), sample_id)


class LayerProfile(SampleStates):
    """Mean share of the absolute relevance of each layer, see `dynamics.layer_profile`; neither way is better.

    Args:
        num_layers: L, needed beforehand, since a process may see no example.
        **kwargs: Of `torchmetrics.Metric`.

    Raises:
        InputError: ``num_layers`` is below 1.

    Example:
        >>> metric = LayerProfile(num_layers=2)
        >>> metric.update(torch.tensor([[[1.0, -2.0], [1.0, 0.0]]]), torch.ones(1, 2).bool(), sample_id=[0])
        >>> metric.compute()
        tensor([0.7500, 0.2500])
    """

    higher_is_better = None

    def __init__(self, num_layers: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if num_layers < 1:
            raise InputError(f"num_layers is {num_layers}, expected 1 or more.")
        self.columns = num_layers

    def update(self, layer_scores: Tensor, mask: Tensor, sample_id: SampleIds) -> None:
        """Add examples: (B, L, T) relevance per layer, (B, T) bool real positions, B ids.

        Raises:
            InputError: There are not ``num_layers`` layers.
            MetricError: A score is not finite; names the sample.
        """
        if layer_scores.dim() != 3 or layer_scores.shape[1] != self.columns:
            raise InputError(f"layer_scores {tuple(layer_scores.shape)}, expected (B, {self.columns}, T).")
        _check_finite(layer_scores, mask.unsqueeze(1), sample_id)
        self._record(dynamics.layer_profile(layer_scores, mask), sample_id)

    def compute(self) -> Tensor:
        """Average over unique samples: (L,) shares, NaN before any example."""
        return self._defined().mean(0).to(self.device, torch.float32)

    def compute_interval(self, *, seed: int = 0, resamples: int = 1000, level: float = 0.95) -> list[Summary]:
        """Compute the mean and bootstrap interval of each layer, over all processes; every process must call it."""
        columns = self._unique_of_all().split(1, dim=1)
        return [summary_of(column, seed=seed, resamples=resamples, level=level) for column in columns]


def _check_finite(scores: Tensor, mask: Tensor, sample_id: SampleIds) -> None:
    for _ in finite_items(list(torch.where(mask.bool(), scores, 0.0)), sample_id, "a score"):
        pass
