"""The samples as one compact JSON block, safe inside a script element.

Scores are int16 with a scale, so that hovering shows exact numbers; layer maps are int8.
"""

from __future__ import annotations

import base64
import json
import math
from collections.abc import Sequence
from typing import Any

from calig.pipeline.errors import InputError
from calig.pipeline.perturbation import Curves
from calig.pipeline.render.color import IMAGE_STRENGTH, LIGHT, OPPOSES, STRENGTH, SUPPORTS, abs_scale
from calig.pipeline.render.decisions import Decision
from calig.pipeline.render.labels import metric
from calig.pipeline.render.pieces import merge_pieces
from calig.pipeline.render.rows import ImageInput, ProbeSample, ReportData, Sample, SampleExplanation
from calig.pipeline.render.tokens import in_rationale

SPECIAL, SPACE, MARKED, SECOND = 1, 2, 4, 8
"""Bits of a unit's flags."""

THUMBNAIL = 160
"""Pixels of the longer side of a picture on the page."""

Packed = tuple[str, float, float]


def pack_scores(scores: Sequence[float], special: Sequence[bool], *, wide: bool = False) -> Packed:
    """Scores as base64 of integers, with one scale for ordinary and one for special positions.

    A read-out token may hold a hundred times the relevance of any word; with a scale of its own it does not cost the
    words their resolution. The error is at most half a step: ``scale / 254``, or ``scale / 65534`` where ``wide``.
    A value that is not finite counts as 0.

    Args:
        scores: (T,) signed relevance.
        special: (T,) whether a position is a special token.
        wide: int16 (little-endian) instead of int8.

    Returns:
        The text, the scale of ordinary positions, the scale of special positions.
    """
    size, most = (2, 32767) if wide else (1, 127)
    values = [float(score) if math.isfinite(score) else 0.0 for score in scores]
    pairs = list(zip(values, special, strict=True))
    scales = [abs_scale(value for value, flag in pairs if flag is kind) for kind in (False, True)]
    levels = [round(most * value / scales[flag]) for value, flag in pairs]
    data = b"".join(level.to_bytes(size, "little", signed=True) for level in levels)
    return base64.b64encode(data).decode("ascii"), float(f"{scales[0]:.7g}"), float(f"{scales[1]:.7g}")


def unpack_scores(packed: Packed, special: Sequence[bool]) -> list[float]:
    """The inverse of :func:`pack_scores`, as the page does it: the length of the text tells the width."""
    text, *scales = packed
    data = base64.b64decode(text)
    size, most = (2, 32767) if len(data) == 2 * len(special) else (1, 127)
    levels = [int.from_bytes(data[i : i + size], "little", signed=True) for i in range(0, len(data), size)]
    return [level / most * scales[flag] for level, flag in zip(levels, special, strict=True)]


def script_json(value: Any) -> str:
    """JSON that cannot end the script element it stands in, whatever the texts contain."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    text = text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")
    return text.encode("utf-8", "backslashreplace").decode("utf-8")  # lone surrogates


def page_data(data: ReportData, samples: Sequence[Sample], layer_methods: Sequence[str]) -> dict[str, Any]:
    """What the page's script reads (see report_data.js): ``samples`` with layer maps for ``layer_methods`` only."""
    methods = method_names(data)
    probe = [_probe_sample(sample, data.label_names) for sample in data.probe]
    return {
        "methods": methods,
        "layerMethods": list(layer_methods),
        "labels": list(data.label_names),
        "segments": list(data.segments),
        "metrics": {name: [metric(name).label, metric(name).variant, metric(name).arrow] for name in _names(samples)},
        "strength": STRENGTH,
        "unit": unit_name(data),
        "units": f"{unit_name(data)}{'es' if unit_name(data) == 'patch' else 's'}",
        "image": {"strength": IMAGE_STRENGTH, "light": LIGHT, "supports": SUPPORTS, "opposes": OPPOSES},
        "probe": {"method": data.probe_method, "samples": probe},
        "samples": [_sample(sample, methods, set(layer_methods), data.label_names) for sample in samples],
    }


def unit_name(data: ReportData) -> str:
    """What the page ranks: a `word` or a `patch`."""
    shown: Sequence[Sample | ProbeSample] = [*data.samples, *data.probe]
    return "patch" if any(sample.image is not None for sample in shown) else "word"


def check_lengths(samples: Sequence[Sample] | Sequence[ProbeSample]) -> None:
    """Raise an InputError that names the first sample and method whose scores do not fit the tokens."""
    for sample in samples:
        total = len(sample.tokens)
        if len(sample.word_ids) != total:
            raise InputError(f"sample {sample.sample_id}: {len(sample.word_ids)} word ids for {total} tokens.")
        found = [(f"epoch {state.epoch}", [state.scores]) for state in getattr(sample, "states", ())]
        for row in getattr(sample, "explanations", ()):
            found.append((f"method '{row.method}'", [row.scores, *(row.layer_scores or ())]))
        for where, rows in found:
            if (lengths := set(map(len, rows))) != {total}:
                where = f"sample {sample.sample_id}, {where}"
                raise InputError(f"{where}: rows of {sorted(lengths)} scores for {total} tokens; give one per token.")


def method_names(data: ReportData) -> list[str]:
    """Methods of the samples, the primary one first."""
    names = dict.fromkeys(explanation.method for sample in data.samples for explanation in sample.explanations)
    return sorted(names, key=lambda name: name != data.primary_method)


def _sample(sample: Sample, methods: list[str], layer_methods: set[str], names: Sequence[str]) -> dict[str, Any]:
    special = [word_id is None for word_id in sample.word_ids]
    packed = [_explanation(row, special, methods, layer_methods) for row in sample.explanations]
    for row in packed:
        name = methods[row["method"]]
        found = {control: _curves(sample.curves.get((name, control))) for control in ("none", "reversed")}
        row["curves"] = {control: curves for control, curves in found.items() if curves}
    return {
        **_input(sample),
        "key": sample.key,
        "prediction": int(sample.prediction),
        "p": _finite(sample.probability),
        **_told(sample.decision, names),
        "explanations": sorted(packed, key=lambda row: row["method"]),
        "random": _curves(sample.curves.get(("random", "random"))),
    }


def _input(sample: Sample | ProbeSample) -> dict[str, Any]:
    """What was read: words with their flags, of several pieces the pieces too."""
    units = []
    for word in merge_pieces(sample.tokens, None, sample.word_ids):
        flags = SPECIAL * word.special + SPACE * word.space + MARKED * in_rationale(word, sample.rationale)
        if sample.segment is not None and sample.segment[word.positions[0]] == 1:
            flags += SECOND
        pieces = [sample.tokens[i] for i in word.positions]
        units.append([word.text, flags] if len(pieces) == 1 else [word.text, flags, pieces])
    label = None if sample.label is None or sample.label < 0 else int(sample.label)
    return {"id": int(sample.sample_id), "label": label, "units": units, **_image(sample.image)}


def _image(image: ImageInput | None) -> dict[str, Any]:
    """What the page's script draws an image from; nothing for a text."""
    if image is None:
        return {}
    from calig.pipeline.render.image import outline_path, thumbnail

    return {
        "grid": list(image.grid),
        "picture": thumbnail(image.picture, THUMBNAIL),
        "outline": None if image.mask is None else outline_path(image.mask),
    }


def _told(decision: Decision | None, names: Sequence[str]) -> dict[str, Any]:
    """What stands in the place of a class: the explained label with its probability, or the number; and in words."""
    if decision is None:
        return {}
    number = decision.value if decision.probability is None else decision.probability
    said = " · ".join(decision.parts(names))
    return {"prediction": int(decision.target), "p": _finite(number), "said": said, "right": decision.right}


def _probe_sample(sample: ProbeSample, names: Sequence[str]) -> dict[str, Any]:
    special = [word_id is None for word_id in sample.word_ids]
    states = [
        {
            "epoch": state.epoch,
            "step": state.step,
            "prediction": int(state.prediction),
            "p": _finite(state.probability),
            **_told(state.decision, names),
            "scores": pack_scores(state.scores, special, wide=True),
        }
        for state in sample.states
    ]
    return {**_input(sample), "states": states}


def _curves(curves: Curves | None) -> dict[str, list[list[float | None]]] | None:
    if not curves:
        return None
    return {kind: [[q, _finite(p)] for q, p in line] for kind, line in curves.items()}


def _explanation(
    row: SampleExplanation, special: list[bool], methods: list[str], layer_methods: set[str]
) -> dict[str, Any]:
    layers = row.layer_scores if row.method in layer_methods else None
    return {
        "method": methods.index(row.method),
        "scores": pack_scores(row.scores, special, wide=True),
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
