"""Any number of labels per text: lists of names, or a column of 0 and 1 for each, to one indicator per label.

Shapes: C labels.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

from calig.datamodules.labels import LISTED, is_integer, label_key
from calig.datamodules.rows import Rows
from calig.pipeline.errors import InputError, unknown

_YES, _NO = ("1", "true", "yes"), ("0", "false", "no")


def label_lists(rows: Rows, column: str) -> list[list[str] | None]:
    """The labels of a column of lists (in a csv: JSON lists) as strings; None where they are missing.

    An empty list says that no label applies.

    Raises:
        InputError: A cell holds something else than a list, also where others hold lists.
    """
    values = rows.values(column)
    lists = [_list(value, rows, index, column) for index, value in enumerate(values)]
    return [None if found is None else _keys(found, rows, index, column) for index, found in enumerate(lists)]


def indicated(rows: Rows, columns: Sequence[str]) -> list[list[str] | None]:
    """The names of the columns that hold 1, row by row; None where a cell is empty.

    Raises:
        InputError: There is no such column, or a cell holds neither 0 nor 1.
    """
    for name in columns:
        if name not in rows.columns:
            raise unknown(
                "column", name, rows.columns, f"Named by data.columns.indicators, looked for in {rows.source}."
            )
    table = {name: rows.values(name) for name in columns}
    found: list[list[str] | None] = []
    for index in range(len(rows)):
        flags = {name: _flag(values[index], rows, index, name) for name, values in table.items()}
        known = None not in flags.values()
        found.append([name for name, flag in flags.items() if flag] if known else None)
    return found


def set_vectors(
    keys: Sequence[Iterable[str]],
    names: Sequence[str],
    label_map: Mapping[str, str] | None,
    rows: Rows,
    column: str,
    known: Collection[int] | None = None,
    *,
    of_model: bool = False,
) -> list[list[float]]:
    """One indicator per label and row, as the loss takes them.

    Args:
        keys: The labels of every row, none missing.
        names: The C label names.
        label_map: Label in the data -> label name.
        rows: Where they come from, for messages.
        column: Their column or columns, for messages.
        known: The labels that the training split has; None for the training split itself, or a model's labels.
        of_model: The names are those of a model; a number then means the label of that index.

    Returns:
        Per row C values, 1.0 or 0.0.

    Raises:
        InputError: A label is not in `label_map`, or is none of `names`; or the training split has no label at all.
    """
    mapping = None if not label_map else {str(key): str(name) for key, name in label_map.items()}
    index_of = {str(name): index for index, name in enumerate(names)}
    if of_model and not any(is_integer(name) for name in index_of):
        index_of |= {str(index): index for index in range(len(names))}
    vectors = []
    for row, labels in enumerate(keys):
        vector = [0.0] * len(names)
        for label in labels:
            if mapping is not None and label not in mapping:
                listed = ", ".join(list(mapping)[:LISTED])
                raise InputError(f"{rows.place(row)}: label '{label}' is not in data.label_map ({listed}).")
            name = label if mapping is None else mapping[label]
            index = index_of.get(name)
            if index is None or (known is not None and index not in known):
                options = [names[i] for i in sorted(known)] if known is not None else list(names)
                where = "no label of the model" if of_model else "never in the training split"
                hint = f"It stands in {rows.place(row)} and is {where}; data.label_map can rename and merge labels."
                raise unknown("label", name, options[:LISTED], hint)
            vector[index] = 1.0
        vectors.append(vector)
    if known is None and not of_model and not any(map(any, vectors)):
        raise InputError(
            f"{rows.source} has no text with a label (column '{column}'), so there is nothing to learn. "
            "data.columns.label names another column."
        )
    return vectors


def _list(value: Any, rows: Rows, index: int, column: str) -> list[Any] | None:
    if value is None or value != value or (isinstance(value, str) and not value.strip()):
        return None
    found = value
    if isinstance(value, str) and value.lstrip().startswith("["):
        try:
            found = json.loads(value)
        except ValueError:
            found = value
    if isinstance(found, list | tuple):
        return list(found)
    raise InputError(
        f"{rows.place(index)}: the labels (column '{column}') are {str(value)[:60]!r} of type {type(value).__name__}. "
        "data.task=multi_label takes a list of labels per text (in a csv a JSON list, [] where none applies), or a "
        "column of 0 and 1 per label (data.columns.indicators). One label per text is data.task=classification."
    )


def _keys(labels: list[Any], rows: Rows, index: int, column: str) -> list[str]:
    keys = [label_key(label, rows, index, column) for label in labels]
    if None in keys:
        raise InputError(f"{rows.place(index)}: the list of labels (column '{column}') holds an empty one.")
    return list(dict.fromkeys(key for key in keys if key is not None))


def _flag(value: Any, rows: Rows, index: int, column: str) -> bool | None:
    if value is None or value != value or (isinstance(value, str) and not value.strip()):
        return None
    word = str(int(value)) if isinstance(value, float) and value.is_integer() else str(value).strip().lower()
    if word in _YES or word in _NO:
        return word in _YES
    raise InputError(
        f"{rows.place(index)}: column '{column}' holds {str(value)[:40]!r}; an indicator is 0 or 1 (or true, false)."
    )
