"""The samples as one compact JSON block: scores and layer maps as int8 with a scale, safe inside a script element."""

from __future__ import annotations

import base64
import json
import math
from collections.abc import Sequence
from typing import Any

from calig.pipeline.errors import InputError
from calig.pipeline.render.color import STRENGTH, abs_scale
from calig.pipeline.render.labels import metric
from calig.pipeline.render.pieces import merge_pieces
from calig.pipeline.render.rows import ReportData, Sample, SampleExplanation
from calig.pipeline.render.tokens import in_rationale

SPECIAL, SPACE, MARKED = 1, 2, 4
"""Bits of a unit's flags."""

Packed = tuple[str, float, float]


def pack_scores(scores: Sequence[float], special: Sequence[bool]) -> Packed:
    """Scores as base64 of int8, with one scale for ordinary and one for special positions.

    A read-out token may hold a hundred times the relevance of any word; with a scale of its own it does not cost the
    words their resolution. The error is at most half a step, ``scale / 254``. A value that is not finite counts as 0.

    Returns:
        The text, the scale of ordinary positions, the scale of special positions.
    """
    values = [float(score) if math.isfinite(score) else 0.0 for score in scores]
    pairs = list(zip(values, special, strict=True))
    scales = [abs_scale(value for value, flag in pairs if flag is kind) for kind in (False, True)]
    levels = [round(127 * value / scales[flag]) for value, flag in pairs]
    text = base64.b64encode(bytes(level & 255 for level in levels)).decode("ascii")
    return text, float(f"{scales[0]:.5g}"), float(f"{scales[1]:.5g}")


def unpack_scores(packed: Packed, special: Sequence[bool]) -> list[float]:
    """The inverse of :func:`pack_scores`, as the page does it."""
    text, *scales = packed
    levels = [byte - 256 if byte > 127 else byte for byte in base64.b64decode(text)]
    return [level / 127 * scales[flag] for level, flag in zip(levels, special, strict=True)]


def script_json(value: Any) -> str:
    """JSON that cannot end the script element it stands in, whatever the texts contain."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    text = text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")
    return text.encode("utf-8", "backslashreplace").decode("utf-8")  # lone surrogates


def page_data(data: ReportData, samples: Sequence[Sample], layer_methods: Sequence[str]) -> dict[str, Any]:
    """What the page's script reads (see report_data.js): ``samples`` with layer maps for ``layer_methods`` only."""
    methods = method_names(data)
    return {
        "methods": methods,
        "layerMethods": list(layer_methods),
        "labels": list(data.label_names),
        "metrics": {name: [metric(name).label, metric(name).variant, metric(name).arrow] for name in _names(samples)},
        "strength": STRENGTH,
        "samples": [_sample(sample, methods, set(layer_methods)) for sample in samples],
    }


def check_lengths(samples: Sequence[Sample]) -> None:
    """Raise an InputError that names the first sample and method whose scores do not fit the tokens."""
    for sample in samples:
        total = len(sample.tokens)
        if len(sample.word_ids) != total:
            raise InputError(f"sample {sample.sample_id}: {len(sample.word_ids)} word ids for {total} tokens.")
        for row in sample.explanations:
            lengths = {len(row.scores), *map(len, row.layer_scores or ())}
            if lengths != {total}:
                where = f"sample {sample.sample_id}, method '{row.method}'"
                raise InputError(f"{where}: rows of {sorted(lengths)} scores for {total} tokens; give one per token.")


def method_names(data: ReportData) -> list[str]:
    """Methods of the samples, the primary one first."""
    names = dict.fromkeys(explanation.method for sample in data.samples for explanation in sample.explanations)
    return sorted(names, key=lambda name: name != data.primary_method)


def _sample(sample: Sample, methods: list[str], layer_methods: set[str]) -> dict[str, Any]:
    words = merge_pieces(sample.tokens, None, sample.word_ids)
    special = [word_id is None for word_id in sample.word_ids]
    units = []
    for word in words:
        flags = SPECIAL * word.special + SPACE * word.space + MARKED * in_rationale(word, sample.rationale)
        pieces = [sample.tokens[i] for i in word.positions]
        units.append([word.text, flags] if len(pieces) == 1 else [word.text, flags, pieces])
    packed = [_explanation(row, special, methods, layer_methods) for row in sample.explanations]
    return {
        "id": int(sample.sample_id),
        "label": None if sample.label is None or sample.label < 0 else int(sample.label),
        "prediction": int(sample.prediction),
        "p": _finite(sample.probability),
        "units": units,
        "explanations": sorted(packed, key=lambda row: row["method"]),
    }


def _explanation(
    row: SampleExplanation, special: list[bool], methods: list[str], layer_methods: set[str]
) -> dict[str, Any]:
    layers = row.layer_scores if row.method in layer_methods else None
    return {
        "method": methods.index(row.method),
        "scores": pack_scores(row.scores, special),
        "layers": [pack_scores(scores, special) for scores in layers] if layers else None,
        "gap": _finite(row.completeness_gap),
        "converged": bool(row.converged),
        "metrics": {name: _finite(value) for name, value in row.metrics.items()},
    }


def _names(samples: Sequence[Sample]) -> list[str]:
    names = {name for sample in samples for row in sample.explanations for name in row.metrics}
    return sorted(names, key=lambda name: metric(name).order)


def _finite(value: float | None) -> float | None:
    return None if value is None or not math.isfinite(value) else float(f"{value:.5g}")
