"""Labels as they stand in the data to class indices."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import TypeVar

from calig.datamodules.rows import Rows
from calig.pipeline.errors import InputError, unknown

LISTED = 20
Label = TypeVar("Label", str, list[str], float)


def label_keys(rows: Rows, column: str) -> list[str | None]:
    """The labels of a column as strings ("1" for 1, 1.0 and "1"; "true" for True); None where one is missing."""
    return [label_key(value, rows, index, column) for index, value in enumerate(rows.values(column))]


def all_present(keys: Sequence[Label | None], rows: Rows, column: str) -> list[Label]:
    """``keys`` again, none of them None; else an error that names the first row without label."""
    if None in keys:
        raise InputError(
            f"{rows.place(keys.index(None))}: the label (column '{column}') is missing. Fill it in, or drop the row."
        )
    return [key for key in keys if key is not None]


def class_order(keys: Iterable[str], label_map: Mapping[str, str] | None, declared: Sequence[str]) -> list[str]:
    """The class names in the order of their indices.

    With ``label_map``: its class names by first appearance. Else the order that the source declares, else sorted, by
    number where all labels are integers.

    Args:
        keys: The labels of the training split, from ``label_keys``.
        label_map: Original label -> class name.
        declared: Class names in the source's own order; empty where it has none.
    """
    found = set(keys)
    if label_map:
        return list(dict.fromkeys(str(name) for name in label_map.values()))
    if declared:
        return list(declared)
    return sorted(found, key=int) if all(is_integer(key) for key in found) else sorted(found)


def class_indices(
    keys: Sequence[str],
    names: Sequence[str],
    label_map: Mapping[str, str] | None,
    rows: Rows,
    column: str,
    trained: Collection[int] | None = None,
) -> list[int]:
    """Class index of every row of a data set that a model is trained on.

    Args:
        keys: The labels, from ``all_present``.
        names: The class names, from ``class_order``.
        label_map: Original label -> class name.
        rows: Where the labels come from, for messages.
        column: Their column, for messages.
        trained: The classes that the training split has; None for the training split itself.

    Raises:
        InputError: A label is not in ``label_map``, is none of the classes of the training split, or the training
            split has one class only.
    """
    index_of = {name: index for index, name in enumerate(names)}
    indices = []
    for row, name in enumerate(_mapped(keys, label_map, rows, column)):
        if name not in index_of or (trained is not None and index_of[name] not in trained):
            options = [names[index] for index in sorted(trained or range(len(names)))]
            raise unknown(
                "label",
                name,
                options[:LISTED],
                f"It stands in {rows.place(row)} and never in the training split; data.label_map can merge labels.",
            )
        indices.append(index_of[name])
    if trained is None and len(set(indices)) < 2:
        found = _listed(sorted({names[index] for index in indices})) or "none"
        raise InputError(
            f"a classifier needs two classes; the labels hold only {found} (column '{column}' of {rows.source}). "
            "data.columns.label names another column, data.label_map the class of every label."
        )
    return indices


def model_indices(
    keys: Sequence[str], names: Sequence[str], label_map: Mapping[str, str] | None, rows: Rows, column: str
) -> list[int]:
    """Class index of every row among the classes of a model: by name, or by number where no class has a number's name.

    Raises:
        InputError: A label is not in ``label_map``, or the model has no such class.
    """
    index_of = {str(name): index for index, name in enumerate(names)}
    if not any(is_integer(name) for name in index_of):
        index_of |= {str(index): index for index in range(len(names))}
    indices = []
    for row, name in enumerate(_mapped(keys, label_map, rows, column)):
        if name not in index_of:
            raise unknown(
                "label",
                name,
                list(names)[:LISTED],
                f"These are the classes of the model; it stands in {rows.place(row)}. "
                f"Say which class is meant: data.label_map={{{name}: CLASS, ...}}.",
            )
        indices.append(index_of[name])
    return indices


def fits_model(keys: Iterable[str | None], names: Sequence[str]) -> bool:
    """Whether any of the labels is a class of the model, by name or number."""
    known = {str(name) for name in names} | {str(index) for index in range(len(names))}
    return any(key in known for key in keys)


def unnamed(names: Sequence[str]) -> bool:
    """Whether a model's class names are the library's placeholders: LABEL_0, LABEL_1, ..."""
    return all(re.fullmatch(r"LABEL_\d+", str(name)) for name in names)


def _mapped(keys: Sequence[str], label_map: Mapping[str, str] | None, rows: Rows, column: str) -> list[str]:
    if not label_map:
        return list(keys)
    mapping = {str(key): str(name) for key, name in label_map.items()}
    for row, key in enumerate(keys):
        if key not in mapping:
            raise InputError(
                f"{rows.place(row)}: label '{key}' is not in data.label_map ({_listed(mapping)}). "
                f"Labels found in column '{column}': {_listed(sorted(set(keys)))}."
            )
    return [mapping[key] for key in keys]


def label_key(value: object, rows: Rows, index: int, column: str) -> str | None:
    """A label as a string, see `label_keys`; InputError where it is neither a string nor an integer."""
    if value is None or value != value:
        return None
    if isinstance(value, str):
        return value.strip() or None
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    if isinstance(value, int):
        return str(value)
    raise InputError(
        f"{rows.place(index)}: the label (column '{column}') is {str(value)[:60]!r} of type {type(value).__name__}. "
        "Expected one integer or string per text. Several labels per text are data.task=multi_label, numbers "
        "data.task=regression."
    )


def is_integer(key: str) -> bool:
    """Whether a label spells an integer."""
    return key.removeprefix("-").isdecimal()


def _listed(names: Iterable[str]) -> str:
    names = list(names)
    return ", ".join(names[:LISTED]) + (f", ... ({len(names)} in all)" if len(names) > LISTED else "")
