"""Is one method better than another? Paired tests on the samples that both have, and their adjustment."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from calig.pipeline.errors import InputError, unknown
from calig.pipeline.metrics.statistics import (
    first_mean,
    percentile_interval,
    resampled_means,
    unique_values,
)

EXACT_UP_TO = 12  # pairs: 4096 sign patterns cost less than the Monte Carlo draws, and give the exact p
_CHUNK = 2**22  # signs held at once: 32 MiB


class Difference(NamedTuple):
    """What separates two methods in one metric, on the samples that are defined for both.

    Attributes:
        metric: As `metric_key` spells it.
        method: The method of interest.
        other: The one it is held against; `random` is the control.
        difference: `method` minus `other`; whether that is good depends on the direction of the metric.
        low: Lower end of its paired bootstrap interval.
        high: Upper end.
        p: Of the two-sided paired permutation test.
        p_adjusted: After Holm, over all methods that this metric is compared for.
        n: Samples compared.
        n_unpaired: Samples that only one of the two is defined for; they are left out.
    """

    metric: str
    method: str
    other: str
    difference: float
    low: float
    high: float
    p: float
    p_adjusted: float
    n: int
    n_unpaired: int


def paired_permutation_test(
    a: Tensor,
    b: Tensor,
    statistic: Callable[[Tensor], Tensor] = first_mean,
    *,
    seed: int = 0,
    permutations: int = 9999,
) -> float:
    """Test two-sided whether two methods differ: under the null the two values of a sample may be swapped.

    Up to 12 samples all 2^N swaps are enumerated and p is exact; beyond, ``permutations`` are drawn and the observed
    one counts as one more (Phipson and Smyth 2010), so p is at least 1 / (permutations + 1).

    Args:
        a: (N,) or (N, C) values of unique samples.
        b: The other method's values of the same samples, in the same order.
        statistic: (..., C) means -> (...) the number compared, for example `f1_of_means`. By default the mean, where
            swapping is flipping the sign of a difference.
        seed: Of the draws.
        permutations: How many to draw.

    Returns:
        p.

    Raises:
        InputError: The shapes differ, there are no samples, a value is not finite, or ``permutations`` is below 1.

    Example:
        >>> paired_permutation_test(torch.tensor([0.5, 0.7, 0.9]), torch.tensor([0.1, 0.2, 0.3]))
        0.25
    """
    if a.shape != b.shape or a.dim() not in (1, 2) or not len(a) or permutations < 1:
        raise InputError(
            f"a {tuple(a.shape)} and b {tuple(b.shape)} must hold the same samples, one or more, and permutations "
            f"({permutations}) be 1 or more."
        )
    a, b = (side.detach().cpu().double().reshape(len(a), -1) for side in (a, b))
    if not bool((a.isfinite() & b.isfinite()).all()):
        raise InputError("a value is not finite. Leave out samples that are undefined for one of the two.")
    centre, half, n = (a + b).mean(0) / 2, (a - b) / (2 * len(a)), len(a)

    def gap(signs: Tensor) -> Tensor:
        moved = signs @ half
        return (statistic(centre + moved) - statistic(centre - moved)).abs()

    exact = n <= EXACT_UP_TO
    total = 2**n if exact else permutations
    generator = torch.Generator().manual_seed(seed)
    observed = gap(torch.ones(1, n, dtype=torch.double))
    # Equal gaps differ by rounding: in exact arithmetic they are as extreme as the observed one.
    least = observed - 1e-12 * max(float(half.abs().sum()), float(centre.abs().max()))
    extreme, size = 0, max(1, _CHUNK // n)
    for start in range(0, total, size):
        number = min(size, total - start)
        if exact:
            flips = torch.arange(start, start + number).unsqueeze(1).bitwise_right_shift(torch.arange(n)) & 1
        else:
            flips = torch.randint(2, (number, n), generator=generator)
        extreme += int((gap((1 - 2 * flips).double()) >= least).sum())
    return extreme / total if exact else (1 + extreme) / (1 + total)


def holm(p_values: Sequence[float]) -> list[float]:
    """Adjust p-values for their number, step down (Holm 1979): the chance of one false finding stays below the level.

    Args:
        p_values: P-values of one family.

    Returns:
        The adjusted ones in the same order, at most 1.

    Raises:
        InputError: A p-value is outside [0, 1].

    Example:
        >>> holm([0.01, 0.25, 0.02])
        [0.03, 0.25, 0.04]
    """
    for p in p_values:
        if not 0 <= p <= 1:
            raise InputError(f"the p-value {p} is not in [0, 1].")
    adjusted, least = [0.0] * len(p_values), 0.0
    for place, i in enumerate(sorted(range(len(p_values)), key=lambda i: p_values[i])):
        least = max(least, min(1.0, (len(p_values) - place) * p_values[i]))
        adjusted[i] = least
    return adjusted


def compare(
    rows: Iterable[Mapping[str, Any]],
    *,
    method: str | None = None,
    metrics: Collection[str] | None = None,
    seed: int = 0,
    resamples: int = 1000,
    permutations: int = 9999,
    level: float = 0.95,
) -> list[Difference]:
    """Hold one method against every other and against the random control, metric by metric, sample by sample.

    Args:
        rows: Rows of the metrics table, as in `summarise`.
        method: The method of interest; by default the first one.
        metrics: Keys as `metric_key` spells them and `iou_f1`; by default all that the method has.
        seed: Of the bootstrap and the permutations.
        resamples: Of the bootstrap; both methods share the resampled examples.
        permutations: Of the test, see `paired_permutation_test`.
        level: Of the intervals.

    Returns:
        One difference per metric and other method, in the order of first appearance, the control last; a pair without
        a common sample has none.

    Raises:
        InputError: ``method`` or one of ``metrics`` is unknown.
        MetricError: As in `summarise`.

    Example:
        >>> row = dict(control="none", metric="token_f1", operator=None, space=None, q=None)
        >>> a = [row | dict(method="a", sample_id=i, value=0.75) for i in range(4)]
        >>> b = [row | dict(method="b", sample_id=i, value=0.25) for i in range(4)]
        >>> found = compare(a + b)[0]
        >>> found.difference, found.p, found.n
        (0.5, 0.125, 4)
    """
    found = unique_values(rows)
    names = list(dict.fromkeys(name for name, control, _ in found if control == "none"))
    if not names:
        return []
    own = names[0] if method is None else method
    if own not in names:
        raise unknown("method", own, names)
    of_own = list(dict.fromkeys(metric for name, control, metric in found if (name, control) == (own, "none")))
    for metric in of_own if metrics is None else metrics:
        if metric not in of_own:
            raise unknown("metric", metric, of_own)
    others = [*((name, "none") for name in names if name not in (own, "random")), ("random", "random")]
    differences: list[Difference] = []
    for metric in of_own if metrics is None else dict.fromkeys(metrics):
        family: list[Difference] = []
        ids, values, statistic = found[own, "none", metric]
        for other, control in others:
            if (other, control, metric) not in found:
                continue
            a, b, unpaired = _paired(ids, values, *found[other, control, metric][:2])
            if not len(a):
                continue
            columns = a.shape[1]
            means = resampled_means(torch.cat([a, b], dim=1), seed=seed, resamples=resamples)
            moved = statistic(means[:, :columns]) - statistic(means[:, columns:])
            low, high = percentile_interval(moved, level)
            difference = float(statistic(a.mean(0)) - statistic(b.mean(0)))
            p = paired_permutation_test(a, b, statistic, seed=seed, permutations=permutations)
            family.append(Difference(metric, own, other, difference, low, high, p, p, len(a), unpaired))
        adjusted = holm([one.p for one in family])
        differences += [one._replace(p_adjusted=p) for one, p in zip(family, adjusted, strict=True)]
    return differences


def _paired(ids_a: Tensor, a: Tensor, ids_b: Tensor, b: Tensor) -> tuple[Tensor, Tensor, int]:
    """Keep the samples that both sides are defined for; also count those that only one is."""
    sides = [(ids[kept], values[kept]) for ids, values in ((ids_a, a), (ids_b, b)) for kept in [~values.isnan().any(1)]]
    (ids_a, a), (ids_b, b) = sides
    in_a, in_b = torch.isin(ids_a, ids_b, assume_unique=True), torch.isin(ids_b, ids_a, assume_unique=True)
    return a[in_a], b[in_b], int((~in_a).sum() + (~in_b).sum())
