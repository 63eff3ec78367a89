"""Curves and infidelity: hand-computed values, plain-Python references, the rows and what must not matter."""

import math
import random
from itertools import pairwise

import pytest
import torch
from conftest import make_bert
from known_models import CLS, MASK, SEP, bag_of_words, measure, table, texts

from calig.pipeline.errors import InputError
from calig.pipeline.metrics import (
    FAITHFULNESS_METRICS,
    MetricError,
    deletion_auc,
    infidelity,
    insertion_auc,
    perturbation_auc,
    removal_draws,
    summarise,
)

GRID = [a / 10 for a in range(11)]
CURVES = ("deletion_auc", "insertion_auc", "positive_auc", "negative_auc")


def test_areas_by_hand():
    line = torch.linspace(1, 0, 11, dtype=torch.double)
    assert float(deletion_auc(line)) == pytest.approx(0.5)
    assert insertion_auc(torch.stack([line, line * 0 + 0.25])).tolist() == pytest.approx([0.5, 0.25])
    # right up to q = 0.3, wrong from 0.4: 0.3 full steps and half a step
    assert float(perturbation_auc(torch.tensor([1.0] * 4 + [0.0] * 6))) == pytest.approx(35)
    assert float(perturbation_auc(torch.ones(10))) == pytest.approx(90)  # not rescaled
    samples = torch.rand(7, 10, generator=torch.Generator().manual_seed(0)).round().double()
    assert float(perturbation_auc(samples).mean()) == pytest.approx(float(perturbation_auc(samples.mean(0))))
    for wrong in (torch.ones(10), torch.ones(()), torch.ones(11, 1)):
        with pytest.raises(InputError, match="expected 11 values"):
            deletion_auc(wrong)
    with pytest.raises(InputError, match=r"\(11,\), expected 10 values.*0, 0.1, ..., 0.9"):
        perturbation_auc(torch.ones(11))


def reference(forward, text, scores, target, label):
    """One text with the operator `mask`, one point at a time: (metric, space, q) -> value."""

    def logits(removed):
        ids = [MASK if i in removed else token for i, token in enumerate(text)]
        fed = {"input_ids": torch.tensor([ids]), "attention_mask": torch.ones(1, len(ids), dtype=torch.long)}
        return forward(fed)[0].tolist()

    def value(removed, space):
        values = logits(removed)
        return values[target] if space == "logit" else math.exp(values[target]) / sum(map(math.exp, values))

    def trapezoid(values):
        return sum(0.1 * (a + b) / 2 for a, b in pairwise(values))

    positions = [i for i, token in enumerate(text) if token not in (CLS, SEP)]
    ranking = sorted(positions, key=lambda i: (-scores[i], i))
    result = {}
    for control, order in (("none", ranking), ("reversed", ranking[::-1])):
        tops = [set(order[: -(-a * len(order) // 10)]) for a in range(11)]
        for space in ("probability", "logit"):
            for name, curve in (
                ("deletion_auc", [value(top, space) for top in tops]),
                ("insertion_auc", [value(set(positions) - top, space) for top in tops]),
            ):
                result |= {(control, name, space, q): v for q, v in zip(GRID, curve)}
                result[control, name, space, None] = trapezoid(curve)
        name = "positive_auc" if control == "none" else "negative_auc"
        wanted = max(range(3), key=logits(set()).__getitem__) if label is None else label
        curve = [float(max(range(3), key=logits(top).__getitem__) == wanted) for top in tops[:10]]
        result |= {("none", name, None, q): v for q, v in zip(GRID, curve)}
        result["none", name, None, None] = 100 * trapezoid(curve)
    return result


@pytest.mark.parametrize("of_labels", [False, True])
def test_curves_agree_with_a_plain_reference(of_labels):
    forward, _ = bag_of_words()
    rows = texts([1, 2, 3, 5, 8, 12, 30])
    generator = torch.Generator().manual_seed(3)
    scores = [torch.randint(-3, 4, (len(row),), generator=generator).float() for row in rows]  # many ties
    target, labels = [i % 3 for i in range(7)], [(i + 1) % 3 for i in range(7)]
    options = {"perturbation_target": "label", "labels": torch.tensor(labels)} if of_labels else {}
    got = table(measure(forward, rows, {"m": scores}, target, metrics=CURVES, **options))
    for i, row in enumerate(rows):
        want = reference(forward, row, scores[i].tolist(), target[i], labels[i] if of_labels else None)
        for (control, name, space, q), value in want.items():
            assert got[i, "m", control, name, "mask", space, q] == pytest.approx(value, abs=1e-5)
        if not of_labels:
            assert got[i, "m", "none", "positive_auc", "mask", None, 0] == 1


def test_the_rows_of_all_metrics():
    forward, _ = bag_of_words()
    rows = texts([4, 6])
    scores = {name: [torch.randn(len(row)) for row in rows] for name in ("a", "b")}
    out = measure(forward, rows, scores, [0, 1], operators=["mask", "delete"], metrics=FAITHFULNESS_METRICS)
    assert len(out) == len(table(out))
    shape = {}
    for row in out:
        key = row["metric"], row["space"]
        shape.setdefault(key, [set(), set()])
        shape[key][0].add((row["method"], row["control"]))
        shape[key][1].add(row["q"])
    forwards = {("random", "random"), ("a", "none"), ("b", "none")}
    both = forwards | {("a", "reversed"), ("b", "reversed")}
    bins = {0.01, 0.05, 0.1, 0.2, 0.5, None}
    assert shape == {
        **{(m, s): [both, bins] for m in ("comprehensiveness", "sufficiency") for s in ("probability", "logit")},
        **{(m, s): [both, {*GRID, None}] for m in ("deletion_auc", "insertion_auc") for s in ("probability", "logit")},
        ("log_odds", "probability"): [both, bins],
        ("positive_auc", None): [forwards, {*GRID[:-1], None}],
        ("negative_auc", None): [forwards, {*GRID[:-1], None}],
        ("infidelity", None): [forwards, {None}],
    }
    keys = {key for _, _, key in summarise(out, resamples=2)}
    assert {"positive_auc", "positive_auc@delete", "infidelity", "deletion_auc@delete.logit"} <= keys
    alone = table(measure(forward, rows, scores, [0, 1], metrics=["negative_auc"], spaces=["logit"]))
    assert alone == {k: pytest.approx(v) for k, v in table(out).items() if k[3:5] == ("negative_auc", "mask")}


def test_everything_runs_once():
    forward, _ = bag_of_words()
    fed = []

    def counting(batch):
        fed.extend(map(tuple, torch.cat([batch["input_ids"], batch["attention_mask"]], 1).tolist()))
        return forward(batch)

    rows = texts([7, 7])
    options = {"operators": ["mask", "delete", "attention"], "metrics": FAITHFULNESS_METRICS}
    scores = [torch.randn(len(row)) for row in rows]
    measure(counting, rows, {f"copy {i}": scores for i in range(6)}, [0, 1], **options)
    assert len(fed) == len(set(fed))
    assert sum(list(row[: len(row) // 2]) in rows and all(row[len(row) // 2 :]) for row in fed) == 2


def test_padding_batch_and_order_do_not_matter():
    forward, _ = bag_of_words()
    rows = texts([3, 9, 1, 17])
    scores = [torch.randn(len(row)) for row in rows]
    options = {"operators": ["mask", "delete", "attention"], "metrics": FAITHFULNESS_METRICS}
    together = table(measure(forward, rows, {"m": scores}, [0, 1, 2, 0], **options))
    padded = table(measure(forward, rows, {"m": scores}, [0, 1, 2, 0], extra=9, token_budget=25, **options))
    single = {}
    for i in (2, 0, 3, 1):
        single |= table(measure(forward, [rows[i]], {"m": [scores[i]]}, [i % 3], ids=[i], **options))
    assert together.keys() == padded.keys() == single.keys()
    for key, value in together.items():
        assert padded[key] == pytest.approx(value, abs=1e-6) and single[key] == pytest.approx(value, abs=1e-6)


def test_nothing_to_perturb_one_token_and_what_is_not_finite():
    forward, _ = bag_of_words()
    rows = [[CLS, SEP], *texts([1, 4])]
    scores = [torch.randn(len(row)) for row in rows]
    out = measure(forward, rows, {"m": scores}, [0, 1, 2], metrics=FAITHFULNESS_METRICS)
    empty = [row for row in out if row["sample_id"] == 0]
    assert all(row["value"] is None and row["q"] is None for row in empty)
    assert {row["metric"] for row in empty} == set(FAITHFULNESS_METRICS)
    got = table(out)
    # one token: it is the top k of every share above 0, and one score explains every draw
    whole, without = (got[1, "m", "none", "deletion_auc", "mask", "logit", q] for q in (0, 0.1))
    assert got[1, "m", "none", "deletion_auc", "mask", "logit", None] == pytest.approx(0.05 * whole + 0.95 * without)
    assert got[1, "m", "none", "infidelity", "mask", None, None] == pytest.approx(0, abs=1e-10)
    zeros = measure(forward, rows, {"m": [torch.zeros(len(row)) for row in rows]}, [0, 1, 2], metrics=["infidelity"])
    assert all(row["value"] > 0 for row in zeros if row["sample_id"] > 0 and row["method"] == "m")

    scores[2] = scores[2].clone()
    scores[2][1] = float("nan")
    for metric in FAITHFULNESS_METRICS:
        with pytest.raises(MetricError, match="sample 2, method 'm': the score at position 1 is nan"):
            measure(forward, rows, {"m": scores}, [0, 1, 2], metrics=[metric])

        def broken(batch):
            return forward(batch) / (batch["input_ids"] != MASK).all(1, keepdim=True)

        with pytest.raises(MetricError, match=f"sample 1, method 'random': {metric}"):
            measure(broken, [rows[0], rows[2]], {"m": [scores[0], torch.ones(6)]}, [0, 1], metrics=[metric])


def test_bad_input_is_named():
    forward, _ = bag_of_words()
    rows, scores = texts([4, 4]), {"m": [torch.randn(6)] * 2}
    for options, message in (
        ({"metrics": ["deletion_aoc"]}, "unknown faithfulness metric 'deletion_aoc'. Did you mean 'deletion_auc'"),
        ({"metrics": []}, "at least one of comprehensiveness, sufficiency"),
        ({"perturbation_target": "labels"}, "Did you mean 'label'"),
        ({"perturbation_target": "label"}, "one label for each of the 2 examples; given none"),
        ({"perturbation_target": "label", "labels": torch.tensor([1])}, r"given the shape \(1,\)"),
        (
            {"perturbation_target": "label", "labels": torch.tensor([1, 7])},
            r"labels \[1, 7\] must be classes from 0 to 2",
        ),
    ):
        with pytest.raises(InputError, match=message):
            measure(forward, rows, scores, [0, 0], **options)


def test_draws_depend_on_seed_and_sample_alone_and_are_frozen():
    draws = removal_draws(100, seed=1, sample_id=5)
    torch.manual_seed(7)
    assert torch.equal(draws, removal_draws(100, seed=1, sample_id=5)) and draws.shape == (64, 100)
    assert draws.float().mean() == pytest.approx(0.2, abs=0.02)
    assert not torch.equal(draws, removal_draws(100, seed=2, sample_id=5))
    assert not torch.equal(draws, removal_draws(100, seed=1, sample_id=6))
    by_hand = random.Random("0/3/infidelity")
    assert removal_draws(3, seed=0, sample_id=3, draws=2).flatten().tolist() == [
        by_hand.random() < 0.2 for _ in range(6)
    ]


def test_infidelity_is_the_residual_of_least_squares():
    generator = torch.Generator().manual_seed(0)
    removed = torch.rand(64, 9, generator=generator, dtype=torch.double) < 0.2
    scores = torch.randn(9, generator=generator, dtype=torch.double)
    drops = torch.randn(64, generator=generator, dtype=torch.double)
    predicted = (removed.double() @ scores).unsqueeze(1)
    fit = torch.linalg.lstsq(predicted, drops.unsqueeze(1)).solution
    want = (predicted @ fit - drops.unsqueeze(1)).square().mean()
    torch.testing.assert_close(infidelity(removed, scores, drops), want)
    assert infidelity(removed, scores * 0, drops) == drops.square().mean()  # b = 0
    with pytest.raises(InputError, match="do not fit"):
        infidelity(removed, scores[:4], drops)


@pytest.mark.parametrize("linear", [True, False])
def test_infidelity_agrees_with_captum(linear):
    from captum.metrics import infidelity as captum_infidelity

    if linear:
        forward, _ = bag_of_words(seed=5)
    else:
        model = make_bert(layers=2, seed=5)

        def forward(batch):
            return model(**batch).logits

    row, n, target = texts([9], seed=4)[0], 9, 2
    scores = torch.randn(11, generator=torch.Generator().manual_seed(1))
    draws = removal_draws(n, seed=8, sample_id=40)

    def of_presence(presence):
        ids = torch.tensor([row]).repeat(len(presence), 1)
        ids[:, 1:-1] = torch.where(presence > 0.5, ids[:, 1:-1], MASK)
        with torch.no_grad():
            return forward({"input_ids": ids, "attention_mask": torch.ones_like(ids)})[:, target].double()

    present = torch.ones(1, n, dtype=torch.double)
    want = captum_infidelity(
        of_presence,
        lambda inputs: (draws.double(), inputs - draws.double()),
        present,
        scores[1:-1].double().unsqueeze(0),
        n_perturb_samples=len(draws),
        normalize=True,
    )
    out = measure(forward, [row], {"m": [scores]}, [target], ids=[40], seed=8, metrics=["infidelity"])
    assert next(r["value"] for r in out if r["method"] == "m") == pytest.approx(want.item(), rel=1e-4)
