"""Cutting texts that are longer than the model's window into overlapping windows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from calig.pipeline.attribution.windows import KEY, Pooling
from calig.pipeline.errors import InputError

Span = tuple[int, int]


@dataclass(frozen=True)
class WindowSettings:
    """How long texts are read.

    Attributes:
        length: Tokens of a window, special ones counted.
        overlap: Tokens that a window has in common with the next.
        pooling: How the windows' logits become those of the text.
        limit: Windows per text; what lies behind the last is cut off. None: as many as it takes.
    """

    length: int
    overlap: int
    pooling: Pooling = "mean"
    limit: int | None = None

    @classmethod
    def of_config(cls, data: Any) -> WindowSettings | None:
        """What ``data.windows`` asks for; None where it asks for none, or does not exist."""
        windows = getattr(data, "windows", None)
        if windows is None or windows.overlap is None:
            return None
        return cls(data.max_length, windows.overlap, windows.pooling, windows.limit)

    @classmethod
    def of_model(cls, config: Any) -> WindowSettings | None:
        """What a model was trained with, from its Hugging Face config; None for one that reads short texts."""
        found: Mapping[str, Any] | None = getattr(config, KEY, None)
        return cls(**found) if found else None

    def room(self, special: int) -> int:
        """Tokens of the text in one window, of whose tokens some are special.

        Raises:
            InputError: The overlap leaves no step from one window to the next.
        """
        room = self.length - special
        if not 0 <= self.overlap < room:
            raise InputError(
                f"data.windows.overlap={self.overlap} leaves no step from one window to the next: a window of "
                f"data.max_length={self.length} has {room} tokens beside its {special} special ones. Set it below "
                f"{room}; an eighth to a quarter of that is usual."
            )
        return room

    def longest(self, special: int) -> int | None:
        """Tokens of the longest text that is not cut off, special ones counted; None: there is no end."""
        room = self.room(special)
        return None if self.limit is None else special + room + (self.limit - 1) * (room - self.overlap)

    def spans(self, start: int, stop: int, special: int) -> list[Span]:
        """The windows over positions [start, stop): all full if there are several, so the last begins early enough.

        >>> WindowSettings(length=6, overlap=1).spans(1, 11, special=2)
        [(1, 5), (4, 8), (7, 11)]
        >>> WindowSettings(length=6, overlap=1).spans(1, 10, special=2)
        [(1, 5), (4, 8), (6, 10)]
        """
        room = self.room(special)
        if stop - start <= room:
            return [(start, stop)]
        step = room - self.overlap
        count = 1 - (room - (stop - start)) // step  # one, and so many steps as reach the end
        return [(first, first + room) for k in range(count) for first in [min(start + k * step, stop - room)]]


def remember_windows(model: Any, windows: WindowSettings | None) -> str:
    """Let a model, and so the folder that it is saved in, know how it reads long texts.

    Returns:
        What to say if it was trained to read them otherwise; empty where it was not, or knew nothing of windows.
    """
    trained = WindowSettings.of_model(model.config)
    if windows is not None or getattr(model.config, KEY, None):  # the config of others stays what it was
        setattr(model.config, KEY, None if windows is None else asdict(windows))
    if trained in (None, windows):
        return ""
    return (
        f"the model was trained on {trained}, and this run reads {windows or 'truncated texts'}: set data.max_length "
        "and data.windows alike for the same decisions"
    )


def places(spans: Sequence[Span], length: int) -> list[list[int]]:
    """The positions that each window of a text holds: its span, in the special tokens that frame the text.

    >>> places([(1, 3), (2, 4)], 5)
    [[0, 1, 2, 4], [0, 2, 3, 4]]
    """
    before, behind = range(spans[0][0]), range(spans[-1][1], length)
    return [[*before, *range(start, stop), *behind] for start, stop in spans]
