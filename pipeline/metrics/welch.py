"""Welch's t-test, for two lists whose spreads differ."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from calig.pipeline.errors import InputError

_TERMS = 10_000
_TINY = 1e-300


class Welch(NamedTuple):
    """The statistic, Welch-Satterthwaite's degrees of freedom, and the two-sided p-value."""

    t: float
    df: float
    p: float


def welch_test(a: Sequence[float], b: Sequence[float]) -> Welch:
    """Test, two-sided, whether two lists have the same mean (Welch 1947).

    Where neither list varies there is nothing to divide by: equal means give t = 0 and p = 1, others t = +-inf, p = 0.

    Args:
        a: At least two finite values.
        b: At least two finite values.

    Raises:
        InputError: A list has fewer than two values, or one that is not finite.

    Example:
        >>> found = welch_test([1.0, 2.0, 3.0], [2.0, 4.0, 6.0, 8.0])
        >>> round(found.t, 4), round(found.df, 4), round(found.p, 4)
        (-2.1213, 4.0755, 0.0999)
    """
    for values in (a, b):
        if len(values) < 2 or not all(map(math.isfinite, values)):
            raise InputError(f"Welch's test takes lists of two finite values or more, got {list(values)[:5]}.")
    (mean_a, part_a), (mean_b, part_b) = _mean_and_variance(a), _mean_and_variance(b)
    difference, total = mean_a - mean_b, part_a + part_b
    if total == 0:
        equal = difference == 0
        return Welch(0.0 if equal else math.copysign(math.inf, difference), math.inf, float(equal))
    # By shares of the whole: the squares of tiny variances would vanish.
    share = part_a / total
    df = 1 / (share**2 / (len(a) - 1) + (1 - share) ** 2 / (len(b) - 1))
    t = difference / math.sqrt(total)
    return Welch(t, df, t_two_sided(t, df))


def t_two_sided(t: float, df: float) -> float:
    """Probability that a Student t of `df` degrees of freedom is at least as far from 0 as `t`.

    Example:
        >>> round(t_two_sided(2.228138852, 10), 6)
        0.05
    """
    return regularised_incomplete_beta(df / 2, 0.5, df / (df + t * t))


def regularised_incomplete_beta(a: float, b: float, x: float) -> float:
    """Compute I_x(a, b) by its continued fraction (Lentz; Numerical Recipes 6.4).

    Args:
        a: Positive.
        b: Positive.
        x: In [0, 1].

    Example:
        >>> round(regularised_incomplete_beta(2, 3, 0.5), 6)
        0.6875
    """
    if x <= 0 or x >= 1:
        return float(x >= 1)
    if x > (a + 1) / (a + b + 2):  # the fraction converges fast on the other side
        return 1 - regularised_incomplete_beta(b, a, 1 - x)
    log_front = math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b) + a * math.log(x) + b * math.log1p(-x)
    c, d = 1.0, 1 / _away_from_zero(1 - (a + b) * x / (a + 1))
    fraction = d
    for m in range(1, _TERMS):
        even = m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m))
        odd = -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1))
        factor = 1.0
        for term in (even, odd):
            d = 1 / _away_from_zero(1 + term * d)
            c = _away_from_zero(1 + term / c)
            factor = c * d
            fraction *= factor
        if abs(factor - 1) < 1e-15:
            break
    return math.exp(log_front) * fraction / a


def _away_from_zero(value: float) -> float:
    return value if abs(value) > _TINY else _TINY


def _mean_and_variance(values: Sequence[float]) -> tuple[float, float]:
    """The mean, and the variance of the mean."""
    count = len(values)
    mean = math.fsum(values) / count
    return mean, math.fsum((value - mean) ** 2 for value in values) / (count - 1) / count
