import pytest
import torch

from calig.pipeline.errors import InputError
from calig.pipeline.metrics import (
    MetricError,
    average_precision,
    plausibility_rows,
    random_rank,
    summarise,
    token_f1,
    word_scores,
)


def by_key(rows):
    assert len({tuple(list(row.values())[:-1]) for row in rows}) == len(rows)
    return {
        (row["sample_id"], row["method"], row["control"], row["metric"], *([row["q"]] if row["q"] else [])): row[
            "value"
        ]
        for row in rows
    }


def test_word_scores():
    scores = torch.tensor([9.0, 1.0, -2.0, 3.0, 0.5, 9.0])
    words = [None, 0, 0, 2, 1, None]
    values, numbers = word_scores(scores, words)
    assert values.tolist() == [-1.0, 0.5, 3.0] and numbers.tolist() == [0, 1, 2]
    assert word_scores(scores, words, "max")[0].tolist() == [1.0, 0.5, 3.0]
    assert word_scores(-scores, words, "max")[0].tolist() == [2.0, -0.5, -3.0]
    values, numbers = word_scores(scores, [None] * 6)
    assert len(values) == len(numbers) == 0
    with pytest.raises(InputError, match="unknown aggregation"):
        word_scores(scores, words, "mean")
    with pytest.raises(InputError, match="5 word ids"):
        word_scores(scores, words[:5])


def test_token_f1_by_hand():
    scores, gold = torch.tensor([0.9, 0.1, 0.5, 0.4]), torch.tensor([1, 0, 0, 1])
    assert token_f1(scores, gold) == 0.5  # top 2 = words 0, 2
    assert token_f1(scores, gold, k=3) == pytest.approx(2 * (2 / 3) * 1 / (2 / 3 + 1))
    assert token_f1(scores, gold, k=99) == pytest.approx(2 * 0.5 * 1 / 1.5)  # k > V: every word
    # two words of the rationale cut off: k = 4, precision 2/4, recall 2/4
    assert token_f1(scores, gold, missed=2) == 0.5
    assert token_f1(scores, torch.zeros(4), missed=1) == 0.0
    assert token_f1(torch.empty(0), torch.empty(0), missed=1) == 0.0
    with pytest.raises(InputError, match="empty"):
        token_f1(scores, torch.zeros(4))
    with pytest.raises(InputError, match="k is 0"):
        token_f1(scores, gold, k=0)
    with pytest.raises(InputError, match=r"\(4,\) and rationale \(3,\)"):
        token_f1(scores, gold[:3])


def test_token_f1_equals_sklearn():
    from sklearn.metrics import f1_score

    generator = torch.Generator().manual_seed(0)
    for _ in range(50):
        scores = torch.randn(15, generator=generator)
        gold = (torch.rand(15, generator=generator) < 0.4).long()
        gold[0] = 1
        predicted = torch.zeros(15).scatter_(0, scores.topk(int(gold.sum())).indices, 1.0)
        assert token_f1(scores, gold) == pytest.approx(f1_score(gold, predicted))


def test_average_precision_equals_sklearn_with_ties():
    from sklearn.metrics import average_precision_score

    generator = torch.Generator().manual_seed(0)
    for i in range(200):
        n = 2 + i % 20
        scores = torch.randint(-2, 3, (n,), generator=generator).float() * 0.3
        if i % 3 == 0:
            scores = torch.randn(n, generator=generator)
        gold = (torch.rand(n, generator=generator) < 0.4).long()
        gold[0], gold[1] = 1, 0
        assert average_precision(scores, gold) == pytest.approx(average_precision_score(gold, scores), abs=1e-6)
    for gold in (torch.zeros(3), torch.ones(3)):
        with pytest.raises(InputError, match="undefined"):
            average_precision(torch.randn(3), gold)


def test_rows_by_hand():
    scores = {"m": torch.tensor([[9.0, 1.0, 1.0, -5.0, 0.5, 9.0, 0.0]])}
    rows = by_key(
        plausibility_rows(scores, word_ids=[[None, 0, 0, 1, 2, None, None]], rationales=[[0, 1, 1]], sample_ids=[4])
    )
    # words: 2, -5, .5; rationale: words 1, 2
    assert rows[4, "m", "none", "token_f1"] == 0.5  # 0, 2
    assert rows[4, "m", "none", "token_f1@absolute"] == 0.5  # 1, 0
    assert rows[4, "m", "reversed", "token_f1"] == 1.0  # 1, 2
    assert rows[4, "m", "none", "auprc"] == pytest.approx((1 / 2 + 2 / 3) / 2)
    assert rows[4, "m", "none", "auprc@absolute"] == pytest.approx((1 + 2 / 3) / 2)
    assert rows[4, "m", "reversed", "auprc"] == 1.0
    assert rows[4, "m", "none", "auprc_base_rate"] == rows[4, "random", "random", "auprc_base_rate"] == 2 / 3
    order = random_rank(torch.ones(3, dtype=torch.bool), seed=0, sample_id=4).tolist()
    assert rows[4, "random", "random", "token_f1"] == len({1, 2} & set(order[:2])) / 2
    assert rows[4, "random", "random", "token_f1@absolute"] == rows[4, "random", "random", "token_f1"]
    # random and the method with its reversal, signed and absolute: 5 numbers and the curve; base rates
    assert len(rows) == 3 * 2 * (5 + 8) + 2


def test_reversed_breaks_ties_the_other_way():
    scores = {"flat": torch.zeros(1, 4)}
    rows = by_key(plausibility_rows(scores, word_ids=[[0, 1, 2, 3]], rationales=[[1, 1, 0, 0]], sample_ids=[0]))
    assert rows[0, "flat", "none", "token_f1"] == 1.0  # positions 0, 1
    assert rows[0, "flat", "reversed", "token_f1"] == 0.0  # positions 3, 2
    assert rows[0, "flat", "none", "auprc"] == rows[0, "flat", "reversed", "auprc"] == 0.5


def test_truncated_rationales_count_as_missed():
    scores = {"m": torch.tensor([[3.0, 2.0, 1.0]])}
    # words 3, 4, 5 were cut off, two of them in the rationale: k = 3 words of 3, one right of three
    rows = by_key(plausibility_rows(scores, word_ids=[[0, 1, 2]], rationales=[[1, 0, 0, 1, 0, 1]], sample_ids=[0]))
    assert rows[0, "m", "none", "token_f1"] == pytest.approx(2 * (1 / 3) * (1 / 3) / (2 / 3))
    assert rows[0, "m", "none", "auprc"] == 1.0
    # all of it cut off: nothing found, and no auprc; a word that has no piece is missed as well
    rows = by_key(plausibility_rows(scores, word_ids=[[0, 1, 3]], rationales=[[0, 0, 1, 0, 1]], sample_ids=[0]))
    assert rows[0, "m", "none", "token_f1"] == 0.0
    assert rows[0, "m", "none", "auprc"] is rows[0, "m", "none", "auprc_base_rate"] is None
    rows = plausibility_rows(scores, word_ids=[[None] * 3], rationales=[[0, 1]], sample_ids=[0])
    assert by_key(rows)[0, "m", "none", "token_f1"] == 0.0


def test_empty_rationales_are_skipped_and_counted():
    scores = {"m": torch.randn(4, 3)}
    rows = plausibility_rows(
        scores,
        word_ids=[[0, 1, 2]] * 4,
        rationales=[None, [0, 0, 0], [1, 0, 0], [1, 1, 1]],
        sample_ids=torch.tensor([0, 1, 2, 2**40]),
    )
    summary = summarise(rows)
    assert summary["m", "none", "token_f1"][3:] == (2, 2)
    assert summary["m", "reversed", "auprc@absolute"][3:] == (1, 3)
    assert summary["random", "random", "auprc"][3:] == (1, 3)


def test_only_signed_methods_have_absolute_rows():
    scores = {"a": torch.randn(1, 2), "b": torch.rand(1, 2)}
    given = {"word_ids": [[0, 1]], "rationales": [[1, 0]], "sample_ids": [0]}
    methods = {row["method"] for row in plausibility_rows(scores, signed=["a"], **given) if "@" in row["metric"]}
    assert methods == {"a", "random"}
    assert not [row for row in plausibility_rows(scores, signed=(), **given) if "@" in row["metric"]]


def test_batched_equals_single_and_the_padding_does_not_matter():
    words = [[None, 0, 0, 1, 2, None], [None, 0, 1, 1, None, None], [None, 0, 1, 2, 3, None]]
    gold = [[1, 0, 0], [0, 1, 1], [0, 0, 1, 0]]
    scores = torch.randn(3, 6)
    together = by_key(plausibility_rows({"m": scores}, word_ids=words, rationales=gold, sample_ids=[5, 6, 7], seed=1))
    padded = plausibility_rows(
        {"m": torch.nn.functional.pad(scores, (2, 3))},
        word_ids=[[None, None, *row, None, None, None] for row in words],
        rationales=gold,
        sample_ids=[5, 6, 7],
        seed=1,
    )
    single = []
    for i in range(3):
        one = slice(i, i + 1)
        given = {"word_ids": words[one], "rationales": gold[one], "sample_ids": [5 + i]}
        single += plausibility_rows({"m": scores[one]}, seed=1, **given)
    assert together == by_key(padded) == by_key(single)


def test_oracle_random_and_reversed_are_in_order():
    generator = torch.Generator().manual_seed(0)
    gold = (torch.rand(60, 12, generator=generator) < 0.3).long()
    gold[:, 0] = 1
    rows = plausibility_rows(
        {"oracle": gold.float()}, word_ids=[list(range(12))] * 60, rationales=gold.tolist(), sample_ids=range(60)
    )
    summary = summarise(rows)
    for metric in ("token_f1", "auprc"):
        assert summary["oracle", "none", metric].mean == 1.0
        assert 1.0 > summary["random", "random", metric].mean > summary["oracle", "reversed", metric].mean
    assert summary["oracle", "none", "auprc_base_rate"].mean == pytest.approx(gold.double().mean().item())


def test_errors_name_the_sample_and_the_method():
    scores = {"m": torch.tensor([[0.0, 1.0], [0.0, float("nan")]])}
    given = {"word_ids": [[0, 1], [0, 1]], "sample_ids": [3, 9]}
    with pytest.raises(MetricError, match="sample 9, method 'm': the score of word 1 is not finite"):
        plausibility_rows(scores, rationales=[[1, 0], [1, 0]], **given)
    with pytest.raises(MetricError, match="sample 3: its word ids reach 1, but its rationale has only 1"):
        plausibility_rows(scores, rationales=[[1], [1, 0]], **given)
    with pytest.raises(InputError, match="rationales has 1 examples"):
        plausibility_rows(scores, rationales=[[1, 0]], **given)
