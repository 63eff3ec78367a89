"""Signed maps over pictures: overlays, the strip of all blocks, and the same for notebooks and the terminal.

Shapes: N = rows x columns patches, L blocks.
"""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Iterator, Sequence
from html import escape
from typing import Literal

from matplotlib.figure import Figure
from PIL import Image, ImageChops, ImageFilter
from rich.text import Text

from calig.pipeline.errors import InputError
from calig.pipeline.render.color import IMAGE_STRENGTH, LIGHT, OPPOSES, SUPPORTS, abs_scale, css_tint, unit
from calig.pipeline.render.figures import INK, QUIET, blank_figure, figure_image
from calig.pipeline.render.fonts import families_for
from calig.pipeline.render.tokens import legend_html, terminal_style

Grid = tuple[int, int]
How = Literal["nearest", "bilinear"]
SIDE = 240
"""Pixels of an overlay's longer side, unless the picture is larger."""
_RESAMPLING = {"nearest": Image.Resampling.NEAREST, "bilinear": Image.Resampling.BILINEAR}
_COLUMNS = 7
_SPACED = 26  # columns of patches that fit into 80 characters with a blank between them


def overlay(
    picture: Image.Image | bytes | None,
    scores: Sequence[float],
    grid: Grid,
    *,
    scale: float | None = None,
    how: How = "nearest",
    mask: Image.Image | bytes | None = None,
    side: int = SIDE,
) -> Image.Image:
    """Lay a signed map over a picture without its colours: blue supports, orange opposes.

    Args:
        picture: The picture, or its file's content; None draws on grey.
        scores: (N,) scores of the patches, row by row.
        grid: Rows and columns.
        scale: The score of full colour; None takes the largest absolute one.
        how: `nearest` shows the patches as they are, `bilinear` draws from middle to middle.
        mask: White where the object is; its outline is drawn.
        side: Pixels of the longer side at least; a larger picture keeps its size.

    Raises:
        InputError: The scores are no such grid.
    """
    _check(scores, grid)
    base = _sized(opened(picture), side)
    scale = abs_scale(scores) if scale is None else scale
    values = [unit(score, scale) for score in scores]
    ground = Image.blend(base.convert("L").convert("RGB"), Image.new("RGB", base.size, (255, 255, 255)), LIGHT)
    small = Image.new("F", (grid[1], grid[0]))
    small.putdata(values)
    spread = small.resize(base.size, _RESAMPLING[how])
    for color, sign in ((SUPPORTS, 1), (OPPOSES, -1)):
        # What is below 0 is cut off by the change to 8 bits.
        strength = spread.point(lambda value, sign=sign: value * (sign * 255 * IMAGE_STRENGTH) + 0.0).convert("L")
        ground = Image.composite(Image.new("RGB", base.size, color), ground, strength)
    return ground if mask is None else outlined(ground, mask)


def outlined(picture: Image.Image | bytes | None, mask: Image.Image | bytes) -> Image.Image:
    """Draw the outline of an object on a picture: white, with a dark rim so that it shows on any ground."""
    base = opened(picture)
    inside = opened(mask).convert("L").resize(base.size, Image.Resampling.NEAREST)
    wide, middle = inside.filter(ImageFilter.MaxFilter(5)), inside.filter(ImageFilter.MaxFilter(3))
    base = Image.composite(Image.new("RGB", base.size, (20, 20, 20)), base, ImageChops.subtract(wide, middle))
    return Image.composite(Image.new("RGB", base.size, (255, 255, 255)), base, ImageChops.subtract(middle, inside))


def contact_sheet(pictures: Sequence[Image.Image], columns: int, gap: int = 8) -> Image.Image:
    """Pictures side by side on white, row by row; each place is as large as the largest of them."""
    wide, tall = (max(picture.size[axis] for picture in pictures) + gap for axis in (0, 1))
    columns = min(columns, len(pictures))
    sheet = Image.new("RGB", (wide * columns, tall * math.ceil(len(pictures) / columns)), (255, 255, 255))
    for place, picture in enumerate(pictures):
        sheet.paste(picture, (place % columns * wide, place // columns * tall))
    return sheet


def layer_strip(
    picture: Image.Image | bytes | None,
    layer_scores: Sequence[Sequence[float]],
    grid: Grid,
    scores: Sequence[float] | None = None,
    title: str | None = None,
    *,
    mask: Image.Image | bytes | None = None,
) -> Image.Image:
    """Image of :func:`layer_strip_figure`."""
    return figure_image(layer_strip_figure(picture, layer_scores, grid, scores, title, mask=mask))


def layer_strip_figure(
    picture: Image.Image | bytes | None,
    layer_scores: Sequence[Sequence[float]],
    grid: Grid,
    scores: Sequence[float] | None = None,
    title: str | None = None,
    *,
    per_layer: bool = True,
    how: How = "nearest",
    mask: Image.Image | bytes | None = None,
) -> Figure:
    """The map of every block in reading order, then the decision's.

    Args:
        picture: Below every map; None draws on grey.
        layer_scores: (L, N) scores, l = 1..L.
        grid: Rows and columns of the patches.
        scores: (N,) the decision's own map; None leaves it out.
        title: A line above.
        per_layer: Whether each map has full colour at its own largest absolute score, or all at one.
        how: See :func:`overlay`.
        mask: Its outline is drawn on every map.

    Raises:
        InputError: There is no block, or a row of another length.
    """
    rows = [list(row) for row in layer_scores]
    if not rows:
        raise InputError("layer_scores is empty; give one map per block.")
    names = [f"block {i}" for i in range(1, len(rows) + 1)]
    if scores is not None:
        rows.append(list(scores))
        names.append("decision")
    whole = abs_scale(value for row in rows for value in row)
    tall = math.ceil(len(rows) / _COLUMNS)
    wide = math.ceil(len(rows) / tall)
    ratio = 1.0 if picture is None else opened(picture).height / opened(picture).width
    figure = blank_figure((1.7 * wide + 0.3, (1.7 * ratio + 0.3) * tall + (0.35 if title else 0.1)))
    for place, (name, row) in enumerate(zip(names, rows, strict=True), start=1):
        axes = figure.add_subplot(tall, wide, place)
        axes.imshow(overlay(picture, row, grid, scale=None if per_layer else whole, how=how, mask=mask))
        axes.set_title(name, fontsize=8, color=INK if name == "decision" else QUIET, pad=3)
        axes.set_axis_off()
    if title:
        figure.suptitle(
            title, fontsize=9, x=0.01, ha="left", color=INK, parse_math=False, fontfamily=families_for([title])
        )
    return figure


def image_html(
    picture: bytes | None,
    scores: Sequence[float],
    grid: Grid,
    *,
    names: Sequence[str],
    title: str | None = None,
    mask: bytes | None = None,
    legend: bool = False,
) -> str:
    """HTML fragment of a picture and of its signed map beside it; loads nothing, the numbers show when pointed at.

    Args:
        picture: PNG or JPEG.
        scores: (N,) scores.
        grid: Rows and columns.
        names: (N,) names of the patches, for the numbers.
        title: A line above.
        mask: PNG, white on the object; outlined in the left picture.
        legend: Whether a legend stands below.
    """
    _check(scores, grid)
    scale = abs_scale(scores)
    rows, columns = grid
    ratio = 1.0 if picture is None else opened(picture).height / opened(picture).width
    wide, tall = columns, columns * ratio
    cells = "".join(
        f'<rect x="{i % columns}" y="{i // columns * tall / rows:.4g}" width="1" height="{tall / rows:.4g}" '
        f'fill="{css_tint(unit(score, scale), strength=IMAGE_STRENGTH)}"><title>{escape(name)}: {score:+.4g}</title>'
        "</rect>"
        for i, (name, score) in enumerate(zip(names, scores, strict=True))
    )
    box = f'<svg viewBox="0 0 {wide} {tall:.4g}" width="{SIDE}" style="max-width:100%;height:auto" role="img"'
    shown = outlined(_sized(opened(picture), SIDE), mask) if mask is not None else picture
    left = right = f'<rect width="{wide}" height="{tall:.4g}" fill="#ddd"/>'
    if shown is not None and picture is not None:
        place = f'width="{wide}" height="{tall:.4g}" preserveAspectRatio="none" style="image-rendering:pixelated'
        left = f'<image href="{thumbnail(shown, SIDE)}" {place}"/>'
        right = f'<image href="{thumbnail(picture, SIDE)}" {place};filter:grayscale(1) opacity({1 - LIGHT})"/>'
    parts = ['<div style="background:Canvas;color:CanvasText;font:15px/1.9 system-ui,sans-serif">']
    if title is not None:
        parts.append(f'<div style="font-weight:600">{escape(title)}</div>')
    parts.append(
        f'<div style="display:flex;flex-wrap:wrap;gap:12px">{box} aria-label="input">{left}</svg>'
        f'{box} aria-label="relevance by patch"><rect width="{wide}" height="{tall:.4g}" fill="#fff"/>{right}{cells}'
        "</svg></div>"
    )
    if legend and any(scores):
        parts.append(legend_html(scale))
    return "".join([*parts, "</div>"])


def grid_text(scores: Sequence[float], grid: Grid, *, scale: float | None = None) -> Text:
    """The map for the terminal, a patch two or three characters wide: `++` and `+` support, `--` and `-` oppose.

    The signs are there without colours too.
    """
    _check(scores, grid)
    scale = abs_scale(scores) if scale is None else scale
    text = Text()
    for i, score in enumerate(scores):
        value = unit(score, scale)
        sign = "-" if value < 0 else "+"
        mark = "· " if abs(value) < 0.1 else sign * 2 if abs(value) >= 0.65 else sign + " "
        text.append(mark, style=terminal_style(value) or "dim")
        text.append(" " if grid[1] <= _SPACED else "")
        if (i + 1) % grid[1] == 0 and i + 1 < len(scores):
            text.append("\n")
    return text


def thumbnail(picture: Image.Image | bytes | None, side: int) -> str:
    """A picture for a page as a `data:` address: small ones as they are, others as JPEG of at most `side` pixels."""
    image = opened(picture)
    if max(image.size) <= min(64, side):
        return data_uri(image)
    image.thumbnail((side, side))
    stream = io.BytesIO()
    image.save(stream, "JPEG", quality=80)
    return data_uri(stream.getvalue(), "jpeg")


def outline_path(mask: bytes, side: int = 64) -> tuple[str, int, int]:
    """The outline of an object as an SVG path, in pixels of a mask of at most `side`; and its width and height."""
    white = Image.open(io.BytesIO(mask)).convert("L")
    scale = min(1.0, side / max(white.size))
    wide, tall = (max(1, round(size * scale)) for size in white.size)
    data = white.resize((wide, tall), Image.Resampling.NEAREST).tobytes()
    # With a rim of nothing around it, so that lines run along the picture's edge too.
    rows = [[data[y * wide + x] > 127 for x in range(wide)] for y in range(tall)]
    inside = [[False] * (wide + 2), *([False, *row, False] for row in rows), [False] * (wide + 2)]
    # Between two rows (columns) runs a line wherever one is inside and the other is not.
    level = [[inside[y][x] != inside[y + 1][x] for x in range(1, wide + 1)] for y in range(tall + 1)]
    upright = [[inside[y][x] != inside[y][x + 1] for y in range(1, tall + 1)] for x in range(wide + 1)]
    parts = [f"M{start} {y}H{end}" for y, line in enumerate(level) for start, end in _runs(line)]
    parts += [f"M{x} {start}V{end}" for x, line in enumerate(upright) for start, end in _runs(line)]
    return "".join(parts), wide, tall


def _runs(line: Sequence[bool]) -> Iterator[tuple[int, int]]:
    """Where true values start and end."""
    start = None
    for place, flag in enumerate([*line, False]):
        if flag and start is None:
            start = place
        elif not flag and start is not None:
            yield start, place
            start = None


def data_uri(picture: Image.Image | bytes, kind: str = "png") -> str:
    """A picture as an address that holds it."""
    if isinstance(picture, Image.Image):
        stream = io.BytesIO()
        picture.save(stream, "PNG")
        picture = stream.getvalue()
    return f"data:image/{kind};base64,{base64.b64encode(picture).decode('ascii')}"


def opened(picture: Image.Image | bytes | None) -> Image.Image:
    """The picture of a file's content, in colours; grey without one."""
    if picture is None:
        return Image.new("RGB", (64, 64), (128, 128, 128))
    return (picture if isinstance(picture, Image.Image) else Image.open(io.BytesIO(picture))).convert("RGB")


def _sized(picture: Image.Image, side: int) -> Image.Image:
    """As large as `side` at least, so that patches and outlines have room."""
    scale = side / max(picture.size)
    if scale <= 1:
        return picture
    return picture.resize((round(picture.width * scale), round(picture.height * scale)), Image.Resampling.NEAREST)


def _check(scores: Sequence[float], grid: Grid) -> None:
    if len(scores) != grid[0] * grid[1]:
        raise InputError(f"{len(scores)} scores are no grid of {grid[0]} x {grid[1]} patches; give one per patch.")
