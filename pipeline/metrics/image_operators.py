"""What it means to remove patches from an image's pixels: the operators `mask` and `blur` (METRICS 1).

`delete` and `attention` take them away inside the model: `calig.pipeline.metrics.patches`.

Shapes: B images, C channels, H x W pixels, R requests, N = rows x columns patches, row by row.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from calig.pipeline.attribution.pixels import blur
from calig.pipeline.errors import InputError, unknown

ImageOperator = Literal["mask", "blur"]
IMAGE_OPERATORS: tuple[ImageOperator, ...] = ("mask", "blur")
_OF_THE_ENGINE = ("delete", "attention")


def perturb_image(
    pixels: Tensor,
    example: Sequence[int],
    keep: Tensor,
    operator: str,
    *,
    grid: tuple[int, int],
    mean: Tensor | None = None,
    sigma: float | None = None,
) -> Tensor:
    """Build the perturbed images of R requests: patches that are not kept change, the others stay to the bit.

    `mask` sets a patch to the data set's mean. `blur` takes the patch from the image blurred as a whole with a Gaussian
    (cut at three sigma, edges continued), so a blurred patch carries the colours of what surrounds it.

    Args:
        pixels: (B, C, H, W) float images, as the model takes them (normalised).
        example: R indices into the batch.
        keep: (R, N) bool, the patches that stay.
        operator: `mask` or `blur`.
        grid: Rows and columns of patches; they must divide H and W.
        mean: For `mask`: (C,) or (C, H, W) in the units of ``pixels``; for images normalised by the data set's mean,
            zeros.
        sigma: Of the Gaussian, in pixels; half the longer side of a patch if None.

    Returns:
        (R, C, H, W) images, on the device and in the dtype of ``pixels``.

    Raises:
        InputError: An operator that is unknown or that pixels cannot express, shapes that do not fit, no mean for
            `mask`, or a sigma that is not positive.

    Example:
        >>> image, keep = torch.ones(1, 1, 2, 4), torch.tensor([[True, False]])
        >>> perturb_image(image, [0], keep, "mask", grid=(1, 2), mean=torch.zeros(1)).tolist()
        [[[[1.0, 1.0, 0.0, 0.0], [1.0, 1.0, 0.0, 0.0]]]]
    """
    _check(pixels, example, keep, operator, grid)
    filled = patch_filling(pixels, operator, grid=grid, mean=mean, sigma=sigma)
    index = torch.as_tensor(example, dtype=torch.long, device=pixels.device)
    return paste_patches(pixels[index], filled[index], keep, grid)


def patch_filling(
    pixels: Tensor, operator: str, *, grid: tuple[int, int], mean: Tensor | None = None, sigma: float | None = None
) -> Tensor:
    """(B, C, H, W) what `perturb_image` puts in the place of patches; arguments as there."""
    if operator == "mask":
        return _mean_image(pixels, mean)
    side = max(pixels.shape[2] // grid[0], pixels.shape[3] // grid[1])
    return blur(pixels, side / 2 if sigma is None else sigma)


def paste_patches(pixels: Tensor, filled: Tensor, keep: Tensor, grid: tuple[int, int]) -> Tensor:
    """(R, C, H, W) images with the patches outside `keep` (R, N) taken from `filled`, both of that shape."""
    stays = keep.to(pixels.device, torch.bool).view(-1, 1, *grid)
    stays = stays.repeat_interleave(pixels.shape[2] // grid[0], 2).repeat_interleave(pixels.shape[3] // grid[1], 3)
    return torch.where(stays, pixels, filled)


def _mean_image(pixels: Tensor, mean: Tensor | None) -> Tensor:
    shape = tuple(pixels.shape[1:])
    if mean is None:
        raise InputError(
            f"the operator 'mask' needs the data set's mean, of shape ({shape[0]},) or {shape}. Give mean=..., "
            "or use the operator 'blur'."
        )
    if tuple(mean.shape) not in ((shape[0],), shape):
        raise InputError(f"mean has the shape {tuple(mean.shape)}, expected ({shape[0]},) or {shape}.")
    return (mean.view(-1, 1, 1) if mean.dim() == 1 else mean).to(pixels).expand(pixels.shape)


def _check(pixels: Tensor, example: Sequence[int], keep: Tensor, operator: str, grid: tuple[int, int]) -> None:
    if operator in _OF_THE_ENGINE:
        raise InputError(
            f"the operator '{operator}' drops patch tokens inside the model, which pixels cannot express; pixels take "
            "'mask' or 'blur'."
        )
    if operator not in IMAGE_OPERATORS:
        raise unknown("operator on images", operator, IMAGE_OPERATORS)
    if pixels.dim() != 4 or min(grid) < 1 or pixels.shape[2] % grid[0] or pixels.shape[3] % grid[1]:
        raise InputError(
            f"pixels {tuple(pixels.shape)} cannot be cut into a grid of {grid[0]} x {grid[1]} patches: expected "
            "(B, C, H, W) with H and W multiples of the grid."
        )
    if tuple(keep.shape) != (len(example), grid[0] * grid[1]):
        raise InputError(
            f"keep has the shape {tuple(keep.shape)}, expected ({len(example)}, {grid[0] * grid[1]}): one row per "
            "request, one column per patch."
        )
