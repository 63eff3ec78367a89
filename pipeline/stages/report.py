"""report: the run as one self-contained page, made from the files of its directory alone."""

from __future__ import annotations

import heapq
import json
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from calig.pipeline.benchmarking import BENCHMARK_FILE, read_benchmark
from calig.pipeline.concept_rows import CONCEPTS_FILE, read_concepts
from calig.pipeline.costs import COSTS
from calig.pipeline.directory import RunDirectory
from calig.pipeline.errors import InputError
from calig.pipeline.flow_rows import AGREEMENT_FILE, read_agreement
from calig.pipeline.loading import learning_curves, mean_curves, rationale_by_word, read_probes
from calig.pipeline.metrics import metric_key, summarise
from calig.pipeline.perturbation import CURVE_METRICS, perturbation_curves
from calig.pipeline.records import (
    SampleKey,
    atomic_write,
    explained_key,
    measured_key,
    read_bins,
    read_numbers,
    read_rows,
    shards,
    table_metadata,
)
from calig.pipeline.render.decisions import Decision
from calig.pipeline.render.report import render_report
from calig.pipeline.render.rows import (
    FlowSample,
    ImageInput,
    MetricRow,
    ProbeSample,
    ProbeState,
    ReportData,
    Sample,
    SampleExplanation,
)
from calig.pipeline.render.tokens import named_segments
from calig.pipeline.run import RunContext

MAX_SAMPLES = 100
MAX_PROBE_SAMPLES = 24
MAX_PROBES = 24
_CURVES = ("train/loss", "val/loss", "val/accuracy", "val/f1_micro", "val/pearson", "val/rmse")
_UNSHOWN = ("auprc_base_rate", *COSTS)  # in summary.json; a base rate is the same for every method
_PROBE_CURVES = (
    "comprehensiveness",
    "sufficiency",
    "token_f1",
    "auprc",
    "completeness_gap",
    "drift",
    "special_share",
)


def run_stage(context: RunContext) -> None:
    """Write `report.html`."""

    def write() -> None:
        path = write_report(context.directory.path)
        context.console.say(f"report   {path} · {path.stat().st_size / 1e6:.1f} MB")

    context.alone(write)


def write_report(run: str | Path) -> Path:
    """Render the report of a run directory again, from its files.

    Raises:
        InputError: It is not a run directory.
    """
    directory = RunDirectory(Path(run))
    if not (directory / "config.yaml").exists():
        raise InputError(f"{run} is not a run directory: it has no config.yaml.")
    path = directory / "report.html"
    atomic_write(path, render_report(collect(directory)))
    return path


def collect(directory: RunDirectory) -> ReportData:
    """Read what the page shows from a run directory; what a run has not made is left out."""
    from calig.pipeline.compose import load, to_yaml

    config = load(directory.path, check=False)
    files = shards(directory / "explanations")
    written = table_metadata(files[0]) if files else {}
    # The configuration is of the run's start; what was explained may have been asked for when it was continued.
    methods = list({name: None for file in files for name in table_metadata(file)["methods"]} or config.explain.methods)
    label_names = written.get("label_names", [])
    benchmark = read_benchmark(directory / BENCHMARK_FILE)
    tests = {(row.method, row.control, row.metric): row for row in benchmark if row.group == "all"}
    metrics = [
        MetricRow(
            method,
            metric,
            summary.mean,
            summary.low,
            summary.high,
            control,  # type: ignore[arg-type]
            summary.n,
            *((test.p_adjusted, test.beats_random) if (test := tests.get((method, control, metric))) else ()),
        )
        for (method, control, metric), summary in summarise(
            read_numbers(directory / "metrics"), seed=config.seed
        ).items()
        # The method `random` is measured as the control, which stands below the methods.
        if summary.mean is not None and (method, control) != ("random", "none") and metric not in _UNSHOWN
    ]
    curves = {name: points for key, points in learning_curves(directory.path).items() if (name := _curve(key))}
    return ReportData(
        title=config.run.name or directory.path.name,
        summary=directory.summary,
        config_yaml=to_yaml(config),
        versions={key: str(value) for key, value in _versions(directory).items()},
        curves=curves,
        metrics=metrics,
        samples=_samples(directory, methods),
        explained=len({row["sample_id"] for row in read_rows(directory / "explanations", columns=["sample_id"])}),
        label_names=label_names,
        primary_method=methods[0],
        failures=directory.failures,
        curves_mean=mean_curves(directory.path),
        probe=_probe(directory),
        probe_method=config.probe.method,
        benchmark=benchmark,
        concepts=read_concepts(directory / CONCEPTS_FILE),
        flows=_flows(directory),
        agreement=read_agreement(directory / AGREEMENT_FILE),
        segments=named_segments(config.data.columns.text, config.data.columns.text_pair),
    )


def _probe(directory: RunDirectory) -> list[ProbeSample]:
    """The first probe samples over the training; of many probes, evenly spread ones from the first to the last."""
    probes = read_probes(directory.path)
    if len(probes) > MAX_PROBES:
        probes = [probes[round(i * (len(probes) - 1) / (MAX_PROBES - 1))] for i in range(MAX_PROBES)]
    first: dict[SampleKey, dict[str, Any]] = {}
    folder = directory / "probe"
    states: dict[SampleKey, list[ProbeState]] = defaultdict(list)
    for epoch, step, rows in probes:
        for row in rows:
            # What does not read the same at every probe (a dataset that augments) is no history of one text.
            key = explained_key(row)
            if first.setdefault(key, row)["tokens"] == row["tokens"]:
                state = ProbeState(epoch, step, row["prediction"], row["probability"], row["scores"], _decision(row))
                states[key].append(state)
    return [
        ProbeSample(
            row["sample_id"],
            row["tokens"],
            row["word_ids"],
            row["label"],
            rationale_by_word(row),
            states[key],
            row.get("segment"),
            _image(row, folder),
        )
        for key, row in sorted(first.items(), key=lambda item: _place(item[1]))[:MAX_PROBE_SAMPLES]
    ]


def _decision(row: Mapping[str, Any]) -> Decision | None:
    """The decision of a row where it is no class of several."""
    decision = Decision.of(row)
    return None if decision.plain else decision


def _place(row: Mapping[str, Any]) -> tuple[int, int]:
    return row["sample_id"], row["target"]


def _curve(key: str) -> str | None:
    """The key of a curve that the page shows; None for the many that stay in metrics.csv."""
    if key in _CURVES:
        return key
    parts = key.split("/")
    if parts[:2] != ["val", "explain"]:
        return None
    if parts[-2] == "layer_profile":
        return f"val/explain/block {int(parts[-1])}/layer profile"  # one panel, one line per block
    # Metrics of another operator than the default have a suffix; logits and variants stay in the file.
    name = parts[-1].split("@")[0]
    return key if name in _PROBE_CURVES and not key.endswith((".logit", "@absolute")) else None


def _image(row: Mapping[str, Any], folder: Path) -> ImageInput | None:
    """The image of an explanation row, None for a text; its files lie where the row says, in the folder."""
    if row.get("grid") is None:
        return None
    found = {}
    for name, ref in (("picture", row["image_ref"]), ("mask", row["mask_ref"])):
        path = None if ref is None else folder / ref
        found[name] = path.read_bytes() if path is not None and path.is_file() else None
    return ImageInput((row["grid"][0], row["grid"][1]), **found)


def _versions(directory: RunDirectory) -> dict[str, Any]:
    file = directory / "versions.json"
    return json.loads(file.read_text(encoding="utf8")) if file.exists() else {}


def _flows(directory: RunDirectory) -> list[FlowSample]:
    """The flows that were kept; of several methods that know one, those of the first met for each sample."""
    kept: dict[int, dict[str, Any]] = {}
    for row in read_rows(directory / "flow", columns=["sample_id", "layers", "flow"]):
        if row["flow"] is not None and len(kept) < MAX_SAMPLES:
            kept.setdefault(row["sample_id"], row)
    tokens: dict[int, list[str]] = {}
    if kept:
        for row in read_rows(directory / "explanations", columns=["sample_id", "tokens"]):
            if row["sample_id"] in kept:
                tokens[row["sample_id"]] = row["tokens"]
    return [FlowSample(number, tokens[number], row["layers"], row["flow"]) for number, row in sorted(kept.items())]


def _samples(directory: RunDirectory, methods: list[str]) -> list[Sample]:
    ids = {row["sample_id"] for row in read_rows(directory / "explanations", columns=["sample_id"])}
    chosen = set(heapq.nsmallest(MAX_SAMPLES, ids))
    values: dict[tuple[SampleKey, str], dict[str, float]] = defaultdict(dict)
    for row in read_numbers(directory / "metrics"):
        if row["sample_id"] in chosen and row["control"] == "none" and row["value"] is not None:
            values[measured_key(row), row["method"]][metric_key(row)] = row["value"]
    bins: dict[SampleKey, list[dict[str, Any]]] = defaultdict(list)
    for row in read_bins(directory / "metrics", list(CURVE_METRICS)):
        if row["sample_id"] in chosen:
            bins[measured_key(row)].append(row)
    found: dict[SampleKey, dict[str, dict[str, Any]]] = defaultdict(dict)
    for row in read_rows(directory / "explanations"):
        if row["sample_id"] in chosen:
            found[explained_key(row)][row["method"]] = row
    samples = []
    for key, by_method in sorted(found.items(), key=lambda item: _place(next(iter(item[1].values())))):
        rows = [by_method[method] for method in methods if method in by_method]
        first = rows[0]
        samples.append(
            Sample(
                sample_id=first["sample_id"],
                tokens=first["tokens"],
                word_ids=first["word_ids"],
                label=first["label"],
                prediction=first["prediction"],
                probability=first["probability"],
                rationale=rationale_by_word(first),
                explanations=[
                    SampleExplanation(
                        method=row["method"],
                        scores=row["scores"],
                        layer_scores=row["layer_scores"],
                        completeness_gap=row["completeness_gap"],
                        converged=row["converged"],
                        metrics=values[key, row["method"]],
                    )
                    for row in rows
                ],
                curves=perturbation_curves(bins[key], {key: first["probability"]}),
                segment=first.get("segment"),
                decision=_decision(first),
                image=_image(first, directory.path),
            )
        )
    return samples
