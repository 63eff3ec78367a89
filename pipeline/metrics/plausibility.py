"""Does an explanation agree with the words that people marked? Word scores, token-F1, AUPRC (METRICS 3).

Shapes: B examples, T positions, V words that have at least one word piece.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor

from calig.pipeline.errors import InputError, unknown
from calig.pipeline.metrics.ranking import random_rank, rank
from calig.pipeline.metrics.rows import MetricError, Row, make_row

Aggregation = Literal["sum", "max"]


def word_scores(scores: Tensor, word_ids: Sequence[int | None], how: Aggregation = "sum") -> tuple[Tensor, Tensor]:
    """Turn the scores of word pieces into scores of words.

    Args:
        scores: (T,) scores of one example.
        word_ids: T word numbers, unique over text pairs; None for special tokens and padding.
        how: `sum` of the pieces, or their `max`.

    Returns:
        (V,) scores, and the (V,) numbers, ascending, of the words that have at least one piece.

    Raises:
        InputError: The lengths differ, or ``how`` is unknown.

    Example:
        >>> word_scores(torch.tensor([9.0, 1.0, 2.0, -1.0]), [None, 0, 0, 2])
        (tensor([ 3., -1.]), tensor([0, 2]))
    """
    if how not in ("sum", "max"):
        raise unknown("aggregation of word pieces", how, ("sum", "max"))
    if len(word_ids) != len(scores) or scores.dim() != 1:
        raise InputError(f"scores {tuple(scores.shape)} and {len(word_ids)} word ids must have one length T.")
    pieces = torch.tensor([i for i, word in enumerate(word_ids) if word is not None], dtype=torch.long)
    numbers = torch.tensor([word for word in word_ids if word is not None], dtype=torch.long)
    words, piece_word = numbers.unique(return_inverse=True)
    reduced = torch.zeros(len(words), dtype=scores.dtype)
    values = scores.detach().cpu()[pieces]
    reduced.scatter_reduce_(0, piece_word, values, "sum" if how == "sum" else "amax", include_self=False)
    return reduced, words


def token_f1(scores: Tensor, rationale: Tensor, k: int | None = None, *, missed: int = 0) -> float:
    """Compute the F1 of the top-k words against the rationale's words (ERASER; METRICS 3).

    Args:
        scores: (V,) word scores.
        rationale: (V,) 1 on the words of the rationale.
        k: How many words to predict, at most V; by default the rationale's own length, missed words included (oracle).
        missed: Words of the rationale that truncation cut off: they count as missed.

    Raises:
        InputError: The shapes differ, ``k`` is below 1, or the rationale is empty.

    Example:
        >>> token_f1(torch.tensor([0.9, 0.1, 0.5]), torch.tensor([1, 1, 0]))
        0.5
    """
    gold = _gold(scores, rationale)
    length = int(gold.sum()) + missed
    if length == 0:
        raise InputError("the rationale is empty: token_f1 is undefined, skip the example.")
    if k is not None and k < 1:
        raise InputError(f"k is {k}, expected 1 or more.")
    top = rank(scores, torch.ones_like(gold))[: length if k is None else k]
    return 2 * int(gold[top].sum()) / (len(top) + length)


def average_precision(scores: Tensor, rationale: Tensor) -> float:
    """Compute the average precision of word scores against a rationale (`auprc`), tied scores taken at once.

    `sum over thresholds of (recall_i - recall_{i-1}) * precision_i`, as scikit-learn's `average_precision_score`.

    Args:
        scores: (V,) word scores.
        rationale: (V,) 1 on the words of the rationale; both classes must be present.

    Raises:
        InputError: The shapes differ, or the rationale holds no word or every word.

    Example:
        >>> average_precision(torch.tensor([0.9, 0.1, 0.5, 0.2]), torch.tensor([1, 1, 0, 0]))
        0.75
    """
    gold = _gold(scores, rationale)
    if bool(gold.all()) or not bool(gold.any()):
        raise InputError("the rationale holds no word or every word: auprc is undefined, skip the example.")
    values, order = torch.sort(scores.detach().cpu(), descending=True)
    hits = gold[order].double().cumsum(0)
    precision = hits / torch.arange(1, len(hits) + 1)
    last_of_tie = torch.cat([values[1:] != values[:-1], torch.ones(1, dtype=torch.bool)])
    gained = torch.diff(hits[last_of_tie] / hits[-1], prepend=torch.zeros(1, dtype=torch.double))
    return float((gained * precision[last_of_tie]).sum())


def plausibility_rows(
    scores: Mapping[str, Tensor],
    *,
    word_ids: Sequence[Sequence[int | None]],
    rationales: Sequence[Sequence[int] | None],
    sample_ids: Sequence[int],
    how: Aggregation = "sum",
    signed: Collection[str] | None = None,
    seed: int = 0,
) -> list[Row]:
    """Measure several methods on one batch against human rationales: rows per sample, method, control and metric.

    Metrics are `token_f1` (oracle k) and `auprc` by signed scores, `token_f1@absolute` and `auprc@absolute` by their
    magnitude, and `auprc_base_rate`, the rationale's share of the words, which auprc is read against. Each method
    comes with the control `reversed` (for auprc: the negated scores), and the control `random` stands once, as method
    `random`. Words that no word piece stands for (truncation) are missed by token_f1 and unknown to auprc. Examples
    with an empty rationale have rows with the value None; so has auprc where only one class is present.

    Args:
        scores: Method -> (B, T) scores.
        word_ids: B lists of T word numbers, None for special tokens and padding.
        rationales: B lists with a 1 for each word of the whole text that is in the rationale, else 0; or None.
        sample_ids: B ids.
        how: How word pieces become words.
        signed: The methods whose `@absolute` rows are wanted, by default all.
        seed: Of the random control.

    Raises:
        InputError: Lengths that do not fit.
        MetricError: A word's score is not finite, or word ids point beyond the rationale; names sample and method.
    """
    ids = [int(i) for i in torch.as_tensor(sample_ids).tolist()]
    sizes = {"word_ids": len(word_ids), "rationales": len(rationales)}
    sizes |= {f"scores of '{method}'": len(values) for method, values in scores.items()}
    for name, size in sizes.items():
        if size != len(ids):
            raise InputError(f"{name} has {size} examples, but there are {len(ids)} sample ids.")
    rows: list[Row] = []
    for b, sample_id in enumerate(ids):
        words, gold, missed = _seen(word_ids[b], rationales[b], sample_id)
        order = random_rank(torch.ones(len(words), dtype=torch.bool), seed=seed, sample_id=sample_id)
        falling = -torch.empty(len(words)).scatter_(0, order, torch.arange(len(words), dtype=torch.float))
        # A random ranking has no sign: it stands beside the absolute numbers as it is.
        for suffix in ("", "@absolute") if signed is None or signed else ("",):
            for metric, value in _measure(falling, gold, missed):
                rows.append(make_row(sample_id, "random", "random", metric + suffix, value))
        for method, pieces in scores.items():
            values, _ = word_scores(pieces[b], word_ids[b], how)
            if not bool(values.isfinite().all()):
                word = int(words[~values.isfinite()][0])
                raise MetricError(f"the score of word {word} is not finite", sample_id=sample_id, method=method)
            for suffix in ("", "@absolute") if signed is None or method in signed else ("",):
                used = values.abs() if suffix else values
                for control in ("none", "reversed"):
                    for metric, value in _measure(used, gold, missed, reverse=control == "reversed"):
                        rows.append(make_row(sample_id, method, control, metric + suffix, value))
        base_rate = float(gold.double().mean()) if gold is not None and _both_classes(gold) else None
        for method, control in [("random", "random"), *((method, "none") for method in scores)]:
            rows.append(make_row(sample_id, method, control, "auprc_base_rate", base_rate))
    return rows


def _seen(
    word_ids: Sequence[int | None], rationale: Sequence[int] | None, sample_id: int
) -> tuple[Tensor, Tensor | None, int]:
    """Return the (V,) words that have pieces, which of them are in the rationale (None: it is empty), words missed."""
    words = torch.tensor(sorted({word for word in word_ids if word is not None}), dtype=torch.long)
    whole = torch.tensor([] if rationale is None else list(rationale)) != 0
    if not bool(whole.any()):
        return words, None, 0
    if len(words) and int(words[-1]) >= len(whole):
        reason = f"its word ids reach {int(words[-1])}, but its rationale has only {len(whole)} words"
        raise MetricError(reason, sample_id=sample_id)
    gold = whole[words]
    return words, gold, int(whole.sum() - gold.sum())


def _measure(
    values: Tensor, gold: Tensor | None, missed: int, *, reverse: bool = False
) -> Iterator[tuple[str, float | None]]:
    """Yield token_f1 and auprc of (V,) word scores, None where undefined; ``gold`` None: the rationale is empty."""
    if gold is None:
        yield from (("token_f1", None), ("auprc", None))
        return
    if reverse:  # flipping the words as well makes ties fall the other way: the exact reversal of the ranking
        values, gold = -values.flip(0), gold.flip(0)
    yield "token_f1", token_f1(values, gold, missed=missed)
    yield "auprc", average_precision(values, gold) if _both_classes(gold) else None


def _both_classes(gold: Tensor) -> bool:
    return bool(gold.any()) and not bool(gold.all())


def _gold(scores: Tensor, rationale: Tensor) -> Tensor:
    if scores.shape != rationale.shape or scores.dim() != 1:
        raise InputError(
            f"scores {tuple(scores.shape)} and rationale {tuple(rationale.shape)} must both have the shape (V,)."
        )
    return rationale.detach().cpu() != 0
