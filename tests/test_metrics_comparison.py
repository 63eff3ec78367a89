import itertools

import numpy as np
import pytest
import torch

from calig.pipeline.errors import InputError
from calig.pipeline.metrics import (
    MetricError,
    Summary,
    compare,
    f1_of_means,
    holm,
    paired_permutation_test,
    small_sample_warning,
    summarise,
)


def pairs(n, seed=0, shift=0.2):
    generator = torch.Generator().manual_seed(seed)
    b = torch.rand(n, generator=generator, dtype=torch.double)
    return b + shift * torch.randn(n, generator=generator, dtype=torch.double) + shift, b


def row(sample_id, value, method="m", control="none", metric="token_f1", **more):
    columns = {"operator": None, "space": None, "q": None} | more
    return {"sample_id": sample_id, "method": method, "control": control, "metric": metric, **columns, "value": value}


@pytest.mark.parametrize("n", [2, 5, 9, 12, 13, 40])
def test_permutation_test_agrees_with_scipy(n):
    from scipy.stats import permutation_test

    for seed in range(4):
        a, b = pairs(n, seed, shift=0.15)
        other = permutation_test(
            (a.numpy(), b.numpy()),
            lambda x, y, axis: np.mean(x - y, axis=axis),
            permutation_type="samples",
            n_resamples=20000 if n > 12 else np.inf,
            vectorized=True,
            rng=0,
        ).pvalue
        got = paired_permutation_test(a, b, permutations=20000)
        # scipy doubles the smaller tail, which for swaps of pairs is the same set of extremes
        assert got == pytest.approx(other, abs=1e-12 if n <= 12 else 0.015)


def test_permutation_of_a_ratio_equals_brute_force():
    generator = torch.Generator().manual_seed(2)
    a, b = torch.rand(2, 7, 2, generator=generator, dtype=torch.double)
    observed = abs(float(f1_of_means(a.mean(0)) - f1_of_means(b.mean(0))))
    extreme = 0
    for swaps in itertools.product([False, True], repeat=7):
        swap = torch.tensor(swaps).unsqueeze(1)
        gap = f1_of_means(torch.where(swap, b, a).mean(0)) - f1_of_means(torch.where(swap, a, b).mean(0))
        extreme += abs(float(gap)) >= observed - 1e-9
    assert paired_permutation_test(a, b, f1_of_means) == extreme / 128


def test_permutation_at_the_edges():
    a, b = pairs(50)
    assert paired_permutation_test(a, a) == 1.0
    assert paired_permutation_test(a[:5], a[:5]) == 1.0
    assert paired_permutation_test(a[:1], b[:1]) == 1.0
    assert paired_permutation_test(a + 5, b, permutations=99) == 1 / 100  # never 0
    assert paired_permutation_test(a, b) == paired_permutation_test(a, b) == paired_permutation_test(b, a)
    # thirds are not exact in binary: four equal differences, both extremes count
    assert paired_permutation_test(torch.full((4,), 1 / 3), torch.zeros(4)) == 2 / 16
    for left, right, options in ((a, b[:3], {}), (a[:0], b[:0], {}), (a, b, {"permutations": 0})):
        with pytest.raises(InputError, match="same samples"):
            paired_permutation_test(left, right, **options)
    with pytest.raises(InputError, match="not finite"):
        paired_permutation_test(torch.tensor([1.0, float("nan")]), torch.ones(2))


def test_monte_carlo_does_not_depend_on_its_chunks(monkeypatch):
    from calig.pipeline.metrics import comparison

    a, b = pairs(20, shift=0.05)
    whole = paired_permutation_test(a, b, permutations=500)
    monkeypatch.setattr(comparison, "_CHUNK", 777)
    assert paired_permutation_test(a, b, permutations=500) == whole
    monkeypatch.setattr(comparison, "_CHUNK", 100)
    assert paired_permutation_test(a[:9], b[:9]) * 512 % 1 == 0


def test_permutation_p_is_uniform_under_the_null():
    generator = torch.Generator().manual_seed(0)
    found = [
        paired_permutation_test(*torch.randn(2, 20, generator=generator), permutations=199, seed=i) for i in range(300)
    ]
    assert sum(p <= 0.05 for p in found) / 300 == pytest.approx(0.05, abs=0.035)


def test_holm():
    # Holm's step-down by hand: 4 * .005, 3 * .01, 2 * .03, 1 * .04 raised to the one before
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.6, 0.7]) == [1.0, 1.0]
    assert holm([0.5]) == [0.5] and holm([]) == []
    generator = torch.Generator().manual_seed(0)
    for _ in range(100):  # closed testing: reject i iff Bonferroni rejects every set of hypotheses that holds i
        p = (torch.rand(4, generator=generator) ** 3).tolist()
        sets = [s for size in range(1, 5) for s in itertools.combinations(range(4), size)]
        expected = [max(min(1.0, len(s) * min(p[j] for j in s)) for s in sets if i in s) for i in range(4)]
        assert holm(p) == pytest.approx(expected)
    for p in (-0.1, 1.1, float("nan")):
        with pytest.raises(InputError, match="p-value"):
            holm([p])


def test_compare_by_hand():
    a, b = pairs(25)
    c = a + 0.001
    rows = [row(i, float(v), method="random", control="random") for i, v in enumerate(b - 1)]
    rows += [row(i, float(v), method=name) for name, side in (("a", a), ("b", b), ("c", c)) for i, v in enumerate(side)]
    rows += [row(i, 9.0, method="a", control="reversed") for i in range(25)]
    rows += [row(i, float(v), method="a", metric="alone") for i, v in enumerate(a)]
    found = compare(rows, seed=5, resamples=300)
    assert [(one.metric, one.method, one.other) for one in found] == [
        ("token_f1", "a", m) for m in ("b", "c", "random")
    ]
    drawn = torch.randint(25, (300, 25), generator=torch.Generator().manual_seed(5))
    ends = (a - b)[drawn].mean(1).quantile(torch.tensor([0.025, 0.975], dtype=torch.double)).tolist()
    assert (found[0].difference, found[0].low, found[0].high) == pytest.approx((float((a - b).mean()), *ends))
    assert [one.p for one in found] == [paired_permutation_test(a, side, seed=5) for side in (b, c, b - 1)]
    assert [one.p_adjusted for one in found] == holm([one.p for one in found])
    assert all(one.n == 25 and one.n_unpaired == 0 for one in found)
    assert [one.method for one in compare(rows, method="b", metrics=["token_f1"])] == ["b"] * 3
    for options, match in (
        ({"method": "d"}, "unknown method 'd'"),
        ({"metrics": ["tokenf1"]}, "Did you mean 'token_f1'"),
    ):
        with pytest.raises(InputError, match=match):
            compare(rows, **options)
    assert compare([]) == []


def test_compare_pairs_by_id_and_counts_the_rest():
    rows = [row(i, float(i), method="a") for i in (3, 1, 2, 7)] + [row(9, None, method="a"), row(3, 3.0, method="a")]
    rows += [row(i, float(i) - 1, method="b") for i in (2, 3, 9)] + [row(1, None, method="b")]
    (only,) = compare(rows)
    assert (only.difference, only.n, only.n_unpaired) == (1.0, 2, 3)  # 2, 3 paired; 1, 7 and 9 not
    rows = [row(0, 1.0, method="a"), row(1, 1.0, method="b")]
    assert compare(rows) == []
    with pytest.raises(MetricError, match="sample 0"):
        compare([row(0, float("nan"), method="a")])


def test_iou_f1_is_compared_as_a_ratio():
    generator = torch.Generator().manual_seed(1)
    values = torch.rand(2, 20, 2, generator=generator, dtype=torch.double)
    rows = [
        row(i, float(values[m, i, c]), method="ab"[m], metric=name)
        for m in range(2)
        for c, name in enumerate(("iou_precision", "iou_recall"))
        for i in range(20)
    ]
    found = {one.metric: one for one in compare(rows, resamples=100)}
    assert list(found) == ["iou_precision", "iou_recall", "iou_f1"]
    drawn = torch.randint(20, (100, 20), generator=torch.Generator().manual_seed(0))
    a, b = (f1_of_means(side[drawn].mean(1)) for side in values)
    got = found["iou_f1"]
    assert got[4:6] == pytest.approx((a - b).quantile(torch.tensor([0.025, 0.975], dtype=torch.double)).tolist())
    assert got.difference == pytest.approx(float(f1_of_means(values[0].mean(0)) - f1_of_means(values[1].mean(0))))
    assert got.p == paired_permutation_test(*values, f1_of_means)


def test_the_parts_of_a_ratio_must_belong_together():
    whole = [row(i, 0.5, metric=name) for name in ("iou_precision", "iou_recall") for i in range(3)]
    assert list(summarise(whole)) == [("m", "none", name) for name in ("iou_precision", "iou_recall", "iou_f1")]
    assert list(summarise(whole[:3])) == [("m", "none", "iou_precision")]
    with pytest.raises(MetricError, match="sample 2, method 'm': only one of iou_precision and iou_recall"):
        summarise(whole[:-1])
    with pytest.raises(MetricError, match="sample 1"):
        summarise([*whole[:4], row(1, None, metric="iou_recall"), whole[5]])


def test_small_samples_are_said_once():
    def summary(n):
        return Summary(0.5, 0.4, 0.6, n, 0) if n else Summary(None, None, None, 0, 4)

    few = {("m", "none", "auprc"): summary(29), ("b", "none", "token_f1"): summary(4), ("b", "none", "x"): summary(0)}
    said = small_sample_warning(few | {("m", "none", "token_f1"): summary(30)})
    assert said.startswith("2 of 3 intervals rest on fewer than 30 samples (the fewest: 4, token_f1 of b)")
    assert small_sample_warning({("m", "none", "token_f1"): summary(30), ("b", "none", "x"): summary(0)}) is None
    assert small_sample_warning({}) is None
