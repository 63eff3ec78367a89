"""What files hold to pictures: red, green and blue in 8 bits each, upright, on white; and masks of them."""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from PIL import Image, ImageChops, ImageOps

from calig.datamodules.rows import gist
from calig.pipeline.errors import InputError

Source = Path | bytes | Callable[[], bytes] | Image.Image
"""Where an encoded image comes from; or the picture itself."""

_DEEP = ("I", "F")  # and I;16, I;16B, ...: more than 8 bits per pixel


class CorruptImage(InputError):
    """An image that is not there or cannot be read."""


def picture(source: Source, place: str) -> Image.Image:
    """Read an image and convert it to RGB.

    Transparent pixels show white, the orientation that a camera noted is applied, and of an animation the first frame
    is taken. Grey images of 16 bits keep their full range: white is 65535.

    Args:
        source: See ``Source``.
        place: How messages name it.

    Raises:
        CorruptImage: It is not there, no image, cut off, or too large to be one (more than 178 million pixels).
    """
    return _read(source, place, _rgb)


def mask_picture(source: Source, place: str) -> Image.Image:
    """Read a mask: grey, 255 where any channel (or the palette's index) is not 0, else 0.

    Raises:
        CorruptImage: As for ``picture``.
    """
    return _read(source, place, _nonzero)


def _read(source: Source, place: str, convert: Callable[[Image.Image], Image.Image]) -> Image.Image:
    if isinstance(source, Image.Image):
        return convert(source)
    try:
        data = source.read_bytes() if isinstance(source, Path) else source if isinstance(source, bytes) else source()
        with warnings.catch_warnings():
            # Large scans and damaged metadata: what is wrong with the pixels is an error, below.
            warnings.simplefilter("ignore")
            image: Any = Image.open(io.BytesIO(data))
            image.load()
            return convert(ImageOps.exif_transpose(image))
    except MemoryError:
        raise
    except Exception as error:  # whatever the readers of many formats raise
        raise CorruptImage(
            f"{place} cannot be read as an image: {gist(error)} Mend or remove it, or leave such images out with "
            "data.on_corrupt=skip."
        ) from error


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode in _DEEP or image.mode.startswith("I;"):
        image = _eight_bits(image)
    if "A" in image.getbands() or "a" in image.getbands() or "transparency" in image.info:
        canvas = Image.new("RGBA", image.size, "white")
        canvas.alpha_composite(image.convert("RGBA"))
        image = canvas
    return image.convert("RGB")


def _eight_bits(image: Image.Image) -> Image.Image:
    """Grey of 16 or 32 bits, or of floats, to 8 bits; by the range of the format, so that dark images stay dark."""
    largest = float(image.getextrema()[1])  # type: ignore[arg-type]  # one band
    full = max(65535.0, largest)
    if image.mode == "F":
        full = 1.0 if largest <= 1 else max(255.0, largest)
    # PIL takes linear functions only, and cuts off what follows the point.
    return image.convert("F").point(lambda value: value * (255 / full) + 0.5).convert("L")


def _nonzero(image: Image.Image) -> Image.Image:
    if image.mode == "P":
        grey = Image.frombytes("L", image.size, image.tobytes())
    elif len(image.getbands()) == 1:
        grey = image.convert("F").point(lambda value: value * 2.0**20 + 0.0).convert("L")
    else:
        bands = image.convert("RGB").split()
        grey = ImageChops.lighter(ImageChops.lighter(bands[0], bands[1]), bands[2])
    return grey.point(lambda value: 255 if value else 0)
