"""Two runs side by side: what was configured differently, how the numbers moved, whether the explanations agree."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from calig.pipeline.compose import CONFIG_FILE, load
from calig.pipeline.config import show
from calig.pipeline.errors import InputError
from calig.pipeline.records import read_rows, shards, table_metadata
from calig.pipeline.run import RunDirectory


@dataclass(frozen=True)
class Agreement:
    """How alike the explanations of one method are in both runs.

    Attributes:
        method: The method.
        common: Samples that both runs explained by it, with the same tokens.
        spearman: Mean rank correlation of the scores over ordinary tokens; None where no sample has one.
        same_target: Samples among them whose explained class is the same.
        spearman_same: The mean over those alone.
        undefined: Common samples without a correlation: fewer than two tokens, or all scores equal.
    """

    method: str
    common: int
    spearman: float | None
    same_target: int
    spearman_same: float | None
    undefined: int


@dataclass(frozen=True)
class Comparison:
    """Attributes: the runs `a` and `b`; (key, a, b) of what differs; samples per run and those in both."""

    a: str
    b: str
    config: list[tuple[str, Any, Any]]
    metrics: list[tuple[str, float | None, float | None]]
    methods: tuple[list[str], list[str]]
    samples: tuple[int, int]
    common_ids: int
    agreement: list[Agreement]


def compare_runs(a: str | Path, b: str | Path) -> Comparison:
    """Compare two run directories (or two `--out` directories of `calig explain`).

    Raises:
        InputError: One is neither.
    """
    one, two = Path(a), Path(b)
    for path in (one, two):
        if not (path / CONFIG_FILE).is_file() and not shards(path / "explanations"):
            problem = "has neither config.yaml nor explanations/" if path.is_dir() else "does not exist"
            raise InputError(f"{path} {problem}; expected a run directory, or what `calig explain --out` wrote.")
    rows = _explanations(one), _explanations(two)
    ids = [{sample for sample, _ in found} for found in rows]
    methods = [list(dict.fromkeys(method for _, method in found)) for found in rows]
    first, second = _settings(one), _settings(two)
    keys = [key for key in dict.fromkeys([*first, *second]) if first.get(key) != second.get(key)]
    values = RunDirectory(one).summary, RunDirectory(two).summary
    return Comparison(
        a=str(a),
        b=str(b),
        config=[(key, first.get(key, "-"), second.get(key, "-")) for key in keys] if _comparable(one, two) else [],
        metrics=_metrics(*values),
        methods=(methods[0], methods[1]),
        samples=(len(ids[0]), len(ids[1])),
        common_ids=len(ids[0] & ids[1]),
        agreement=[_agreement(method, *rows) for method in methods[0] if method in methods[1]],
    )


def print_comparison(found: Comparison, *, every_metric: bool = False) -> None:
    """Print a comparison; without `every_metric` the variants, intervals and controls are left out."""
    console = Console(highlight=False, soft_wrap=True)

    def table(columns: list[str], rows: list[list[str]]) -> None:
        drawn = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
        for index, column in enumerate(columns):
            drawn.add_column(column, justify="left" if index == 0 else "right", no_wrap=not index, overflow="fold")
        for row in rows:
            drawn.add_row(*row)
        console.print(drawn, width=max(console.width, 100), crop=False, markup=False)

    console.print(f"A  {found.a}\nB  {found.b}", markup=False)
    console.print("\nconfiguration", style="bold")
    if found.config:
        table(["key", "A", "B"], [[key, show(a), show(b)] for key, a, b in found.config])
    else:
        same = _comparable(Path(found.a), Path(found.b))
        console.print("the same in both" if same else "not known of both: one has no config.yaml")

    console.print("\nmetrics", style="bold")
    shown = [row for row in found.metrics if every_metric or _is_plain(row[0])]
    paired = [(key, x, y) for key, x, y in shown if x is not None and y is not None]
    if paired:
        rows = [[key, _number(x), _number(y), "=" if x == y else _number(y - x, "+")] for key, x, y in paired]
        table(["metric", "A", "B", "B − A"], rows)
    else:
        console.print("none in common")
    for name, index in (("A", 1), ("B", 2)):
        alone = [row[0] for row in shown if row[3 - index] is None]
        if alone:
            console.print(f"only in {name}: {', '.join(alone[:6])}{f' and {len(alone) - 6} more' * (len(alone) > 6)}")

    console.print("\nrank agreement of explanations", style="bold")
    a, b = found.samples
    console.print(
        f"{a:,} samples in A, {b:,} in B, {found.common_ids:,} sample ids in both; compared where tokens are the same"
    )
    if not found.agreement:
        one, two = (", ".join(names) or "none" for names in found.methods)
        console.print(f"no method in common (A: {one}; B: {two})")
    elif not any(item.common for item in found.agreement):
        console.print("no sample has the same tokens in both: other data, or another tokenizer")
    else:
        rows = [
            [x.method, f"{x.common:,}", _number(x.spearman), f"{x.same_target:,}", _number(x.spearman_same)]
            for x in found.agreement
        ]
        table(["method", "samples", "mean Spearman", "same class", "mean Spearman"], rows)
        if any(item.undefined for item in found.agreement):
            left = ", ".join(f"{x.method} {x.undefined}" for x in found.agreement if x.undefined)
            console.print(f"left out, as a correlation needs two tokens with different scores: {left}")


def _comparable(a: Path, b: Path) -> bool:
    """Whether both are runs, or both are what `calig explain` wrote."""
    return (a / CONFIG_FILE).is_file() == (b / CONFIG_FILE).is_file()


def _settings(path: Path) -> dict[str, Any]:
    """Full key -> value; without `run`, which only says where a run is kept. Of what `calig explain` wrote: how."""

    def flat(values: Mapping[str, Any], prefix: str) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for key, value in values.items():
            nested = isinstance(value, dict) and value
            found |= flat(value, f"{prefix}{key}.") if nested else {f"{prefix}{key}": value}
        return found

    if not (path / CONFIG_FILE).is_file():
        metadata = table_metadata(shards(path / "explanations")[0])
        return flat({key: metadata[key] for key in ("source", "file", "methods") if key in metadata}, "")
    everything = flat(asdict(load(path, check=False)), "")
    return {key: value for key, value in everything.items() if not key.startswith("run.")}


def _metrics(a: Mapping[str, Any], b: Mapping[str, Any]) -> list[tuple[str, float | None, float | None]]:
    order = ("test/", "val/", "train/", "explain/")
    keys = sorted({*a, *b}, key=lambda key: (next((i for i, o in enumerate(order) if key.startswith(o)), 9), key))
    numbers = [(key, _float(a.get(key)), _float(b.get(key))) for key in keys]
    return [row for row in numbers if row[1:] != (None, None)]


def _is_plain(key: str) -> bool:
    """Whether a key is a headline: the probe's course, variants, ends of intervals and controls are not."""
    if key.startswith(("val/explain/", "train/")) or "@" in key or "/reversed/" in key:
        return False
    return not key.endswith(("/low", "/high", "/seconds", "/failed", "base_rate")) and "layer_profile" not in key


def _explanations(path: Path) -> dict[tuple[int, str], dict[str, Any]]:
    columns = ["sample_id", "method", "tokens", "word_ids", "scores", "target"]
    return {(row["sample_id"], row["method"]): row for row in read_rows(path / "explanations", columns=columns)}


def _agreement(method: str, a: Mapping[Any, dict[str, Any]], b: Mapping[Any, dict[str, Any]]) -> Agreement:
    pairs = [
        (row, b[key]) for key, row in a.items() if key[1] == method and key in b and row["tokens"] == b[key]["tokens"]
    ]
    values = [(_spearman(one, two), one["target"] == two["target"]) for one, two in pairs]
    defined = [(value, same) for value, same in values if not math.isnan(value)]
    return Agreement(
        method,
        common=len(pairs),
        spearman=_mean([value for value, _ in defined]),
        same_target=sum(same for _, same in values),
        spearman_same=_mean([value for value, same in defined if same]),
        undefined=len(values) - len(defined),
    )


def _spearman(a: Mapping[str, Any], b: Mapping[str, Any]) -> float:
    import torch

    from calig.pipeline.metrics import spearman

    words = [i for i, word in enumerate(a["word_ids"]) if word is not None]
    scores = (torch.tensor([row["scores"][i] for i in words]) for row in (a, b))
    return spearman(*scores)


def _mean(values: list[float]) -> float | None:
    return sum(values) / len(values) if values else None


def _float(value: Any) -> float | None:
    return float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else None


def _number(value: float | None, sign: str = "") -> str:
    return "-" if value is None else f"{value:{sign}.4f}"
