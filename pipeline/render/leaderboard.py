"""The metric table: methods in rows, metrics in columns, the controls apart."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from html import escape

from calig.pipeline.render.labels import Metric, metric, number
from calig.pipeline.render.rows import MetricRow

Values = dict[tuple[str, str, str], MetricRow]
"""(control, method, metric) to its row."""


@dataclass(frozen=True)
class Cell:
    """One value as text; ``best`` in its column, ``weak`` where it does not beat the random ranking."""

    text: str
    interval: str = ""
    best: bool = False
    weak: bool = False


@dataclass(frozen=True)
class Line:
    """One row of the table."""

    name: str
    control: str
    cells: list[Cell | None]
    primary: bool = False

    @property
    def html(self) -> str:
        """The name, escaped, with places to break after its underscores."""
        return escape(self.name).replace("_", "_<wbr>")


@dataclass(frozen=True)
class Table:
    """A table ready for the template."""

    columns: list[Metric] = field(default_factory=list)
    methods: list[Line] = field(default_factory=list)
    controls: list[Line] = field(default_factory=list)

    @property
    def any_weak(self) -> bool:
        """Whether the footnote on values no better than random is needed."""
        return any(cell is not None and cell.weak for line in self.methods for cell in line.cells)


def leaderboards(rows: Sequence[MetricRow], primary: str) -> tuple[Table, Table]:
    """The main table, and the table of the same metrics under other perturbation operators or on logits."""
    main = [row for row in rows if not metric(row.metric).other_operator]
    other = [row for row in rows if metric(row.metric).other_operator]
    return _table(main, primary), _table(other, primary)


def _table(rows: Sequence[MetricRow], primary: str) -> Table:
    columns = sorted({row.metric: metric(row.metric) for row in rows}.values(), key=lambda column: column.order)
    values: Values = {(row.control, row.method, row.metric): row for row in rows if math.isfinite(row.value)}
    best = {column.name: _best(column, values) for column in columns}
    random = {row.metric: row.value for row in values.values() if row.control == "random"}

    def line(control: str, method: str, name: str) -> Line:
        cells = [_cell(column, values.get((control, method, column.name)), best, random) for column in columns]
        return Line(name, control, cells, primary=control == "none" and method == primary)

    methods = _unique(row.method for row in rows if row.control == "none")
    methods.sort(key=lambda method: method != primary)
    randoms = _unique(row.method for row in rows if row.control == "random")
    controls = [line("random", name, "random" if len(randoms) == 1 else f"random · {name}") for name in randoms]
    reverses = _unique(row.method for row in rows if row.control == "reversed")
    reverses.sort(key=lambda method: method != primary)
    controls += [line("reversed", name, f"{name} reversed") for name in reverses]
    return Table(columns, [line("none", name, name) for name in methods], controls)


def _best(column: Metric, values: Values) -> float | None:
    if not column.direction:
        return None
    own = [row.value for (control, _, name), row in values.items() if control == "none" and name == column.name]
    return max(own, key=lambda value: column.direction * value) if len(own) > 1 else None


def _cell(
    column: Metric, row: MetricRow | None, best: dict[str, float | None], random: dict[str, float]
) -> Cell | None:
    if row is None:
        return None
    interval = ""
    if row.low is not None and row.high is not None and math.isfinite(row.low) and math.isfinite(row.high):
        low, high = number(row.low, row.metric), number(row.high, row.metric)
        interval = f"{low.removesuffix(' %')} to {high}"
    own = row.control == "none"
    chance = random.get(row.metric)
    weak = own and chance is not None and column.direction * (row.value - chance) <= 0 and column.direction != 0
    return Cell(number(row.value, row.metric), interval, own and row.value == best[column.name], weak)


def _unique(names: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(names))
