"""Metrics must order explanations as the truth does, on models whose true relevance is known by construction."""

from itertools import permutations

import pytest
import torch
from conftest import make_bert
from known_models import (
    CLS,
    KEY,
    SECOND,
    SEP,
    TOKENS,
    bag_of_words,
    collate,
    measure,
    planted_bert,
    table,
    texts,
    two_class_bag,
)

from calig.pipeline.errors import InputError
from calig.pipeline.metrics import FAITHFULNESS_METRICS, as_scores, oracle_rank

BETTER = {  # 1: higher is better
    "comprehensiveness": 1,
    "sufficiency": -1,
    "log_odds": -1,
    "deletion_auc": -1,
    "insertion_auc": 1,
    "positive_auc": -1,
    "negative_auc": 1,
}
SPACE = {"log_odds": "probability", "positive_auc": None, "negative_auc": None}
OTHER = {"positive_auc": "negative_auc", "negative_auc": "positive_auc"}


def oracle(forward, rows, target, **options):
    batch, special, mask = collate(rows)
    given = {"target": torch.tensor(target), "special": special, "mask": mask, "tokens": TOKENS}
    return oracle_rank(forward, batch, **given, **options)


def values_of(got, method, control, metric, operator, space, n):
    if control == "reversed" and metric in OTHER:
        metric, control = OTHER[metric], "none"
    return torch.tensor([got[i, method, control, metric, operator, space, None] for i in range(n)])


def check_order(forward, rows, true, operator):
    """Per sample: oracle = truth >= random >= reversed, and strictly so in the mean over the samples."""
    target = [1] * len(rows)
    for metric, sign in BETTER.items():
        for space in [SPACE[metric]] if metric in SPACE else ["probability", "logit"]:
            options = {"metric": metric, "operator": operator, "space": space or "probability"}
            best = [
                as_scores(ranking, len(row))
                for ranking, row in zip(oracle(forward, rows, target, **options), rows, strict=True)
            ]
            scores = {"true": true, "oracle": best}
            names = [metric, OTHER.get(metric, metric)]
            out = table(measure(forward, rows, scores, target, operators=[operator], metrics=names))
            of = (metric, operator, space, len(rows))
            oracle_, truth, chance, reversed_ = (
                sign * values_of(out, *who, *of)
                for who in (("oracle", "none"), ("true", "none"), ("random", "random"), ("true", "reversed"))
            )
            torch.testing.assert_close(oracle_, truth, atol=1e-6, rtol=1e-6)
            assert (truth >= chance - 1e-6).all() and (chance >= reversed_ - 1e-6).all(), (metric, space)
            assert truth.mean() > chance.mean() + 1e-3 > reversed_.mean() + 2e-3, (metric, space)


@pytest.mark.parametrize("operator", ["mask", "delete", "attention"])
def test_the_linear_bag_is_ordered_as_its_weights(operator):
    forward, weight = two_class_bag(seed=3)
    rows = [row for row in texts([8] * 24 + [5] * 6, seed=1) if weight[torch.tensor(row)].sum() > 0.3]
    assert len(rows) >= 8
    check_order(forward, rows, [weight[torch.tensor(row)].float() for row in rows], operator)


@pytest.mark.parametrize("operator", ["mask", "delete", "attention"])
def test_the_planted_transformer_is_ordered_as_its_rule(operator):
    rows = [[CLS, *(5 + (7 * i + j) % 12 for j in range(8)), SEP] for i in range(6)]
    for i, row in enumerate(rows):
        row[1 + i], row[1 + (i + 3) % 8] = KEY, SECOND
    true = [torch.tensor([{KEY: 2.0, SECOND: 1.0}.get(token, 0.0) for token in row]) for row in rows]
    check_order(planted_bert(), rows, true, operator)


def test_the_rule_of_the_planted_transformer():
    forward = planted_bert()
    rows = [[CLS, *middle, SEP] for middle in ([6, 7, 8], [KEY, 7, 8], [6, SECOND, 8], [9, SECOND, KEY], [KEY, KEY, 5])]
    batch, _, _ = collate(rows)
    with torch.no_grad():
        logits = forward(batch)
    nothing, key, second, both, twice = logits[:, 1].tolist()
    assert nothing == pytest.approx(-0.8, abs=1e-6) and nothing < second < 0 < key < both
    assert twice == pytest.approx(key, abs=1e-6) and (logits[:, 0] == 0).all()


def test_infidelity_is_zero_for_the_truth_of_a_linear_model_and_not_for_others():
    forward, weight = bag_of_words(seed=2)
    rows, target = texts([2, 8, 30]), [0, 1, 2]
    true = [weight[torch.tensor(row), c] for row, c in zip(rows, target, strict=True)]
    scores = {"true": true, "scaled": [-3 * s for s in true], "wrong": [s.flip(0) for s in true]}
    for operator in ("mask", "delete", "attention"):
        out = table(measure(forward, rows, scores, target, operators=[operator], metrics=["infidelity"]))
        of = ("infidelity", operator, None, 3)
        assert values_of(out, "true", "none", *of).abs().max() < 1e-10
        assert values_of(out, "scaled", "none", *of).abs().max() < 1e-10  # any unit, and either sign
        assert (values_of(out, "random", "random", *of) > 1e-2).all()
        assert (values_of(out, "wrong", "none", *of) > 1e-3).all()
    true = [torch.tensor([0, 2.0, 1.0, *[0.0] * 6])]
    out = measure(planted_bert(), [[CLS, KEY, SECOND, *range(6, 11), SEP]], {"true": true}, [1], metrics=["infidelity"])
    values = {row["method"]: row["value"] for row in out}
    assert 0 < values["true"] < 0.2 * values["random"]


@pytest.mark.parametrize("operator", ["mask", "delete"])
def test_the_oracle_is_the_best_of_all_rankings(operator):
    model = make_bert(layers=2, seed=4)
    rows = [[CLS, 9, 30, 14, 41, SEP], [CLS, 50, 8, SEP]]
    orders = list(permutations(range(1, 5)))
    every = {}
    for i, order in enumerate(orders):  # of the short text each order occurs many times
        short = [p for p in order if p < 3]
        every[str(i)] = [as_scores(torch.tensor(order), 6), as_scores(torch.tensor(short), 4)]

    def forward(batch):
        return model(**batch).logits

    target = [2, 0]
    metrics = [name for name in FAITHFULNESS_METRICS if name != "infidelity"]
    options = {"operators": [operator], "metrics": metrics, "bins": (0.2, 0.4, 0.6, 1)}
    out = table(measure(forward, rows, every, target, **options))
    for metric, sign in BETTER.items():
        for space in [SPACE[metric]] if metric in SPACE else ["probability", "logit"]:
            asked = {"metric": metric, "operator": operator, "space": space or "probability", "bins": options["bins"]}
            rankings = oracle(forward, rows, target, **asked)
            scores = [as_scores(ranking, len(row)) for ranking, row in zip(rankings, rows, strict=True)]
            own = table(measure(forward, rows, {"oracle": scores}, target, **(options | {"metrics": [metric]})))
            got = sign * values_of(own, "oracle", "none", metric, operator, space, 2)
            all_of_them = torch.stack([sign * values_of(out, m, "none", metric, operator, space, 2) for m in every])
            torch.testing.assert_close(got, all_of_them.max(0).values, atol=1e-6, rtol=1e-6)


def test_the_oracle_knows_its_limits():
    forward, _ = bag_of_words()
    rankings = oracle(forward, [[CLS, SEP], [CLS, 9, SEP]], [0, 0], metric="sufficiency")
    assert [ranking.tolist() for ranking in rankings] == [[], [1]]
    with pytest.raises(InputError, match="example 1 has 9 evaluable positions.*at most 8"):
        oracle(forward, texts([3, 9]), [0, 0], metric="sufficiency")
    with pytest.raises(InputError, match="unknown metric of a ranking 'infidelity'"):
        oracle(forward, texts([3]), [0], metric="infidelity")
    with pytest.raises(InputError, match="Did you mean 'logit'"):
        oracle(forward, texts([3]), [0], metric="deletion_auc", space="logits")
    with pytest.raises(InputError, match="unknown operator on texts 'blur'"):
        oracle(forward, texts([3]), [0], metric="deletion_auc", operator="blur")
    with pytest.raises(InputError, match="bins is empty"):
        oracle(forward, texts([3]), [0], metric="log_odds", bins=())
    with pytest.raises(InputError, match=r"labels \[5\] must be classes from 0 to 2"):
        oracle(forward, texts([3]), [0], metric="positive_auc", labels=torch.tensor([5]))
