"""Which column holds what, and its values as texts, words and rationales."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

from calig.datamodules.rationales import (
    Marks,
    Spans,
    check_spans,
    marks_of,
    marks_of_passages,
    parse_passages,
    parse_rationale,
    parse_spans,
)
from calig.datamodules.rows import Rows
from calig.datamodules.settings import ColumnNames
from calig.pipeline.errors import InputError, unknown

# Looked for in this order where the configuration names no column.
TEXT_NAMES = ("text", "sentence", "review", "content", "tokens", "words", "tweet", "comment", "post", "document")
LABEL_NAMES = ("label", "labels", "class", "sentiment", "category", "target")
RATIONALE_NAME = "rationale"
_SURROGATE = re.compile("[\ud800-\udfff]")

Text = str | list[str]


class Texts(NamedTuple):
    """What the columns of a split hold, one entry per row.

    Attributes:
        texts: Strings, or lists of words.
        pairs: The second texts; None without ``columns.text_pair``.
        rationales: 0/1 per word of a text that is a list of words; None where unknown.
        spans: [start, end) of characters of a text that is a string; None where unknown.
    """

    texts: list[Text]
    pairs: list[Text] | None
    rationales: list[Marks | None]
    spans: list[Spans | None]


def text_column(rows: Rows, named: str | None) -> str:
    """The name of the text column: ``named``, else the source's own, else the first of ``TEXT_NAMES`` that exists."""
    return column_of(rows, "text", named, rows.text, TEXT_NAMES)


def column_of(rows: Rows, role: str, named: str | None, own: str | None, candidates: Sequence[str]) -> str:
    """The name of a column: ``named``, else the source's ``own``, else the first of ``candidates`` that exists.

    Raises:
        InputError: It is not there; ``role`` says which key names it.
    """
    if named is not None:
        return _existing(rows, role, named)
    return own or _detected(rows, role, candidates)


def label_column(rows: Rows, named: str | None) -> str:
    """The name of the label column: ``named``, else the first of ``LABEL_NAMES`` that exists."""
    return _existing(rows, "label", named) if named is not None else _detected(rows, "label", LABEL_NAMES)


def has_label_column(rows: Rows) -> bool:
    """Whether ``label_column`` finds one by name."""
    return bool({name.lower() for name in rows.columns} & set(LABEL_NAMES))


def read_texts(rows: Rows, columns: ColumnNames, strip_quotes: bool = False) -> Texts:
    """Texts, second texts and rationales.

    Where a rationale column holds 0/1 per word, spans of words or passages, every text comes back as a list of words:
    the token list of the source, or the text split at white space. With pairs of numbers beside strings, which are
    spans of characters, strings stay strings.

    Args:
        rows: The rows of a split.
        columns: See ``ColumnNames``.
        strip_quotes: Take off the quotes of texts that stand in quotes as a whole.

    Raises:
        InputError: A column is not there, a text is missing or empty, or a rationale does not fit its text.
    """
    texts = _texts(rows, text_column(rows, columns.text))
    pairs = None
    if columns.text_pair is not None:
        pairs = _texts(rows, _existing(rows, "text_pair", columns.text_pair))
    if strip_quotes:
        texts, pairs = [unquoted(text) for text in texts], pairs and [unquoted(text) for text in pairs]
    marks: list[Marks | None] = [None] * len(texts)
    spans: list[Spans | None] = [None] * len(texts)
    column = _rationale_column(rows, columns.rationale)
    if column is None:
        return Texts(texts, pairs, marks, spans)
    values = [None if is_missing(value) else value for value in rows.values(column)]
    by_character = any(isinstance(text, str) and parse_spans(value) for text, value in zip(texts, values, strict=True))
    for index, value in enumerate(values):
        text, place = texts[index], rows.place(index)
        if isinstance(text, str) and by_character:
            if strip_quotes:
                raise InputError(
                    f"data.strip_quotes=true: the rationales (column '{column}') count characters with them."
                )
            spans[index] = None if value is None else _character_spans(value, text, column, place)
            continue
        words = texts[index] = text.split() if isinstance(text, str) else text
        marks[index] = None if value is None else _word_marks(value, words, column, place)
    return Texts(texts, pairs, marks, spans)


def unquoted(text: Text) -> Text:
    """A string without the pair of quotes that it stands in; a list of words as it is.

    >>> unquoted("'a text' "), unquoted("'tis a text"), unquoted("''")
    ('a text', "'tis a text", "''")
    """
    plain = text.strip() if isinstance(text, str) else ""
    inside = plain[1:-1].strip()
    return inside if len(plain) > 2 and plain[0] == plain[-1] and plain[0] in "'\"" and inside else text


def _word_marks(value: object, words: list[str], column: str, place: str) -> Marks:
    spans = parse_spans(value)
    if spans is not None:
        return marks_of(check_spans(spans, len(words), "words", place), len(words))
    passages = parse_passages(value)
    if passages is not None:
        return marks_of_passages(passages, words, place)
    marks = parse_rationale(value)
    if marks is None:
        raise _no_rationale(value, column, place)
    if len(marks) != len(words):
        raise InputError(
            f"{place}: the rationale has {len(marks)} entries, the text {len(words)} words. "
            "Expected one entry per token, or per word of the text split at white space."
        )
    return marks


def _character_spans(value: object, text: str, column: str, place: str) -> Spans:
    spans = parse_spans(value)
    if spans is None:
        raise _no_rationale(value, column, place, " Other rows of the column hold spans of characters.")
    spans = check_spans(spans, len(text), "characters", place)
    for start, end in spans:
        if not text[start:end].strip():
            raise InputError(f"{place}: the rationale's span [{start}, {end}) covers nothing but white space.")
    return spans


def _no_rationale(value: object, column: str, place: str, more: str = "") -> InputError:
    return InputError(
        f"{place}: column '{column}' holds {str(value)[:60]!r}, not a rationale.{more} Expected 0 or 1 per word (a "
        "list, a JSON list or numbers separated by spaces), [start, end) pairs: of words where the text is a list of "
        "words, of characters where it is a string, or passages of the text; empty where it is unknown."
    )


def _texts(rows: Rows, column: str) -> list[Text]:
    texts = _split_lists(rows.values(column))
    for index, text in enumerate(texts):
        if is_missing(text):
            raise InputError(
                f"{rows.place(index)}: the text (column '{column}') is missing or empty. Fill it in, or drop the row."
            )
        if isinstance(text, str):
            words = [text]
        elif isinstance(text, list) and all(isinstance(word, str) for word in text):
            words = text
        else:
            raise InputError(
                f"{rows.place(index)}: column '{column}' holds {str(text)[:60]!r} of type {type(text).__name__}. "
                "Expected a string or a list of words; data.columns.text names another column."
            )
        if not any(word.strip() for word in words):
            raise InputError(
                f"{rows.place(index)}: the text (column '{column}') is missing or empty. Fill it in, or drop the row."
            )
        if any(_SURROGATE.search(word) for word in words):
            raise InputError(
                f"{rows.place(index)}: the text (column '{column}') holds half a character (a lone surrogate such as "
                "\\ud83d), which no encoding has. Write the file anew from the original texts."
            )
    return texts


def _split_lists(values: list[Any]) -> list[Any]:
    """Lists of words out of a column of JSON lists, the form that csv leaves to them; other columns as they are."""
    if not values or not all(isinstance(value, str) and value.startswith('["') for value in values):
        return values
    try:
        parsed = [json.loads(value) for value in values]
    except ValueError:
        return values
    return parsed if all(isinstance(word, str) for words in parsed for word in words) else values


def _rationale_column(rows: Rows, named: str | None) -> str | None:
    if named is not None:
        return _existing(rows, "rationale", named)
    if RATIONALE_NAME not in rows.columns:
        return None
    # Some data sets call a free-text explanation "rationale": what was not asked for must not stop the run.
    first = next((value for value in rows.values(RATIONALE_NAME) if not is_missing(value)), None)
    return None if parse_rationale(first) is None and parse_spans(first) is None else RATIONALE_NAME


def is_missing(value: Any) -> bool:
    """Whether a cell holds nothing."""
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
