import pytest
import torch

from calig.pipeline.errors import InputError
from calig.pipeline.metrics import (
    dataset_k,
    f1_of_means,
    iou_precision_recall,
    plausibility_rows,
    span_agreement,
    summarise,
    token_f1,
    token_iou,
)
from calig.pipeline.metrics.ranking import count
from calig.pipeline.metrics.spans import places, spans


def eraser_iou_f1(predicted, truth, threshold=0.5):
    """ERASER's partial_match_score, word for word: sets of positions instead of interval arithmetic."""

    def runs(flags):
        found, current = [], []
        for i, flag in enumerate([*flags, 0]):
            if flag:
                current.append(i)
            elif current:
                found.append(set(current))
                current = []
        return found

    precisions, recalls = [], []
    for p_flags, t_flags in zip(predicted, truth):
        p_runs, t_runs = runs(p_flags), runs(t_flags)
        best = [max((len(p & t) / len(p | t) for t in t_runs), default=0.0) for p in p_runs]
        true = sum(iou >= threshold for iou in best)
        precisions.append(true / len(p_runs) if p_runs else 0)
        recalls.append(true / len(t_runs) if t_runs else 0)
    p, r = sum(precisions) / len(precisions), sum(recalls) / len(recalls)
    return precisions, recalls, 2 * p * r / (p + r) if p + r else 0.0


def random_examples(number=60, words=14, seed=0):
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randn(number, words, generator=generator)
    gold = (torch.rand(number, words, generator=generator) < 0.35).long()
    gold[:, 3] = 1
    return scores, gold


def top_flags(scores, k):
    chosen = set(sorted(range(len(scores)), key=lambda i: (-scores[i], i))[:k])
    return [int(i in chosen) for i in range(len(scores))]


def rows_of(scores, gold, **options):
    words = [list(range(scores.shape[1]))] * len(scores)
    return plausibility_rows(
        {"m": scores}, word_ids=words, rationales=gold.tolist(), sample_ids=range(len(gold)), **options
    )


def test_iou_f1_equals_eraser():
    scores, gold = random_examples()
    summary = summarise(rows_of(scores, gold))
    for suffix, control, used in (
        ("", "none", scores),
        ("", "reversed", -scores),
        ("@absolute", "none", scores.abs()),
        ("@absolute", "reversed", -scores.abs()),
    ):
        predicted = [top_flags(row.tolist(), int(marks.sum())) for row, marks in zip(used, gold)]
        precisions, recalls, f1 = eraser_iou_f1(predicted, gold.tolist())
        assert summary["m", control, f"iou_precision{suffix}"].mean == pytest.approx(sum(precisions) / 60)
        assert summary["m", control, f"iou_recall{suffix}"].mean == pytest.approx(sum(recalls) / 60)
        assert summary["m", control, f"iou_f1{suffix}"].mean == pytest.approx(f1)
        assert 0 < f1 < 1
    for row, marks, p, r in zip(
        scores.abs(),
        gold,
        *eraser_iou_f1(
            [top_flags(row.tolist(), int(marks.sum())) for row, marks in zip(scores.abs(), gold)], gold.tolist()
        )[:2],
    ):
        assert iou_precision_recall(row, marks) == pytest.approx((p, r))


def test_the_interval_of_iou_f1_recomputes_the_ratio_per_resample():
    scores, gold = random_examples(40)
    summary = summarise(rows_of(scores, gold), seed=3, resamples=200)["m", "none", "iou_f1"]
    predicted = [top_flags(row.tolist(), int(marks.sum())) for row, marks in zip(scores, gold)]
    precisions, recalls, _ = eraser_iou_f1(predicted, gold.tolist())
    drawn = torch.randint(40, (200, 40), generator=torch.Generator().manual_seed(3))
    p, r = (torch.tensor(values, dtype=torch.double)[drawn].mean(1) for values in (precisions, recalls))
    expected = (2 * p * r / (p + r)).quantile(torch.tensor([0.025, 0.975], dtype=torch.double))
    assert summary[1:3] == pytest.approx(tuple(expected.tolist()))
    assert summary.low < summary.mean < summary.high


def test_token_iou_and_f1_at_any_k_equal_sklearn():
    from sklearn.metrics import f1_score, jaccard_score

    scores, gold = random_examples(8, seed=1)
    rows = rows_of(scores, gold, dataset_length=4.6)
    found = {(r["sample_id"], r["control"], r["metric"], r["q"]): r["value"] for r in rows if r["method"] == "m"}
    for i, (row, marks) in enumerate(zip(scores, gold)):
        oracle, k5 = top_flags(row.tolist(), int(marks.sum())), top_flags(row.tolist(), 5)
        assert found[i, "none", "token_iou", None] == pytest.approx(jaccard_score(marks, oracle))
        assert token_iou(row, marks, 5) == pytest.approx(jaccard_score(marks, k5))
        assert found[i, "none", "token_f1@dataset", None] == pytest.approx(f1_score(marks, k5))
        away = top_flags((-row.abs()).tolist(), 5)
        assert found[i, "reversed", "token_f1@dataset@absolute", None] == pytest.approx(f1_score(marks, away))
        for a in range(1, 9):
            flags = top_flags(row.tolist(), count(a / 10, 14))
            assert found[i, "none", "token_f1", a / 10] == pytest.approx(f1_score(marks, flags))
            assert found[i, "none", "token_f1", a / 10] == pytest.approx(token_f1(row, marks, sum(flags)))


def test_a_point_of_the_curve_is_summarised_by_its_share():
    scores, gold = random_examples()
    rows = rows_of(scores, gold)
    at = summarise(rows, q=0.3)
    assert list(at) == [
        ("random", "random", "token_f1"),
        ("random", "random", "token_f1@absolute"),
        ("m", "none", "token_f1"),
        ("m", "reversed", "token_f1"),
        ("m", "none", "token_f1@absolute"),
        ("m", "reversed", "token_f1@absolute"),
    ]
    assert at["m", "none", "token_f1"].mean == pytest.approx(
        sum(token_f1(row, marks, 5) for row, marks in zip(scores, gold)) / 60
    )


def test_spans_end_between_the_texts_of_a_pair():
    assert places([None, 0, 1, None, None, 2, 3, None], 4) == [0, 1, 3, 4]
    assert places([None, None, 0, 1, None], 4) == [0, 1, 2, 3]  # padding on the left, and words cut off
    assert places([None, 0, None, 3, None], 4) == [0, 1, 2, 4]  # the first text was cut after word 0
    given = {"rationales": [[0, 1, 1, 0]], "sample_ids": [0]}
    scores = {"m": torch.tensor([[0.0, 0.0, 1.0, 0.0, 0.9, 0.1, 0.0]])}
    joined = summarise(
        plausibility_rows({"m": scores["m"][:, [0, 1, 2, 4, 5]]}, word_ids=[[None, 0, 1, 2, 3]], **given)
    )
    parted = summarise(plausibility_rows(scores, word_ids=[[None, 0, 1, None, 2, 3, None]], **given))
    assert joined["m", "none", "iou_precision"].mean == parted["m", "none", "iou_precision"].mean == 1.0
    # top two: words 1 and 3, so in a pair both are alone; in one text word 1 covers half of the span 1..2
    scores = {"m": torch.tensor([[0.0, 0.0, 1.0, 0.0, 0.1, 0.9, 0.0]])}
    parted = summarise(plausibility_rows(scores, word_ids=[[None, 0, 1, None, 2, 3, None]], **given))
    joined = summarise(
        plausibility_rows({"m": scores["m"][:, [0, 1, 2, 4, 5]]}, word_ids=[[None, 0, 1, 2, 3]], **given)
    )
    assert parted["m", "none", "iou_recall"].mean == 0.5 and joined["m", "none", "iou_recall"].mean == 1.0


def test_words_cut_off_are_missed_spans():
    scores = torch.tensor([3.0, 2.0, 1.0])
    # words 3 and 5 are marked and gone: k = 3 takes every word, one run of three, IoU 1/3 with word 0
    rows = plausibility_rows({"m": scores[None]}, word_ids=[[0, 1, 2]], rationales=[[1, 0, 0, 1, 0, 1]], sample_ids=[0])
    found = {(r["control"], r["metric"]): r["value"] for r in rows if r["q"] is None}
    assert found["none", "iou_precision"] == found["none", "iou_recall"] == 0.0
    assert found["none", "token_iou"] == pytest.approx(1 / 5)
    # k = 2; words 0 and 1 meet the rest of a span 0..3
    assert iou_precision_recall(scores, torch.tensor([1, 1, 0]), 2, missed=2) == (1.0, 0.5)
    assert iou_precision_recall(scores, torch.tensor([0, 0, 1]), 2, missed=1) == (0.0, 0.0)
    assert token_iou(scores, torch.tensor([1, 1, 0]), 2, missed=2) == 0.5
    # nothing is left to explain
    rows = plausibility_rows({"m": torch.ones(1, 2)}, word_ids=[[None, None]], rationales=[[0, 1]], sample_ids=[0])
    by_name = {r["metric"]: r["value"] for r in rows if r["control"] == "none" and r["q"] is None}
    assert by_name["iou_precision"] == by_name["iou_recall"] == by_name["token_iou"] == by_name["token_f1"] == 0.0
    assert summarise(rows)["m", "none", "iou_f1"][:4] == (0.0, 0.0, 0.0, 1)


def test_one_word_every_word_ties_and_k_above_n():
    one, three = torch.tensor([0.4]), torch.tensor([0.5, 0.5, 0.5])
    every = torch.ones(3)
    assert (token_iou(one, one), iou_precision_recall(one, one)) == (1.0, (1.0, 1.0))
    assert (token_iou(three, every), iou_precision_recall(three, every)) == (1.0, (1.0, 1.0))
    assert iou_precision_recall(three, torch.tensor([1, 0, 1]), 99) == (0.0, 0.0)  # one run of 3, IoU 1/3 with each
    assert token_iou(three, torch.tensor([1, 0, 0]), 99) == pytest.approx(1 / 3)
    # ties go by position, and the reversal turns them round
    rows = rows_of(three[None], torch.tensor([[1, 0, 0]]))
    found = {r["control"]: r["value"] for r in rows if r["metric"] == "token_iou" and r["method"] == "m"}
    assert found == {"none": 1.0, "reversed": 0.0}
    for pure in (token_iou, iou_precision_recall):
        with pytest.raises(InputError, match="rationale is empty"):
            pure(three, torch.zeros(3))


def test_empty_rationales_have_no_curve_and_are_counted():
    rows = plausibility_rows(
        {"m": torch.randn(3, 2)},
        word_ids=[[0, 1]] * 3,
        rationales=[None, [0, 0], [0, 1]],
        sample_ids=[0, 1, 2],
        dataset_length=1.0,
    )
    assert {row["sample_id"] for row in rows if row["q"] is not None} == {2}
    for metric in (
        "token_f1",
        "token_f1@dataset",
        "token_iou",
        "iou_precision",
        "iou_recall",
        "iou_f1",
        "iou_f1@absolute",
    ):
        assert summarise(rows)["m", "none", metric][3:] == (1, 2)


def test_the_length_of_the_data_set():
    assert [dataset_k(length) for length in (0.0, 0.4, 1.4, 4.7)] == [1, 1, 1, 5]
    for length in (float("nan"), float("inf"), -1.0):
        with pytest.raises(InputError, match="mean rationale length"):
            dataset_k(length)


def test_span_arithmetic_equals_sets():
    generator = torch.Generator().manual_seed(4)
    for _ in range(300):
        flags = (torch.rand(2, 12, generator=generator) < 0.5).long().tolist()
        runs = [spans(i for i, flag in enumerate(side) if flag) for side in flags]
        p, r, _ = eraser_iou_f1(flags[:1], flags[1:])
        assert span_agreement(*runs) == pytest.approx((p[0], r[0]))
    assert span_agreement([], [(0, 1)]) == span_agreement([(0, 1)], []) == (0.0, 0.0)
    assert f1_of_means(torch.tensor([0.0, 0.0])) == 0.0
