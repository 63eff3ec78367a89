"""The signed diverging scale of every picture: blue supports the objective, burnt orange opposes it.

Blue against orange differs along the blue-yellow axis, which red-green colour blindness leaves whole. In HTML the
scale is laid over the page as a translucent tint, so the same markup reads on light and on dark: at full strength the
text keeps a contrast of at least 5 : 1 on both.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

RGB = tuple[int, int, int]

SUPPORTS: RGB = (33, 102, 172)
OPPOSES: RGB = (200, 90, 10)
WHITE: RGB = (255, 255, 255)
STRENGTH = 0.7
"""Opacity of the tint behind text at full scale."""

IMAGE_STRENGTH = 0.85
"""The same on a picture, which is light and grey below it: there is no text to read."""
LIGHT = 0.4
"""How far the picture below goes towards white."""


def abs_scale(values: Iterable[float]) -> float:
    """The largest finite absolute value; 1.0 where there is none or all are zero, so that dividing is safe."""
    return max((abs(value) for value in values if math.isfinite(value)), default=0.0) or 1.0


def unit(value: float, scale: float) -> float:
    """``value / scale`` clamped to [-1, 1]; 0 for a value that is not finite."""
    return max(-1.0, min(1.0, value / scale)) if math.isfinite(value) else 0.0


def hue(value: float) -> RGB:
    """The full colour of a sign."""
    return OPPOSES if value < 0 else SUPPORTS


def css_tint(value: float, *, strength: float = STRENGTH) -> str:
    """CSS colour of a value in [-1, 1]: the hue of its sign, its size as opacity; ``transparent`` near zero."""
    alpha = round(abs(value) * strength, 3)
    if alpha < 0.004:
        return "transparent"
    red, green, blue = hue(value)
    return f"rgba({red},{green},{blue},{alpha:g})"


def rgb(value: float, background: RGB = WHITE) -> RGB:
    """Opaque colour of a value in [-1, 1] on ``background``."""
    size = min(1.0, abs(value))
    red, green, blue = (round(size * c + (1 - size) * b) for c, b in zip(hue(value), background, strict=True))
    return red, green, blue


def hex_color(color: RGB) -> str:
    """``#rrggbb``."""
    return "#{:02x}{:02x}{:02x}".format(*color)
