"""Spans of words and how well predicted ones meet the marked ones (ERASER, DeYoung et al. 2020; METRICS 3)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

Span = tuple[int, int]
"""First place and the place behind the last one."""


def spans(places: Iterable[int]) -> list[Span]:
    """Join places into spans: runs of consecutive numbers.

    Args:
        places: Places of words in any order; a gap in the numbers ends a span.

    Example:
        >>> spans([7, 2, 3, 0])
        [(0, 1), (2, 4), (7, 8)]
    """
    found: list[Span] = []
    for place in sorted(set(places)):
        if found and found[-1][1] == place:
            found[-1] = (found[-1][0], place + 1)
        else:
            found.append((place, place + 1))
    return found


def span_agreement(predicted: Sequence[Span], truth: Sequence[Span], *, threshold: float = 0.5) -> tuple[float, float]:
    """Compute precision and recall of predicted spans; one is true if its best IoU with a true span is large enough.

    As in ERASER both count the true predictions, and a side without spans scores 0. Spans of one side must not touch
    (`spans` makes such); then at a threshold of 0.5 no two predictions can meet the same true span.

    Args:
        predicted: Predicted spans.
        truth: Spans of the rationale.
        threshold: The least IoU of a true prediction.

    Returns:
        Precision, recall.

    Example:
        >>> span_agreement([(0, 2), (5, 6)], [(0, 3), (8, 9), (11, 12)])
        (0.5, 0.3333333333333333)
    """
    found = 0
    for start, stop in predicted:
        for first, last in truth:
            shared = min(stop, last) - max(start, first)
            union = stop - start + last - first - shared
            if shared > 0 and shared >= threshold * union:
                found += 1
                break
    return found / len(predicted) if predicted else 0.0, found / len(truth) if truth else 0.0


def places(word_ids: Sequence[int | None], size: int) -> list[int]:
    """Number the words of a text so that neighbours differ by 1, but not across the special tokens of a text pair.

    Args:
        word_ids: Word number per token, None on special tokens and padding.
        size: How many words the whole text has; those without a token follow the last word before them.

    Returns:
        The places of the words 0 .. size - 1, ascending.

    Example:
        >>> places([None, 0, 0, 1, None, 2, None], 4)
        [0, 1, 3, 4]
    """
    shift: dict[int, int] = {}
    texts, between = 0, False
    for word in word_ids:
        if word is None:
            between = bool(shift)
            continue
        texts += between
        between = False
        shift.setdefault(word, texts)
    numbered, current = [], 0
    for word in range(size):
        current = shift.get(word, current)
        numbered.append(word + current)
    return numbered
