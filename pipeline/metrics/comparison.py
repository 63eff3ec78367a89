"""Is one method better than another? Paired tests on the samples that both have, and their adjustment."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from calig.pipeline.errors import InputError, unknown
from calig.pipeline.metrics.statistics import (
    Key,
    Values,
    first_mean,
    percentile_interval,
    resampled_means,
    unique_values,
)

Statistic = Callable[[Tensor], Tensor]

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
    return paired_permutation_tests([(a, b, statistic)], seed=seed, permutations=permutations)[0]


def paired_permutation_tests(
    pairs: Sequence[tuple[Tensor, Tensor, Statistic]], *, seed: int = 0, permutations: int = 9999
) -> list[float]:
    """Run `paired_permutation_test` for many pairs; those of one number of samples share their draws, most of the time.

    Args:
        pairs: (a, b, statistic) each, as in `paired_permutation_test`.
        seed: Of the draws.
        permutations: How many to draw.

    Returns:
        One p per pair, the same as of each alone.

    Raises:
        InputError: As in `paired_permutation_test`.
    """
    groups: dict[int, list[tuple[int, _Swaps]]] = {}
    for place, (a, b, statistic) in enumerate(pairs):
        _check_pair(a, b, permutations)
        a, b = (side.detach().cpu().double().reshape(len(a), -1) for side in (a, b))
        groups.setdefault(len(a), []).append((place, _Swaps.of(a, b, statistic)))
    found = [0.0] * len(pairs)
    for n, group in groups.items():
        exact = n <= EXACT_UP_TO
        total = 2**n if exact else permutations
        generator = torch.Generator().manual_seed(seed)
        halves = torch.cat([swaps.half for _, swaps in group], dim=1)
        widths = [swaps.half.shape[1] for _, swaps in group]
        extreme, size = [0] * len(group), max(1, _CHUNK // n)
        for start in range(0, total, size):
            number = min(size, total - start)
            if exact:
                flips = torch.arange(start, start + number).unsqueeze(1).bitwise_right_shift(torch.arange(n)) & 1
            else:
                flips = torch.randint(2, (number, n), generator=generator)
            moved = ((1 - 2 * flips).double() @ halves).split(widths, dim=1)
            for i, (_, swaps) in enumerate(group):
                extreme[i] += int((swaps.gap(moved[i]) >= swaps.least).sum())
        for count, (place, _) in zip(extreme, group, strict=True):
            found[place] = count / total if exact else (1 + count) / (1 + total)
    return found


class _Swaps(NamedTuple):
    """A pair as what swapping moves: the statistic of `centre` plus and minus signs times `half`, (C,) and (N, C)."""

    centre: Tensor
    half: Tensor
    statistic: Statistic
    least: float

    @classmethod
    def of(cls, a: Tensor, b: Tensor, statistic: Statistic) -> _Swaps:
        centre, half = (a + b).mean(0) / 2, (a - b) / (2 * len(a))
        observed = float(cls(centre, half, statistic, 0.0).gap(half.sum(0)))
        # Equal gaps differ by rounding: in exact arithmetic they are as extreme as the observed one.
        return cls(centre, half, statistic, observed - 1e-12 * max(float(half.abs().sum()), float(centre.abs().max())))

    def gap(self, moved: Tensor) -> Tensor:
        return (self.statistic(self.centre + moved) - self.statistic(self.centre - moved)).abs()


def _check_pair(a: Tensor, b: Tensor, permutations: int) -> None:
    if a.shape != b.shape or a.dim() not in (1, 2) or not len(a) or permutations < 1:
        raise InputError(
            f"a {tuple(a.shape)} and b {tuple(b.shape)} must hold the same samples, one or more, and permutations "
            f"({permutations}) be 1 or more."
        )
    if not bool((a.isfinite() & b.isfinite()).all()):
        raise InputError("a value is not finite. Leave out samples that are undefined for one of the two.")


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
    keys = of_own if metrics is None else dict.fromkeys(metrics)
    pairs = [((own, "none", metric), (*other, metric)) for metric in keys for other in others]
    every = differences(found, pairs, seed=seed, resamples=resamples, permutations=permutations, level=level)
    return [one for one in every if one is not None]


def differences(
    found: Mapping[Key, Values],
    pairs: Iterable[tuple[Key, Key]],
    *,
    seed: int = 0,
    resamples: int = 1000,
    permutations: int = 9999,
    level: float = 0.95,
) -> list[Difference | None]:
    """Hold pairs of methods against each other, on the samples that both are defined for.

    Args:
        found: As `unique_values` returns it.
        pairs: The keys of the method of interest and of the other, for one metric; all pairs of a metric are one
            family for Holm's adjustment.
        seed: As in `compare`.
        resamples: As in `compare`.
        permutations: As in `compare`.
        level: As in `compare`.

    Returns:
        One difference per pair, in their order; None for one that has no sample in common or is not there.
    """
    rows: dict[int, Difference] = {}
    tested: list[tuple[Tensor, Tensor, Statistic]] = []
    pairs = list(pairs)
    for place, (own, other) in enumerate(pairs):
        if own not in found or other not in found:
            continue
        ids, values, statistic = found[own]
        a, b, unpaired = _paired(ids, values, *found[other][:2])
        if not len(a):
            continue
        columns = a.shape[1]
        means = resampled_means(torch.cat([a, b], dim=1), seed=seed, resamples=resamples)
        low, high = percentile_interval(statistic(means[:, :columns]) - statistic(means[:, columns:]), level)
        difference = float(statistic(a.mean(0)) - statistic(b.mean(0)))
        rows[place] = Difference(own[2], own[0], other[0], difference, low, high, 1.0, 1.0, len(a), unpaired)
        tested.append((a, b, statistic))
    p_values = dict(zip(rows, paired_permutation_tests(tested, seed=seed, permutations=permutations), strict=True))
    families: dict[str, list[int]] = {}
    for place, row in rows.items():
        families.setdefault(row.metric, []).append(place)
    for family in families.values():
        for place, p in zip(family, holm([p_values[i] for i in family]), strict=True):
            rows[place] = rows[place]._replace(p=p_values[place], p_adjusted=p)
    return [rows.get(place) for place in range(len(pairs))]


def _paired(ids_a: Tensor, a: Tensor, ids_b: Tensor, b: Tensor) -> tuple[Tensor, Tensor, int]:
    """Keep the samples that both sides are defined for; also count those that only one is."""
    sides = [(ids[kept], values[kept]) for ids, values in ((ids_a, a), (ids_b, b)) for kept in [~values.isnan().any(1)]]
    (ids_a, a), (ids_b, b) = sides
    in_a, in_b = torch.isin(ids_a, ids_b, assume_unique=True), torch.isin(ids_b, ids_a, assume_unique=True)
    return a[in_a], b[in_b], int((~in_a).sum() + (~in_b).sum())
