"""Rankings of positions, and how many of them a share is, in exact integers (METRICS, notation)."""

from __future__ import annotations

import random

import torch
from torch import Tensor

from calig.pipeline.errors import InputError


def count(q: float, n: int) -> int:
    """Return how many of ``n`` positions the share ``q`` is: 0 for q = 0, else ``max(1, ceil(q n))``.

    Exact integers (q = a/1000, k = -(-a n // 1000)): with floats, 0.1 * 30 rounds up to 4. No positions: 0.

    Args:
        q: A share in [0, 1], a multiple of 0.001.
        n: The number of evaluable positions.

    Raises:
        InputError: ``q`` is outside [0, 1] or no multiple of 0.001, or ``n`` is negative.

    Example:
        >>> [count(q, 30) for q in (0, 0.01, 0.1, 0.5, 1)]
        [0, 1, 3, 15, 30]
    """
    if not 0 <= q <= 1 or abs(q * 1000 - round(q * 1000)) > 1e-6:
        raise InputError(f"the share q = {q} is not a multiple of 0.001 in [0, 1]. Use for example 0.01 or 0.5.")
    if n < 0:
        raise InputError(f"the number of positions is {n}, expected 0 or more.")
    return -(-round(q * 1000) * n // 1000)


def rank(scores: Tensor, evaluable: Tensor) -> Tensor:
    """Rank the evaluable positions of one example by descending signed score, ties by position.

    Args:
        scores: (T,) finite scores.
        evaluable: (T,) bool, True at positions that are neither special nor padding.

    Returns:
        (N,) int64 positions on the CPU, most relevant first.

    Raises:
        InputError: The shapes differ or are not one-dimensional.

    Example:
        >>> rank(torch.tensor([9.0, 1.0, 2.0, 1.0]), torch.tensor([False, True, True, True])).tolist()
        [2, 1, 3]
    """
    if scores.shape != evaluable.shape or scores.dim() != 1:
        raise InputError(
            f"scores {tuple(scores.shape)} and evaluable {tuple(evaluable.shape)} must both have the shape (T,): "
            "rank one example at a time."
        )
    values = scores.detach().cpu()
    positions = evaluable.cpu().nonzero().squeeze(1)
    return positions[torch.argsort(values[positions], descending=True, stable=True)]


def reverse(ranking: Tensor) -> Tensor:
    """Return the control `reversed`: the exact reversal of a ranking, ties too."""
    return ranking.flip(0)


def random_rank(evaluable: Tensor, *, seed: int, sample_id: int) -> Tensor:
    """Rank the evaluable positions at random: the control `random`.

    Depends on the seed, the sample id and the evaluable positions only; not on batch, process, device or torch version.

    Args:
        evaluable: (T,) bool.
        seed: The run's seed.
        sample_id: The sample's id.

    Returns:
        (N,) int64 positions on the CPU.

    Example:
        >>> every = torch.ones(5, dtype=torch.bool)
        >>> sorted(random_rank(every, seed=0, sample_id=7).tolist())
        [0, 1, 2, 3, 4]
    """
    positions = evaluable.cpu().nonzero().squeeze(1)
    order = list(range(len(positions)))
    random.Random(f"{seed}/{sample_id}").shuffle(order)
    return positions[torch.tensor(order, dtype=torch.long)]


def random_scores(ranking: Tensor, width: int, *, seed: int, sample_id: int) -> Tensor:
    """Score positions at random so that they rank as ``ranking``: the control `random` of metrics that read scores.

    Args:
        ranking: (N,) positions, most relevant first, as `random_rank` returns them.
        width: The number of positions T.
        seed: The run's seed.
        sample_id: The sample's id.

    Returns:
        (T,) float32 scores on the CPU, N uniform draws on [-1, 1) and 0 elsewhere.

    Example:
        >>> ranking = torch.tensor([2, 0])
        >>> scores = random_scores(ranking, 4, seed=0, sample_id=7)
        >>> rank(scores, torch.tensor([True, False, True, False])).tolist(), scores[1].item()
        ([2, 0], 0.0)
    """
    draw = random.Random(f"{seed}/{sample_id}/scores").random
    values = sorted((2 * draw() - 1 for _ in range(len(ranking))), reverse=True)
    return torch.zeros(width).scatter_(0, ranking, torch.tensor(values))


def as_scores(ranking: Tensor, width: int) -> Tensor:
    """Turn a ranking into scores that rank so, to measure it like a method.

    Args:
        ranking: (N,) positions, most relevant first.
        width: The number of positions T.

    Returns:
        (T,) float32 scores on the CPU: N, N - 1, ..., 1 and 0 elsewhere.

    Example:
        >>> as_scores(torch.tensor([3, 1]), 4).tolist()
        [0.0, 1.0, 0.0, 2.0]
    """
    return torch.zeros(width).scatter_(0, ranking, torch.arange(len(ranking), 0, -1).float())
