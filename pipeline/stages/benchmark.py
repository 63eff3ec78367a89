"""benchmark: what `explain` wrote for all methods, compared; no model is run."""

from __future__ import annotations

from collections.abc import Sequence

from calig.pipeline.benchmarking import (
    BENCHMARK_FILE,
    COLUMNS,
    EXPLANATION_COLUMNS,
    BenchmarkRow,
    as_list,
    benchmark,
    write_benchmark,
)
from calig.pipeline.errors import InputError
from calig.pipeline.records import read_numbers, read_samples, shards
from calig.pipeline.render.labels import ON_OUTPUT, SIGNIFICANT, comparable
from calig.pipeline.render.labels import metric as label_of
from calig.pipeline.run import RunContext

SHOWN = {
    "token_f1": "tokenF1",
    "auprc": "auprc",
    "pointing_game": "point",
    "mask_auprc": "m-auprc",
    "comprehensiveness": "compreh",
    "sufficiency": "suffic",
    "infidelity": "infidel",
    "sensitivity_max": "sensit",
    "randomisation": "random",
    "deletion_auc": "delet",
}
"""Columns of the terminal, the first ones that were measured."""
_COLUMNS = 5  # with the method, in 80 characters


def run_stage(context: RunContext) -> None:
    """Write `benchmark.csv`, and show and log what it says.

    Raises:
        InputError: The run has no explanations.
    """
    context.alone(lambda: compare(context))


def compare(context: RunContext) -> None:
    """The work of `run_stage`, for one process."""
    run, config = context.directory, context.config
    if not shards(run / "explanations"):
        raise InputError(
            f"there is nothing to compare: {run.path} has no explanations. Put explain before benchmark in stages."
        )
    # Nothing is held against chance but by the test against it.
    methods = sorted(config.explain.methods, key=lambda method: method == "random")
    rows = benchmark(
        read_numbers(run / "metrics"),
        read_samples(run / "explanations", EXPLANATION_COLUMNS),
        methods,
        run.failures,
        seed=config.seed,
    )
    write_benchmark(run / BENCHMARK_FILE, rows)
    context.log(scalars(rows, methods))
    log_table(context, rows)
    show(context, rows, methods)


def scalars(rows: Sequence[BenchmarkRow], methods: Sequence[str]) -> dict[str, float]:
    """Two numbers per method; the others are in the file.

    `benchmark/<method>/beats_random` is the share of the metrics that it does so on, `benchmark/<method>/agreement` its
    mean rank correlation with the first method.
    """
    values: dict[str, float] = {}
    for method in methods:
        tested = [row.beats_random for row in rows if row.method == method and row.beats_random is not None]
        if tested:
            values[f"benchmark/{method}/beats_random"] = sum(tested) / len(tested)
        for row in rows:
            if row.metric == "agreement" and (row.method, row.other) == (methods[0], method) and row.mean is not None:
                values[f"benchmark/{method}/agreement"] = row.mean
    return values


def log_table(context: RunContext, rows: Sequence[BenchmarkRow]) -> None:
    """Log all rows as one table, where a logger has tables (Weights & Biases)."""
    for logger in context.loggers:
        if not hasattr(logger, "log_table"):
            continue
        try:
            logger.log_table("benchmark/table", columns=list(COLUMNS), data=[as_list(row) for row in rows])
        except Exception as error:
            context.console.warn(f"{type(logger).__name__} failed: {type(error).__name__}: {error}")


def show(context: RunContext, rows: Sequence[BenchmarkRow], methods: Sequence[str]) -> None:
    """Print the leaderboard: means with marks, the sizes below, and what failed."""
    found = {(row.method, row.control, row.metric): row for row in rows if row.group == "all"}
    names = [method for method in methods if method != "random"]
    first = methods[0]
    known = {key[2] for key in found}
    # A regression has no probability: its metrics are those of the output.
    metrics = [name if name in known else name + ON_OUTPUT for name in SHOWN if {name, name + ON_OUTPUT} & known]
    metrics = metrics[:_COLUMNS]
    best = {name: _best(name, found) for name in metrics}
    lines = [(name, "none", name) for name in names]
    lines += [("random", "random", "random (control)"), (first, "reversed", f"{first} reversed")]
    lines += [("centre", "centre", "centre prior")] * any(key[1] == "centre" for key in found)
    columns = [[_cell(found.get((*line[:2], name)), best[name]) for line in lines] for name in metrics]
    widths = [max((len(mark) for _, mark in column), default=0) for column in columns]
    table = []
    for place, (_, _, label) in enumerate(lines):
        cells = [column[place] for column in columns]
        numbers = [text + mark.ljust(width) for (text, mark), width in zip(cells, widths, strict=True)]
        table.append([label, *numbers])
    sizes = [_size(first, name, found) + " " * width for name, width in zip(metrics, widths, strict=True)]
    table.append(["samples", *sizes])
    arrows = {1: "↑", -1: "↓"}
    heads = [f"{SHOWN[name.removesuffix(ON_OUTPUT)]}{arrows.get(label_of(name).direction, '')}" for name in metrics]
    context.console.table(f"benchmark  {len(names)} method{'s' * (len(names) != 1)}, means", ["method", *heads], table)
    _show_costs(context, found, names)
    context.console.say(
        f"* best   ≈ no significant difference from {first} (paired permutation\n"
        f"test, Holm, p ≥ {SIGNIFICANT})   † does not beat the random ranking"
    )
    for row in rows:
        if row.metric == "failed":
            context.console.say(f"failed   {row.method} on {row.n} samples: {row.note}")


Found = dict[tuple[str, str, str], BenchmarkRow]


def _show_costs(context: RunContext, found: Found, methods: Sequence[str]) -> None:
    """Print what each method costs a sample, beside how often it beats chance."""
    costs = {"seconds": ("ms", 1000), "passes": ("passes", 1), "peak_memory": ("MiB", 1)}
    shown = [name for name in costs if any(key[2] == name for key in found)]
    table = []
    for method in methods:
        rows = [found.get((method, "none", name)) for name in shown]
        numbers = [
            "-" if row is None or row.mean is None else f"{row.mean * costs[name][1]:,.0f}"
            for row, name in zip(rows, shown, strict=True)
        ]
        tested = [row.beats_random for key, row in found.items() if key[:2] == (method, "none")]
        beats = [beaten for beaten in tested if beaten is not None]
        table.append([method, _size(method, "seconds", found), *numbers, f"{sum(beats)} of {len(beats)} metrics"])
    heads = [costs[name][0] for name in shown]
    context.console.table(
        "\ncosts per sample, peak memory of a batch", ["method", "samples", *heads, "beats random on"], table
    )


def _best(metric: str, found: Found) -> float | None:
    rows = [row for key, row in found.items() if key[1:] == ("none", metric) and row.mean is not None]
    most = max((row.n for row in rows), default=0)
    own = [row.mean for row in rows if row.mean is not None and comparable(row.n, most)]
    direction = label_of(metric).direction
    return max(own, key=lambda value: direction * value) if len(own) > 1 and direction else None


def _cell(row: BenchmarkRow | None, best: float | None) -> tuple[str, str]:
    """A number and its marks."""
    if row is None or row.mean is None:
        return "-", ""
    leads = row.control == "none" and row.mean == best
    marks = "*" * leads + "≈" * row.same + "†" * (row.beats_random is False)
    return f"{row.mean:.3f}".replace("0.", ".", 1), marks


def _size(method: str, metric: str, found: Found) -> str:
    row = found.get((method, "none", metric))
    return "-" if row is None else str(row.n)
