"""Heatmaps and profiles as matplotlib figures and as images; no pyplot, so no global state and no display needed."""

from __future__ import annotations

import io
import math
import warnings
from collections.abc import Mapping, Sequence

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from PIL import Image

from calig.pipeline.concept_rows import ConceptRow
from calig.pipeline.errors import InputError
from calig.pipeline.render.color import OPPOSES, SUPPORTS, abs_scale, hex_color
from calig.pipeline.render.fonts import families_for

SIGNED = LinearSegmentedColormap.from_list("calig_signed", [hex_color(OPPOSES), "#ffffff", hex_color(SUPPORTS)])
INK, QUIET = "#22252a", "#70757d"
DASHES = ("-", "--", ":", "-.")
_MAX_LABELS = 90


def layer_heatmap(
    tokens: Sequence[str],
    layer_scores: Sequence[Sequence[float]],
    title: str | None = None,
    *,
    per_layer: bool = False,
) -> Image.Image:
    """Image of :func:`layer_heatmap_figure`."""
    return figure_image(layer_heatmap_figure(tokens, layer_scores, title, per_layer=per_layer))


def layer_heatmap_figure(
    tokens: Sequence[str],
    layer_scores: Sequence[Sequence[float]],
    title: str | None = None,
    *,
    per_layer: bool = False,
) -> Figure:
    """Layers x tokens, signed: block 1 at the bottom beside the words, block L (the decision) at the top.

    Args:
        tokens: (T,) labels of the columns.
        layer_scores: (L, T) signed relevance, rows l = 1..L.
        title: A line above the map.
        per_layer: Whether each row is divided by its own largest absolute value.

    Raises:
        InputError: If there is no layer, no token, or a row of another length.
    """
    rows = [[value if math.isfinite(value) else 0.0 for value in map(float, row)] for row in layer_scores]
    layers, width = len(rows), len(tokens)
    if not layers or not width or any(len(row) != width for row in rows):
        lengths = sorted({len(row) for row in rows})
        raise InputError(
            f"layer_scores has {layers} rows of length {lengths} for {width} tokens; give (L, T), L, T > 0."
        )
    if per_layer:
        rows = [[value / abs_scale(row) for value in row] for row in rows]
    limit = abs_scale(value for row in rows for value in row)

    size = (min(24.0, max(4.0, 0.24 * width + 1.6)), max(2.6, 0.2 * layers + 1.9))
    figure = blank_figure(size)
    axes = figure.add_subplot()
    image = axes.imshow(rows, cmap=SIGNED, vmin=-limit, vmax=limit, aspect="auto", origin="lower", interpolation="none")
    step = -(-width // _MAX_LABELS)
    shown = list(range(0, width, step))
    labels = [short_label(tokens[i]) for i in shown]
    axes.set_xticks(shown, labels, rotation=90, fontsize=8, parse_math=False, fontfamily=families_for(labels))
    ticks = list(range(0, layers, max(1, layers // 12)))
    axes.set_yticks(ticks, [str(i + 1) for i in ticks], fontsize=8)
    axes.set_ylabel(f"block  1 → {layers} (decision)", fontsize=8, color=QUIET)
    if title:
        axes.set_title(title, fontsize=9, loc="left", color=INK, parse_math=False, fontfamily=families_for([title]))
    bar = figure.colorbar(image, ax=axes, fraction=0.03, pad=0.01, ticks=[-limit, 0, limit])
    ends = ("opposes", "supports") if per_layer else (f"−{limit:.2g}\nopposes", f"+{limit:.2g}\nsupports")
    bar.ax.set_yticklabels([ends[0], "0", ends[1]], fontsize=7)
    bar.outline.set_visible(False)
    quieten(axes)
    return figure


def layer_profile(profile: Sequence[float] | Mapping[str, Sequence[float]], title: str | None = None) -> Image.Image:
    """Image of :func:`layer_profile_figure`."""
    return figure_image(layer_profile_figure(profile, title))


def layer_profile_figure(profile: Sequence[float] | Mapping[str, Sequence[float]], title: str | None = None) -> Figure:
    """The share of absolute relevance per block, l = 1..L: bars for one profile, lines for several named ones.

    Raises:
        InputError: If no profile has a value.
    """
    series = dict(profile) if isinstance(profile, Mapping) else {"": list(profile)}
    longest = max((len(values) for values in series.values()), default=0)
    if not longest:
        raise InputError("the layer profile is empty; give one value per block.")
    figure = blank_figure((min(12.0, max(3.6, 0.26 * longest + 1.4)), 2.4))
    axes = figure.add_subplot()
    for i, (name, values) in enumerate(series.items()):
        blocks = range(1, len(values) + 1)
        if len(series) == 1:
            axes.bar(blocks, values, color=QUIET, width=0.72)
        else:
            gray = hex_color((int(30 + 130 * i / len(series)),) * 3)
            axes.plot(blocks, values, DASHES[i % 4], color=gray, marker="o", markersize=2.5, linewidth=1.3, label=name)
    if len(series) > 1:
        legend = axes.legend(fontsize=7, frameon=False)
        for text in legend.get_texts():
            text.set_parse_math(False)
    axes.set_xlabel("block", fontsize=8, color=QUIET)
    axes.set_ylabel("share of |relevance|", fontsize=8, color=QUIET)
    axes.set_xticks(range(1, longest + 1, max(1, longest // 12)))
    axes.set_ylim(bottom=0)
    if title:
        axes.set_title(title, fontsize=9, loc="left", color=INK, parse_math=False, fontfamily=families_for([title]))
    quieten(axes)
    return figure


def concept_map(rows: Sequence[ConceptRow]) -> Image.Image:
    """Image of concepts and classes x layers: the share of supported inputs, starred where it is significant."""
    lines: dict[str, dict[int, ConceptRow]] = {}
    for row in rows:
        lines.setdefault(f"{short_label(row.concept)} → {short_label(row.target)}", {})[row.layer] = row
    layers = sorted({row.layer for row in rows})
    figure = blank_figure((min(16.0, 0.5 * len(layers) + 3.2), 0.28 * len(lines) + 1.0))
    axes = figure.add_subplot()
    # Every line has every layer: the stage tests all layers of a concept and class, or none.
    shares = [[2 * line[layer].share - 1 for layer in layers] for line in lines.values()]
    axes.imshow(shares, cmap=SIGNED, vmin=-1, vmax=1, aspect="auto", interpolation="none")
    for y, line in enumerate(lines.values()):
        for x, layer in enumerate(layers):
            text = f"{line[layer].share:.2f}{'*' if line[layer].significant else ''}"
            axes.text(x, y, text, ha="center", va="center", fontsize=7, color=INK)
    names = list(lines)
    axes.set_yticks(range(len(names)), names, parse_math=False, fontfamily=families_for(names))
    axes.set_xticks(range(len(layers)), list(map(str, layers)))
    axes.set_xlabel("layer", fontsize=8, color=QUIET)
    quieten(axes)
    return figure_image(figure)


def figure_image(figure: Figure) -> Image.Image:
    """Rasterise a figure (RGB, its own resolution)."""
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from")  # no installed font: a box is all there is
        figure.savefig(buffer, format="png")
    buffer.seek(0)
    return Image.open(buffer).convert("RGB")


def blank_figure(size: tuple[float, float]) -> Figure:
    """An empty figure of this size in inches, on white."""
    figure = Figure(figsize=size, dpi=120, layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    return figure


def quieten(axes: Axes) -> None:
    """Take the frame and the tick marks away."""
    for side in ("top", "right", "left", "bottom"):
        axes.spines[side].set_visible(False)
    axes.tick_params(length=0, labelsize=8, colors=INK)


def short_label(token: str, limit: int = 18) -> str:
    """A token on one line, cut where it is long."""
    text = token.replace("\n", "⏎").replace("\t", "⇥")
    return text if len(text) <= limit else text[: limit - 1] + "…"
