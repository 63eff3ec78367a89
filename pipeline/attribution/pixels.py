"""Baselines of images (METHODS 0): pixels are replaced, so that patches, positions and [CLS] stay the model's own.

Shapes: B images of C channels, height H and width W, as the model takes them: after the processor's normalisation.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from calig.pipeline.errors import InputError, unknown

BLUR = 1 / 20  # standard deviation of the blur as a share of the longer side: 11 pixels at 224


def baseline_pixels(pixels: Tensor, baseline: str, processor: Any) -> Tensor:
    """The pixels of the baseline x'.

    Args:
        pixels: (B, C, H, W).
        baseline: `black`; `mean` (and `pad`, which becomes `mean` where there is no pad token): the data set's mean
            colour; or `blur`, a Gaussian blur of the image itself.
        processor: The image processor, which says how pixels were normalised. Without one `mean` is 0, which is the
            mean colour of every model that normalises its input.

    Raises:
        InputError: A baseline of text, or `black` without a processor.
    """
    if baseline == "blur":
        return blur(pixels, BLUR * max(pixels.shape[-2:]))
    if baseline in ("mean", "pad"):
        return _colour(pixels, processor, black=False) if processor is not None else torch.zeros_like(pixels)
    if baseline == "black":
        if processor is None:
            raise InputError(
                "baseline 'black' needs to know how pixels were normalised; pass the image processor as `tokenizer=`, "
                "or take 'mean' or 'blur'."
            )
        return _colour(pixels, processor, black=True)
    raise InputError(f"baseline '{baseline}' is for text; images take black, mean, blur or zero.")


def patch_grid(height: int, width: int, count: int, patch_size: Any = None) -> tuple[int, int]:
    """Rows and columns of an image's patches, in the order of its positions: row by row.

    Args:
        height: H.
        width: W.
        count: Number of patches.
        patch_size: Side of a patch in pixels, or (height, width), as the model's config says it; without one, or where
            it does not fit, patches are taken for squares.

    Raises:
        InputError: No grid of that many patches fits the image.

    Example:
        >>> patch_grid(32, 64, 8), patch_grid(32, 64, 16, (16, 8))
        ((2, 4), (2, 8))
    """
    if patch_size is not None:
        tall, wide = patch_size if isinstance(patch_size, Sequence) else (patch_size, patch_size)
        if (height // tall) * (width // wide) == count:
            return height // tall, width // wide
    rows = round((count * height / width) ** 0.5)
    columns = round((count * width / height) ** 0.5)
    if rows * columns != count or not count:
        raise InputError(f"an image of {height} x {width} pixels has no grid of {count} square patches.")
    return rows, columns


def to_pixels(
    scores: Tensor, grid: tuple[int, int], size: tuple[int, int], how: Literal["nearest", "bilinear"] = "bilinear"
) -> Tensor:
    """Spread the scores of patches over an image's pixels.

    Args:
        scores: (..., N) scores, row by row.
        grid: Rows and columns; their product is N.
        size: Height and width of the map.
        how: `nearest` gives every pixel its patch's score; `bilinear` puts the score in the patch's middle and draws
            straight lines between the middles, beyond the outermost of them it continues the edge.

    Returns:
        (..., H, W).

    Raises:
        InputError: N is no such grid, or ``how`` is unknown.

    Example:
        >>> to_pixels(torch.tensor([0.0, 1.0]), (1, 2), (1, 4)).tolist()
        [[0.0, 0.25, 0.75, 1.0]]
    """
    if how not in ("nearest", "bilinear"):
        raise unknown("interpolation", how, ("nearest", "bilinear"))
    if scores.shape[-1] != grid[0] * grid[1]:
        raise InputError(f"{scores.shape[-1]} scores are no grid of {grid[0]} x {grid[1]} patches.")
    maps = scores.reshape(-1, 1, *grid)
    smooth = {"align_corners": False} if how == "bilinear" else {}
    spread = nn.functional.interpolate(maps, size=size, mode="nearest-exact" if how == "nearest" else how, **smooth)
    return spread.reshape(*scores.shape[:-1], *size)


def blur(pixels: Tensor, sigma: float) -> Tensor:
    """Blur images with a Gaussian, cut off at three standard deviations, edges continued outwards.

    Args:
        pixels: (B, C, H, W).
        sigma: Standard deviation in pixels.

    Raises:
        InputError: `sigma` is not positive.
    """
    if not 0 < sigma < float("inf"):
        raise InputError(f"sigma = {sigma} must be positive: the width of the Gaussian in pixels.")
    reach = max(1, round(3 * sigma))
    offsets = torch.arange(-reach, reach + 1, dtype=torch.double)
    kernel = torch.exp(-0.5 * (offsets / sigma) ** 2)
    kernel = (kernel / kernel.sum()).to(pixels).expand(pixels.shape[1], 1, 1, -1)
    padded = nn.functional.pad(pixels, (reach,) * 4, mode="replicate")
    rows = nn.functional.conv2d(padded, kernel, groups=pixels.shape[1])
    return nn.functional.conv2d(rows, kernel.transpose(2, 3), groups=pixels.shape[1])


def normalisation(processor: Any) -> tuple[Any, Any, bool]:
    """Mean and standard deviation per channel that an image processor knows, and whether it normalises by them."""
    processor = getattr(processor, "image_processor", processor)
    mean, std = getattr(processor, "image_mean", None), getattr(processor, "image_std", None)
    return mean, std, bool(getattr(processor, "do_normalize", False)) and mean is not None and std is not None


def _colour(pixels: Tensor, processor: Any, *, black: bool) -> Tensor:
    """One colour per channel, taken through the processor's scaling and normalisation."""
    mean, std, normalised = normalisation(processor)
    if mean is None and not black:
        name = type(getattr(processor, "image_processor", processor)).__name__
        raise InputError(
            f"baseline 'mean' needs the mean colour, and {name} has no `image_mean`; take 'black' or 'blur'."
        )
    # `image_mean` is in the unit that pixels have after rescaling.
    raw = torch.zeros(pixels.shape[1]) if black else _per_channel(mean, pixels)
    if normalised:
        raw = (raw - _per_channel(mean, pixels)) / _per_channel(std, pixels)
    return raw.to(pixels)[:, None, None].expand_as(pixels).clone()


def _per_channel(values: Any, pixels: Tensor) -> Tensor:
    found = torch.as_tensor(values, dtype=torch.float32).flatten()
    if len(found) not in (1, pixels.shape[1]):
        raise InputError(
            f"the image processor has {len(found)} channel means, the images have {pixels.shape[1]} channels."
        )
    return found.expand(pixels.shape[1])
