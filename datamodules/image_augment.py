"""Light augmentation of training images, a function of (seed, epoch, row) and nothing else.

Shapes: C channels, H x W pixels.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

Augment = Literal["none", "flip", "crop_flip"]
SHIFT = 8
"""``crop_flip`` shifts an image by at most one eighth of its side: 4 pixels of 32."""


def augment(pixels: Tensor, mask: Tensor | None, how: Augment, seed: int, epoch: int, row: int) -> tuple[Tensor, ...]:
    """Flip an image from left to right half of the time; ``crop_flip`` shifts it too, and mirrors it at its edges.

    Args:
        pixels: (C, H, W).
        mask: (H, W), moved along; None: there is none.
        how: ``flip`` or ``crop_flip``; ``none`` gives back what was given.
        seed: Of the run.
        epoch: From 0.
        row: In the data set.

    Returns:
        The image, and the mask where there is one.
    """
    given = (pixels,) if mask is None else (pixels, mask)
    if how == "none":
        return given
    generator = torch.Generator().manual_seed(((seed * 1_000_003 + epoch) * 1_000_003 + row) % 2**63)
    flipped = bool(torch.rand((), generator=generator) < 0.5)
    places = []
    for side in pixels.shape[-2:]:
        place = torch.arange(side)
        if how == "crop_flip":
            most = side // SHIFT
            place = place + int(torch.randint(-most, most + 1, (), generator=generator))
            place = place.abs()
            place = side - 1 - (side - 1 - place).abs()
        places.append(place)
    rows, columns = places
    if flipped:
        columns = columns.flip(0)
    return tuple(part[..., rows, :][..., columns] for part in given)
