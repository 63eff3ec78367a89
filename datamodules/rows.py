"""The rows of a split as every source yields them, and how files and folders say which split they are."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa

from calig.pipeline.errors import InputError

SPLIT_NAMES = {"train": ("train",), "val": ("val", "valid", "validation", "dev"), "test": ("test",)}
WHOLE = "all"
"""The split of a source that has none: a single file, an archive of class folders without split folders."""


@dataclass(frozen=True)
class Rows:
    """The rows of one split, column-wise.

    Attributes:
        source: What messages call it: the file as the user gave it, or the hub name and split.
        columns: Column name -> values, one per row.
        class_names: Column name -> the class names in their declared order, where the source declares them.
        text: The text column where none is named; None: found by its name.
        files: The file that each row is, where it is one.
        notes: What the user should know of how the source was read.
    """

    source: str
    columns: dict[str, Sequence[Any]]
    class_names: dict[str, list[str]] = field(default_factory=dict)
    text: str | None = None
    files: Sequence[str] = ()
    notes: Sequence[str] = ()

    def __len__(self) -> int:
        return len(next(iter(self.columns.values()), ()))

    def values(self, column: str) -> list[Any]:
        """The values of a column as Python objects.

        Raises:
            InputError: A binary format holds a string that is not UTF-8.
        """
        values = self.columns[column]
        if not isinstance(values, pa.ChunkedArray):
            return list(values)
        try:
            return values.to_pylist()
        except UnicodeDecodeError as error:
            raise InputError(f"column '{column}' of {self.source} is not UTF-8: {error}. Write it as UTF-8.") from error

    def place(self, index: int) -> str:
        """How a message names a row: rows are counted from 1, the header line is not a row."""
        return f"{self.files[index]} in {self.source}" if self.files else f"row {index + 1} of {self.source}"


def from_table(source: str, table: pa.Table) -> Rows:
    """An arrow table; integer classes (or lists of them) that its schema names come back as names, -1 as None."""
    check_names(source, table.column_names)
    rows = Rows(source, {name: table.column(name) for name in table.column_names})
    for column, names in _declared_classes(table.schema).items():
        ids = rows.values(column) if column in rows.columns else []
        if names and all(_is_class(i, names) for i in ids):
            rows.class_names[column] = names
            rows.columns[column] = [_class_name(i, names) for i in ids]
    return rows


def _is_class(value: Any, names: list[str]) -> bool:
    if isinstance(value, list):
        return all(isinstance(i, int) and 0 <= i < len(names) for i in value)
    return value is None or (isinstance(value, int) and value < len(names))


def _class_name(value: Any, names: list[str]) -> str | list[str] | None:
    if isinstance(value, list):
        return [names[i] for i in value]
    return None if value is None or value < 0 else names[value]


def check_names(source: str, names: Sequence[str]) -> None:
    """Refuse two columns of one name."""
    twice = [name for name, count in Counter(names).items() if count > 1]
    if twice:
        raise InputError(f"{source} has more than one column '{twice[0]}'. Rename one; columns: {', '.join(names)}.")


def check_text(place: str, data: bytes) -> str:
    """Decode UTF-8.

    Raises:
        InputError: It is something else; the message names byte and line.
    """
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise InputError(
            f"{place} is not UTF-8: byte 0x{data[error.start]:02x} in line {line}. Save the file as UTF-8."
        ) from error


def split_named(stem: str) -> str | None:
    """The split that a name without suffix stands for.

    >>> split_named("dev"), split_named("en_ewt-ud-dev"), split_named("train-00000-of-00002"), split_named("trained")
    ('val', 'val', 'train', None)
    """
    stem = re.sub(r"-\d+-of-\d+$", "", stem.lower())
    last = re.split(r"[-_.\s]", stem)[-1]
    return next((split for split, names in SPLIT_NAMES.items() if last in names), None)


def gist(error: BaseException) -> str:
    """The first two lines of an error, in one; libraries put the options into the second."""
    lines = [line.strip() for line in str(error).strip().splitlines() if line.strip()]
    text = " ".join(lines[:2]) or type(error).__name__
    return text if len(text) <= 400 else text[:399] + "…"


def _declared_classes(schema: pa.Schema) -> dict[str, list[str]]:
    """Class names by column from what the ``datasets`` library writes into arrow and parquet files."""
    try:
        features = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
        inner = {
            name: feature["feature"] if isinstance(feature, dict) and "feature" in feature else feature  # of a list
            for name, feature in features.items()
        }
        return {
            name: list(feature["names"])
            for name, feature in inner.items()
            if isinstance(feature, dict) and feature.get("_type") == "ClassLabel" and feature.get("names")
        }
    except (KeyError, TypeError, ValueError, AttributeError):
        return {}
