"""Numbers as labels, for regression."""

from __future__ import annotations

import math
from typing import Any

from calig.datamodules.rows import Rows
from calig.pipeline.errors import InputError


def label_values(rows: Rows, column: str) -> list[float | None]:
    """The numbers of a column, also where a text file spells them; None where a cell is empty.

    Raises:
        InputError: A cell holds no finite number.

    Example:
        >>> label_values(Rows("a.csv", {"score": ["1.5", 2, None]}), "score")
        [1.5, 2.0, None]
    """
    return [_value(value, rows, index, column) for index, value in enumerate(rows.values(column))]


def _value(value: Any, rows: Rows, index: int, column: str) -> float | None:
    if value is None or (isinstance(value, str) and not value.strip()):
        return None
    number = math.nan
    if isinstance(value, int | float | str) and not isinstance(value, bool):
        try:
            number = float(value)
        except ValueError:
            number = math.nan
    if math.isfinite(number):
        return number
    raise InputError(
        f"{rows.place(index)}: the label (column '{column}') is {str(value)[:60]!r}; data.task=regression takes one "
        "finite number per text. Drop the row, or name another column by data.columns.label."
    )
