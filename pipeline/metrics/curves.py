"""Areas under perturbation curves: deletion and insertion, positive and negative perturbation (METRICS 2).

Shapes: G points of the grid.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from calig.pipeline.errors import InputError

GRID = tuple(a / 10 for a in range(11))  # shares removed or kept: 0, 0.1, ..., 1
ACCURACY_GRID = GRID[:-1]  # Chefer et al. stop at 0.9


def deletion_auc(removed: Tensor) -> Tensor:
    """Compute the area under p(x without the top k(q)), q = 0, 0.1, ..., 1 (MoRF); lower is better.

    Args:
        removed: (..., 11) probability (or logit) of the explained class along `GRID`.

    Returns:
        (...) the trapezoid on [0, 1].

    Raises:
        InputError: There is not one value per point of the grid.

    Example:
        >>> deletion_auc(torch.tensor([1.0] + [0.0] * 10))
        tensor(0.0500)
    """
    return _trapezoid(removed, GRID)


def insertion_auc(kept: Tensor) -> Tensor:
    """Compute the area under p(the top k(q) only), q = 0, 0.1, ..., 1; higher is better.

    Args:
        kept: (..., 11) probability (or logit) of the explained class along `GRID`.

    Returns:
        (...) the trapezoid on [0, 1].

    Raises:
        InputError: There is not one value per point of the grid.

    Example:
        >>> insertion_auc(torch.tensor([0.0] + [1.0] * 10))
        tensor(0.9500)
    """
    return _trapezoid(kept, GRID)


def perturbation_auc(correct: Tensor) -> Tensor:
    """Compute `100 x` the area under the accuracy while removing q = 0, 0.1, ..., 0.9 (Chefer et al., CVPR 2021).

    Positive perturbation removes the most relevant first (lower is better), negative the least relevant (higher is
    better). The area is that of [0, 0.9] and is not rescaled, so it is at most 90. It is linear in the curve: of a
    sample the curve is 0 or 1, and the mean of the samples' areas is the area under the data set's accuracy.

    Args:
        correct: (..., 10) whether argmax is the reference class, along `ACCURACY_GRID`; or a mean of it.

    Returns:
        (...) the area, 0 to 90.

    Raises:
        InputError: There is not one value per point of the grid.

    Example:
        >>> round(perturbation_auc(torch.ones(10)).item(), 4)
        90.0
    """
    return 100 * _trapezoid(correct, ACCURACY_GRID)


def _trapezoid(values: Tensor, grid: Sequence[float]) -> Tensor:
    if values.shape[-1:] != (len(grid),):
        raise InputError(
            f"the curve has the shape {tuple(values.shape)}, expected {len(grid)} values in the last dimension, one "
            f"for each share {grid[0]:g}, {grid[1]:g}, ..., {grid[-1]:g}."
        )
    return (values * torch.tensor(trapezoid_weights(len(grid)), dtype=values.dtype, device=values.device)).sum(-1)


def trapezoid_weights(points: int) -> list[float]:
    """Return the weight of each point of a grid with steps of 0.1."""
    return [0.05 if i in (0, points - 1) else 0.1 for i in range(points)]
