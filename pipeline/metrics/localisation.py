"""Does a heatmap lie on the object that people outlined? (METRICS 3, images.) Shapes: H, W rows and columns."""

from __future__ import annotations

import torch
from torch import Tensor

from calig.pipeline.errors import InputError
from calig.pipeline.metrics.plausibility import average_precision


def pointing_game(heat: Tensor, mask: Tensor, *, tolerance: int = 0) -> float:
    """Return 1 if the most relevant place lies on the object, else 0 (Zhang et al. 2018); equal ones: the first by row.

    Args:
        heat: (H, W) signed relevance.
        mask: (H, W) not 0 on the object.
        tolerance: Also a hit within this Euclidean distance of the object, in cells (the paper: 15 pixels).

    Raises:
        InputError: The shapes differ, a value is not finite, the object is empty or ``tolerance`` is negative.

    Example:
        >>> pointing_game(torch.tensor([[0.1, 0.9], [0.2, 0.3]]), torch.tensor([[0, 1], [0, 0]]))
        1.0
    """
    heat, inside = _pair(heat, mask)
    if tolerance < 0:
        raise InputError(f"the tolerance is {tolerance}, expected 0 or more cells.")
    # argmax says nothing about equal values; nonzero lists places by row.
    peak = (heat == heat.max()).nonzero()[0]
    return float(bool(((inside.nonzero() - peak).square().sum(1) <= tolerance**2).any()))


def mask_auprc(heat: Tensor, mask: Tensor) -> float:
    """Compute the average precision of cells against the object, see `average_precision`.

    Args:
        heat: (H, W) signed relevance.
        mask: (H, W) not 0 on the object, which must be neither empty nor everything.

    Raises:
        InputError: The shapes differ, a value is not finite, or the object is empty or everything.

    Example:
        >>> mask_auprc(torch.tensor([[0.1, 0.9], [0.2, 0.3]]), torch.tensor([[0, 1], [1, 0]]))
        0.8333333333333333
    """
    heat, inside = _pair(heat, mask)
    return average_precision(heat.flatten(), inside.flatten())


def mask_iou(heat: Tensor, mask: Tensor) -> float:
    """Compute the IoU of the object and the cells above the map's mean (the threshold of Chefer et al. 2021).

    The foreground alone counts; their mIoU averages foreground and background.

    Args:
        heat: (H, W) signed relevance; a constant map selects nothing.
        mask: (H, W) not 0 on the object.

    Raises:
        InputError: The shapes differ, a value is not finite or the object is empty.

    Example:
        >>> mask_iou(torch.tensor([[0.0, 1.0], [0.0, 1.0]]), torch.tensor([[0, 1], [0, 0]]))
        0.5
    """
    heat, inside = _pair(heat, mask)
    # Not `heat > heat.mean()` alone: the rounded mean of equal values may lie below them.
    above = (heat > heat.mean()) & (heat > heat.min())
    return int((above & inside).sum()) / int((above | inside).sum())


def centre_prior(height: int, width: int) -> Tensor:
    """Make the map that knows nothing but that objects are in the middle: the control of the three metrics.

    A Gaussian bump whose standard deviation is a quarter of each side (ours).

    Args:
        height: H.
        width: W.

    Returns:
        (H, W) float64 values in (0, 1].

    Raises:
        InputError: A side is below 1.

    Example:
        >>> centre_prior(1, 3)
        tensor([[0.4111, 1.0000, 0.4111]], dtype=torch.float64)
    """
    if height < 1 or width < 1:
        raise InputError(f"a map of {height} x {width} cells: both sides must be 1 or more.")
    rows, columns = (
        ((torch.arange(side, dtype=torch.double) - (side - 1) / 2) / (side / 4)).square() for side in (height, width)
    )
    return (-(rows.unsqueeze(1) + columns) / 2).exp()


def _pair(heat: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    if heat.shape != mask.shape or heat.dim() != 2:
        raise InputError(f"heat {tuple(heat.shape)} and mask {tuple(mask.shape)} must both have the shape (H, W).")
    heat, inside = heat.detach().cpu().double(), mask.detach().cpu() != 0
    if not bool(heat.isfinite().all()):
        raise InputError("a value of the heatmap is not finite (NaN or infinity).")
    if not bool(inside.any()):
        raise InputError("the mask is empty: the metric is undefined, skip the example.")
    return heat, inside
