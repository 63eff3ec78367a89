"""Labels as they stand in the data to class indices."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from calig.datamodules.readers import Rows
from calig.pipeline.errors import InputError, unknown

LISTED = 20


def label_keys(rows: Rows, column: str) -> list[str | None]:
    """The labels of a column as strings ("1" for 1, 1.0 and "1"; "true" for True); None where one is missing."""
    return [_key(value, rows, index, column) for index, value in enumerate(rows.values(column))]


def all_present(keys: Sequence[str | None], rows: Rows, column: str) -> list[str]:
    """``keys`` again, none of them None; else an error that names the first row without label."""
    if None in keys:
        raise InputError(f"{rows.place(keys.index(None))}: the label (column '{column}') is missing.")
    return [key for key in keys if key is not None]


def class_order(keys: Iterable[str], label_map: Mapping[str, str] | None, declared: Sequence[str]) -> list[str]:
    """The class names in the order of their indices.

    With ``label_map``: its class names by first appearance. Else the order that the source declares, else sorted, by
    number where all labels are integers.

    Args:
        keys: The labels of the training split, from ``label_keys``.
        label_map: Original label -> class name.
        declared: Class names in the source's own order; empty where it has none.

    Raises:
        InputError: There are fewer than two classes.
    """
    found = set(keys)
    if label_map:
        names = list(dict.fromkeys(str(name) for name in label_map.values()))
    elif declared:
        names = list(declared)
    else:
        names = sorted(found, key=int) if all(_is_integer(key) for key in found) else sorted(found)
    if len(names) < 2:
        raise InputError(f"a classifier needs two classes; the labels hold {_listed(names) or 'none'}.")
    return names


def class_indices(
    keys: Sequence[str], names: Sequence[str], label_map: Mapping[str, str] | None, rows: Rows, column: str
) -> list[int]:
    """Class index of every row.

    Raises:
        InputError: A label is not in ``label_map``, or is none of the classes of the training split.
    """
    index_of = {name: index for index, name in enumerate(names)}
    mapping = {str(key): str(name) for key, name in label_map.items()} if label_map else {}
    indices = []
    for row, key in enumerate(keys):
        if mapping and key not in mapping:
            raise InputError(
                f"{rows.place(row)}: label '{key}' is not in data.label_map ({_listed(mapping)}). "
                f"Labels found in column '{column}': {_listed(sorted(set(keys)))}."
            )
        name = mapping.get(key, key)
        if name not in index_of:
            raise unknown(
                "label",
                name,
                names[:LISTED],
                f"It stands in {rows.place(row)} and never in the training split; data.label_map can merge labels.",
            )
        indices.append(index_of[name])
    return indices


def _key(value: object, rows: Rows, index: int, column: str) -> str | None:
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
        "Expected one integer or string per text."
    )


def _is_integer(key: str) -> bool:
    return key.removeprefix("-").isdecimal()


def _listed(names: Iterable[str]) -> str:
    names = list(names)
    return ", ".join(names[:LISTED]) + (f", ... ({len(names)} in all)" if len(names) > LISTED else "")
