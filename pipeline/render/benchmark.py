"""The benchmark section of the page: differences with p-values, costs, agreement of rankings, and groups of samples."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING

from calig.pipeline.render.labels import Metric, metric, number, p_value

if TYPE_CHECKING:
    from calig.pipeline.benchmarking import BenchmarkRow

_COSTS = {
    "seconds": ("ms", "per sample"),
    "passes": ("passes", "per sample"),
    "steps_used": ("path nodes", "per sample"),
    "peak_memory": ("peak MiB", "of a batch"),
}
_QUALITY = ("token_f1", "auprc", "mask_auprc", "comprehensiveness", "sufficiency")
"""What stands beside the costs, where it was measured."""
_WIDTH = 0.45
"""Opacity of the ground behind a rank correlation of 1."""


@dataclass(frozen=True)
class Entry:
    """A cell: a number, a mark, two small lines under it, and how deep its ground is coloured."""

    text: str
    small: str = ""
    mark: str = ""
    smaller: str = ""
    depth: float = 0.0
    opposes: bool = False


@dataclass(frozen=True)
class Grid:
    """A table ready for the template.

    Attributes:
        title: What it shows.
        columns: (label, small line) of each.
        lines: (name of the line as trusted markup, its cells).
        narrow: Whether the columns stand close together.
    """

    title: str
    columns: list[tuple[str, str]]
    lines: list[tuple[str, list[Entry | None]]]
    narrow: bool = False


@dataclass(frozen=True)
class BenchmarkView:
    """What the section shows; a part without numbers is left out."""

    primary: str
    grids: list[Grid]
    breakdowns: list[Grid]
    failed: list[tuple[str, int, str]]
    """Method, samples, the most frequent reason."""


def benchmark_view(rows: Sequence[BenchmarkRow], primary: str) -> BenchmarkView | None:
    """Arrange the rows of `benchmark.csv`; None where there are none."""
    if not rows:
        return None
    primary = next((row.other for row in rows if row.difference is not None), primary)
    grids = [_differences(rows, primary), _costs(rows), _agreement(rows)]
    return BenchmarkView(
        primary=primary,
        grids=[grid for grid in grids if grid.lines],
        breakdowns=_breakdowns(rows),
        failed=[(row.method, row.n, row.note) for row in rows if row.metric == "failed"],
    )


def _differences(rows: Sequence[BenchmarkRow], primary: str) -> Grid:
    found = {
        (row.method, row.metric): row
        for row in rows
        if row.difference is not None and "@" not in row.metric and row.metric != "completeness_gap"
    }
    columns = sorted({metric(name) for _, name in found}, key=lambda column: column.order)

    sizes = {
        column.name: max(row.n_paired or 0 for (_, name), row in found.items() if name == column.name)
        for column in columns
    }

    def cell(row: BenchmarkRow | None) -> Entry | None:
        if row is None:
            return None
        interval = f"{number(row.difference_low)} to {number(row.difference_high)}"
        size = "" if row.n_paired == sizes[row.metric] else f", n = {row.n_paired}"
        return Entry(number(row.difference), interval, "≈" if row.same else "", p_value(row.p_adjusted) + size)

    lines = [
        (_name(name), [cell(found.get((name, column.name))) for column in columns])
        for name in _unique(name for name, _ in found)
    ]
    heads = [
        (label, f"{small}, n = {n}".removeprefix(", "))
        for (label, small), n in zip(map(_label, columns), sizes.values(), strict=True)
    ]
    return Grid(f"{primary} minus each method, on the samples of both", heads, lines)


def _costs(rows: Sequence[BenchmarkRow]) -> Grid:
    # The random ranking's costs are those of the method `random`, its quality that of the control.
    found = {(row.method, row.metric): row for row in rows if row.control != "reversed" and row.group == "all"}
    methods = _unique(method for method, name in found if name in _COSTS)
    costs = [name for name in _COSTS if any(name == key for _, key in found)]
    quality = [metric(name) for name in _QUALITY if any(name == key for _, key in found)]

    def mean(name: str, row: BenchmarkRow | None) -> Entry | None:
        if row is None or row.mean is None:
            return None
        if name not in _COSTS:
            return Entry(number(row.mean))
        return Entry(f"{(1000 if name == 'seconds' else 1) * row.mean:,.1f}")

    lines = []
    for method in methods:
        of_method = [row for (name, _), row in found.items() if name == method]
        tested = [row.beats_random for row in of_method if row.beats_random is not None]
        cells: list[Entry | None] = [Entry(str(max(row.n for row in of_method if row.metric in _COSTS)))]
        cells += [mean(name, found.get((method, name))) for name in (*costs, *(column.name for column in quality))]
        cells.append(Entry(f"{sum(tested)} of {len(tested)}") if tested else None)
        lines.append((_name(method), cells))
    heads = [("samples", ""), *(_COSTS[name] for name in costs), *(_label(column) for column in quality)]
    return Grid("What a method costs, and how well it does", [*heads, ("beats random", "metrics")], lines)


def _agreement(rows: Sequence[BenchmarkRow]) -> Grid:
    found = {(row.method, row.other): row for row in rows if row.metric == "agreement"}
    names = _unique(name for name, _ in found)
    most = max((row.n for row in found.values()), default=0)

    def cell(row: BenchmarkRow | None) -> Entry | None:
        if row is None or row.mean is None:
            return None
        size = "" if row.n == most else f"n = {row.n}"
        return Entry(
            f"{row.mean:.2f}".replace("-", "−"), size, depth=round(_WIDTH * abs(row.mean), 3), opposes=row.mean < 0
        )

    lines = [(f"{i} {_name(a)}", [cell(found.get((a, b))) for b in names]) for i, a in enumerate(names, start=1)]
    heads = [(str(i), "") for i in range(1, len(names) + 1)]
    return Grid("Agreement: mean rank correlation of the scores of a sample", heads, lines, narrow=True)


def _breakdowns(rows: Sequence[BenchmarkRow]) -> list[Grid]:
    grouped = [row for row in rows if row.group != "all" and row.mean is not None]
    notes = {row.group: row.note for row in grouped}
    found = {(row.metric, row.method, row.group): row for row in grouped}
    grids = []
    for column in sorted({metric(row.metric) for row in grouped}, key=lambda column: column.order):
        lines = []
        for method in _unique(row.method for row in grouped if row.metric == column.name):
            cells = [_with_interval(found.get((column.name, method, group))) for group in notes]
            lines.append((_name(method), cells))
        grids.append(Grid(f"{column.label} {column.arrow}".rstrip(), list(notes.items()), lines))
    return grids


def _with_interval(row: BenchmarkRow | None) -> Entry | None:
    if row is None:
        return None
    low, high = number(row.low, row.metric), number(row.high, row.metric)
    return Entry(number(row.mean, row.metric), f"{low.removesuffix(' %')} to {high}, {row.n} samples")


def _label(column: Metric) -> tuple[str, str]:
    return f"{column.label}\u00a0{column.arrow}".rstrip(), column.variant


def _name(method: str) -> str:
    return escape(method).replace("_", "_<wbr>")


def _unique(names: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(names))
