"""explain: attributions and per-sample metrics of all methods, as a predict stage; then their means and intervals."""

from __future__ import annotations

import dataclasses
import errno
import zlib
from array import array
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from calig.pipeline import manifest
from calig.pipeline.explainer import ExplainSettings, scalar_key
from calig.pipeline.flow_summary import summarise_flows
from calig.pipeline.limits import limited
from calig.pipeline.loading import mean_curves
from calig.pipeline.metrics import Summary, is_flagged, small_sample_warning, summarise
from calig.pipeline.metrics.randomisation import KEPT_TOO_MUCH
from calig.pipeline.records import read_numbers, read_rows, shards
from calig.pipeline.render.labels import ON_OUTPUT
from calig.pipeline.run import RunContext
from calig.pipeline.stages.fit import lower_is_better

if TYPE_CHECKING:
    from torch import nn

_NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
SHOWN = {
    "token_f1": "token_f1",
    "auprc": "auprc",
    "mask_auprc": "mask auprc",
    "comprehensiveness": "compreh.",
    "sufficiency": "suffic.",
}


def run_stage(context: RunContext) -> None:
    """Explain the chosen samples that are not explained yet, and summarise."""
    from calig.callbacks import ExplanationWriter
    from calig.datamodules.remaining import RemainingSamples

    config, directory = context.config.explain, context.directory
    data, module, explainer = context.data, context.module, context.explainer
    # Of all samples, those that are done already too: a continued run measures what it would have measured at once.
    every: Any = data.explain_dataloader(config.split, config.num_samples, seed=context.config.seed).dataset
    rows = every.dataset.rows  # an image would be read for its number
    ids = [rows[index]["sample_id"] for index in every.indices]
    only = limited(ids, config.limits, context.config.seed)
    flows = limited(ids, {"flow": config.flows}, context.config.seed).get("flow", ids)
    length = rationale_length(data.dataset(config.split).rows)
    settings = dataclasses.replace(explainer.settings, only=only, flows=flows, dataset_length=length)
    metadata = {
        "label_names": data.label_names,
        "methods": dict(settings.methods),
        "split": config.split,
        "target": config.target,
        "operator": config.operator,
        "metrics": list(config.metrics),
        "limits": dict(config.limits),
        "flows": config.flows,
        "perturbation_target": config.perturbation_target,
        "seed": context.config.seed,
        "data": data_mark(data.dataset(config.split)),
        "model": model_mark(module.model),
        "windows": None if data.windows is None else dataclasses.asdict(data.windows),
    }
    writer = ExplanationWriter(explainer, directory.path, metadata, batches_per_shard=config.batches_per_shard)

    def share(standing: manifest.Standing, rank: int, world_size: int) -> Any:
        explainer.settings, finished = left_over(settings, ids, standing)
        return data.explain_dataloader(
            config.split, config.num_samples, config.batch_size, context.config.seed, finished, rank, world_size
        )

    remaining = RemainingSamples(lambda: look_up(context, metadata), share, context.signals)
    trainer = context.trainer
    trainer.callbacks.append(writer)  # type: ignore[attr-defined]
    try:
        trainer.predict(module, datamodule=remaining, return_predictions=False)
    except OSError as error:
        if error.errno not in _NO_SPACE:
            raise
        raise RuntimeError(
            f"{error.filename} cannot be written: {error.strerror}. What was explained before is kept: make room, and "
            f"run.resume={directory.path} goes on."
        ) from error
    finally:
        trainer.callbacks.remove(writer)  # type: ignore[attr-defined]
    context.alone(lambda: finish(context))


def finish(context: RunContext) -> None:
    """Summarise what all processes have written.

    Raises:
        RuntimeError: No sample could be explained.
    """
    config, directory = context.config.explain, context.directory
    failures = manifest.failures(directory.path)
    directory.set_failures(failures)
    if failures and not shards(directory / "explanations"):
        reasons = Counter(row["reason"] for row in failures)
        ids = sorted({row["sample_id"] for row in failures})
        raise RuntimeError(
            f"none of {len(ids)} samples of the {config.split} split could be explained (sample_id "
            f"{', '.join(map(str, ids[:5]))}{', ...' if len(ids) > 5 else ''}): {reasons.most_common(1)[0][0]}"
        )
    summaries = summarise(read_numbers(directory / "metrics"), seed=context.config.seed)
    worst: dict[str, float] = {}
    for row in read_rows(directory / "explanations", columns=["method", "completeness_gap"]):
        if row["completeness_gap"] is not None:
            key = f"explain/{row['method']}/completeness_gap_max"
            worst[key] = max(worst.get(key, 0.0), row["completeness_gap"])
    context.log(scalars(summaries, config.methods, failures) | worst)
    log_curves(context)
    show(context, summaries, config.methods)
    summarise_flows(context)


def log_curves(context: RunContext) -> None:
    """Log the mean perturbation curves of all methods beside the controls of the first one."""
    from calig.callbacks.media import MediaLog, perturbation_charts

    media = MediaLog(context.loggers)
    if media.shows:
        curves = mean_curves(context.directory.path)
        unit = "words" if context.data.tokenizer is not None else "patches"
        charts = perturbation_charts(curves, context.config.explain.methods, unit)
        media.log(context.trainer.global_step, charts={f"explain/{key}": chart for key, chart in charts.items()})


def rationale_length(rows: Iterable[Mapping[str, Any]]) -> float | None:
    """Mean number of rationale words over the examples that have any, those that truncation cut off included.

    Args:
        rows: Encoded examples, see `calig.datamodules.tokenization.encode`.

    Returns:
        The mean, None where no example has a rationale.
    """
    lengths = []
    for row in rows:
        if "rationale" not in row:
            continue
        pairs = zip(row["word_ids"], row["rationale"], strict=True)
        lengths.append(len({word for word, mark in pairs if mark == 1}) + row["rationale_missed"])
    marked = [length for length in lengths if length]
    return sum(marked) / len(marked) if marked else None


def data_mark(dataset: Any) -> str:
    """Tells the examples of a split from others, wherever they are read from: a folder may be moved.

    Args:
        dataset: Of a data module; some 1,000 of its tokenised texts are looked at, or 50 of its images.
    """
    found, rows = zlib.crc32(b""), dataset.rows
    if not rows or "input_ids" in rows[0]:
        for row in rows[:: max(1, len(rows) // 1000)]:
            found = zlib.crc32(array("q", [row["sample_id"], *row["input_ids"]]).tobytes(), found)
    else:
        for index in range(0, len(rows), max(1, len(rows) // 50)):
            found = zlib.crc32(dataset[index]["pixels"].contiguous().numpy().tobytes(), found)
        found = zlib.crc32(array("q", [row["sample_id"] for row in rows]).tobytes(), found)
    return f"{len(rows)} examples with checksum {found:08x}"


def model_mark(model: nn.Module) -> str:
    """Tells a model's weights from others, wherever they are read from and in whatever precision they are held.

    Args:
        model: Not yet on its device; some 1,000 values of every parameter are looked at.
    """
    found = zlib.crc32(b"")
    for name, parameter in model.named_parameters():
        flat = parameter.detach().flatten()
        some = flat[:: max(1, len(flat) // 1000)].float().tolist()
        found = zlib.crc32(name.encode() + array("f", some).tobytes(), found)
    return f"weights with checksum {found:08x}"


def look_up(context: RunContext, metadata: Mapping[str, Any]) -> manifest.Standing:
    """What earlier sessions have explained; what they left unfinished is deleted."""
    run = context.directory.path
    standing = manifest.take_up(run)
    for damage in standing.damaged:
        context.console.warn(f"{damage}; its samples are explained again")
    manifest.check_settings(run, standing, metadata)
    if standing.by_method:
        added = [name for name in metadata["methods"] if name not in standing.by_method]
        more = f"; {', '.join(added)} for them too now" if added else ""
        context.console.say(f"explain  {len(standing.done):,} samples are explained already{more}")
    return standing


def left_over(
    settings: ExplainSettings, ids: Sequence[int], standing: manifest.Standing
) -> tuple[ExplainSettings, set[int]]:
    """What is still to be done.

    Args:
        settings: Of all that was asked for.
        ids: All samples.
        standing: What is done.

    Returns:
        Settings that leave to every sample the methods that it lacks; the samples that lack none.
    """
    done = standing.by_method

    def lacks(sample: int) -> bool:
        return any(sample not in done.get(name, ()) for name in settings.wanted(settings.methods, sample))

    started = {sample for sample in standing.done if lacks(sample)}
    finished = standing.done - started
    if not started:
        return settings, finished
    left = {
        name: frozenset(sample for sample in settings.only.get(name, ids) if sample not in done[name])
        for name in settings.methods
        if name in done
    }
    return dataclasses.replace(settings, only={**settings.only, **left}, measured=standing.measured), finished


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
        if summary.n_skipped:
            values[f"{key}/n_skipped"] = float(summary.n_skipped)
    return values


def show(context: RunContext, summaries: Mapping[tuple[str, str, str], Summary], methods: list[str]) -> None:
    """Print the table of methods with 95 % intervals."""
    names = [method for method in methods if method != "random"]
    # A mean with its interval takes 15 of the 80 characters; the other metrics are in the report.
    room = max(1, (80 - max(map(len, [*names, "random (control)"]))) // 15)
    found = {key[2] for key in summaries}
    # A regression has no probability: its metrics are those of the output.
    metrics = [name if name in found else name + ON_OUTPUT for name in SHOWN if {name, name + ON_OUTPUT} & found][:room]
    rows = []
    controls = {"random": "random (control)", "centre": "centre (prior)"}
    centre = [("centre", "centre")] if any(key[1] == "centre" for key in summaries) else []
    for method, control in [*((name, "none") for name in names), ("random", "random"), *centre]:
        label = controls.get(control, method)
        rows.append([label, *(_cell(summaries.get((method, control, metric))) for metric in metrics)])
    count = max((summary.n for summary in summaries.values()), default=0)
    title = f"explain  {count} samples of the {context.config.explain.split} split"
    if metrics:
        named = {metric: SHOWN[metric.removesuffix(ON_OUTPUT)] for metric in metrics}
        arrows = [f"{named[metric]} {'↓' if lower_is_better(metric) else '↑'}" for metric in metrics]
        context.console.table(f"{title} · mean and 95 % interval", ["method", *arrows], rows)
    else:
        context.console.say(title)
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
    for name in names:
        summary = summaries.get((name, "none", "randomisation"))
        if summary is not None and is_flagged(summary.mean):
            context.console.say(
                f"randomisation     {name} keeps a rank correlation of {summary.mean:.2f} with random weights; above "
                f"{KEPT_TOO_MUCH} it says little of what the model learned"
            )
    if warning := small_sample_warning(summaries):
        context.console.say(warning)


def _cell(summary: Summary | None) -> str:
    if summary is None or summary.mean is None:
        return "-"
    return f"{_short(summary.mean)} {_short(summary.low)}–{_short(summary.high)}"


def _short(value: float | None) -> str:
    """Three decimals without the leading zero: four metrics with intervals fit into 80 columns."""
    return "" if value is None else f"{value:.3f}".replace("0.", ".", 1)
