"""The metric table: methods in rows, metrics in columns, the controls apart."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from html import escape

from calig.pipeline.render.labels import ON_OUTPUT, SIGNIFICANT, Metric, comparable, metric, number, p_value
from calig.pipeline.render.rows import MetricRow

Values = dict[tuple[str, str, str], MetricRow]
"""(control, method, metric) to its row."""


@dataclass(frozen=True)
class Cell:
    """One value as text; ``best`` in its column, ``weak`` where it does not beat the random ranking.

    ``same`` where a test against the primary method found no difference; ``p`` is its adjusted p-value in words.
    """

    text: str
    interval: str = ""
    best: bool = False
    weak: bool = False
    same: bool = False
    p: str = ""


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

    @property
    def any_same(self) -> bool:
        """Whether the footnote on differences that no test found is needed."""
        return any(cell is not None and cell.same for line in self.methods for cell in line.cells)


def leaderboards(rows: Sequence[MetricRow], primary: str) -> tuple[Table, Table]:
    """The main table, and the table of the same metrics under other perturbation operators or on logits.

    A regression has no probability: its metrics on the output, with the default operator, stand in the main table.
    """
    names = {row.metric for row in rows}
    apart = {
        name
        for name in names
        if metric(name).other_operator and not (name.endswith(ON_OUTPUT) and name.removesuffix(ON_OUTPUT) not in names)
    }
    main = [row for row in rows if row.metric not in apart]
    other = [row for row in rows if row.metric in apart]
    return _table(main, primary), _table(other, primary)


def _table(rows: Sequence[MetricRow], primary: str) -> Table:
    columns = sorted({row.metric: metric(row.metric) for row in rows}.values(), key=lambda column: column.order)
    values: Values = {(row.control, row.method, row.metric): row for row in rows if math.isfinite(row.value)}
    most = {column.name: _most(column, values) for column in columns}
    best = {column.name: _best(column, values, most[column.name]) for column in columns}
    random = {row.metric: row.value for row in values.values() if row.control == "random"}

    def line(control: str, method: str, name: str) -> Line:
        rows = [values.get((control, method, column.name)) for column in columns]
        cells = [_cell(column, row, best, random, most[column.name]) for column, row in zip(columns, rows, strict=True)]
        return Line(name, control, cells, primary=control == "none" and method == primary)

    methods = _unique(row.method for row in rows if row.control == "none")
    methods.sort(key=lambda method: method != primary)
    randoms = _unique(row.method for row in rows if row.control == "random")
    controls = [line("random", name, "random" if len(randoms) == 1 else f"random · {name}") for name in randoms]
    priors = _unique(row.method for row in rows if row.control == "centre")
    controls += [line("centre", name, f"{name} prior") for name in priors]
    reverses = _unique(row.method for row in rows if row.control == "reversed")
    reverses.sort(key=lambda method: method != primary)
    controls += [line("reversed", name, f"{name} reversed") for name in reverses]
    return Table(columns, [line("none", name, name) for name in methods], controls)


def _most(column: Metric, values: Values) -> int:
    return max((row.n or 0 for row in values.values() if row.metric == column.name), default=0)


def _best(column: Metric, values: Values, most: int) -> float | None:
    if not column.direction:
        return None
    rows = [row for (control, _, name), row in values.items() if control == "none" and name == column.name]
    own = [row.value for row in rows if comparable(row.n, most)]
    return max(own, key=lambda value: column.direction * value) if len(own) > 1 else None


def _cell(
    column: Metric, row: MetricRow | None, best: dict[str, float | None], random: dict[str, float], most: int
) -> Cell | None:
    if row is None:
        return None
    interval = ""
    if row.low is not None and row.high is not None and math.isfinite(row.low) and math.isfinite(row.high):
        low, high = number(row.low, row.metric), number(row.high, row.metric)
        interval = f"{low.removesuffix(' %')} to {high}"
    if not comparable(row.n, most):
        interval = f"{interval}, n = {row.n}".removeprefix(", ")
    own = row.control == "none"
    chance = random.get(row.metric)
    weak = own and chance is not None and column.direction * (row.value - chance) <= 0 and column.direction != 0
    if own and row.beats_random is not None:
        weak = not row.beats_random
    same = own and row.p is not None and row.p >= SIGNIFICANT
    best_of_all = own and row.value == best[column.name]
    return Cell(number(row.value, row.metric), interval, best_of_all, weak, same, p_value(row.p) if own else "")


def _unique(names: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(names))
