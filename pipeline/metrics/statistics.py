"""From rows per sample to numbers with intervals: unique samples, bootstrap, rank correlation (METRICS, head)."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from calig.pipeline.errors import InputError
from calig.pipeline.metrics.rows import MetricError, metric_key

STEP = 10.0  # of positive and negative AUC: what one prediction on the edge between two classes moves them by
TOLERANCE = 1e-4  # duplicates from a distributed sampler may differ by the noise of another batch
_CHUNK = 2**22  # drawn indices held at once: 32 MiB
SMALL_SAMPLE = 30
"""Below this many samples a percentile interval promises more than it keeps: of 4000 nominal 95 % intervals for the
mean of skewed numbers in [0, 1], Beta(0.5, 2), only 85 % held it at 8 samples, 89 % at 12, 93 % at 30, 94 % at 100."""
_PARTS = {"iou_f1": ("iou_precision", "iou_recall")}  # metrics that are the F1 of the means of two others


class Summary(NamedTuple):
    """Mean over unique samples with its bootstrap interval; all three None where every sample was skipped.

    For `iou_f1`, which no sample has a value of, `mean` is the F1 of the means of its two parts.
    """

    mean: float | None
    low: float | None
    high: float | None
    n: int
    n_skipped: int


def bootstrap_interval(
    values: Tensor, *, seed: int = 0, resamples: int = 1000, level: float = 0.95
) -> tuple[float, float, float]:
    """Compute the mean and its percentile bootstrap interval; resampling is over examples.

    Args:
        values: (N,) one value per unique example, N >= 1.
        seed: Of the resampling.
        resamples: How many resamples of size N.
        level: Coverage of the interval.

    Returns:
        Mean, lower end, upper end.

    Raises:
        InputError: There are no values, or ``resamples`` or ``level`` is out of range.

    Example:
        >>> bootstrap_interval(torch.tensor([0.5, 0.5]))
        (0.5, 0.5, 0.5)
    """
    values = values.detach().cpu().double().flatten()
    _check(len(values), resamples, level)
    resampled = resampled_means(values.unsqueeze(1), seed=seed, resamples=resamples).squeeze(1)
    return float(values.mean()), *percentile_interval(resampled, level)


def resampled_means(columns: Tensor, *, seed: int = 0, resamples: int = 1000) -> Tensor:
    """Draw resamples of the examples and average; all columns, and all calls with one N and seed, share the draws.

    Args:
        columns: (N, C) values of N unique examples.
        seed: Of the resampling.
        resamples: R resamples of size N.

    Returns:
        (R, C) float64 means.
    """
    n = len(columns)
    parts = columns.detach().cpu().double().unbind(1)
    generator = torch.Generator().manual_seed(seed)
    size = max(1, _CHUNK // n)
    means = []
    for start in range(0, resamples, size):
        drawn = torch.randint(n, (min(size, resamples - start), n), generator=generator)
        means.append(torch.stack([part[drawn].mean(1) for part in parts], dim=1))
    return torch.cat(means)


def percentile_interval(resampled: Tensor, level: float = 0.95) -> tuple[float, float]:
    """Return the ends of the central interval that holds the share ``level`` of (R,) resampled statistics."""
    tail = (1 - level) / 2
    low, high = resampled.quantile(torch.tensor([tail, 1 - tail], dtype=resampled.dtype)).tolist()
    return low, high


def f1_of_means(means: Tensor) -> Tensor:
    """Compute the F1 of mean precision and mean recall (ERASER's macro F1), 0 where both are 0.

    Args:
        means: (..., 2) mean precision, mean recall.

    Returns:
        (...) F1, which is not the mean of the examples' F1.

    Example:
        >>> f1_of_means(torch.tensor([[0.5, 1.0], [0.0, 0.0]]))
        tensor([0.6667, 0.0000])
    """
    total = means.sum(-1)
    return torch.where(total > 0, 2 * means.prod(-1) / total, 0.0)


def spearman(a: Tensor, b: Tensor) -> float:
    """Compute Spearman's rank correlation with average ranks for ties.

    Args:
        a: (N,) values.
        b: (N,) values.

    Returns:
        The correlation, NaN where it is undefined (N < 2, all values of one side are equal, or a value is NaN).

    Raises:
        InputError: The shapes differ.

    Example:
        >>> spearman(torch.tensor([1.0, 2.0, 3.0]), torch.tensor([1.0, 8.0, 27.0]))
        1.0
    """
    if a.shape != b.shape or a.dim() != 1:
        raise InputError(f"a {tuple(a.shape)} and b {tuple(b.shape)} must both have the shape (N,).")
    if bool((a.isnan() | b.isnan()).any()):
        return float("nan")
    x, y = (ranks - ranks.mean() for ranks in (_average_ranks(a), _average_ranks(b)))
    norm = float((x.square().sum() * y.square().sum()).sqrt())
    return max(-1.0, min(1.0, float(x @ y) / norm)) if norm > 0 else float("nan")


def rank_correlation(scores: Tensor, others: Tensor, evaluable: Tensor) -> Tensor:
    """Compute Spearman's correlation of two explanations, example by example; 1 means the same ranking.

    Args:
        scores: (B, T) signed scores.
        others: (B, T) signed scores of the same examples.
        evaluable: (B, T) bool, positions that are neither special nor padding; the rest is not looked at.

    Returns:
        (B,) float64 in [-1, 1], NaN where it is undefined: fewer than two positions, or all scores of one side equal.

    Raises:
        InputError: The shapes differ.

    Example:
        >>> every = torch.ones(1, 3, dtype=torch.bool)
        >>> rank_correlation(torch.tensor([[3.0, 2.0, 1.0]]), torch.tensor([[9.0, 1.0, 2.0]]), every)
        tensor([0.5000], dtype=torch.float64)
    """
    if not scores.shape == others.shape == evaluable.shape or scores.ndim != 2:
        shapes = ", ".join(str(tuple(tensor.shape)) for tensor in (scores, others, evaluable))
        raise InputError(f"scores, others and evaluable must have one shape (B, T), got {shapes}.")
    rows = zip(scores, others, evaluable.bool(), strict=True)
    return torch.tensor([spearman(a[kept], b[kept]) for a, b, kept in rows], dtype=torch.double)


def spearman_matrix(values: Tensor) -> Tensor:
    """Compute Spearman's correlation of every two rows, as `spearman` of each pair.

    Args:
        values: (M, N) finite values.

    Returns:
        (M, M) float64; NaN where one of the two rows has equal values only.

    Example:
        >>> spearman_matrix(torch.tensor([[1.0, 2.0, 3.0], [3.0, 2.0, 1.0]])).round(decimals=6).tolist()
        [[1.0, -1.0], [-1.0, 1.0]]
    """
    ranks = torch.stack([_average_ranks(row) for row in values])
    ranks = ranks - ranks.mean(1, keepdim=True)
    norms = ranks.norm(dim=1)
    product = ranks @ ranks.T / norms.outer(norms)  # 0 / 0 is NaN: no ranking, no correlation
    return product.clamp(-1, 1)


def unique_by_id(ids: Tensor, values: Tensor, tolerance: float = TOLERANCE) -> tuple[Tensor, Tensor]:
    """Sort by id and keep the first value of each id.

    Args:
        ids: (N,) int64.
        values: (N,) values, or (N, C), NaN for skipped samples.
        tolerance: By how much the values of one id may differ, relative to values above 1.

    Returns:
        (U,) ascending unique ids and their (U,) or (U, C) values.

    Raises:
        MetricError: Values of one id differ by more, or only some of them are skipped; names the sample.

    Example:
        >>> unique_by_id(torch.tensor([9, 2, 9]), torch.tensor([1.0, 3.0, 1.0]))
        (tensor([2, 9]), tensor([3., 1.]))
    """
    order = torch.argsort(ids, stable=True)
    ids, values = ids[order], values[order]
    first = torch.ones_like(ids, dtype=torch.bool)
    first[1:] = ids[1:] != ids[:-1]
    kept = values[first][first.long().cumsum(0) - 1]
    wrong = ((values - kept).abs() > tolerance * kept.abs().clamp_min(1)) | (values.isnan() != kept.isnan())
    if bool(wrong.any()):
        at = tuple(wrong.nonzero()[0].tolist())
        given = f"{float(kept[at])} and {float(values[at])}"
        raise MetricError(
            f"it occurs twice with different values, {given}. Rows of two runs may be mixed.", sample_id=int(ids[at[0]])
        )
    return ids[first], values[first]


Key = tuple[str, str, str]
"""Method, control and metric as `metric_key` spells it."""


def summarise(
    rows: Iterable[Mapping[str, Any]],
    *,
    q: float | None = None,
    seed: int = 0,
    resamples: int = 1000,
    level: float = 0.95,
) -> dict[Key, Summary]:
    """Summarise rows of the metrics table over unique samples: means over the bins and numbers without bins.

    Args:
        rows: Rows as in `Row`, for example `table.to_pylist()`.
        q: Only rows of this bin, which are passed over by default: a point of a curve, or token-F1 at a fixed share.
        seed: Of the bootstrap; all metrics of one sample size share their resamples.
        resamples: Of the bootstrap.
        level: Of the intervals.

    Returns:
        (method, control, `metric_key`) -> summary, in the order of first appearance; `iou_f1` stands behind its parts.

    Raises:
        MetricError: A value is not finite, or duplicates of a sample differ; names the sample and the method.

    Example:
        >>> row = dict(method="ca_lig", control="none", metric="token_f1", operator=None, space=None, q=None)
        >>> summarise([row | dict(sample_id=0, value=0.5), row | dict(sample_id=1, value=None)])
        {('ca_lig', 'none', 'token_f1'): Summary(mean=0.5, low=0.5, high=0.5, n=1, n_skipped=1)}
    """
    return {
        key: summary_of(values, statistic, seed=seed, resamples=resamples, level=level)
        for key, (_, values, statistic) in unique_values(rows, q=q).items()
    }


class Values(NamedTuple):
    """The values of one metric: ascending unique (U,) ids, (U, C) values and the statistic of their means."""

    ids: Tensor
    values: Tensor
    statistic: Callable[[Tensor], Tensor]


def unique_values(rows: Iterable[Mapping[str, Any]], *, q: float | None = None) -> dict[Key, Values]:
    """Collect the values of each method, control and metric per unique sample, NaN for skipped samples.

    Where rows have a `target` (several labels per text), the value of a sample is the mean over its targets.

    Args:
        rows: As in `summarise`.
        q: As in `summarise`.

    Raises:
        MetricError: As in `summarise`.
    """
    # Arrays: 16 bytes per sample and metric, a quarter of what lists of Python numbers take.
    groups: dict[tuple[Key, int | None], tuple[array[int], array[float]]] = {}
    for row in rows:
        if row["q"] != q:
            continue
        key = (row["method"], row["control"], metric_key(row))
        value = row["value"]
        if value is not None and not abs(value) < float("inf"):
            reason = f"{key[2]} (control '{row['control']}') is {value}"
            raise MetricError(reason, sample_id=row["sample_id"], method=row["method"])
        ids, values = groups.setdefault((key, row.get("target")), (array("q"), array("d")))
        ids.append(row["sample_id"])
        values.append(float("nan") if value is None else value)
    by_target: dict[Key, list[tuple[Tensor, Tensor]]] = {}
    for (key, _), (ids, values) in groups.items():
        tolerance = STEP if key[2].split("@")[0] in ("positive_auc", "negative_auc") else TOLERANCE
        try:
            column = torch.tensor(values, dtype=torch.double).unsqueeze(1)
            unique, column = unique_by_id(torch.tensor(ids), column, tolerance)
        except MetricError as error:
            raise MetricError(f"{key[2]}: {error.reason}", sample_id=error.sample_id, method=key[0]) from None
        by_target.setdefault(key, []).append((unique, column))
    found: dict[Key, Values] = {}
    for key, parts_of in by_target.items():
        found[key] = Values(*(parts_of[0] if len(parts_of) == 1 else _over_targets(parts_of)), first_mean)
        for whole, parts in _PARTS.items():
            name, at, variant = key[2].partition("@")
            keys = [(*key[:2], part + at + variant) for part in parts]
            if name in parts and all(other in found for other in keys):
                found[*key[:2], whole + at + variant] = _joined(keys, found)
    return found


def _over_targets(parts: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Mean over the targets of each sample, those that are defined: samples, not labels, are drawn independently."""
    ids, place = torch.cat([ids for ids, _ in parts]).unique(return_inverse=True)
    values = torch.cat([values for _, values in parts])
    known = ~values.isnan()
    totals = torch.zeros(len(ids), 1, dtype=values.dtype).index_add_(0, place, values.nan_to_num())
    counts = torch.zeros(len(ids), 1, dtype=values.dtype).index_add_(0, place, known.to(values.dtype))
    return ids, totals / counts  # 0 / 0 is NaN: skipped for every target


def first_mean(means: Tensor) -> Tensor:
    """Return the (...) mean of the only column of (..., 1) means."""
    return means[..., 0]


def summary_of(
    values: Tensor,
    statistic: Callable[[Tensor], Tensor] = first_mean,
    *,
    seed: int = 0,
    resamples: int = 1000,
    level: float = 0.95,
) -> Summary:
    """Summarise values of unique samples.

    Args:
        values: (U, C) values, NaN for skipped samples.
        statistic: (..., C) means -> (...) the number that is summarised, computed anew of every resample.
        seed: Of the bootstrap.
        resamples: Of the bootstrap.
        level: Of the interval.

    Raises:
        InputError: ``resamples`` or ``level`` is out of range.
    """
    defined = values[~values.isnan().any(1)].double()
    n, n_skipped = len(defined), len(values) - len(defined)
    if n == 0:
        return Summary(None, None, None, 0, n_skipped)
    _check(n, resamples, level)
    low, high = percentile_interval(statistic(resampled_means(defined, seed=seed, resamples=resamples)), level)
    return Summary(float(statistic(defined.mean(0))), low, high, n, n_skipped)


def small_sample_warning(summaries: Mapping[Key, Summary]) -> str | None:
    """Say, once for a whole table, that intervals rest on too few samples to be believed.

    Args:
        summaries: As `summarise` returns them.

    Returns:
        A sentence, or None where every number has `SMALL_SAMPLE` samples or more (or none at all).

    Example:
        >>> print(small_sample_warning({("m", "none", "auprc"): Summary(0.5, 0.4, 0.6, 12, 3)}).split(":")[0])
        1 of 1 intervals rests on fewer than 30 samples (the fewest
    """
    numbers = {key: summary.n for key, summary in summaries.items() if summary.n}
    small = {key: n for key, n in numbers.items() if n < SMALL_SAMPLE}
    if not small:
        return None
    (method, _, metric), n = min(small.items(), key=lambda item: item[1])
    return (
        f"{len(small)} of {len(numbers)} intervals {'rests' if len(small) == 1 else 'rest'} on fewer than "
        f"{SMALL_SAMPLE} samples (the fewest: {n}, {metric} of {method}): they are too narrow and differences between "
        "methods may be chance. Explain more samples."
    )


def _joined(keys: list[Key], found: Mapping[Key, Values]) -> Values:
    """Put the parts of one metric side by side; they must be defined for the same samples."""
    first, second = (found[key] for key in keys)
    ids = set(first.ids[~first.values[:, 0].isnan()].tolist())
    odd = ids.symmetric_difference(second.ids[~second.values[:, 0].isnan()].tolist())
    if odd or not torch.equal(first.ids, second.ids):
        reason = f"only one of {keys[0][2]} and {keys[1][2]} (control '{keys[0][1]}') is there"
        sample_id = min(odd or set(first.ids.tolist()).symmetric_difference(second.ids.tolist()))
        raise MetricError(reason, sample_id=sample_id, method=keys[0][0])
    return Values(first.ids, torch.cat([first.values, second.values], dim=1), f1_of_means)


def _check(n: int, resamples: int, level: float) -> None:
    if n == 0 or resamples < 1 or not 0 < level < 1:
        raise InputError(
            f"a bootstrap needs values, resamples and a level between 0 and 1; given {n} values, "
            f"resamples={resamples}, level={level}."
        )


def _average_ranks(values: Tensor) -> Tensor:
    _, place, counts = values.detach().cpu().unique(return_inverse=True, return_counts=True)
    last = counts.cumsum(0)
    return (last - (counts - 1) / 2).double()[place]
