import math

import numpy as np
import pytest
import torch

from calig.pipeline.errors import InputError
from calig.pipeline.metrics import MetricError, bootstrap_interval, metric_key, spearman, summarise
from calig.pipeline.metrics import statistics as room
from calig.pipeline.metrics.rows import make_row
from calig.pipeline.metrics.statistics import unique_by_id


def row(sample_id, value, method="m", control="none", metric="comprehensiveness", **more):
    columns = {"operator": "mask", "space": "probability", "q": None} | more
    return {"sample_id": sample_id, "method": method, "control": control, "metric": metric, **columns, "value": value}


def test_bootstrap_by_hand():
    values = torch.rand(37, generator=torch.Generator().manual_seed(5))
    drawn = torch.randint(37, (200, 37), generator=torch.Generator().manual_seed(3)).numpy()
    means = values.double().numpy()[drawn].mean(1)
    mean, low, high = bootstrap_interval(values, seed=3, resamples=200, level=0.9)
    assert (mean, low, high) == pytest.approx((values.double().mean().item(), *np.percentile(means, [5, 95])))


def test_bootstrap_agrees_with_scipy():
    from scipy.stats import bootstrap

    values = torch.rand(80, generator=torch.Generator().manual_seed(1), dtype=torch.double)
    mean, low, high = bootstrap_interval(values, resamples=4000)
    other = bootstrap((values.numpy(),), np.mean, n_resamples=4000, method="percentile", rng=0).confidence_interval
    assert (low, high) == pytest.approx(tuple(other), abs=0.006)
    assert low < mean < high
    assert bootstrap_interval(values) == bootstrap_interval(values) != bootstrap_interval(values, seed=1)


def test_bootstrap_does_not_depend_on_its_chunks(monkeypatch):
    values = torch.rand(50)
    whole = bootstrap_interval(values)
    monkeypatch.setattr(room, "_CHUNK", 777)
    assert bootstrap_interval(values) == pytest.approx(whole)


def test_bootstrap_at_the_edges():
    assert bootstrap_interval(torch.tensor([0.25])) == (0.25, 0.25, 0.25)
    for values, options in ((torch.empty(0), {}), (torch.ones(2), {"level": 1.0}), (torch.ones(2), {"resamples": 0})):
        with pytest.raises(InputError, match="bootstrap needs"):
            bootstrap_interval(values, **options)


def test_spearman_equals_scipy_with_ties():
    from scipy.stats import spearmanr

    generator = torch.Generator().manual_seed(0)
    for n in (2, 3, 10, 100):
        for _ in range(20):
            a = torch.randint(0, max(3, n // 2), (n,), generator=generator).float()
            b = torch.randn(n, generator=generator)
            if a.unique().numel() > 1:
                assert spearman(a, b) == pytest.approx(spearmanr(a, b).statistic, abs=1e-9)
    assert math.isnan(spearman(torch.ones(4), torch.rand(4)))
    assert math.isnan(spearman(torch.ones(1), torch.ones(1)))
    with pytest.raises(InputError, match="shape"):
        spearman(torch.ones(2), torch.ones(3))


def test_metric_keys():
    for operator, space, key in (
        ("mask", "probability", "log_odds"),
        ("mask", "logit", "log_odds@mask.logit"),
        ("delete", "probability", "log_odds@delete"),
        ("attention", "logit", "log_odds@attention.logit"),
        (None, None, "log_odds"),
    ):
        assert metric_key({"metric": "log_odds", "operator": operator, "space": space}) == key


def test_summarise_groups_and_passes_over_bins():
    rows = [row(i, float(i)) for i in range(10)]
    rows += [row(i, 100.0, q=0.1) for i in range(10)]
    rows += [row(i, 2.0 * i, control="reversed") for i in range(10)]
    rows += [row(i, 3.0 * i, space="logit", operator="delete") for i in range(10)]
    rows += [row(i, 0.5, metric="token_f1@absolute", operator=None, space=None) for i in range(3)]
    out = summarise(rows)
    assert list(out) == [
        ("m", "none", "comprehensiveness"),
        ("m", "reversed", "comprehensiveness"),
        ("m", "none", "comprehensiveness@delete.logit"),
        ("m", "none", "token_f1@absolute"),
    ]
    plain = out["m", "none", "comprehensiveness"]
    assert plain[:3] == bootstrap_interval(torch.arange(10.0)) and plain[3:] == (10, 0)
    assert out["m", "reversed", "comprehensiveness"].mean == 9.0
    assert out["m", "none", "token_f1@absolute"].n == 3


def test_summarise_counts_each_sample_once_in_any_order():
    big = [2**24 + 1, 2**24 + 2, 2**24 + 3, 2**40 + 1]
    rows = [row(i, float(n)) for n, i in enumerate(big)]
    expected = summarise(rows)
    again = [row(i, float(n) + 5e-5) for n, i in enumerate(big)][:2]
    assert summarise(rows + again) == expected
    shuffled = [rows[i] for i in (2, 0, 3, 1)]
    assert summarise(shuffled) == expected
    assert expected["m", "none", "comprehensiveness"].n == 4


def test_summarise_refuses_what_cannot_be_right():
    with pytest.raises(MetricError, match=r"sample 5, method 'm': comprehensiveness: it occurs twice .* 1.0 and 1.5"):
        summarise([row(4, 1.0), row(5, 1.0), row(5, 1.5)])
    with pytest.raises(MetricError, match="sample 5"):
        summarise([row(5, 1.0), row(5, None)])
    for value in (float("nan"), float("inf"), -float("inf")):
        with pytest.raises(MetricError, match="sample 5, method 'm'"):
            summarise([row(5, value)])
        with pytest.raises(MetricError, match="sample 5, method 'm'"):
            make_row(5, "m", "none", "token_f1", value)


def test_summarise_counts_skipped_samples_once():
    out = summarise([row(0, 0.5), row(1, None), row(1, None), row(2, None)])
    assert out["m", "none", "comprehensiveness"] == (0.5, 0.5, 0.5, 1, 2)
    out = summarise([row(0, None)])
    assert out["m", "none", "comprehensiveness"] == (None, None, None, 0, 1)
    assert summarise([]) == {}


def test_unique_by_id_of_nothing():
    ids, values = unique_by_id(torch.empty(0, dtype=torch.long), torch.empty(0))
    assert len(ids) == len(values) == 0
