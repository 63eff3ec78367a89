"""Learning curves as small inline SVG panels that take their colours from the page."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from calig.pipeline.perturbation import KEPT, REMOVED, Curves
from calig.pipeline.render.labels import metric, number

_WIDTH, _HEIGHT, _LEFT, _RIGHT, _TOP, _BOTTOM = 320, 148, 40, 8, 8, 20
_MAX_POINTS = 400

Points = list[tuple[float, float]]


@dataclass(frozen=True)
class Series:
    """One line: its name, its last value as text, and the class that gives its colour."""

    name: str
    last: str
    kind: str


@dataclass(frozen=True)
class Panel:
    """One small multiple."""

    title: str
    series: list[Series]
    svg: str
    """Trusted markup: numbers only."""


def curve_panels(curves: Mapping[str, Sequence[tuple[float, float]]]) -> list[Panel]:
    """Group scalar keys by their last part (``train/loss`` and ``val/loss`` share a panel) and draw each group."""
    groups: dict[str, dict[str, Points]] = {}
    for key, points in curves.items():
        finite = sorted((float(x), float(y)) for x, y in points if math.isfinite(x) and math.isfinite(y))
        if not finite:
            continue
        parts = key.split("/")
        name = "/".join(parts[:-1]) or key
        title = metric(parts[-1]).label + (f" ({metric(parts[-1]).variant})" if metric(parts[-1]).variant else "")
        if "explain" in parts[:-1]:
            name = "/".join(parts[parts.index("explain") + 1 : -1]) or name
            title = f"{title} · probe" if parts[0] != "explain" else title
        groups.setdefault(title, {})[name] = _thin(finite)
    return [line_panel(title, series) for title, series in groups.items()]


def perturbation_panels(curves: Mapping[tuple[str, str], Curves], primary: str, units: str = "words") -> list[Panel]:
    """The primary method's curves beside those of its controls, a panel for each way to perturb."""
    lines = {primary: (primary, "none"), f"{primary} reversed": (primary, "reversed"), "random": ("random", "random")}
    panels = []
    for kind, title in ((REMOVED, f"Most relevant {units} removed"), (KEPT, f"Only the most relevant {units} kept")):
        found = {name: curves[key][kind] for name, key in lines.items() if kind in curves.get(key, {})}
        if primary in found:
            panels.append(line_panel(title, found, limits=(0.0, 1.0), x_texts=("{:.0%}", "{:.0%}")))
    return panels


def line_panel(
    title: str,
    lines: Mapping[str, Points],
    *,
    limits: tuple[float, float] | None = None,
    x_texts: tuple[str, str] = ("step {:g}", "{:g}"),
) -> Panel:
    """Draw named lines.

    Args:
        title: Above the panel.
        lines: Name -> points by x.
        limits: Of the y axis; None takes what the lines need.
        x_texts: How the two ends of the x axis are written.
    """
    # train is drawn first, underneath; controls come last, so that the method itself has the accent
    names = sorted(lines, key=lambda name: (name != "train", name.endswith("reversed"), name == "random"))
    others = [name for name in names if name != "train"]
    kinds = {name: "train" if name == "train" else f"s{min(others.index(name), 4)}" for name in names}
    series = [Series(name, number(lines[name][-1][1]), kinds[name]) for name in names]
    xs = [x for points in lines.values() for x, _ in points]
    ys = [y for points in lines.values() for _, y in points]
    ticks = _ticks(*limits) if limits else _ticks(min(ys), max(ys))
    x_low, x_high, y_low, y_high = min(xs), max(xs), min(ticks[0], min(ys)), max(ticks[-1], max(ys))

    def px(x: float) -> float:
        share = (x - x_low) / (x_high - x_low) if x_high > x_low else 0.5
        return round(_LEFT + share * (_WIDTH - _LEFT - _RIGHT), 1)

    def py(y: float) -> float:
        return round(_HEIGHT - _BOTTOM - (y - y_low) / (y_high - y_low) * (_HEIGHT - _TOP - _BOTTOM), 1)

    parts = [f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" aria-hidden="true">']
    for tick in ticks:
        parts.append(f'<line class="grid" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{py(tick)}" y2="{py(tick)}"/>')
        parts.append(f'<text x="{_LEFT - 6}" y="{py(tick) + 3.5}" text-anchor="end">{tick:.4g}</text>')
    parts.append(f'<text x="{px(x_low)}" y="{_HEIGHT - 5}" text-anchor="start">{x_texts[0].format(x_low)}</text>')
    if x_high > x_low:
        text = x_texts[1].format(x_high)
        parts.append(f'<text x="{px(x_high)}" y="{_HEIGHT - 5}" text-anchor="end">{text}</text>')
    for name in names:
        points = lines[name]
        path = " ".join(f"{px(x)},{py(y)}" for x, y in points)
        parts.append(f'<polyline class="{kinds[name]}" points="{path}"/>')
        parts.append(f'<circle class="{kinds[name]}" cx="{px(points[-1][0])}" cy="{py(points[-1][1])}" r="2.4"/>')
    return Panel(title, series, "".join([*parts, "</svg>"]))


def _ticks(low: float, high: float) -> list[float]:
    """Three to five round values from at or below ``low`` to at or above ``high``."""
    if high <= low:
        pad = abs(low) * 0.1 or 1.0
        low, high = low - pad, high + pad
    rough = (high - low) / 3
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= rough * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(i * step, 12) for i in range(first, last + 1)]


def _thin(points: Points) -> Points:
    """At most ``_MAX_POINTS`` evenly spread points, first and last kept."""
    if len(points) <= _MAX_POINTS:
        return points
    return [points[round(i * (len(points) - 1) / (_MAX_POINTS - 1))] for i in range(_MAX_POINTS)]
