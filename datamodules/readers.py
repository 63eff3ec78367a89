"""Files and hub data sets to rows: columns of plain values, nothing interpreted yet."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
from pyarrow import csv, parquet

from calig.pipeline.errors import InputError, unknown

SUFFIXES = (".csv", ".tsv", ".json", ".jsonl", ".parquet")
SPLIT_NAMES = {"train": ("train",), "val": ("val", "valid", "validation", "dev"), "test": ("test",)}


@dataclass(frozen=True)
class Rows:
    """The rows of one split, column-wise.

    Attributes:
        source: What messages call it: the file as the user gave it, or the hub name and split.
        columns: Column name -> values, one per row.
        class_names: Column name -> the class names in their declared order, where the source declares them.
    """

    source: str
    columns: dict[str, Sequence[Any]]
    class_names: dict[str, list[str]] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(next(iter(self.columns.values()), ()))

    def values(self, column: str) -> list[Any]:
        """The values of a column as Python objects."""
        values = self.columns[column]
        return values.to_pylist() if isinstance(values, pa.ChunkedArray) else list(values)

    def place(self, index: int) -> str:
        """How a message names a row: rows are counted from 1, the header line is not a row."""
        return f"row {index + 1} of {self.source}"


def read_local(path: str, header: bool = True, quoted: bool | None = None) -> dict[str, Rows]:
    """Read a file (one split, ``train``) or a folder of ``train``, ``val`` and ``test`` files.

    Args:
        path: A file with one of ``SUFFIXES``, or a folder; there ``valid``, ``validation`` and ``dev`` mean ``val``.
        header: False where a csv or tsv file has no header line; its columns are then named "0", "1", ...
        quoted: Whether quote characters in csv or tsv enclose a field; None: in csv they do, in tsv they do not.

    Raises:
        InputError: Nothing is there, two files claim one split, or a file cannot be read.
    """
    root = Path(path)
    if not root.is_dir():
        return {"train": read_file(root, header, quoted)}
    entries = sorted(entry for entry in root.iterdir() if entry.is_file())
    splits = {}
    for split, stems in SPLIT_NAMES.items():
        files = [entry for entry in entries if entry.stem in stems and entry.suffix.lower() in SUFFIXES]
        if len(files) > 1:
            names = ", ".join(file.name for file in files)
            raise InputError(f"data.path='{path}' holds {len(files)} files for the {split} split: {names}. Keep one.")
        if files:
            splits[split] = read_file(files[0], header, quoted)
    if "train" not in splits:
        found = ", ".join(entry.name for entry in entries[:20]) or "no files"
        raise InputError(
            f"data.path='{path}' holds no training file: looked for train with one of {' '.join(SUFFIXES)}. "
            f"Found: {found}. A single file can be given by its own path."
        )
    return splits


def read_file(path: Path, header: bool = True, quoted: bool | None = None) -> Rows:
    """Read one file by its suffix; see ``read_local``."""
    suffix = path.suffix.lower()
    if not path.is_file():
        siblings = [entry.name for entry in sorted(path.parent.iterdir())[:20]] if path.parent.is_dir() else []
        raise unknown("file", path, siblings, "Named by data.path; listed is what its folder holds.")
    if suffix not in SUFFIXES:
        raise unknown("file type", suffix or path.name, SUFFIXES, f"Named by data.path='{path}'.")
    try:
        if suffix == ".parquet":
            return _from_table(str(path), parquet.read_table(path))
        data = path.read_bytes()
    except (OSError, pa.ArrowException) as error:
        raise InputError(f"{path} cannot be read: {_first_line(error)}") from error
    _check_text(path, data)
    if suffix in (".csv", ".tsv"):
        delimiter = "," if suffix == ".csv" else "\t"
        return _read_separated(path, data, delimiter, header, suffix == ".csv" if quoted is None else quoted)
    return _read_json(path, data)


def read_hub(name: str, revision: str | None = None) -> dict[str, Rows]:
    """Read the splits of a data set by its hub name; ``datasets`` answers from its cache where it can.

    Integer classes come back as their declared names; -1, the hub's sign for a withheld label, as None.
    """
    import datasets  # a second of import that local files need not pay

    try:
        loaded = datasets.load_dataset(name, revision=revision)
    except (OSError, ValueError, RuntimeError) as error:
        raise InputError(
            f"data.name='{name}' could not be loaded from the hub: {_first_line(error)} "
            "A local file or folder is given by data.path (with data.name=null)."
        ) from error
    splits = {}
    for split, names in SPLIT_NAMES.items():
        found = next((candidate for candidate in names if candidate in loaded), None)
        if found is None:
            continue
        dataset = loaded[found]
        rows = _from_table(f"{name} ({found})", dataset.with_format("arrow")[:])
        for column, feature in dataset.features.items():
            if isinstance(feature, datasets.ClassLabel) and feature.names:
                rows.class_names[column] = list(feature.names)
                ids = rows.values(column)
                rows.columns[column] = [None if i is None or i < 0 else feature.names[i] for i in ids]
        splits[split] = rows
    if "train" not in splits:
        raise InputError(f"data.name='{name}' has no train split. Splits: {', '.join(loaded)}.")
    return splits


def _from_table(source: str, table: pa.Table) -> Rows:
    _check_names(source, table.column_names)
    return Rows(source, {name: table.column(name) for name in table.column_names})


def _check_names(source: str, names: list[str]) -> None:
    twice = [name for name, count in Counter(names).items() if count > 1]
    if twice:
        raise InputError(f"{source} has more than one column '{twice[0]}'. Rename one; columns: {', '.join(names)}.")


def _check_text(path: Path, data: bytes) -> None:
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise InputError(
            f"{path} is not UTF-8: byte 0x{data[error.start]:02x} in line {line}. Save the file as UTF-8."
        ) from error
    if not text.strip():
        raise InputError(f"{path} is empty.")


def _read_separated(path: Path, data: bytes, delimiter: str, header: bool, quoted: bool) -> Rows:
    ragged: list[csv.InvalidRow] = []

    def note(row: csv.InvalidRow) -> str:
        ragged.append(row)
        return "skip"

    # One block and one thread: rows may be of any length, and an invalid row knows its number.
    block = min(len(data) + 1024, 2**31 - 1)
    read = csv.ReadOptions(use_threads=False, block_size=block, autogenerate_column_names=not header)
    parse = csv.ParseOptions(
        delimiter=delimiter, quote_char='"' if quoted else False, newlines_in_values=quoted, invalid_row_handler=note
    )
    try:
        names = csv.open_csv(pa.BufferReader(data), read_options=read, parse_options=parse).schema.names
        _check_names(str(path), names)
        ragged.clear()
        # All columns as strings: a text "1.0" or a date must stay what it is.
        convert = csv.ConvertOptions(column_types=dict.fromkeys(names, pa.string()))
        table = csv.read_csv(pa.BufferReader(data), read_options=read, parse_options=parse, convert_options=convert)
    except pa.ArrowException as error:
        raise InputError(f"{path} cannot be read: {_first_line(error)}") from error
    if ragged:
        row = ragged[0]
        place = "a row" if row.number is None else f"row {row.number - header}"
        raise InputError(
            f"{path} is ragged: {place} has {row.actual_columns} columns, expected {row.expected_columns}: "
            f"{row.text[:80]!r}. Quote the field, or see data.quoted (now {str(quoted).lower()})."
        )
    if not header:
        table = table.rename_columns([str(index) for index in range(table.num_columns)])
    return _from_table(str(path), table)


def _read_json(path: Path, data: bytes) -> Rows:
    """A JSON array of objects, or one object per line.

    The standard library and not ``pyarrow.json``: that one turns date-like strings into timestamps.
    """
    text = data.decode("utf-8-sig")
    if text.lstrip().startswith("["):
        try:
            records = json.loads(text)
        except json.JSONDecodeError as error:
            raise InputError(f"{path} is not valid JSON: {error}.") from error
    else:
        records = []
        for number, line in enumerate(text.split("\n"), start=1):
            try:
                records += [json.loads(line)] if line.strip() else []
            except json.JSONDecodeError as error:
                raise InputError(
                    f"{path}, line {number}, is not valid JSON: {error}. "
                    "Expected one object per line, or one array of objects."
                ) from error
    for index, record in enumerate(records):
        if not isinstance(record, dict):
            raise InputError(f"row {index + 1} of {path} is not a JSON object but {str(record)[:40]!r}.")
    names = dict.fromkeys(name for record in records for name in record)
    return Rows(str(path), {name: [record.get(name) for record in records] for name in names})


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
