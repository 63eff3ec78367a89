"""What the stage concepts found: one small SVG panel per concept, a line per class, in the colours of the page."""

from __future__ import annotations

from collections.abc import Sequence

from calig.pipeline.concept_rows import ConceptRow
from calig.pipeline.render.curves import Panel, Series
from calig.pipeline.render.labels import number

_WIDTH, _HEIGHT, _LEFT, _RIGHT, _TOP, _BOTTOM = 320, 148, 40, 12, 8, 20
_LABELS = 12


def concept_panels(rows: Sequence[ConceptRow]) -> list[Panel]:
    """Share of supported inputs by layer, a full dot where it is significant; thin: the accuracy of the vectors."""
    concepts: dict[str, dict[str, list[ConceptRow]]] = {}
    for row in rows:
        concepts.setdefault(row.concept, {}).setdefault(row.target, []).append(row)
    return [_panel(concept, lines) for concept, lines in concepts.items()]


def _panel(concept: str, lines: dict[str, list[ConceptRow]]) -> Panel:
    layers = sorted({row.layer for line in lines.values() for row in line})
    place = {layer: index / max(1, len(layers) - 1) for index, layer in enumerate(layers)}

    def px(layer: int) -> float:
        return round(_LEFT + place[layer] * (_WIDTH - _LEFT - _RIGHT), 1)

    def py(share: float) -> float:
        return round(_HEIGHT - _BOTTOM - share * (_HEIGHT - _TOP - _BOTTOM), 1)

    parts = [f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" aria-hidden="true">']
    for tick in (0, 0.5, 1):
        parts.append(f'<line class="grid" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{py(tick)}" y2="{py(tick)}"/>')
        parts.append(f'<text x="{_LEFT - 6}" y="{py(tick) + 3.5}" text-anchor="end">{tick:g}</text>')
    for layer in layers[:: -(-len(layers) // _LABELS)]:
        name = f"layer {layer}" if layer == layers[0] else str(layer)
        parts.append(f'<text x="{px(layer)}" y="{_HEIGHT - 5}" text-anchor="middle">{name}</text>')
    first = next(iter(lines.values()))  # the vectors are the same for every class
    accuracy = sum(row.cav_accuracy for row in first) / len(first)
    series = [Series("accuracy of the vectors", number(accuracy, "accuracy"), "train")]
    points = " ".join(f"{px(row.layer)},{py(row.cav_accuracy)}" for row in first)
    parts.append(f'<polyline class="train" points="{points}"/>')
    for index, (target, line) in enumerate(lines.items()):
        kind = f"s{min(index, 4)}"
        marks = sum(row.significant for row in line)
        series.append(Series(target, f"{marks} of {len(line)} layers", kind))
        points = " ".join(f"{px(row.layer)},{py(row.share)}" for row in line)
        parts.append(f'<polyline class="{kind}" points="{points}"/>')
        for row in line:
            hollow = "" if row.significant else " hollow"
            parts.append(f'<circle class="{kind}{hollow}" cx="{px(row.layer)}" cy="{py(row.share)}" r="3"/>')
    return Panel(concept, series, "".join([*parts, "</svg>"]))
