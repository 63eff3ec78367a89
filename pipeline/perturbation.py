"""Perturbation curves from metric rows: the output as ranked words are removed, or as they alone are kept.

`comprehensiveness` at q is p(x) - p(x without the top k(q)), `sufficiency` is p(x) - p(top k(q) only) (METRICS 2):
with p(x) known, the rows that the metrics leave behind hold both curves and those of their controls.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from calig.pipeline.records import measured_key

REMOVED, KEPT = "removed", "kept"
CURVE_METRICS = {"comprehensiveness": REMOVED, "sufficiency": KEPT}

Curves = dict[str, list[tuple[float, float]]]
"""`removed` and `kept`: (share of the tokens, probability) points, by share."""


def perturbation_curves(
    rows: Iterable[Mapping[str, Any]], probabilities: Mapping[Any, float | None]
) -> dict[tuple[str, str], Curves]:
    """Average the curves of some samples; of one sample, they are its own.

    Args:
        rows: Metric rows (`METRIC_SCHEMA`) of any metrics. Of several operators `mask` is taken, else the first.
        probabilities: Sample (`explained_key`: its id, or id and label) -> probability of what is explained for the
            whole input; other samples are left out.

    Returns:
        (method, control) -> curves. `removed` starts with the whole input at share 0.

    Example:
        >>> row = dict(sample_id=1, method="ca_lig", control="none", operator="mask", space="probability")
        >>> rows = [{**row, "metric": "comprehensiveness", "q": 0.5, "value": 0.75}]
        >>> perturbation_curves(rows, {1: 1.0})
        {('ca_lig', 'none'): {'removed': [(0.0, 1.0), (0.5, 0.25)]}}
    """
    values: dict[str, dict[tuple[str, str], dict[str, dict[float, list[float]]]]] = {}
    for row in rows:
        kind, q, whole = CURVE_METRICS.get(row["metric"]), row["q"], probabilities.get(measured_key(row))
        if kind is None or q is None or whole is None or row["space"] != "probability" or row["value"] is None:
            continue
        lines = values.setdefault(row["operator"], {}).setdefault((row["method"], row["control"]), {})
        line = lines.setdefault(kind, {})
        total = line.setdefault(float(q), [0.0, 0.0, 0.0])
        total[0] += whole
        total[1] += whole - row["value"]
        total[2] += 1
    chosen = values.get("mask") or next(iter(values.values()), {})
    return {key: {kind: _line(kind, line) for kind, line in lines.items()} for key, lines in chosen.items()}


def _line(kind: str, totals: Mapping[float, list[float]]) -> list[tuple[float, float]]:
    points = [(q, after / count) for q, (_, after, count) in sorted(totals.items())]
    if kind == REMOVED and points[0][0] > 0:
        whole, _, count = totals[points[0][0]]
        points.insert(0, (0.0, whole / count))
    return points
