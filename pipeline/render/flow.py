"""Flow from token to token: the picture of each sample, and the table of how well compositions agree with it.

The picture is plain SVG with the lines of the last block, sources left and targets right, so that it stands on paper
and without JavaScript; `report_flow.js` draws the lines of the other blocks into it. Shapes: L blocks, T tokens.
"""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from calig.pipeline.flow_rows import ALL, AgreementRow, by_configuration, marked, remarks
from calig.pipeline.render.color import abs_scale
from calig.pipeline.render.pieces import is_special, merge_pieces
from calig.pipeline.render.rows import FlowSample

MAX_BYTES = 1_500_000
"""Of all pictures; the samples behind are left out."""
STRONGEST = 5
"""Lines that end at each target, unless it is the one looked at."""
GEOMETRY = {"width": 640, "left": 206, "right": 434, "top": 30, "row": 21}
_LONGEST = 22


@dataclass(frozen=True)
class FlowPicture:
    """One sample."""

    title: str
    svg: str
    """Trusted markup: every text in it is escaped."""
    data: dict[str, Any]


@dataclass(frozen=True)
class AgreementLine:
    """One configuration: its names, and a cell for each layer and for all."""

    names: tuple[str, ...]
    cells: list[str]
    interval: str
    correlation: str
    ratio: str


def flow_pictures(flows: Sequence[FlowSample]) -> list[FlowPicture]:
    """Draw the samples, as many as fit into `MAX_BYTES`, at least one."""
    pictures: list[FlowPicture] = []
    size = 0
    for sample in flows:
        picture = _picture(sample)
        size += len(picture.svg) + sum(map(len, picture.data["shares"]))
        if pictures and size > MAX_BYTES:
            break
        pictures.append(picture)
    return pictures


def shares(flow: Sequence[Sequence[float]]) -> list[list[float]]:
    """Each column of a flow (T, T) by source and target over the sum of its magnitudes; 0 where that vanishes."""
    total = [sum(abs(row[j]) for row in flow) for j in range(len(flow))]
    return [[value / total[j] if total[j] > 1e-12 else 0.0 for j, value in enumerate(row)] for row in flow]


def agreement_table(rows: Sequence[AgreementRow]) -> tuple[list[str], list[AgreementLine], list[str]]:
    """The layers, a line for each configuration, the best first, and what to say of the columns behind them."""
    layers = list(dict.fromkeys(row.layer for row in rows if row.layer != ALL))
    lines = []
    for names, line in by_configuration(rows).items():
        overall = line[ALL]
        lines.append(
            AgreementLine(
                marked(names[1:], overall),
                [f"{line[layer].normalised:.3f}" if layer in line else "–" for layer in [*layers, ALL]],
                f"{overall.low:.3f} to {overall.high:.3f}",
                f"{overall.correlation:.2f}".replace("-", "−"),
                f"{overall.ratio:.2f}",
            )
        )
    return layers, lines, remarks(rows)


def _picture(sample: FlowSample) -> FlowPicture:
    blocks = [shares(flow) for flow in sample.flow]
    packed = []
    for block in blocks:
        scale = abs_scale(value for row in block for value in row)
        levels = bytes(round(127 * value / scale) & 255 for row in block for value in row)
        packed.append(f"{scale:.4g} {base64.b64encode(levels).decode('ascii')}")
    words = [word for word in merge_pieces(sample.tokens) if not word.special]
    text = "".join((" " if word.space else "") + word.text for word in words).strip()
    data = {"tokens": list(sample.tokens), "layers": list(sample.layers), "shares": packed}
    return FlowPicture(f"{sample.sample_id} · {text[:70]}", _svg(sample, blocks[-1]), data)


def _svg(sample: FlowSample, block: list[list[float]]) -> str:
    place, tokens = GEOMETRY, sample.tokens
    height = place["top"] + place["row"] * len(tokens)
    parts = [
        f'<svg viewBox="0 0 {place["width"]} {height}" role="img" aria-label="Flow from {len(tokens)} source tokens, '
        f'left, to the same tokens as targets, right, in block {sample.layers[-1] + 1}">',
        f'<text class="head" x="{place["left"] - 8}" y="14" text-anchor="end">from</text>',
        f'<text class="head" x="{place["right"] + 8}" y="14">to</text>',
        f'<g class="lines">{"".join(_lines(block))}</g>',
    ]
    for side, x, anchor in (("source", place["left"] - 8, "end"), ("target", place["right"] + 8, "start")):
        for index, token in enumerate(tokens):
            short = token if len(token) <= _LONGEST else token[: _LONGEST - 1] + "…"
            kind = f"{side} special" if is_special(token) else side
            parts.append(
                f'<text class="{kind}" data-i="{index}" x="{x}" y="{_middle(index) + 4}" text-anchor="{anchor}">'
                f"{escape(short)}</text>"
            )
    return "".join([*parts, "</svg>"])


def _middle(index: int) -> int:
    return GEOMETRY["top"] + GEOMETRY["row"] * index


def _lines(block: list[list[float]]) -> list[str]:
    """The strongest of every target, weak ones first so that strong ones lie on top."""
    left, right = GEOMETRY["left"], GEOMETRY["right"]
    chosen = []
    for target in range(len(block)):
        column = sorted(range(len(block)), key=lambda source: -abs(block[source][target]))
        chosen += [(block[source][target], source, target) for source in column[:STRONGEST]]
    lines = []
    for value, source, target in sorted(chosen, key=lambda line: abs(line[0])):
        if abs(value) < 0.01:
            continue
        a, b, middle = _middle(source), _middle(target), (left + right) // 2
        lines.append(
            f'<path class="{"plus" if value > 0 else "minus"}" d="M{left} {a}C{middle} {a} {middle} {b} {right} {b}" '
            f'stroke-width="{0.5 + 5 * abs(value):.1f}" opacity="{min(1, 0.12 + 1.4 * abs(value)):.2f}"/>'
        )
    return lines
