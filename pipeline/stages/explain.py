"""explain: attributions and per-sample metrics of all methods, as a predict stage; then their means and intervals."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from calig.pipeline.explainer import scalar_key
from calig.pipeline.metrics import Summary, summarise
from calig.pipeline.records import read_lines, read_rows
from calig.pipeline.run import RunContext
from calig.pipeline.stages.fit import lower_is_better

SHOWN = {"token_f1": "token_f1", "auprc": "auprc", "comprehensiveness": "compreh.", "sufficiency": "suffic."}


def run_stage(context: RunContext) -> None:
    """Explain the chosen samples that are not explained yet, and summarise."""
    from calig.callbacks import ExplanationWriter
    from calig.pipeline.explainer import Explainer, ExplainSettings, settings_for

    config, directory = context.config.explain, context.directory
    data, module = context.data, context.module
    shared = {"steps": config.steps, "tolerance": config.tolerance, "max_steps": config.max_steps}
    settings = ExplainSettings(
        settings_for(config.methods, config.options, shared),
        target=config.target,
        operators=[config.operator] if isinstance(config.operator, str) else config.operator,
        strict=config.strict,
        seed=context.config.seed,
    )
    explainer = Explainer(module.model, data.tokenizer, settings)
    metadata = {"label_names": data.label_names, "methods": dict(settings.methods), "split": config.split}
    writer = ExplanationWriter(explainer, directory.path, metadata)
    done = {row["sample_id"] for row in read_rows(directory / "explanations", columns=["sample_id"])}
    loader = data.explain_dataloader(
        config.split, config.num_samples, config.batch_size, context.config.seed, exclude=done
    )
    trainer = context.trainer
    if len(loader.dataset):  # type: ignore[arg-type]
        trainer.callbacks.append(writer)  # type: ignore[attr-defined]
        try:
            trainer.predict(module, dataloaders=loader, return_predictions=False)
        finally:
            trainer.callbacks.remove(writer)  # type: ignore[attr-defined]
    trainer.strategy.barrier("explanations written")
    failures = read_lines(directory / "failures.jsonl")
    context.failed = len(failures)
    if not context.is_main:
        return
    summaries = summarise(read_rows(directory / "metrics"), seed=context.config.seed)
    worst: dict[str, float] = {}
    for row in read_rows(directory / "explanations", columns=["method", "completeness_gap"]):
        if row["completeness_gap"] is not None:
            key = f"explain/{row['method']}/completeness_gap_max"
            worst[key] = max(worst.get(key, 0.0), row["completeness_gap"])
    context.log(scalars(summaries, config.methods, failures) | worst)
    show(context, summaries, config.methods)


def scalars(
    summaries: Mapping[tuple[str, str, str], Summary], methods: list[str], failures: list[dict[str, Any]]
) -> dict[str, float]:
    """The scalar keys of the stage (ARCHITECTURE, Scalar keys) with the ends of their intervals."""
    values: dict[str, float] = {
        f"explain/{method}/failed": float(sum(row["method"] == method for row in failures)) for method in methods
    }
    for (method, control, metric), summary in summaries.items():
        if summary.mean is None or summary.low is None or summary.high is None:
            continue
        key = scalar_key("explain", method, control, metric)
        values |= {key: summary.mean, f"{key}/low": summary.low, f"{key}/high": summary.high}
    return values


def show(context: RunContext, summaries: Mapping[tuple[str, str, str], Summary], methods: list[str]) -> None:
    """Print the table of methods with 95 % intervals."""
    metrics = [name for name in SHOWN if any(key[2] == name for key in summaries)]
    rows = []
    names = [method for method in methods if method != "random"]
    for method, control in [*((name, "none") for name in names), ("random", "random")]:
        label = "random (control)" if control == "random" else method
        rows.append([label, *(_cell(summaries.get((method, control, metric))) for metric in metrics)])
    count = max((summary.n for summary in summaries.values()), default=0)
    context.console.table(
        f"explain  {count} samples of the {context.config.explain.split} split · mean [95 % interval]",
        ["method", *(f"{SHOWN[metric]} {'↓' if lower_is_better(metric) else '↑'}" for metric in metrics)],
        rows,
    )
    gaps = [
        f"{name} {summary.mean:.1%}"
        for name in names
        if (summary := summaries.get((name, "none", "completeness_gap"))) is not None and summary.mean is not None
    ]
    if gaps:
        context.console.say(f"completeness gap  {' · '.join(gaps)}")
    times = [
        f"{name} {1000 * summary.mean:.0f}"
        for name in names
        if (summary := summaries.get((name, "none", "seconds"))) is not None and summary.mean is not None
    ]
    context.console.say(f"ms per sample     {' · '.join(times)}")


def _cell(summary: Summary | None) -> str:
    if summary is None or summary.mean is None:
        return "-"
    return f"{_short(summary.mean)} [{_short(summary.low)} {_short(summary.high)}]"


def _short(value: float | None) -> str:
    """Two decimals without the leading zero: six methods with intervals fit into 80 columns."""
    return "" if value is None else f"{value:.2f}".replace("0.", ".", 1)
