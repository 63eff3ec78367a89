"""Which installed fonts a text needs: matplotlib falls back per glyph, but only among families it is told of."""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache

from matplotlib import font_manager
from matplotlib.ft2font import FT2Font

DEFAULT = "DejaVu Sans"


def families_for(texts: Iterable[str]) -> list[str]:
    """Font families that together cover ``texts`` as far as installed fonts can, the default first."""
    wanted = sorted({char for text in texts for char in text if ord(char) > 0x024F})
    families = [DEFAULT]
    for char in wanted:
        family = _family_with(char)
        if family is not None and family not in families:
            families.append(family)
    return families


@lru_cache(maxsize=4096)
def _family_with(char: str) -> str | None:
    return next((family for family, chars in _charmaps() if ord(char) in chars), None)


@lru_cache(maxsize=1)
def _charmaps() -> list[tuple[str, frozenset[int]]]:
    """Upright regular fonts and the characters they hold; the default first, sans serif before the rest."""
    entries: dict[str, str] = {}
    for entry in font_manager.fontManager.ttflist:
        if (
            entry.style == "normal"
            and entry.weight in (400, "normal", "regular", "book")
            and entry.name != "Last Resort"
        ):
            entries.setdefault(entry.name, entry.fname)
    charmaps = []
    for name in sorted(entries, key=lambda name: (name != DEFAULT, "Sans" not in name, name)):
        try:
            charmaps.append((name, frozenset(FT2Font(entries[name]).get_charmap())))
        except (OSError, RuntimeError):  # a font file that is gone or broken only narrows the choice
            continue
    return charmaps
