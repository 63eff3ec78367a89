import math

import pytest
import torch
from known_models import CLS, MASK, PAD, SEP, TOKENS, bag_of_words, collate, measure, table, texts

from calig.pipeline.errors import InputError
from calig.pipeline.metrics import (
    MetricError,
    PerturbationTokens,
    comprehensiveness,
    faithfulness_rows,
    log_odds,
    random_rank,
    sufficiency,
    summarise,
)

BINS = (0.01, 0.05, 0.1, 0.2, 0.5)


def test_pure_functions():
    full, removed = torch.tensor([0.9, 0.2]), torch.tensor([[0.8, 0.4, 0.0], [0.3, 0.2, 0.1]])
    torch.testing.assert_close(comprehensiveness(full, removed), torch.tensor([0.5, 0.0]))
    torch.testing.assert_close(sufficiency(full, removed, per_bin=True), full[:, None] - removed)
    torch.testing.assert_close(log_odds(full.log(), removed.exp().log()), (removed - full.log()[:, None]).mean(1))


def brute_force(forward, text, scores, target, operator, bins=BINS):
    """One text, one bin at a time, in plain Python: (metric, space, q) -> value."""

    def logits(removed):
        ids, attention = list(text), [1] * len(text)
        if operator == "mask":
            ids = [MASK if i in removed else token for i, token in enumerate(text)]
        elif operator == "delete":
            ids = [token for i, token in enumerate(text) if i not in removed]
            attention = [1] * len(ids)
        else:
            attention = [int(i not in removed) for i in range(len(text))]
        return forward({"input_ids": torch.tensor([ids]), "attention_mask": torch.tensor([attention])})[0].tolist()

    def of(values, space):
        total = sum(math.exp(v) for v in values)
        p = math.exp(values[target]) / total
        return {"logit": values[target], "probability": p, "log": math.log(p)}[space]

    positions = [i for i, token in enumerate(text) if token not in (CLS, SEP)]
    ranking = sorted(positions, key=lambda i: (-scores[i], i))
    result = {}
    for ordered, control in ((ranking, "none"), (ranking[::-1], "reversed")):
        for q in bins:
            k = max(1, -(-round(q * 1000) * len(positions) // 1000)) if q else 0
            without, only = logits(set(ordered[:k])), logits(set(ordered[k:]))
            for space in ("probability", "logit"):
                full = of(logits(set()), space)
                result[control, "comprehensiveness", space, q] = full - of(without, space)
                result[control, "sufficiency", space, q] = full - of(only, space)
            result[control, "log_odds", "probability", q] = of(without, "log") - of(logits(set()), "log")
    for control, name, space, _ in list(result):
        per_bin = [result[control, name, space, q] for q in bins]
        result[control, name, space, None] = sum(per_bin) / len(bins)
    return result


@pytest.mark.parametrize("operator", ["mask", "delete", "attention"])
def test_rows_agree_with_brute_force(operator):
    forward, _ = bag_of_words()
    rows = texts([1, 2, 3, 5, 8, 12, 30])
    generator = torch.Generator().manual_seed(3)
    scores = [torch.randint(-3, 4, (len(row),), generator=generator).float() for row in rows]  # many ties
    target = [i % 3 for i in range(len(rows))]
    got = table(measure(forward, rows, {"m": scores}, target, operators=[operator], bins=(0, *BINS, 1)))
    for i, row in enumerate(rows):
        want = brute_force(forward, row, scores[i].tolist(), target[i], operator, bins=(0, *BINS, 1))
        for (control, name, space, q), value in want.items():
            assert got[i, "m", control, name, operator, space, q] == pytest.approx(value, abs=1e-5)
    assert all(abs(value) < 1e-12 for key, value in got.items() if key[-1] == 0 and key[3] == "comprehensiveness")


def test_the_schema_and_the_controls():
    forward, _ = bag_of_words()
    rows = texts([4, 6])
    scores = {name: [torch.randn(len(row)) for row in rows] for name in ("a", "b")}
    out = measure(forward, rows, scores, [0, 1], ids=[11, 12], operators=["mask", "delete"], seed=5)
    columns = ["sample_id", "method", "control", "metric", "operator", "space", "q", "value"]
    assert all(list(row) == columns for row in out)
    assert all(type(row["sample_id"]) is int and type(row["value"]) is float for row in out)
    pairs = {(row["method"], row["control"]) for row in out}
    assert pairs == {("random", "random"), ("a", "none"), ("a", "reversed"), ("b", "none"), ("b", "reversed")}
    # 2 samples x 5 rankings x 2 operators x (2 metrics x 2 spaces + log-odds) x (5 bins + mean), each once
    assert len(out) == len(table(out)) == 2 * 5 * 2 * 5 * 6
    # the random control is the method that scores by the seeded random ranking
    values = []
    for row, i in zip(rows, (11, 12), strict=True):
        evaluable = torch.tensor([token not in (CLS, SEP) for token in row])
        order = random_rank(evaluable, seed=5, sample_id=i)
        values.append(torch.zeros(len(row)).scatter_(0, order, -torch.arange(len(order)).float()))
    by_hand = table(measure(forward, rows, {"r": values}, [0, 1], ids=[11, 12]))
    got = table(out)
    for key, value in by_hand.items():
        if key[1:3] == ("r", "none"):
            assert got[key[0], "random", "random", *key[3:]] == pytest.approx(value, abs=1e-7)


def test_batched_equals_single_and_the_padding_does_not_matter():
    forward, _ = bag_of_words()
    rows = texts([3, 9, 1, 17])
    scores = [torch.randn(len(row)) for row in rows]
    operators = ["mask", "delete", "attention"]
    together = table(measure(forward, rows, {"m": scores}, [0, 1, 2, 0], operators=operators))
    padded = table(measure(forward, rows, {"m": scores}, [0, 1, 2, 0], operators=operators, extra=9, token_budget=25))
    single = {}
    for i, row in enumerate(rows):
        single |= table(measure(forward, [row], {"m": [scores[i]]}, [i % 3], ids=[i], operators=operators))
    assert together.keys() == padded.keys() == single.keys()
    for key, value in together.items():
        assert padded[key] == pytest.approx(value, abs=1e-6)
        assert single[key] == pytest.approx(value, abs=1e-6)


def test_many_methods_run_the_unperturbed_input_once():
    forward, _ = bag_of_words()
    fed = []

    def counting(batch):
        fed.extend(row[row != PAD].tolist() for row in batch["input_ids"])
        return forward(batch)

    rows = texts([9, 14])
    scores = [torch.randn(len(row)) for row in rows]
    measure(counting, rows, {"one": scores}, [0, 1])
    alone = len(fed)
    assert sum(text in rows for text in fed) == 2
    fed.clear()
    measure(counting, rows, {f"copy {i}": scores for i in range(10)}, [0, 1])
    assert len(fed) == alone


@pytest.mark.parametrize("operator", ["mask", "delete", "attention"])
def test_controls_bracket_the_oracle(operator):
    forward, weight = bag_of_words(seed=1)
    rows = texts([20] * 40, seed=2)
    target = [int(forward({"input_ids": t, "attention_mask": torch.ones_like(t)}).argmax()) for t in map(_row, rows)]
    # in logits of the target, the relevance of a token is its weight, exactly
    oracle = [weight[torch.tensor(row), c] for row, c in zip(rows, target, strict=True)]
    out = summarise(measure(forward, rows, {"oracle": oracle}, target, operators=[operator]))
    end = "" if operator == "mask" else f"@{operator}"
    for key, sign in ((f"comprehensiveness{end}", 1), (f"sufficiency{end}", -1), (f"log_odds{end}", -1)):
        mean = {
            name: sign * out[name, control, key].mean for name, control in (("oracle", "none"), ("random", "random"))
        }
        reversed_mean = sign * out["oracle", "reversed", key].mean
        assert mean["oracle"] > mean["random"] + 0.05 > reversed_mean + 0.1
    logit = f"comprehensiveness@{operator}.logit"
    assert out["oracle", "none", logit].low > out["random", "random", logit].high
    assert out["random", "random", logit].low > out["oracle", "reversed", logit].high


def _row(row):
    return torch.tensor([row])


def test_the_oracle_is_the_best_of_all_rankings():
    from itertools import permutations

    forward, weight = bag_of_words(seed=4)
    rows = texts([5], seed=9)
    bins = (0.2, 0.4, 0.6)
    oracle = weight[torch.tensor(rows[0]), 1]
    every = {}
    for order in permutations(range(1, 6)):
        every[str(order)] = [torch.zeros(7).scatter_(0, torch.tensor(order), -torch.arange(5.0))]
    rankings = {"oracle": [oracle], **every}
    out = measure(forward, rows, rankings, [1], bins=bins, spaces=["logit"], metrics=["comprehensiveness"])
    means = {
        r["method"]: r["value"] for r in out if r["q"] is None and r["control"] == "none" and r["metric"][0] == "c"
    }
    assert means["oracle"] == pytest.approx(max(means.values()), abs=1e-7)


def test_examples_without_evaluable_tokens_are_skipped_and_counted():
    forward, _ = bag_of_words()
    rows = [[CLS, SEP], *texts([4]), [CLS, SEP]]
    scores = [torch.randn(len(row)) for row in rows]
    out = measure(forward, rows, {"m": scores}, [0, 1, 2], ids=[7, 8, 9])
    assert {row["sample_id"] for row in out if row["value"] is None} == {7, 9}
    assert all(row["q"] is None for row in out if row["value"] is None)
    summary = summarise(out)["m", "none", "comprehensiveness"]
    assert (summary.n, summary.n_skipped) == (1, 2)
    out = measure(forward, rows[:1], {"m": scores[:1]}, [0])
    assert summarise(out)["m", "reversed", "log_odds"] == (None, None, None, 0, 1)


def test_what_is_not_finite_names_sample_and_method():
    forward, _ = bag_of_words()
    rows = texts([4, 4])
    good = [torch.randn(6), torch.randn(6)]
    bad = [good[0], good[1].clone()]
    bad[1][2] = float("nan")
    with pytest.raises(MetricError, match="sample 31, method 'bad': the score at position 2 is nan") as caught:
        measure(forward, rows, {"good": good, "bad": bad}, [0, 0], ids=[30, 31])
    assert (caught.value.sample_id, caught.value.method) == (31, "bad")
    bad[1][2], bad[1][0] = 1.0, float("inf")  # at a special token: not looked at
    measure(forward, rows, {"bad": bad}, [0, 0])

    def broken(batch):
        return forward(batch) / (batch["input_ids"] != MASK).all(1, keepdim=True)

    with pytest.raises(MetricError, match="sample 30, method 'random': comprehensiveness"):
        measure(broken, rows, {"good": good}, [0, 0], ids=[30, 31])


def test_bad_input_is_named():
    forward, _ = bag_of_words()
    rows = texts([4])
    scores = {"m": [torch.randn(6)]}
    for options, message in (
        ({"bins": (0.1, 0.33333)}, "0.33333"),
        ({"bins": ()}, "at least one"),
        ({"spaces": ["logits"]}, "Did you mean 'logit'"),
        ({"operators": ["blur"]}, "unknown operator on texts 'blur'"),
        ({"ids": [1, 2]}, "2 sample ids"),
    ):
        with pytest.raises(InputError, match=message):
            measure(forward, rows, scores, [0], **options)
    with pytest.raises(InputError, match="classes from 0 to 2"):
        measure(forward, rows, scores, [3])
    batch, special, mask = collate(rows)
    given = {"target": torch.tensor([0]), "special": special, "mask": mask, "sample_ids": [0]}
    with pytest.raises(InputError, match="operator 'delete'"):
        faithfulness_rows(forward, batch, {}, tokens=PerturbationTokens(pad_id=0), **given)
    with pytest.raises(InputError, match="scores of 'm'"):
        faithfulness_rows(forward, batch, {"m": torch.zeros(1, 5)}, tokens=TOKENS, **given)
