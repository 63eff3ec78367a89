"""The deciding object of an image, as its data tell it: a mask, boxes, or the regions of a COCO file."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from PIL import Image, ImageChops, ImageDraw

from calig.datamodules.image_pixels import Source, mask_picture
from calig.datamodules.rows import gist
from calig.pipeline.errors import InputError

Size = tuple[int, int]
"""(width, height) of the upright picture."""


@dataclass(frozen=True)
class Regions:
    """The parts of a picture that belong to the object.

    Attributes:
        boxes: (left, top, right, bottom) in pixels; right and bottom are the first outside.
        polygons: Corners (x, y) in pixels.
        runs: (width, height, lengths of runs of 0, 1, 0, ... down the columns).
    """

    boxes: Sequence[tuple[float, float, float, float]] = ()
    polygons: Sequence[Sequence[tuple[float, float]]] = ()
    runs: Sequence[tuple[int, int, Sequence[int]]] = ()

    def draw(self, size: Size, place: str) -> Image.Image:
        """The mask: grey, 255 inside.

        Raises:
            InputError: Runs belong to a picture of another size, or nothing lies inside of the picture.
        """
        mask = Image.new("L", size, 0)
        pen = ImageDraw.Draw(mask)
        for left, top, right, bottom in self.boxes:
            first, last = (math.floor(left), math.floor(top)), (math.ceil(right) - 1, math.ceil(bottom) - 1)
            pen.rectangle((*first, max(first[0], last[0]), max(first[1], last[1])), fill=255)
        for corners in self.polygons:
            pen.polygon(list(corners), fill=255)
        for width, height, lengths in self.runs:
            if (width, height) != size or sum(lengths) != width * height:
                raise InputError(f"{place}: a mask in runs is of {width} x {height} pixels, the image of {_by(size)}.")
            run = b"".join(bytes([255 * (turn % 2)]) * length for turn, length in enumerate(lengths))
            columns = Image.frombytes("L", (height, width), run)  # run-lengths go down the columns
            mask = ImageChops.lighter(mask, columns.transpose(Image.Transpose.TRANSPOSE))
            pen = ImageDraw.Draw(mask)
        if mask.getbbox() is None:
            raise InputError(f"{place}: its boxes or polygons lie outside of the image of {_by(size)} pixels.")
        return mask


MaskSource = Regions | Source | list[Any]
"""Regions, an encoded mask image, or rows of 0 and 1."""


def draw_mask(source: MaskSource, size: Size, place: str) -> Image.Image:
    """The mask of a picture: grey, 255 on the object.

    Raises:
        InputError: It cannot be read, or has another size than the picture.
    """
    if isinstance(source, Regions):
        return source.draw(size, place)
    what = f"the mask of {place}"
    mask = _of_rows(source, what) if isinstance(source, list) else mask_picture(source, what)
    if mask.size != size:
        raise InputError(f"{what} has {_by(mask.size)} pixels, the image {_by(size)}. Save both at one size.")
    return mask


def parse_boxes(value: Any, place: str, column: str) -> Regions | None:
    """Boxes as a column holds them: ``[left, top, right, bottom]`` or a list of such, also as JSON; None: unknown.

    Raises:
        InputError: It is something else, or a box that ends before it begins.
    """
    given = value
    if isinstance(value, str):
        try:
            value = json.loads(value) if value.strip() else None
        except ValueError:
            value = 0
    if value is None or value == []:
        return None
    if isinstance(value, list) and not isinstance(value[0], (list, tuple)):
        value = [value]
    try:
        boxes = [tuple(float(number) for number in box) for box in value]
        if all(len(box) == 4 and box[0] < box[2] and box[1] < box[3] for box in boxes):
            return Regions(boxes=boxes)  # type: ignore[arg-type]  # four of them
    except (TypeError, ValueError):
        pass
    raise InputError(
        f"{place}: column '{column}' holds {str(given)[:60]!r}, no boxes. Expected [left, top, right, bottom] in "
        "pixels, or a list of them."
    )


@dataclass(frozen=True)
class Annotations:
    """A COCO file: regions by the name of the image.

    Attributes:
        source: The file.
        images: Name -> (category, regions) each.
        categories: The names of all categories.
    """

    source: str
    images: Mapping[str, Sequence[tuple[str, Regions]]]
    categories: frozenset[str] = field(default_factory=frozenset)

    def of(self, name: str, label: str | None) -> Regions | None:
        """The regions of an image: where its label is a category, those of that category, else all; None: unknown.

        Args:
            name: Path of the image; what stands in front of the name in the file does not matter.
            label: Its class.
        """
        parts = PurePosixPath(name).parts
        named = ("/".join(parts[start:]) for start in range(len(parts)))
        found = next((self.images[key] for key in named if key in self.images), ())
        chosen = [regions for category, regions in found if label not in self.categories or category == label]
        if not chosen:
            return None
        return Regions(
            [box for regions in chosen for box in regions.boxes],
            [corners for regions in chosen for corners in regions.polygons],
            [run for regions in chosen for run in regions.runs],
        )


def read_annotations(path: str) -> Annotations:
    """Read a COCO file of instances: polygons, runs (also compressed), and boxes where there is nothing finer.

    Raises:
        InputError: It is not there or holds something else.
    """
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
        names = {image["id"]: str(image["file_name"]) for image in content["images"]}
        categories = {category["id"]: str(category["name"]) for category in content.get("categories", ())}
        images: dict[str, list[tuple[str, Regions]]] = {}
        for item in content["annotations"]:
            category = categories.get(item.get("category_id"), "")
            images.setdefault(names[item["image_id"]], []).append((category, _regions(item)))
    except (OSError, ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
        raise InputError(
            f"data.annotations={path} cannot be read as a COCO file: {type(error).__name__}: {gist(error)} Expected "
            "JSON with images (id, file_name) and annotations (image_id, and bbox or segmentation)."
        ) from error
    return Annotations(path, images, frozenset(categories.values()))


def _regions(item: Mapping[str, Any]) -> Regions:
    segmentation = item.get("segmentation")
    if isinstance(segmentation, dict):
        height, width = segmentation["size"]
        counts = segmentation["counts"]
        return Regions(runs=[(width, height, _counts(counts) if isinstance(counts, str) else counts)])
    if segmentation:
        return Regions(polygons=[list(zip(flat[::2], flat[1::2], strict=True)) for flat in segmentation])
    left, top, width, height = item["bbox"]
    return Regions(boxes=[(left, top, left + width, top + height)])


def _counts(text: str) -> list[int]:
    """The run lengths of COCO's compressed form: 5 bits a character, from the fourth on differences to two before."""
    counts: list[int] = []
    value = shift = 0
    for character in text:
        code = ord(character) - 48
        value |= (code & 31) << shift
        shift += 5
        if code & 32:
            continue
        if code & 16:
            value -= 1 << shift
        counts.append(value + (counts[-2] if len(counts) > 2 else 0))
        value = shift = 0
    return counts


def _of_rows(rows: Sequence[Any], what: str) -> Image.Image:
    width = len(rows[0]) if rows and isinstance(rows[0], list) else 0
    if not width or any(not isinstance(row, list) or len(row) != width for row in rows):
        raise InputError(f"{what} is no rectangle of numbers: expected rows of equal length, 0 off the object.")
    return Image.frombytes("L", (width, len(rows)), bytes(255 if value else 0 for value in _flat(rows)))


def _flat(rows: Iterable[Iterable[Any]]) -> Iterable[Any]:
    return (value for row in rows for value in row)


def _by(size: Size) -> str:
    return f"{size[0]} x {size[1]}"
