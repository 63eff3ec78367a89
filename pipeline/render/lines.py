"""Curves as matplotlib figures: perturbation curves, and how the relevance of words moves from block to block."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from calig.pipeline.errors import InputError
from calig.pipeline.render.color import abs_scale, hex_color, hue
from calig.pipeline.render.figures import DASHES, INK, QUIET, blank_figure, quieten, short_label
from calig.pipeline.render.fonts import families_for

_ACCENT = "#0b6e66"
_MAX_NAMED = 8


def lines_figure(lines: Mapping[str, Sequence[tuple[float, float]]], title: str, x_name: str) -> Figure:
    """Named lines; the first stands out, the others tell themselves apart by their dashes.

    Raises:
        InputError: If there is no line, or one without points.
    """
    if not lines or not all(lines.values()):
        raise InputError(f"'{title}' has nothing to draw: give at least one line, and points for each.")
    figure = blank_figure((4.2, 2.8))
    _draw_lines(figure.add_subplot(), lines, title, x_name)
    return figure


def curves_figure(curves: Mapping[str, Mapping[str, Sequence[tuple[float, float]]]], title: str) -> Figure:
    """Perturbation curves side by side, one panel per way to perturb, on one scale from 0 to 1.

    Args:
        curves: Name of a panel -> name of a line -> (share of the words, probability).
        title: Above both.
    """
    figure = blank_figure((4.2 * len(curves), 3.0))
    for place, (name, lines) in enumerate(curves.items(), start=1):
        axes = figure.add_subplot(1, len(curves), place)
        _draw_lines(axes, lines, name, "share of the words")
        axes.set_ylim(-0.02, 1.02)
        if place == 1:
            axes.set_ylabel("probability", fontsize=8, color=QUIET)
    figure.suptitle(title, fontsize=9, x=0.01, ha="left", color=INK, parse_math=False, fontfamily=families_for([title]))
    return figure


def _draw_lines(axes: Axes, lines: Mapping[str, Sequence[tuple[float, float]]], title: str, x_name: str) -> None:
    for i, (name, points) in enumerate(lines.items()):
        color = _ACCENT if i == 0 else hex_color((int(30 + 130 * i / len(lines)),) * 3)
        xs, ys = zip(*points, strict=True)
        axes.plot(xs, ys, DASHES[i % 4], color=color, marker="o", markersize=2.5, linewidth=1.3, label=name)
    for text in axes.legend(fontsize=7, frameon=False).get_texts():
        text.set_parse_math(False)
    axes.set_title(title, fontsize=9, loc="left", color=INK, parse_math=False, fontfamily=families_for([title]))
    axes.set_xlabel(x_name, fontsize=8, color=QUIET)
    axes.grid(axis="y", color="#e4e4e0", linewidth=0.6)
    quieten(axes)


def flow_figure(words: Sequence[str], rows: Sequence[Sequence[float]], title: str) -> Figure:
    """How the relevance of each word moves from block 1 to the decision: a line per word, the strongest ones named.

    Args:
        words: (W,) names of the lines.
        rows: (L, W) signed relevance, l = 1..L.
        title: Above the lines.

    Raises:
        InputError: If there is no block, no word, or a row of another length.
    """
    if not rows or not words or any(len(row) != len(words) for row in rows):
        lengths = sorted({len(row) for row in rows})
        raise InputError(f"{len(rows)} blocks of lengths {lengths} for {len(words)} words; give (L, W), L, W > 0.")
    lines = [[value if math.isfinite(value) else 0.0 for value in line] for line in zip(*rows, strict=True)]
    named = _named(lines)
    blocks = range(1, len(rows) + 1)
    figure = blank_figure((min(12.0, max(4.6, 0.42 * len(rows) + 3.2)), 3.4))
    axes = figure.add_subplot()
    axes.axhline(0, color="#c8c8c2", linewidth=0.8)
    for i in range(len(words)):
        axes.plot(blocks, lines[i], color="#c8c8c2", linewidth=0.7)
    for i in reversed(named):
        color = hex_color(hue(lines[i][-1]))
        axes.plot(blocks, lines[i], color=color, marker="o", markersize=2.5, linewidth=1.5)
    low, high = axes.get_ylim()
    heights = _apart([lines[i][-1] for i in named], 0.055 * (high - low))
    for i, height in zip(named, heights, strict=True):
        name = short_label(words[i])
        axes.annotate(
            name,
            (len(rows), lines[i][-1]),
            (len(rows) + 0.03 * max(3, len(rows)), height),
            fontsize=8,
            va="center",
            color=hex_color(hue(lines[i][-1])),
            fontfamily=families_for([name]),
            parse_math=False,
            annotation_clip=False,
        )
    axes.set_xticks(blocks[:: -(-len(rows) // 12)])
    axes.set_xlabel(f"block  1 → {len(rows)} (decision)", fontsize=8, color=QUIET)
    axes.set_ylabel("opposes  ←  relevance  →  supports", fontsize=8, color=QUIET)
    axes.set_title(title, fontsize=9, loc="left", color=INK, parse_math=False, fontfamily=families_for([title]))
    quieten(axes)
    return figure


def _named(lines: Sequence[Sequence[float]]) -> list[int]:
    """The lines to name: those that end strongest and not near zero, where there are both signs one of each."""
    least = 0.05 * abs_scale(line[-1] for line in lines)
    strong = (i for i in range(len(lines)) if lines[i][-1] and abs(lines[i][-1]) >= least)
    order = sorted(strong, key=lambda i: -abs(lines[i][-1]))
    chosen = order[:_MAX_NAMED]
    if order and len({lines[i][-1] > 0 for i in chosen}) == 1:
        other = next((i for i in order if (lines[i][-1] > 0) != (lines[order[0]][-1] > 0)), None)
        chosen = chosen if other is None else [*chosen[: _MAX_NAMED - 1], other]
    return chosen


def _apart(heights: Sequence[float], gap: float) -> list[float]:
    """Heights at least `gap` apart, in the same order and as near to where they were as can be (least squares)."""
    order = sorted(range(len(heights)), key=heights.__getitem__)
    groups: list[list[float]] = []  # pooled neighbours: sum and number of `height - rank * gap`
    for rank, i in enumerate(order):
        groups.append([heights[i] - rank * gap, 1])
        while len(groups) > 1 and groups[-2][0] / groups[-2][1] > groups[-1][0] / groups[-1][1]:
            total, count = groups.pop()
            groups[-1][0] += total
            groups[-1][1] += count
    level = [total / count for total, count in groups for _ in range(int(count))]
    moved = [0.0] * len(heights)
    for rank, i in enumerate(order):
        moved[i] = level[rank] + rank * gap
    return moved
