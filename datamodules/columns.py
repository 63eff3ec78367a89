"""Which column holds what, and its values as texts, words and rationales."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from calig.datamodules.readers import Rows
from calig.datamodules.settings import ColumnNames
from calig.pipeline.errors import InputError, unknown

# Looked for in this order where the configuration names no column.
TEXT_NAMES = ("text", "sentence", "review", "content", "tokens", "words", "tweet", "comment", "post", "document")
LABEL_NAMES = ("label", "labels", "class", "sentiment", "category", "target")
RATIONALE_NAME = "rationale"

Text = str | list[str]


def text_column(rows: Rows, named: str | None) -> str:
    """The name of the text column: ``named``, else the first of ``TEXT_NAMES`` that exists."""
    return _existing(rows, "text", named) if named is not None else _detected(rows, "text", TEXT_NAMES)


def label_column(rows: Rows, named: str | None) -> str:
    """The name of the label column: ``named``, else the first of ``LABEL_NAMES`` that exists."""
    return _existing(rows, "label", named) if named is not None else _detected(rows, "label", LABEL_NAMES)


def read_texts(rows: Rows, columns: ColumnNames) -> tuple[list[Text], list[Text] | None, list[list[int] | None]]:
    """Texts, second texts (None without ``columns.text_pair``) and rationales, one per row.

    Where a rationale column is in use, every text comes back as a list of words: the token list of the source, or
    the text split at white space.

    Raises:
        InputError: A column is not there, a text is missing or empty, or a rationale does not fit its text.
    """
    texts = _texts(rows, text_column(rows, columns.text))
    pairs = None
    if columns.text_pair is not None:
        pairs = _texts(rows, _existing(rows, "text_pair", columns.text_pair))
    column = _rationale_column(rows, columns.rationale)
    if column is None:
        return texts, pairs, [None] * len(texts)
    rationales: list[list[int] | None] = []
    for index, value in enumerate(rows.values(column)):
        text = texts[index]
        words = texts[index] = text.split() if isinstance(text, str) else text
        if _is_missing(value):
            rationales.append(None)
            continue
        marks = parse_rationale(value)
        if marks is None:
            raise InputError(
                f"{rows.place(index)}: column '{column}' holds {str(value)[:60]!r}, not a rationale. Expected 0 or 1 "
                "per word: a list, a JSON list or numbers separated by spaces; empty where it is unknown."
            )
        if len(marks) != len(words):
            raise InputError(
                f"{rows.place(index)}: the rationale has {len(marks)} entries, the text {len(words)} words. "
                "Expected one entry per token, or per word of the text split at white space."
            )
        rationales.append(marks)
    return texts, pairs, rationales


def parse_rationale(value: object) -> list[int] | None:
    """0/1 per word from a sequence, a JSON list or numbers separated by spaces; None for anything else.

    >>> parse_rationale("[0, 1]"), parse_rationale("0 1"), parse_rationale("because of the plot")
    ([0, 1], [0, 1], None)
    """
    if isinstance(value, str):
        try:
            value = json.loads(value) if value.lstrip().startswith("[") else [int(part) for part in value.split()]
        except ValueError:
            return None
    if not isinstance(value, list) or any(isinstance(mark, str) or mark not in (0, 1) for mark in value):
        return None
    return [int(mark) for mark in value]


def _texts(rows: Rows, column: str) -> list[Text]:
    texts = rows.values(column)
    for index, text in enumerate(texts):
        if _is_missing(text):
            raise InputError(f"{rows.place(index)}: the text (column '{column}') is missing or empty.")
        if isinstance(text, str):
            continue
        if not isinstance(text, list) or not all(isinstance(word, str) for word in text):
            raise InputError(
                f"{rows.place(index)}: column '{column}' holds {str(text)[:60]!r} of type {type(text).__name__}. "
                "Expected a string or a list of words; data.columns.text names another column."
            )
        if not any(word.strip() for word in text):
            raise InputError(f"{rows.place(index)}: the text (column '{column}') is missing or empty.")
    return texts


def _rationale_column(rows: Rows, named: str | None) -> str | None:
    if named is not None:
        return _existing(rows, "rationale", named)
    if RATIONALE_NAME not in rows.columns:
        return None
    # Some data sets call a free-text explanation "rationale": what was not asked for must not stop the run.
    first = next((value for value in rows.values(RATIONALE_NAME) if not _is_missing(value)), None)
    return RATIONALE_NAME if parse_rationale(first) is not None else None


def _is_missing(value: Any) -> bool:
    return value is None or value != value or (isinstance(value, str) and not value.strip())


def _existing(rows: Rows, role: str, named: str) -> str:
    name = str(named)
    if name in rows.columns:
        return name
    raise unknown("column", name, _short(rows), f"Named by data.columns.{role}, looked for in {rows.source}.")


def _detected(rows: Rows, role: str, candidates: Sequence[str]) -> str:
    by_lower = {name.lower(): name for name in rows.columns}
    for candidate in candidates:
        if candidate in by_lower:
            return by_lower[candidate]
    raise InputError(
        f"{rows.source} has no {role} column of a known name ({', '.join(candidates)}). Name it by "
        f"data.columns.{role}; columns: {', '.join(_short(rows))}. If these are data, the file has no header line: "
        "data.header=false, and columns are named by index."
    )


def _short(rows: Rows) -> list[str]:
    return [name if len(name) <= 40 else name[:39] + "…" for name in rows.columns]
