"""Which rows of a source are used, and which parts of their texts: posts and mails carry more than their words."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from calig.datamodules.columns import label_column, text_column
from calig.datamodules.labels import label_keys
from calig.datamodules.rows import Rows
from calig.pipeline.errors import InputError, unknown

_HEADER = re.compile(r"[A-Za-z][A-Za-z-]*:")
_QUOTE = re.compile(r"writes in|writes:|wrote:|says:|said:|^In article|^Quoted from|^\||^>")


def without_headers(text: str) -> str:
    r"""A post without the lines in front of its first empty one, if they begin as headers do.

    >>> without_headers("From: me\nSubject: cars\n\nThe brakes squeak.")
    'The brakes squeak.'
    >>> without_headers("The brakes squeak.\n\nWhat now?")
    'The brakes squeak.\n\nWhat now?'
    """
    head, _, body = text.partition("\n\n")
    return body if _HEADER.match(head) else text


def without_signature(text: str) -> str:
    r"""A post without its last block, which an empty line or a line of dashes parts from the rest.

    As in scikit-learn's copy of 20 Newsgroups, which published figures are on; it takes the last paragraph of a post
    that has no signature.

    >>> without_signature("The brakes squeak.\n--\nMe, at my desk")
    'The brakes squeak.'
    """
    lines = text.strip().split("\n")
    last = next((i for i in range(len(lines) - 1, 0, -1) if not lines[i].strip().strip("-")), 0)
    return "\n".join(lines[:last]) if last else text


def without_quotes(text: str) -> str:
    r"""A post without the lines that quote another, and those that say whom.

    >>> without_quotes("You wrote:\n> They squeak.\nWhich ones?")
    'Which ones?'
    """
    return "\n".join(line for line in text.split("\n") if not _QUOTE.search(line))


PARTS: Mapping[str, Callable[[str], str]] = {
    "headers": without_headers,
    "signatures": without_signature,
    "quotes": without_quotes,
}


def select(rows: Rows, config: Any) -> Rows:
    """The rows that ``data.keep_labels`` and ``data.remove`` leave, with notes of what they took.

    Rows are counted anew: a ``sample_id`` is the place among those that are left.

    Args:
        rows: A split.
        config: With ``columns``, and these two keys where they exist.

    Raises:
        InputError: A label that the split does not have, or parts that only strings have.
    """
    labels, parts = getattr(config, "keep_labels", None), getattr(config, "remove", None)
    if labels is not None:
        rows = _labelled(rows, label_column(rows, config.columns.label), labels)
    return _stripped(rows, text_column(rows, config.columns.text), parts) if parts else rows


def _labelled(rows: Rows, column: str, labels: Sequence[str]) -> Rows:
    keys = label_keys(rows, column)
    known = list(dict.fromkeys(key for key in keys if key is not None))
    for label in labels:
        if label not in known:
            raise unknown("label", label, sorted(known), f"data.keep_labels asks for it, in {rows.source}.")
    kept = [row for row, key in enumerate(keys) if key in labels]
    return _only(rows, kept, f"{len(keys) - len(kept):,} rows of other labels")


def _stripped(rows: Rows, column: str, parts: Sequence[str]) -> Rows:
    texts = rows.values(column)
    for row, text in enumerate(texts):
        if not isinstance(text, str):
            raise InputError(
                f"{rows.place(row)}: data.remove={list(parts)} takes parts off texts, and column '{column}' holds "
                f"{type(text).__name__}. Leave it out."
            )
    for name, strip in PARTS.items():
        if name in parts:
            texts = [strip(text) for text in texts]
    kept = [row for row, text in enumerate(texts) if text.strip()]
    whole = replace(rows, columns={**rows.columns, column: texts})
    return _only(whole, kept, f"{len(texts) - len(kept):,} texts that held nothing but {', '.join(parts)}")


def _only(rows: Rows, kept: Sequence[int], rest: str) -> Rows:
    if len(kept) == len(rows):
        return rows
    columns: dict[str, Sequence[Any]] = {
        name: [values[row] for row in kept] for name in rows.columns for values in [rows.values(name)]
    }
    files = [rows.files[row] for row in kept] if rows.files else ()
    return replace(rows, columns=columns, files=files, notes=[*rows.notes, f"{rest} left out"])
