"""From the rows of a source to image examples: where each image is, its label, and the mask of its deciding object."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
from PIL import Image

from calig.datamodules.class_folders import IMAGE_SUFFIXES
from calig.datamodules.columns import column_of, is_missing
from calig.datamodules.image_masks import Annotations, MaskSource, parse_boxes, read_annotations
from calig.datamodules.image_pixels import Source
from calig.datamodules.labels import label_keys
from calig.datamodules.rows import Rows
from calig.datamodules.sources import Kind, label_column, sizes_of
from calig.pipeline.errors import InputError

SCENES = "scenes"
IMAGE_NAMES = ("image", "img", "picture", "pixels", "image_path", "path", "file_path", "filepath", "file_name", "file")
"""Looked for in this order where the configuration names no column."""
MASK_NAME = "mask"
HEAD = 2**16
"""Bytes of a file that tell it from others of its size."""


@dataclass(frozen=True)
class Cell:
    """An encoded image inside an arrow table, read when it is needed: a table of images may be large."""

    column: pa.ChunkedArray
    row: int

    def __call__(self) -> bytes:
        """Its bytes."""
        data: bytes = self.column[self.row].as_py()
        return data


@dataclass(frozen=True, slots=True)
class ImageExample:
    """One image before it is read.

    Attributes:
        sample_id: Row index in its split; stable for the same source and settings.
        image: Where it is.
        label: Class index; None where the data carry no labels.
        place: How messages name it.
        mask: Where the deciding object is; None where it is not known.
    """

    sample_id: int
    image: Source
    label: int | None
    place: str
    mask: MaskSource | None = None

    @property
    def content(self) -> str | bytes:
        """What makes two examples equal: their bytes; of files size and beginning, not to read all of them twice."""
        if isinstance(self.image, Path):
            try:
                with self.image.open("rb") as file:
                    return hashlib.sha256(b"%d " % self.image.stat().st_size + file.read(HEAD)).digest()
            except OSError:  # has its own message when it is read
                return self.place
        if isinstance(self.image, Image.Image):
            return self.image.tobytes()
        return hashlib.sha256(self.image if isinstance(self.image, bytes) else self.image()).digest()


def image_examples(rows: Rows, config: Any, labels: Sequence[int] | None) -> list[ImageExample]:
    """The examples of a split.

    Raises:
        InputError: A column is not there or holds something else, or the masks belong to other images.
    """
    columns = config.columns
    folder = _folder(config.path)
    name = column_of(rows, "image", getattr(columns, "image", None), rows.text, IMAGE_NAMES)
    images = _sources(rows, name, folder, "data.columns.image", required=True)
    masks: Sequence[MaskSource | None] = [None] * len(rows)
    mask_column, boxes = getattr(columns, "mask", None), getattr(columns, "boxes", None)
    annotations = getattr(config, "annotations", None)
    if mask_column is not None or (boxes is None and annotations is None and _has_masks(rows)):
        mask_column = column_of(rows, "mask", mask_column, MASK_NAME, ())
        masks = _sources(rows, mask_column, folder, "data.columns.mask", required=False)
    elif boxes is not None:
        boxes = column_of(rows, "boxes", boxes, None, ())
        masks = [parse_boxes(value, rows.place(row), boxes) for row, value in enumerate(rows.values(boxes))]
    elif annotations is not None:
        masks = _annotated(rows, read_annotations(annotations), name, config, labels is not None)
    return [
        ImageExample(row, image, None if labels is None else labels[row], rows.place(row), mask)
        for row, (image, mask) in enumerate(zip(images, masks, strict=True))
    ]


def _has_masks(rows: Rows) -> bool:
    """Whether a column is called ``mask`` and holds some: what was not asked for must not stop the run."""
    values = rows.columns.get(MASK_NAME, ())
    if isinstance(values, pa.ChunkedArray):
        values = values.drop_null()[:1].to_pylist()
    first = next((value for value in values if not is_missing(value)), None)
    if isinstance(first, str):
        return first.lower().endswith(IMAGE_SUFFIXES)
    return isinstance(first, (bytes, list)) or (isinstance(first, dict) and "bytes" in first)


def _annotated(rows: Rows, found: Annotations, column: str, config: Any, labelled: bool) -> list[MaskSource | None]:
    names = [str(name) for name in rows.files] if rows.files else _names(rows, column)
    keys: Sequence[str | None] = [None] * len(rows)
    if labelled:
        keys = label_keys(rows, label_column(rows, config.columns.label))
    masks: list[MaskSource | None] = [found.of(name, key) for name, key in zip(names, keys, strict=True)]
    if not any(masks):
        listed = ", ".join(list(found.images)[:3]) or "none"
        raise InputError(
            f"data.annotations={found.source} knows none of the {len(rows):,} images of {rows.source} (such as "
            f"{next(iter(names), 'none')}). The names in it (file_name) are {listed}, ..."
        )
    return masks


def _names(rows: Rows, column: str) -> list[str]:
    """The file names of images inside a table, as far as it keeps them."""
    values = rows.columns[column]
    if isinstance(values, pa.ChunkedArray) and pa.types.is_struct(values.type):
        return [path or "" for path in _field(values, "path").to_pylist()]
    return [str(value) if isinstance(value, str) else "" for value in rows.values(column)]


def _sources(rows: Rows, column: str, folder: Path, key: str, *, required: bool) -> list[Any]:
    """Where the images of a column are: bytes, paths, or what the ``datasets`` library writes; None where missing."""
    values = rows.columns[column]
    if isinstance(values, pa.ChunkedArray):
        kind = values.type
        if pa.types.is_binary(kind) or pa.types.is_large_binary(kind):
            present = values.is_valid().to_pylist()
            return _checked([Cell(values, row) if there else None for row, there in enumerate(present)], rows, required)
        if pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0:
            return _checked(_cells(values, folder), rows, required)
    sources: list[Any] = []
    for row, value in enumerate(rows.values(column)):
        if is_missing(value):
            value = None
        elif isinstance(value, str):
            value = folder / value
        elif not (isinstance(value, (Path, bytes)) or (isinstance(value, list) and not required)):
            raise InputError(
                f"{rows.place(row)}: column '{column}' holds {str(value)[:60]!r} of type {type(value).__name__}. "
                f"Expected the path of an image or its bytes; {key} names another column."
            )
        sources.append(value)
    return _checked(sources, rows, required)


def _cells(values: pa.ChunkedArray, folder: Path) -> list[Any]:
    """Of every row {bytes, path}: the bytes, else the path."""
    data = _field(values, "bytes")
    paths = _field(values, "path").to_pylist() if values.type.get_field_index("path") >= 0 else [None] * len(values)
    inside = data.is_valid().to_pylist()
    return [
        Cell(data, row) if there else folder / path if path else None
        for row, (there, path) in enumerate(zip(inside, paths, strict=True))
    ]


def _field(values: pa.ChunkedArray, name: str) -> pa.ChunkedArray:
    """A field of a column of structs; missing where the struct is."""
    return values.flatten()[values.type.get_field_index(name)]


def _checked(sources: list[Any], rows: Rows, required: bool) -> list[Any]:
    if required and None in sources:
        raise InputError(f"{rows.place(sources.index(None))}: the image is missing. Fill it in, or drop the row.")
    return sources


def _folder(path: str | None) -> Path:
    """What relative paths in a table are relative to."""
    if path is None:
        return Path()
    return Path(path) if Path(path).is_dir() else Path(path).parent


def _generate(config: Any, seed: int) -> dict[str, list[ImageExample]]:
    from calig.datamodules.scenes import generate

    return {
        split: [
            ImageExample(row, scene.picture, scene.label, f"scene {row} of {split}", scene.mask)
            for row, scene in enumerate(scenes)
        ]
        for split, scenes in generate(sizes_of(config), seed).items()
    }


def _classes() -> Sequence[str]:
    from calig.datamodules.scenes import LABELS

    return LABELS


IMAGES = Kind("image", SCENES, _classes, _generate, image_examples)
