"""The report page: one self-contained HTML file from plain rows."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from html import escape
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined, Template

from calig.pipeline.render.benchmark import benchmark_view
from calig.pipeline.render.concepts import concept_panels
from calig.pipeline.render.curves import curve_panels, perturbation_panels
from calig.pipeline.render.decisions import Decision, class_name
from calig.pipeline.render.flow import GEOMETRY, STRONGEST, agreement_table, flow_pictures
from calig.pipeline.render.labels import ON_OUTPUT, metric, number
from calig.pipeline.render.leaderboard import leaderboards
from calig.pipeline.render.packing import check_lengths, method_names, page_data, script_json
from calig.pipeline.render.pieces import Word, merge_pieces
from calig.pipeline.render.rows import MetricRow, ReportData, Sample, SampleExplanation
from calig.pipeline.render.tokens import legend_html, split_segments, word_scale, word_spans

__all__ = ["MAX_BYTES", "MetricRow", "ReportData", "Sample", "SampleExplanation", "render_report"]

MAX_BYTES = 5_000_000
LAYER_METHODS = 3
STATIC_SAMPLES = 12
"""Samples that stand in the page itself, for paper and for readers without JavaScript."""

_FOLDER = Path(__file__).parent
_SCRIPTS = (
    "report_data.js",
    "report_map.js",
    "report_image.js",
    "report_curves.js",
    "report_viewer.js",
    "report_probe.js",
    "report.js",
    "report_flow.js",
)
_HEADLINES = (
    "comprehensiveness",
    "sufficiency",
    "token_f1",
    "auprc",
    "pointing_game",
    "mask_auprc",
    "completeness_gap",
)
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Headline:
    """One large number of the header."""

    label: str
    value: str
    note: str = ""


@dataclass(frozen=True)
class StaticSample:
    """One sample as fixed markup."""

    sample_id: int
    verdict: str
    prediction: str
    label: str | None
    probability: str
    html: str
    """Trusted markup: every text in it is escaped."""
    gap: str
    converged: bool


def render_report(data: ReportData, *, max_bytes: int = MAX_BYTES) -> str:
    """Render the page as one HTML text that loads nothing.

    Layer maps are kept for at most three methods, the primary one first. Where the page would still grow over
    ``max_bytes`` (very long texts), it keeps maps of fewer methods, then fewer samples, and says so.

    Raises:
        InputError: If scores and tokens of a sample differ in length.
    """
    check_lengths(data.samples)
    check_lengths(data.probe)
    with_layers = _methods_with_layers(data)[:LAYER_METHODS]
    kept, samples = len(with_layers), list(data.samples)
    while True:
        page = _render(data, samples, with_layers[:kept])
        size = len(page.encode("utf-8"))
        if size <= max_bytes or (not kept and len(samples) <= 1):
            break
        if kept:
            kept -= 1
        else:
            samples = samples[: max(1, min(len(samples) - 1, int(len(samples) * 0.9 * max_bytes / size)))]
    if kept < len(with_layers) or len(samples) < len(data.samples) or size > max_bytes:
        _log.warning(
            "report '%s': %d of %d samples and the layer maps of %d of %d methods fit into %.1f MB (page: %.1f MB)",
            *(data.title, len(samples), len(data.samples), kept, len(with_layers), max_bytes / 1e6, size / 1e6),
        )
    return page


def _render(data: ReportData, samples: Sequence[Sample], layer_methods: Sequence[str]) -> str:
    main, other = leaderboards(data.metrics, data.primary_method)
    primary = data.primary_method or next(iter(method_names(data)), "")
    flows = flow_pictures(data.flows)
    payload = page_data(data, samples, layer_methods)
    return _template().render(
        data=data,
        primary=primary,
        headlines=_headlines(data),
        panels=curve_panels(data.curves),
        perturbation=perturbation_panels(data.curves_mean, primary, payload["units"]),
        unit=payload["unit"],
        units=payload["units"],
        concepts=concept_panels(data.concepts),
        flows=flows,
        flow_payload=script_json(
            {"geometry": GEOMETRY, "strongest": STRONGEST, "samples": [picture.data for picture in flows]}
        ),
        agreement=agreement_table(data.agreement),
        tables=[("", main), ("Other operators and logits", other)],
        benchmark=benchmark_view(data.benchmark, primary),
        shown=len(samples),
        total=len(data.samples),
        explained=len(data.samples) if data.explained is None else data.explained,
        static=[_static_sample(sample, primary, data) for sample in samples[:STATIC_SAMPLES]],
        legend=legend_html(1.0).replace("−1 ", "").replace(" +1 ", " "),
        payload=script_json(payload),
        css=_source("report.css"),
        script="\n".join(_source(name) for name in _SCRIPTS),
        number=number,
    )


def _headlines(data: ReportData) -> list[Headline]:
    lines = []
    of_task = (("f1_micro", "micro F1"), ("pearson", "Pearson r"), ("spearman", "Spearman r"), ("rmse", "RMSE"))
    for name, label in (("accuracy", "accuracy"), ("f1", "F1"), *of_task):
        split = next((split for split in ("test", "val") if _is_number(data.summary, f"{split}/{name}")), None)
        if split:
            lines.append(Headline(f"{split} {label}", number(data.summary[f"{split}/{name}"], name)))
    own = {row.metric: row for row in data.metrics if row.method == data.primary_method and row.control == "none"}
    for name in _HEADLINES:
        name = name if name in own else name + ON_OUTPUT if name + ON_OUTPUT in own else name
        info, row = metric(name), own.get(name)
        value = row.value if row else data.summary.get(f"explain/{data.primary_method}/{name}")
        if value is None or isinstance(value, str):
            continue
        note = ""
        if row and row.low is not None and row.high is not None:
            note = f"{number(row.low, name).removesuffix(' %')} to {number(row.high, name)}"
        lines.append(Headline(f"{info.label} {info.arrow}", number(value, name), note))
    return lines


def _texts_html(words: Sequence[Word], sample: Sample, segments: Sequence[str]) -> str:
    """The words with their tints; the texts of a pair apart, each under its name."""
    texts = split_segments(words, sample.segment)
    scale = word_scale(words)  # one for both
    found = [word_spans(text, rationale=sample.rationale, scale=scale) for text in texts]
    if len(texts) == 1:
        return found[0]
    return "".join(
        f'<span class="segment">{escape(name)}</span>{text}' for name, text in zip(segments, found, strict=False)
    )


def _static_sample(sample: Sample, primary: str, data: ReportData) -> StaticSample:
    names = data.label_names
    rows = {row.method: row for row in sample.explanations}
    row = rows.get(primary) or next(iter(rows.values()), None)
    words = merge_pieces(sample.tokens, row.scores if row else None, sample.word_ids)
    decision = sample.decision or Decision(sample.prediction, sample.prediction, sample.probability, sample.label)
    labelled = sample.label is not None and sample.label >= 0
    return StaticSample(
        sample_id=sample.sample_id,
        verdict={True: "right", False: "wrong", None: ""}[decision.right],
        prediction=class_name(sample.prediction, names) if decision.plain else " · ".join(decision.parts(names)),
        label=class_name(sample.label, names) if sample.label is not None and labelled else None,
        probability=number(sample.probability) if decision.plain else "",
        html=_static_image(sample, row) if sample.image else _texts_html(words, sample, data.segments),
        gap=number(row.completeness_gap if row else None, "completeness_gap"),
        converged=row is None or row.converged,
    )


def _static_image(sample: Sample, row: SampleExplanation | None) -> str:
    from calig.pipeline.render.image import image_html

    assert sample.image is not None  # the caller looked
    content = [place for place, number in enumerate(sample.word_ids) if number is not None]
    scores = [0.0 if row is None else row.scores[place] for place in content]
    names = [sample.tokens[place] for place in content]
    return image_html(sample.image.picture, scores, sample.image.grid, names=names, mask=sample.image.mask)


def _methods_with_layers(data: ReportData) -> list[str]:
    having = {row.method for sample in data.samples for row in sample.explanations if row.layer_scores}
    return [name for name in method_names(data) if name in having]


def _is_number(summary: Mapping[str, float | str | None], key: str) -> bool:
    return isinstance(summary.get(key), int | float)


@lru_cache(maxsize=1)
def _template() -> Template:
    environment = Environment(
        loader=FileSystemLoader(_FOLDER),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("report.html")


@lru_cache(maxsize=8)
def _source(name: str) -> str:
    return (_FOLDER / name).read_text(encoding="utf-8")
