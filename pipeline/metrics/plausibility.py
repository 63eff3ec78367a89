"""Does an explanation agree with the words that people marked? Token-F1 and -IoU, spans, AUPRC (METRICS 3).

Shapes: B examples, T positions, V words that have at least one word piece.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from calig.pipeline.errors import InputError, unknown
from calig.pipeline.metrics.ranking import count, random_rank, rank, reverse
from calig.pipeline.metrics.rows import MetricError, Row, make_row
from calig.pipeline.metrics.spans import Span, places, span_agreement, spans

Aggregation = Literal["sum", "max"]
SHARES = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8)  # of the words: the curve of token_f1


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
    gold, top, length = _top(scores, rationale, k, missed)
    return _f1(int(gold[top].sum()), len(top), length)


def token_iou(scores: Tensor, rationale: Tensor, k: int | None = None, *, missed: int = 0) -> float:
    """Compute the intersection over union of the top-k words and the rationale's words (the Jaccard index).

    It is not ERASER's IoU-F1, which is about spans: see `iou_precision_recall`.

    Args:
        scores: (V,) word scores.
        rationale: (V,) 1 on the words of the rationale.
        k: As in `token_f1`.
        missed: As in `token_f1`.

    Raises:
        InputError: As in `token_f1`.

    Example:
        >>> token_iou(torch.tensor([0.9, 0.1, 0.5]), torch.tensor([1, 1, 0]))
        0.3333333333333333
    """
    gold, top, length = _top(scores, rationale, k, missed)
    return _iou(int(gold[top].sum()), len(top), length)


def iou_precision_recall(
    scores: Tensor, rationale: Tensor, k: int | None = None, *, missed: int = 0
) -> tuple[float, float]:
    """Compute the two parts of ERASER's IoU-F1 for one example: precision and recall of spans (`span_agreement`).

    IoU-F1 is the F1 of their means over examples, so it has no value for a single one: `f1_of_means`, `summarise`.

    Args:
        scores: (V,) scores of V consecutive words.
        rationale: (V,) 1 on the words of the rationale.
        k: As in `token_f1`.
        missed: Words of the rationale that truncation cut off; they are taken to follow the last word in one run.

    Raises:
        InputError: As in `token_f1`.

    Example:
        >>> iou_precision_recall(torch.tensor([0.9, 0.8, 0.1, 0.5]), torch.tensor([1, 1, 1, 0]))
        (0.5, 1.0)
    """
    gold, top, _ = _top(scores, rationale, k, missed)
    marked = [*gold.nonzero().squeeze(1).tolist(), *range(len(gold), len(gold) + missed)]
    return span_agreement(spans(top.tolist()), spans(marked))


def dataset_k(length: float) -> int:
    """Return how many words `token_f1@dataset` predicts: the rationales' mean length, rounded, 1 or more.

    Args:
        length: Mean number of rationale words of the data set, over its examples that have any.

    Raises:
        InputError: ``length`` is not finite or below 0.

    Example:
        >>> dataset_k(4.7)
        5
    """
    if not math.isfinite(length) or length < 0:
        raise InputError(f"the mean rationale length is {length}, expected a finite number of words, 0 or more.")
    return max(1, round(length))


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
    dataset_length: float | None = None,
    seed: int = 0,
) -> list[Row]:
    """Measure several methods on one batch against human rationales: rows per sample, method, control and metric.

    Metrics, all with oracle k but for the two that say so:

    - `token_f1`; its curve as rows with `q` set, k = count(q, V); and `token_f1@dataset`, k = `dataset_k`;
    - `token_iou`;
    - `iou_precision` and `iou_recall`, the parts of ERASER's `iou_f1`, which `summarise` makes of their means;
    - `auprc`, and `auprc_base_rate`, the rationale's share of the words, which auprc is read against.

    Each is by signed scores, and with the suffix `@absolute` by their magnitude. Each method comes with the control
    `reversed` (for auprc: the negated scores), and the control `random` stands once, as method `random`. Words that no
    word piece stands for (truncation) are missed by all but auprc, which does not know them. Examples with an empty
    rationale have rows with the value None, and no curve; so has auprc where only one class is present.

    Args:
        scores: Method -> (B, T) scores.
        word_ids: B lists of T word numbers, None for special tokens and padding; a span never crosses a special token.
        rationales: B lists with a 1 for each word of the whole text that is in the rationale, else 0; or None.
        sample_ids: B ids.
        how: How word pieces become words.
        signed: The methods whose `@absolute` rows are wanted, by default all.
        dataset_length: Mean rationale length of the data set in words; without it there is no `token_f1@dataset`.
        seed: Of the random control.

    Raises:
        InputError: Lengths that do not fit, or a ``dataset_length`` that is none.
        MetricError: A word's score is not finite, or word ids point beyond the rationale; names sample and method.
    """
    ids = [int(i) for i in torch.as_tensor(sample_ids).tolist()]
    sizes = {"word_ids": len(word_ids), "rationales": len(rationales)}
    sizes |= {f"scores of '{method}'": len(values) for method, values in scores.items()}
    for name, size in sizes.items():
        if size != len(ids):
            raise InputError(f"{name} has {size} examples, but there are {len(ids)} sample ids.")
    k = None if dataset_length is None else dataset_k(dataset_length)
    rows: list[Row] = []
    for b, sample_id in enumerate(ids):
        seen = _seen(word_ids[b], rationales[b], sample_id)
        size = len(seen.words)
        order = random_rank(torch.ones(size, dtype=torch.bool), seed=seed, sample_id=sample_id)
        falling = -torch.empty(size).scatter_(0, order, torch.arange(size, dtype=torch.float))
        # A random ranking has no sign: it stands beside the absolute numbers as it is.
        for suffix in ("", "@absolute") if signed is None or signed else ("",):
            for metric, q, value in _measure(falling, seen, k):
                rows.append(make_row(sample_id, "random", "random", metric + suffix, value, q=q))
        for method, pieces in scores.items():
            values, _ = word_scores(pieces[b], word_ids[b], how)
            if not bool(values.isfinite().all()):
                word = int(seen.words[~values.isfinite()][0])
                raise MetricError(f"the score of word {word} is not finite", sample_id=sample_id, method=method)
            for suffix in ("", "@absolute") if signed is None or method in signed else ("",):
                used = values.abs() if suffix else values
                for control in ("none", "reversed"):
                    for metric, q, value in _measure(used, seen, k, reversing=control == "reversed"):
                        rows.append(make_row(sample_id, method, control, metric + suffix, value, q=q))
        base_rate = float(seen.gold.double().mean()) if seen.gold is not None and _both_classes(seen.gold) else None
        for method, control in [("random", "random"), *((method, "none") for method in scores)]:
            rows.append(make_row(sample_id, method, control, "auprc_base_rate", base_rate))
    return rows


class _Seen(NamedTuple):
    """What an explanation is compared with.

    Attributes:
        words: (V,) numbers of the words that have pieces.
        gold: (V,) which of them are in the rationale; None: the rationale is empty.
        length: Words of the rationale, those without pieces too.
        places: V places of the words, see `spans.places`.
        truth: Spans of the rationale.
    """

    words: Tensor
    gold: Tensor | None
    length: int
    places: list[int]
    truth: list[Span]


def _seen(word_ids: Sequence[int | None], rationale: Sequence[int] | None, sample_id: int) -> _Seen:
    words = torch.tensor(sorted({word for word in word_ids if word is not None}), dtype=torch.long)
    whole = torch.tensor([] if rationale is None else list(rationale)) != 0
    if not bool(whole.any()):
        return _Seen(words, None, 0, [], [])
    if len(words) and int(words[-1]) >= len(whole):
        reason = f"its word ids reach {int(words[-1])}, but its rationale has only {len(whole)} words"
        raise MetricError(reason, sample_id=sample_id)
    place = places(word_ids, len(whole))
    truth = spans(place[word] for word in whole.nonzero().squeeze(1).tolist())
    return _Seen(words, whole[words], int(whole.sum()), [place[word] for word in words.tolist()], truth)


def _measure(
    values: Tensor, seen: _Seen, k: int | None, *, reversing: bool = False
) -> Iterator[tuple[str, float | None, float | None]]:
    """Yield metric, bin and value of (V,) word scores; the value is None where it is undefined."""
    if seen.gold is None:
        names = ["token_f1", *(["token_f1@dataset"] if k else []), "token_iou", "iou_precision", "iou_recall", "auprc"]
        yield from ((name, None, None) for name in names)
        return
    ranking = rank(values, torch.ones_like(seen.gold))
    if reversing:  # ties too, which the ranking of the negated scores would leave as they are
        ranking, values = reverse(ranking), -values
    hits = [0, *seen.gold[ranking].cumsum(0).tolist()]

    def best(k: int) -> tuple[int, int, int]:
        k = min(k, len(ranking))
        return hits[k], k, seen.length

    yield "token_f1", None, _f1(*best(seen.length))
    for q in SHARES:
        yield "token_f1", q, _f1(*best(count(q, len(ranking))))
    if k is not None:
        yield "token_f1@dataset", None, _f1(*best(k))
    yield "token_iou", None, _iou(*best(seen.length))
    chosen = spans(seen.places[i] for i in ranking[: seen.length].tolist())
    precision, recall = span_agreement(chosen, seen.truth)
    yield "iou_precision", None, precision
    yield "iou_recall", None, recall
    yield "auprc", None, average_precision(values, seen.gold) if _both_classes(seen.gold) else None


def _top(scores: Tensor, rationale: Tensor, k: int | None, missed: int) -> tuple[Tensor, Tensor, int]:
    """Return the (V,) rationale, its top-k words (K,) and its length with the missed words."""
    gold = _gold(scores, rationale)
    length = int(gold.sum()) + missed
    if length == 0:
        raise InputError("the rationale is empty: the metric is undefined, skip the example.")
    if k is not None and k < 1:
        raise InputError(f"k is {k}, expected 1 or more.")
    return gold, rank(scores, torch.ones_like(gold))[: length if k is None else k], length


def _f1(hits: int, predicted: int, marked: int) -> float:
    return 2 * hits / (predicted + marked)


def _iou(hits: int, predicted: int, marked: int) -> float:
    return hits / (predicted + marked - hits)


def _both_classes(gold: Tensor) -> bool:
    return bool(gold.any()) and not bool(gold.all())


def _gold(scores: Tensor, rationale: Tensor) -> Tensor:
    if scores.shape != rationale.shape or scores.dim() != 1:
        raise InputError(
            f"scores {tuple(scores.shape)} and rationale {tuple(rationale.shape)} must both have the shape (V,)."
        )
    return rationale.detach().cpu() != 0
