"""From the rows that `explain` wrote to a benchmark of its methods: intervals, paired tests, costs, agreement, groups.

Nothing is computed of a model. Shapes: M methods, N evaluable tokens of a sample, U samples.
"""

from __future__ import annotations

import csv
import dataclasses
import io
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from calig.pipeline.metrics.comparison import Difference, differences
from calig.pipeline.metrics.statistics import (
    Key,
    Summary,
    Values,
    first_mean,
    spearman_matrix,
    summary_of,
    unique_by_id,
    unique_values,
)
from calig.pipeline.records import atomic_write
from calig.pipeline.render.decisions import Decision
from calig.pipeline.render.labels import SIGNIFICANT
from calig.pipeline.render.labels import metric as label_of

BENCHMARK_FILE = "benchmark.csv"
EXPLANATION_COLUMNS = [
    *("sample_id", "method", "word_ids", "scores", "label", "prediction", "steps_used"),
    *("target", "predictions", "labels"),
]
"""What is read of the explanations."""

Rows = Iterable[Mapping[str, Any]]


@dataclass(frozen=True)
class BenchmarkRow:
    """One line of `benchmark.csv`; what does not apply is None, an empty field in the file.

    Attributes:
        method: The method; `random` with the control `random` is the random ranking.
        control: `none`, `random`, `reversed` or, of object masks, `centre`.
        metric: As `metric_key` spells it; also `steps_used`, `agreement` (with `other`) and `failed` (`n` of them).
        group: `all`, `short`, `medium` or `long` (thirds by evaluable tokens), `right` or `wrong` (the prediction).
        mean: Over the samples of the group.
        low: Lower end of its 95 % bootstrap interval.
        high: Upper end.
        n: Samples.
        n_skipped: Samples that the metric is undefined for.
        other: What it is held against: the first method, or the other method of an agreement.
        difference: First method minus this one on the samples of both.
        difference_low: Lower end of its paired bootstrap interval.
        difference_high: Upper end.
        p: Of the two-sided paired permutation test.
        p_adjusted: After Holm, over the methods held against the first one in this metric.
        n_paired: Samples of the test.
        random_difference: This method minus the random ranking.
        random_p_adjusted: Of the same test against the random ranking, after Holm over all methods.
        beats_random: Whether that is a difference to the better side.
        note: What a group holds, or the most frequent reason of failures.
    """

    method: str
    control: str
    metric: str
    group: str = "all"
    mean: float | None = None
    low: float | None = None
    high: float | None = None
    n: int = 0
    n_skipped: int = 0
    other: str = ""
    difference: float | None = None
    difference_low: float | None = None
    difference_high: float | None = None
    p: float | None = None
    p_adjusted: float | None = None
    n_paired: int | None = None
    random_difference: float | None = None
    random_p_adjusted: float | None = None
    beats_random: bool | None = None
    note: str = ""

    @property
    def same(self) -> bool:
        """Whether it was tested against the first method and no difference was found."""
        return self.p_adjusted is not None and self.p_adjusted >= SIGNIFICANT


@dataclass
class SampleFacts:
    """What the explanations say beside the metrics.

    Attributes:
        lengths: Sample -> evaluable tokens.
        right: Sample -> whether the prediction is the label, where there is one.
        steps: Method -> ids and path nodes of its samples.
        agreement: Two methods -> sum of their rank correlations, and of how many samples.
    """

    lengths: dict[int, int] = field(default_factory=dict)
    right: dict[int, bool] = field(default_factory=dict)
    steps: dict[str, tuple[array[int], array[float]]] = field(default_factory=dict)
    agreement: dict[tuple[str, str], tuple[float, int]] = field(default_factory=dict)

    def add(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Take in one sample: its explanations by all methods, of each of its labels where it may have several."""
        first = rows[0]
        words = [i for i, word in enumerate(first["word_ids"]) if word is not None]
        sample = first["sample_id"]
        self.lengths[sample] = len(words)
        if (right := Decision.of({"target": None, **first}).right) is not None:
            self.right[sample] = right
        steps: dict[str, list[int]] = {}
        for row in rows:
            steps.setdefault(row["method"], []).append(row["steps_used"])
        for method, used in steps.items():
            ids, values = self.steps.setdefault(method, (array("q"), array("d")))
            ids.append(sample)
            values.append(sum(used) / len(used))  # over the labels of the sample
        by_target: dict[int | None, list[Mapping[str, Any]]] = {}
        for row in rows if len(words) > 1 else ():
            by_target.setdefault(row.get("target") if row.get("predictions") is not None else None, []).append(row)
        for same in by_target.values():
            self._agree(same, words)

    def _agree(self, rows: Sequence[Mapping[str, Any]], words: Sequence[int]) -> None:
        """Take in the explanations of one output by all methods."""
        # (M, M) of (M, N)
        found = spearman_matrix(torch.tensor([[row["scores"][i] for i in words] for row in rows])).tolist()
        for i, a in enumerate(rows):
            for j, b in enumerate(rows):
                value = found[i][j]
                if i != j and value == value:  # no NaN
                    total, count = self.agreement.get((a["method"], b["method"]), (0.0, 0))
                    self.agreement[a["method"], b["method"]] = (total + value, count + 1)

    def step_values(self) -> dict[Key, Values]:
        """The path nodes as a metric `steps_used`."""
        found: dict[Key, Values] = {}
        for method, (ids, values) in self.steps.items():
            columns = torch.tensor(values, dtype=torch.double).unsqueeze(1)
            found[method, "none", "steps_used"] = Values(*unique_by_id(torch.tensor(ids), columns), first_mean)
        return found

    def groups(self) -> dict[str, tuple[str, set[int]]]:
        """Group -> what it holds, in words, and its samples; groups without samples are left out."""
        found: dict[str, tuple[str, set[int]]] = {}
        order = sorted(self.lengths.values())
        ends = [order[-(-len(order) * third // 3) - 1] for third in (1, 2, 3)] if order else []
        least = 0
        for name, end in zip(("short", "medium", "long"), ends, strict=False):
            ids = {sample for sample, length in self.lengths.items() if least <= length <= end}
            if ids:
                found[name] = (f"{min(self.lengths[i] for i in ids)} to {end} tokens", ids)
                least = end + 1
        for name, wanted in (("right", True), ("wrong", False)):
            ids = {sample for sample, right in self.right.items() if right == wanted}
            if ids:
                found[name] = (f"{name} predictions", ids)
        return found


def benchmark(
    metrics: Rows,
    samples: Iterable[Sequence[Mapping[str, Any]]],
    methods: Sequence[str],
    failures: Rows = (),
    *,
    seed: int = 0,
    resamples: int = 1000,
    permutations: int = 9999,
) -> list[BenchmarkRow]:
    """Compare methods on what was measured of them; see `BenchmarkRow` for the columns.

    Args:
        metrics: Rows of the metrics table, as in `summarise`.
        samples: For each sample its rows of the explanations table, at least `EXPLANATION_COLUMNS`.
        methods: The methods in order; the others are held against the first.
        failures: Rows of `failures.jsonl`.
        seed: Of the bootstrap and the permutations.
        resamples: Of the bootstrap.
        permutations: Of the tests.

    Returns:
        The rows: for all samples by method and control, then the groups, the agreement and the failures.

    Raises:
        MetricError: As in `summarise`.
    """
    facts = SampleFacts()
    for rows in samples:
        facts.add(rows)
    found = unique_values(metrics) | facts.step_values()
    names = list(dict.fromkeys([*methods, *(method for method, control, _ in found if control == "none")]))
    options = {"seed": seed, "resamples": resamples}
    tests = _Tests.of(found, names, permutations=permutations, **options)
    keys = sorted(found, key=lambda key: _place(key, names))
    lines = [tests.row(key, names[0], summary_of(found[key].values, found[key].statistic, **options)) for key in keys]
    main = {key: found[key] for key in keys if key[1] != "reversed" and "@" not in key[2] and _judged(key)}
    for group, (note, members) in facts.groups().items():
        chosen = torch.tensor(sorted(members))
        for key, own in main.items():
            summary = summary_of(own.values[torch.isin(own.ids, chosen)], own.statistic, **options)
            if summary.n or summary.n_skipped:
                lines.append(_row(key, summary, group, note))
    return [*lines, *_agreement(facts, names), *_failed(failures)]


def _row(key: Key, summary: Summary, group: str = "all", note: str = "") -> BenchmarkRow:
    method, control, metric = key
    mean, low, high, n, n_skipped = summary
    return BenchmarkRow(method, control, metric, group, mean, low, high, n, n_skipped, note=note)


def _judged(key: Key) -> bool:
    """Whether the metric has a better side."""
    return label_of(key[2]).direction != 0


def _agreement(facts: SampleFacts, names: Sequence[str]) -> Iterator[BenchmarkRow]:
    for a in names:
        for b in names:
            if (a, b) in facts.agreement:
                total, count = facts.agreement[a, b]
                yield BenchmarkRow(a, "none", "agreement", mean=total / count, n=count, other=b)


def _failed(failures: Rows) -> Iterator[BenchmarkRow]:
    reasons: dict[str, Counter[str]] = {}
    for row in failures:
        reasons.setdefault(row["method"], Counter())[row["reason"]] += 1
    for method, counts in reasons.items():
        yield BenchmarkRow(method, "none", "failed", n=counts.total(), note=counts.most_common(1)[0][0])


@dataclass
class _Tests:
    """Of (method, control, metric): its difference from the first method, and from the random ranking."""

    first: dict[Key, Difference]
    random: dict[Key, Difference]

    @classmethod
    def of(cls, found: Mapping[Key, Values], names: Sequence[str], **options: Any) -> _Tests:
        """Test every metric that has a better side."""
        judged = [key for key in found if key[1] != "reversed" and _judged(key)]
        own = names[0]
        first = [((own, "none", key[2]), key) for key in judged if key[0] != own]
        chance = [(key, ("random", "random", key[2])) for key in judged if key[1] == "none"]
        held, tested = (differences(found, pairs, **options) for pairs in (first, chance))
        return cls(
            {key: row for (_, key), row in zip(first, held, strict=True) if row is not None},
            {key: row for (key, _), row in zip(chance, tested, strict=True) if row is not None},
        )

    def row(self, key: Key, own: str, summary: Summary) -> BenchmarkRow:
        """One line for all samples."""
        line = _row(key, summary)
        if (held := self.first.get(key)) is not None:
            line = dataclasses.replace(
                line,
                other=own,
                difference=held.difference,
                difference_low=held.low,
                difference_high=held.high,
                p=held.p,
                p_adjusted=held.p_adjusted,
                n_paired=held.n,
            )
        if (chance := self.random.get(key)) is not None:
            better = label_of(key[2]).direction * chance.difference > 0
            line = dataclasses.replace(
                line,
                random_difference=chance.difference,
                random_p_adjusted=chance.p_adjusted,
                beats_random=better and chance.p_adjusted < SIGNIFICANT,
            )
        return line


def _place(key: Key, names: Sequence[str]) -> tuple[int, int, tuple[int, str, str]]:
    method, control, metric = key
    return (
        ("none", "random", "centre", "reversed").index(control),
        names.index(method) if method in names else -1,
        (label_of(metric).order),
    )


def write_benchmark(path: Path, rows: Sequence[BenchmarkRow]) -> None:
    """Write the rows as CSV, atomically; floats as Python spells them, so that reading them back loses nothing."""
    text = io.StringIO(newline="")
    writer = csv.writer(text)
    writer.writerow(COLUMNS)
    writer.writerows(as_list(row) for row in rows)
    atomic_write(path, text.getvalue())


def as_list(row: BenchmarkRow) -> list[Any]:
    """The values of a row in the order of `COLUMNS`."""
    return [getattr(row, name) for name in COLUMNS]


def read_benchmark(path: Path) -> list[BenchmarkRow]:
    """Read what `write_benchmark` wrote; none where there is no such file."""
    if not path.exists():
        return []
    with path.open(encoding="utf8", newline="") as stream:
        return [
            BenchmarkRow(**{name: _read(name, text) for name, text in row.items()}) for row in csv.DictReader(stream)
        ]


COLUMNS = tuple(item.name for item in dataclasses.fields(BenchmarkRow))
_TEXT = ("method", "control", "metric", "group", "other", "note")


def _read(name: str, text: str) -> Any:
    if name in _TEXT:
        return text
    if not text:
        return None
    if name == "beats_random":
        return text == "True"
    return int(text) if name in ("n", "n_skipped", "n_paired") else float(text)
