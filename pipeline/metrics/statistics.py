"""From rows per sample to numbers with intervals: unique samples, bootstrap, rank correlation (METRICS, head)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from calig.pipeline.errors import InputError
from calig.pipeline.metrics.rows import MetricError, metric_key

TOLERANCE = 1e-4  # duplicates from a distributed sampler may differ by the noise of another batch
_CHUNK = 2**22  # drawn indices held at once: 32 MiB


class Summary(NamedTuple):
    """Mean over unique samples with its bootstrap interval; all three None where every sample was skipped."""

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
    n = len(values)
    if n == 0 or resamples < 1 or not 0 < level < 1:
        raise InputError(
            f"a bootstrap needs values, resamples and a level between 0 and 1; given {n} values, "
            f"resamples={resamples}, level={level}."
        )
    generator = torch.Generator().manual_seed(seed)
    size = max(1, _CHUNK // n)
    means = [
        values[torch.randint(n, (min(size, resamples - start), n), generator=generator)].mean(1)
        for start in range(0, resamples, size)
    ]
    tail = (1 - level) / 2
    low, high = torch.cat(means).quantile(torch.tensor([tail, 1 - tail], dtype=torch.double)).tolist()
    return float(values.mean()), low, high


def spearman(a: Tensor, b: Tensor) -> float:
    """Compute Spearman's rank correlation with average ranks for ties.

    Args:
        a: (N,) values.
        b: (N,) values.

    Returns:
        The correlation, NaN where it is undefined (N < 2, or all values of one side are equal).

    Raises:
        InputError: The shapes differ.

    Example:
        >>> spearman(torch.tensor([1.0, 2.0, 3.0]), torch.tensor([1.0, 8.0, 27.0]))
        1.0
    """
    if a.shape != b.shape or a.dim() != 1:
        raise InputError(f"a {tuple(a.shape)} and b {tuple(b.shape)} must both have the shape (N,).")
    x, y = (ranks - ranks.mean() for ranks in (_average_ranks(a), _average_ranks(b)))
    norm = float((x.square().sum() * y.square().sum()).sqrt())
    return max(-1.0, min(1.0, float(x @ y) / norm)) if norm > 0 else float("nan")


def unique_by_id(ids: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """Sort by id and keep the first value of each id.

    Args:
        ids: (N,) int64.
        values: (N,) values, NaN for skipped samples.

    Returns:
        (U,) ascending unique ids and their (U,) values.

    Raises:
        MetricError: Values of one id differ by more than 1e-4, or only some of them are skipped; names the sample.

    Example:
        >>> unique_by_id(torch.tensor([9, 2, 9]), torch.tensor([1.0, 3.0, 1.0]))
        (tensor([2, 9]), tensor([3., 1.]))
    """
    order = torch.argsort(ids, stable=True)
    ids, values = ids[order], values[order]
    first = torch.ones_like(ids, dtype=torch.bool)
    first[1:] = ids[1:] != ids[:-1]
    kept = values[first][first.long().cumsum(0) - 1]
    wrong = ((values - kept).abs() > TOLERANCE) | (values.isnan() != kept.isnan())
    if bool(wrong.any()):
        at = int(wrong.nonzero()[0])
        given = f"{float(kept[at])} and {float(values[at])}"
        raise MetricError(
            f"it occurs twice with different values, {given}. Rows of two runs may be mixed.", sample_id=int(ids[at])
        )
    return ids[first], values[first]


def summarise(
    rows: Iterable[Mapping[str, Any]], *, seed: int = 0, resamples: int = 1000, level: float = 0.95
) -> dict[tuple[str, str, str], Summary]:
    """Summarise rows of the metrics table over unique samples: means over the bins and numbers without bins.

    Args:
        rows: Rows as in `Row`, for example `table.to_pylist()`; rows of single bins (`q` set) are passed over.
        seed: Of the bootstrap; all metrics of one sample size share their resamples.
        resamples: Of the bootstrap.
        level: Of the intervals.

    Returns:
        (method, control, `metric_key`) -> summary, in the order of first appearance.

    Raises:
        MetricError: A value is not finite, or duplicates of a sample differ; names the sample and the method.

    Example:
        >>> row = dict(method="ca_lig", control="none", metric="token_f1", operator=None, space=None, q=None)
        >>> summarise([row | dict(sample_id=0, value=0.5), row | dict(sample_id=1, value=None)])
        {('ca_lig', 'none', 'token_f1'): Summary(mean=0.5, low=0.5, high=0.5, n=1, n_skipped=1)}
    """
    groups: dict[tuple[str, str, str], tuple[list[int], list[float]]] = {}
    for row in rows:
        if row["q"] is not None:
            continue
        key = (row["method"], row["control"], metric_key(row))
        value = row["value"]
        if value is not None and not abs(value) < float("inf"):
            reason = f"{key[2]} (control '{row['control']}') is {value}"
            raise MetricError(reason, sample_id=row["sample_id"], method=row["method"])
        ids, values = groups.setdefault(key, ([], []))
        ids.append(row["sample_id"])
        values.append(float("nan") if value is None else value)
    summaries = {}
    for key, (ids, values) in groups.items():
        try:
            _, unique = unique_by_id(torch.tensor(ids), torch.tensor(values, dtype=torch.double))
        except MetricError as error:
            raise MetricError(f"{key[2]}: {error.reason}", sample_id=error.sample_id, method=key[0]) from None
        summaries[key] = summary_of(unique, seed=seed, resamples=resamples, level=level)
    return summaries


def summary_of(values: Tensor, *, seed: int = 0, resamples: int = 1000, level: float = 0.95) -> Summary:
    """Summarise (U,) values of unique samples, NaN for skipped ones."""
    defined = values[~values.isnan()]
    n, n_skipped = len(defined), len(values) - len(defined)
    if n == 0:
        return Summary(None, None, None, 0, n_skipped)
    mean, low, high = bootstrap_interval(defined, seed=seed, resamples=resamples, level=level)
    return Summary(mean, low, high, n, n_skipped)


def _average_ranks(values: Tensor) -> Tensor:
    _, place, counts = values.detach().cpu().unique(return_inverse=True, return_counts=True)
    last = counts.cumsum(0)
    return (last - (counts - 1) / 2).double()[place]
