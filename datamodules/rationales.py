"""Rationales in every form: 0 or 1 per word, spans of words or of characters, passages of the text."""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import pairwise

from calig.pipeline.errors import InputError

Marks = list[int]
Spans = list[tuple[int, int]]


def parse_rationale(value: object) -> Marks | None:
    """0/1 per word from a sequence, a JSON list or numbers separated by spaces; None for anything else.

    >>> parse_rationale("[0, 1]"), parse_rationale("0 1"), parse_rationale("because of the plot")
    ([0, 1], [0, 1], None)
    """
    if isinstance(value, str):
        try:
            value = json.loads(value) if value.lstrip().startswith("[") else [int(part) for part in value.split()]
        except ValueError:
            return None
    if not isinstance(value, list) or any(not isinstance(mark, (int, float)) or mark not in (0, 1) for mark in value):
        return None
    return [int(mark) for mark in value]


def parse_spans(value: object) -> Spans | None:
    """[start, end) pairs from a sequence or a JSON list of pairs; None for anything else. An empty list marks nothing.

    >>> parse_spans("[[0, 4], [6, 8]]"), parse_spans([]), parse_spans([0, 1])
    ([(0, 4), (6, 8)], [], None)
    """
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except ValueError:
            return None
    if not isinstance(value, list):
        return None
    pairs = [tuple(pair) if isinstance(pair, (list, tuple)) else () for pair in value]
    if any(len(pair) != 2 or not all(type(number) is int for number in pair) for pair in pairs):
        return None
    return [(int(start), int(end)) for start, end in pairs]


def parse_passages(value: object) -> list[str] | None:
    """The passages that are the evidence, from a sequence or a JSON list of strings; None for anything else.

    >>> parse_passages('["fun movie", "a joy"]'), parse_passages([]), parse_passages([[0, 4]])
    (['fun movie', 'a joy'], None, None)
    """
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except ValueError:
            return None
    if not isinstance(value, list) or not value or not all(isinstance(part, str) for part in value):
        return None
    return list(value)


def marks_of_passages(passages: Sequence[str], words: Sequence[str], place: str) -> Marks:
    """0/1 per word from passages, each marked where it first stands; white space does not count.

    Args:
        passages: See ``parse_passages``.
        words: Of the text.
        place: How messages name the row.

    Raises:
        InputError: A passage is empty or does not stand in the text.

    >>> marks_of_passages(["fun  movie"], ["a", "fun", "movie", "!"], "row 1")
    [0, 1, 1, 0]
    """
    text = "".join(words)
    owner = [index for index, word in enumerate(words) for _ in word]
    marks = [0] * len(words)
    for passage in passages:
        plain = "".join(passage.split())
        start = text.find(plain) if plain else -1
        if start < 0:
            raise InputError(
                f"{place}: the rationale's passage {passage[:60]!r} does not stand in the text. Expected passages as "
                "they stand there, but for white space."
            )
        for index in owner[start : start + len(plain)]:
            marks[index] = 1
    return marks


def check_spans(spans: Sequence[tuple[int, int]], size: int, unit: str, place: str) -> Spans:
    """Return the spans in order.

    Args:
        spans: [start, end) pairs.
        size: What the text has of ``unit``.
        unit: ``"words"`` or ``"characters"``.
        place: How messages name the row.

    Raises:
        InputError: A span is empty, lies outside of the text, or overlaps another.
    """
    expected = f"Expected [start, end) pairs of {unit}, counted from 0, the end excluded."
    for start, end in spans:
        if start >= end:
            raise InputError(f"{place}: the rationale's span [{start}, {end}) is empty. {expected}")
        if start < 0 or end > size:
            raise InputError(
                f"{place}: the rationale's span [{start}, {end}) is out of range: the text has {size} {unit}. "
                f"{expected}"
            )
    ordered = sorted(spans)
    for (start, end), (begin, stop) in pairwise(ordered):
        if begin < end:
            raise InputError(
                f"{place}: the rationale's spans [{start}, {end}) and [{begin}, {stop}) overlap. "
                "Merge them into one span."
            )
    return ordered


def marks_of(spans: Sequence[tuple[int, int]], size: int) -> Marks:
    """0/1 per word from spans of words.

    >>> marks_of([(1, 3)], 4)
    [0, 1, 1, 0]
    """
    inside = {word for start, end in spans for word in range(start, end)}
    return [int(word in inside) for word in range(size)]
