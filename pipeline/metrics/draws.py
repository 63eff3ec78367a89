"""Do the scores say how much the logit falls when tokens go? Infidelity (Yeh et al. 2019), on tokens (METRICS 2).

Shapes: N evaluable positions of one example, D draws.
"""

from __future__ import annotations

import random

import torch
from torch import Tensor

from calig.pipeline.errors import InputError

DRAWS = 64
SHARE = 0.2


def infidelity(removed: Tensor, scores: Tensor, drops: Tensor) -> Tensor:
    """Compute `mean((b I.s - (f(x) - f(x without I)))^2)`, b the least-squares scale; lower is better, 0 is exact.

    `b = sum(I.s drop) / sum((I.s)^2)`, and 0 where every I.s is 0, so that scores of any unit compare; Captum's
    `normalize=True` is the same scale. It may be negative: infidelity does not see the sign of all scores together.

    Args:
        removed: (D, N) 1 (or True) where a draw removes the position.
        scores: (..., N) scores of the positions.
        drops: (D,) the logit of the explained class for the whole input minus that without the draw's positions.

    Returns:
        (...) infidelity, in squared logits.

    Raises:
        InputError: Shapes that do not fit.

    Example:
        >>> removed = torch.tensor([[1.0, 0.0], [1.0, 1.0]])
        >>> infidelity(removed, torch.tensor([[1.0, 2.0], [0.0, 1.0]]), torch.tensor([2.0, 6.0]))
        tensor([0., 2.])
    """
    if removed.dim() != 2 or scores.shape[-1:] != removed.shape[1:] or drops.shape != removed.shape[:1]:
        raise InputError(
            f"removed {tuple(removed.shape)}, scores {tuple(scores.shape)} and drops {tuple(drops.shape)} do not fit "
            "(D, N), (..., N) and (D,)."
        )
    predicted = scores @ removed.to(scores.dtype).T
    norm = predicted.square().sum(-1, keepdim=True)
    scale = (predicted * drops).sum(-1, keepdim=True) / norm.where(norm > 0, 1)
    return (scale * predicted - drops).square().mean(-1)


def removal_draws(n: int, *, seed: int, sample_id: int, draws: int = DRAWS, share: float = SHARE) -> Tensor:
    """Draw which positions go: each with probability ``share``, the same for all methods of a sample.

    Depends on the seed, the sample id and ``n`` only; not on batch, process, device or torch version.

    Args:
        n: The number of evaluable positions.
        seed: The run's seed.
        sample_id: The sample's id.
        draws: How many draws D.
        share: The probability that a position goes.

    Returns:
        (D, N) bool on the CPU, True where a position is removed.

    Example:
        >>> removal_draws(5, seed=0, sample_id=7).shape
        torch.Size([64, 5])
    """
    draw = random.Random(f"{seed}/{sample_id}/infidelity").random
    return torch.tensor([draw() < share for _ in range(draws * n)], dtype=torch.bool).view(draws, n)
