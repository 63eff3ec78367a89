"""Single files to rows: csv, tsv, json, jsonl, parquet, arrow, conllu."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
from pyarrow import csv, parquet

from calig.datamodules.rows import Rows, check_names, check_text, from_table, gist
from calig.pipeline.errors import InputError

TABLES = (".csv", ".tsv", ".json", ".jsonl", ".parquet", ".arrow", ".conllu")
FORM = "form"
"""The column of a conllu file that holds the words: ``text`` is the usual comment with the raw sentence."""


def read_table(path: Path, header: bool = True, quoted: bool | None = None) -> Rows:
    """Read an existing file with one of the suffixes in ``TABLES``.

    Args:
        path: The file.
        header: False where a csv or tsv file has no header line; its columns are then named "0", "1", ...
        quoted: Whether quote characters in csv or tsv enclose a field; None: in csv they do, in tsv they do not.

    Raises:
        InputError: It is empty or not UTF-8, cannot be parsed, has rows of unequal length, or two columns of one name.
    """
    suffix = path.suffix.lower()
    try:
        if not path.stat().st_size:
            raise InputError(f"{path} is empty.")
        if suffix == ".parquet":
            # One file: a reader of data sets would take `key=value` in the path for a column.
            return from_table(str(path), parquet.ParquetFile(path).read())
        if suffix == ".arrow":
            return from_table(str(path), _read_arrow(path))
        data = path.read_bytes()
    except (OSError, pa.ArrowException) as error:
        raise InputError(f"{path} cannot be read: {gist(error)}") from error
    text = check_text(str(path), data)
    if not text.strip():
        raise InputError(f"{path} is empty.")
    if suffix == ".conllu":
        return _read_conllu(path, text)
    if suffix in (".csv", ".tsv"):
        delimiter = "," if suffix == ".csv" else "\t"
        return _read_separated(path, data, delimiter, header, suffix == ".csv" if quoted is None else quoted)
    return _read_json(path, text)


def _read_arrow(path: Path) -> pa.Table:
    """Both forms of arrow files: the stream that ``datasets`` writes and the file with a footer (feather)."""
    with pa.memory_map(str(path)) as source:
        try:
            return pa.ipc.open_file(source).read_all()
        except pa.ArrowInvalid:
            source.seek(0)
            return pa.ipc.open_stream(source).read_all()


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
        check_names(str(path), names)
        ragged.clear()
        # All columns as strings: a text "1.0" or a date must stay what it is.
        convert = csv.ConvertOptions(column_types=dict.fromkeys(names, pa.string()))
        table = csv.read_csv(pa.BufferReader(data), read_options=read, parse_options=parse, convert_options=convert)
    except pa.ArrowException as error:
        raise InputError(f"{path} cannot be read: {gist(error)}") from error
    if ragged:
        row = ragged[0]
        place = "a row" if row.number is None else f"row {row.number - header}"
        raise InputError(
            f"{path} is ragged: {place} has {row.actual_columns} columns, expected {row.expected_columns}: "
            f"{row.text[:80]!r}. Quote the field, or see data.quoted (now {str(quoted).lower()})."
        )
    if not header:
        table = table.rename_columns([str(index) for index in range(table.num_columns)])
    return from_table(str(path), table)


def _read_json(path: Path, text: str) -> Rows:
    """A JSON array of objects, or one object per line.

    The standard library and not ``pyarrow.json``: that one turns date-like strings into timestamps.
    """

    def named(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        # The library would keep the last of two values.
        check_names(str(path), [name for name, _ in pairs])
        return dict(pairs)

    if text.lstrip().startswith("["):
        try:
            records = json.loads(text, object_pairs_hook=named)
        except json.JSONDecodeError as error:
            raise InputError(f"{path} is not valid JSON: {error}.") from error
    else:
        records = []
        for number, line in enumerate(text.split("\n"), start=1):
            try:
                records += [json.loads(line, object_pairs_hook=named)] if line.strip() else []
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


def _read_conllu(path: Path, text: str) -> Rows:
    """Sentences as rows: ``form`` holds the words, every ``# key = value`` comment is a column.

    The words are the syntactic ones (of a range ``1-2`` the two, not the joined form); empty nodes are left out.
    """
    sentences: list[dict[str, Any]] = []
    words: list[str] = []
    comments: dict[str, str] = {}
    for number, line in enumerate([*text.split("\n"), ""], start=1):
        line = line.rstrip("\r")
        if line.startswith("#"):
            key, equals, value = line[1:].partition("=")
            if equals:
                comments.setdefault(key.strip(), value.strip())
        elif line.strip():
            fields = line.split("\t")
            if len(fields) != 10:
                raise InputError(
                    f"{path}, line {number}, has {len(fields)} columns; conllu has 10, separated by tabs: "
                    f"{line[:80]!r}."
                )
            if fields[0].isdecimal():
                words.append(fields[1])
        elif words:
            sentences.append(comments | {FORM: words})
            words, comments = [], {}
    names = dict.fromkeys([FORM, *(name for sentence in sentences for name in sentence)])
    columns: dict[str, Sequence[Any]] = {name: [sentence.get(name) for sentence in sentences] for name in names}
    return Rows(str(path), columns, text=FORM)
