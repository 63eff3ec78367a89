"""The plausibility metrics as thin `torchmetrics` classes (METRICS 3). Shapes: B examples, V words, H, W cells."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from calig.pipeline.errors import InputError
from calig.pipeline.metrics import localisation, plausibility
from calig.pipeline.metrics.ranking import count
from calig.pipeline.metrics.sample_metric import SampleIds, SampleMetric, finite_items
from calig.pipeline.metrics.statistics import f1_of_means

Tensors = Sequence[Tensor]


class _WordMetric(SampleMetric):
    """A value per example of word scores and a rationale; empty rationales are skipped."""

    higher_is_better = True

    def _compare(
        self,
        value: Callable[[Tensor, Tensor, int], float | tuple[float, float]],
        scores: Tensors,
        rationale: Tensors,
        sample_id: SampleIds,
        missed: Sequence[int] | None,
    ) -> None:
        missed = [0] * len(scores) if missed is None else missed
        self._record(
            [
                value(values, gold, cut) if bool((gold != 0).any()) or cut else None
                for values, gold, cut in zip(finite_items(scores, sample_id), rationale, missed, strict=True)
            ],
            sample_id,
        )


class TokenF1(_WordMetric):
    """Mean token-F1, see `plausibility.token_f1`; higher is better. Empty rationales are skipped.

    Args:
        dataset_length: Predict the data set's mean rationale length in words, instead of the example's own (oracle).
        fraction: Predict this share of the example's words, a multiple of 0.001.
        **kwargs: Of `torchmetrics.Metric`.

    Raises:
        InputError: Both are given, or one is out of range.

    Example:
        >>> metric = TokenF1()
        >>> scores, rationales = [torch.tensor([0.9, 0.1, 0.5]), torch.tensor([0.3])], [[1, 1, 0], [0]]
        >>> metric.update(scores, [torch.tensor(r) for r in rationales], sample_id=[0, 1])
        >>> metric.compute(), metric.compute_interval().n_skipped
        (tensor(0.5000), 1)
    """

    def __init__(self, *, dataset_length: float | None = None, fraction: float | None = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if dataset_length is not None and fraction is not None:
            raise InputError(f"dataset_length={dataset_length} and fraction={fraction}: give one of the two.")
        self._k = None if dataset_length is None else plausibility.dataset_k(dataset_length)
        if fraction is not None and count(fraction, 1) < 1:
            raise InputError(f"fraction is {fraction}, expected more than 0.")
        self._fraction = fraction

    def update(
        self, scores: Tensors, rationale: Tensors, sample_id: SampleIds, missed: Sequence[int] | None = None
    ) -> None:
        """Add examples: B (V,) word scores, B (V,) rationales, B ids, B numbers of words that truncation cut off."""

        def value(scores: Tensor, rationale: Tensor, missed: int) -> float:
            k = self._k if self._fraction is None else max(1, count(self._fraction, len(scores)))
            return plausibility.token_f1(scores, rationale, k, missed=missed)

        self._compare(value, scores, rationale, sample_id, missed)


class TokenIoU(_WordMetric):
    """Mean token-IoU with oracle k, see `plausibility.token_iou`; higher is better. Empty rationales are skipped.

    Example:
        >>> metric = TokenIoU()
        >>> metric.update([torch.tensor([0.9, 0.1, 0.5])], [torch.tensor([1, 1, 0])], sample_id=[0])
        >>> metric.compute()
        tensor(0.3333)
    """

    def update(
        self, scores: Tensors, rationale: Tensors, sample_id: SampleIds, missed: Sequence[int] | None = None
    ) -> None:
        """Add examples: B (V,) word scores, B (V,) rationales, B ids, B numbers of words that truncation cut off."""
        self._compare(
            lambda values, gold, cut: plausibility.token_iou(values, gold, missed=cut),
            scores,
            rationale,
            sample_id,
            missed,
        )


class IoUF1(_WordMetric):
    """ERASER's IoU-F1: F1 of mean precision and mean recall of spans; higher is better. Empty rationales are skipped.

    See `plausibility.iou_precision_recall`.

    Example:
        >>> metric = IoUF1()
        >>> metric.update([torch.tensor([0.9, 0.8, 0.1, 0.5])], [torch.tensor([1, 1, 1, 0])], sample_id=[0])
        >>> metric.compute()
        tensor(0.6667)
    """

    columns = 2

    def update(
        self, scores: Tensors, rationale: Tensors, sample_id: SampleIds, missed: Sequence[int] | None = None
    ) -> None:
        """Add examples: B (V,) word scores, B (V,) rationales, B ids, B numbers of words that truncation cut off."""
        self._compare(
            lambda values, gold, cut: plausibility.iou_precision_recall(values, gold, missed=cut),
            scores,
            rationale,
            sample_id,
            missed,
        )

    def _of_means(self, means: Tensor) -> Tensor:
        # Without a sample the means are NaN, which f1_of_means would take for 0.
        return torch.where(means.isnan().any(-1), torch.nan, f1_of_means(means))


class AUPRC(SampleMetric):
    """Mean average precision per example, see `plausibility.average_precision`; higher is better.

    Examples whose words are all of one class are skipped.

    Example:
        >>> metric = AUPRC()
        >>> metric.update([torch.tensor([0.9, 0.1, 0.5, 0.2])], [torch.tensor([1, 1, 0, 0])], sample_id=[0])
        >>> metric.compute()
        tensor(0.7500)
    """

    higher_is_better = True

    def update(self, scores: Sequence[Tensor], rationale: Sequence[Tensor], sample_id: SampleIds) -> None:
        """Add examples: B (V,) word scores, B (V,) rationales, B ids."""
        self._record(
            [
                plausibility.average_precision(values, gold) if len((gold != 0).unique()) == 2 else None
                for values, gold in zip(finite_items(scores, sample_id), rationale, strict=True)
            ],
            sample_id,
        )


class _MapMetric(SampleMetric):
    """A value per example of a heatmap and a mask; masks that leave it undefined are skipped."""

    higher_is_better = True

    def _compare(
        self, value: Callable[[Tensor, Tensor], float], heat: Tensors, mask: Tensors, sample_id: SampleIds, full: bool
    ) -> None:
        maps = zip(finite_items(heat, sample_id, "a value of the heatmap"), mask, strict=True)
        self._record(
            [
                value(of_model, outline) if bool((outline != 0).any()) and (full or not bool(outline.all())) else None
                for of_model, outline in maps
            ],
            sample_id,
        )


class PointingGame(_MapMetric):
    """Share of examples whose most relevant cell lies on the object; higher is better.

    See `localisation.pointing_game`.

    Args:
        tolerance: See `localisation.pointing_game`.
        **kwargs: Of `torchmetrics.Metric`.

    Example:
        >>> metric = PointingGame()
        >>> metric.update([torch.tensor([[0.1, 0.9]])], [torch.tensor([[0, 1]])], sample_id=[0])
        >>> metric.compute()
        tensor(1.)
    """

    def __init__(self, *, tolerance: int = 0, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._tolerance = tolerance

    def update(self, heat: Tensors, mask: Tensors, sample_id: SampleIds) -> None:
        """Add examples: B (H, W) heatmaps, B (H, W) masks, B ids; empty masks are skipped."""
        self._compare(
            lambda of_model, outline: localisation.pointing_game(of_model, outline, tolerance=self._tolerance),
            heat,
            mask,
            sample_id,
            full=True,
        )


class MaskAUPRC(_MapMetric):
    """Mean average precision of cells, see `localisation.mask_auprc`; higher is better.

    Example:
        >>> metric = MaskAUPRC()
        >>> metric.update([torch.tensor([[0.1, 0.9]])], [torch.tensor([[1, 0]])], sample_id=[0])
        >>> metric.compute()
        tensor(0.5000)
    """

    def update(self, heat: Tensors, mask: Tensors, sample_id: SampleIds) -> None:
        """Add examples: B (H, W) heatmaps, B (H, W) masks, B ids; masks that are empty or everything are skipped."""
        self._compare(localisation.mask_auprc, heat, mask, sample_id, full=False)


class MaskIoU(_MapMetric):
    """Mean IoU of the object and the cells above the mean, see `localisation.mask_iou`; higher is better.

    Example:
        >>> metric = MaskIoU()
        >>> metric.update([torch.tensor([[0.0, 1.0], [0.0, 1.0]])], [torch.tensor([[0, 1], [0, 0]])], sample_id=[0])
        >>> metric.compute()
        tensor(0.5000)
    """

    def update(self, heat: Tensors, mask: Tensors, sample_id: SampleIds) -> None:
        """Add examples: B (H, W) heatmaps, B (H, W) masks, B ids; empty masks are skipped."""
        self._compare(localisation.mask_iou, heat, mask, sample_id, full=True)
