"""Generated scenes in which one object decides the class, and its mask is known exactly.

A scene is a textured background with one deciding object and up to two distractors. The deciding object is a cross, a
ring, a saltire or a pair of bars: that is the class. Distractors (discs, squares, triangles) have the same sizes and
colours, stand at random places too, and their look says nothing of the class. The place of the deciding object is
uniform over all places where it fits, whatever else is there, and every object is as often lighter as darker than the
background: neither a place nor a colour gives the class away. The vision twin of :mod:`calig.datamodules.controlled`.

Shapes: H = W = 32 pixels, C = 3 channels, S pixels across an object.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

import torch
from PIL import Image
from torch import Tensor

from calig.datamodules.image_processor import to_picture
from calig.pipeline.errors import InputError

LABELS: Final = ("cross", "ring", "saltire", "bars")
SIZE: Final = 32
"""Side of a scene in pixels."""
MAX_SCENES: Final = 1_000_000  # over all splits

# Chosen so that a ViT of four layers and width 96 with patches of 4 pixels reads the scenes from scratch within minutes
# on one thread, while a linear model of the centre or of the mean colour stays at chance.
_SIZES: Final = (11, 12, 13)
_DISTRACTORS: Final = ("disc", "square", "triangle")
_MOST_DISTRACTORS: Final = 2
_TRIES: Final = 20  # for a place that is still free; a distractor that finds none is left out
_TEXTURE: Final = 0.1  # standard deviation of the background's slow and fast variation
_GRAIN: Final = 0.04
_CONTRAST: Final = (0.45, 0.6)  # between an object and the background's mean, in brightness
_TINT: Final = 0.12  # how far single channels depart from that


@dataclass(frozen=True)
class Scene:
    """One scene.

    Attributes:
        picture: RGB.
        mask: Grey, 255 on the deciding object.
        label: Index of the class in ``LABELS``.
        place: (row, column) of the upper left corner of the object's box.
        side: Of that box, in pixels.
    """

    picture: Image.Image
    mask: Image.Image
    label: int
    place: tuple[int, int]
    side: int


def generate(sizes: Mapping[str, int], seed: int = 0) -> dict[str, list[Scene]]:
    """Draw the splits.

    Args:
        sizes: Split name -> number of scenes.
        seed: The same sizes and seed give the same scenes, whatever the state of any global generator.

    Returns:
        The splits in the order of ``sizes``; in each, the classes differ in number by at most one.

    Raises:
        InputError: A size is no whole number, is negative, or all together are more than a million.
    """
    for split, size in sizes.items():
        if isinstance(size, bool) or not isinstance(size, int) or size < 0:
            raise InputError(f"size of split '{split}' is {size!r}, expected a whole number of 0 or more.")
    if (total := sum(sizes.values())) > MAX_SCENES:
        raise InputError(f"the sizes {dict(sizes)} ask for {total} scenes, expected {MAX_SCENES} at most.")
    stamps = {(name, side): _stamp(name, side) for name in (*LABELS, *_DISTRACTORS) for side in _SIZES}
    splits = {}
    for number, (split, size) in enumerate(sizes.items()):
        generator = torch.Generator().manual_seed((seed * 1_000_003 + number) % 2**63)
        labels = (torch.arange(size) % len(LABELS))[torch.randperm(size, generator=generator)]
        splits[split] = [_draw(label, stamps, generator) for label in labels.tolist()]
    return splits


def _draw(label: int, stamps: Mapping[tuple[str, int], Tensor], generator: torch.Generator) -> Scene:
    def number(count: int) -> int:
        return int(torch.randint(count, (), generator=generator))

    def placed(side: int) -> tuple[int, int]:
        return number(SIZE - side + 1), number(SIZE - side + 1)

    scene = _background(generator)
    brightness = float(scene.mean())
    side = _SIZES[number(len(_SIZES))]
    place = placed(side)  # first, and without regard to the others: uniform
    taken = [(place, side)]
    objects = [(LABELS[label], place, side)]
    for _ in range(number(_MOST_DISTRACTORS + 1)):
        name, extent = _DISTRACTORS[number(len(_DISTRACTORS))], _SIZES[number(len(_SIZES))]
        tried = (placed(extent) for _ in range(_TRIES))
        free = (spot for spot in tried if not any(_overlap(spot, extent, *box) for box in taken))
        if (spot := next(free, None)) is not None:
            taken.append((spot, extent))
            objects.append((name, spot, extent))
    mask = torch.zeros(SIZE, SIZE, dtype=torch.uint8)
    for index, (name, (top, left), extent) in enumerate(objects):
        stamp = stamps[name, extent]
        low, high = _CONTRAST
        contrast = low + (high - low) * float(torch.rand((), generator=generator))
        colour = brightness + (contrast if number(2) else -contrast)
        tint = colour + _TINT * (2 * torch.rand(3, 1, 1, generator=generator) - 1)
        window = (slice(top, top + extent), slice(left, left + extent))
        surface = tint + _GRAIN * torch.randn(stamp.shape, generator=generator)
        scene[:, *window] = torch.where(stamp, surface, scene[:, *window])
        if index == 0:
            mask[window] = 255 * stamp.byte()
    pixels = (255 * scene.clamp(0, 1)).round().byte()
    grey = Image.frombytes("L", (SIZE, SIZE), bytes(mask.flatten().tolist()))
    return Scene(to_picture(pixels), grey, label, place, side)


def _background(generator: torch.Generator) -> Tensor:
    """(C, H, W): one colour of middle brightness, slow and fast variation of it, grain."""
    colour = 0.5 + 0.1 * (2 * torch.rand(3, 1, 1, generator=generator) - 1)
    texture = torch.zeros(1, 1, SIZE, SIZE)
    for cells in (3, 8):
        coarse = torch.randn(1, 1, cells, cells, generator=generator)
        texture += torch.nn.functional.interpolate(coarse, size=SIZE, mode="bilinear", align_corners=True)
    grain = torch.randn(3, SIZE, SIZE, generator=generator)
    return colour + _TEXTURE * texture[0] / 2**0.5 + _GRAIN * grain


def _overlap(one: tuple[int, int], side: int, other: tuple[int, int], extent: int) -> bool:
    return all(a < b + extent and b < a + side for a, b in zip(one, other, strict=True))


def _stamp(name: str, side: int) -> Tensor:
    """(S, S) bool: the pixels of a shape that fills its box."""
    middle = (side - 1) / 2
    line = (torch.arange(side) - middle) / (side / 2)  # pixel centres in (-1, 1)
    down, across = line[:, None].expand(side, side), line[None, :].expand(side, side)
    radius = (down**2 + across**2).sqrt()
    shapes = {
        "cross": (down.abs() < 0.3) | (across.abs() < 0.3),
        "ring": (radius < 1) & (radius > 0.55),
        "saltire": ((down - across).abs() < 0.42) | ((down + across).abs() < 0.42),
        "bars": (down.abs() > 0.4) & (down.abs() < 1),
        "disc": radius < 0.85,
        "square": torch.maximum(down.abs(), across.abs()) < 0.75,
        "triangle": across.abs() < (down + 1) / 2,
    }
    return shapes[name]
