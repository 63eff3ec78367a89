import pytest
import torch

from calig.pipeline.metrics import drift, layer_profile, special_share


def test_layer_profile_by_hand():
    scores = torch.tensor([[[1.0, -3.0, float("nan")], [2.0, 2.0, 9.0]], [[0.0, 0.0, 0.0], [0.0, 0.0, 0.0]]])
    mask = torch.tensor([[True, True, False], [True, True, True]])
    assert layer_profile(scores, mask).tolist() == [[0.5, 0.5], [0.0, 0.0]]
    random = torch.randn(4, 6, 9)
    profile = layer_profile(random, torch.ones(4, 9).bool())
    torch.testing.assert_close(profile.sum(1), torch.ones(4))
    assert profile[2, 3] == pytest.approx((random[2, 3].abs().sum() / random[2].abs().sum()).item())


def test_special_share_by_hand():
    scores = torch.tensor([[-3.0, 1.0, 0.0, 7.0], [0.0, 0.0, 0.0, 0.0]])
    special = torch.tensor([[True, False, True, True]]).expand(2, 4)
    mask = torch.tensor([[True, True, True, False]]).expand(2, 4)
    assert special_share(scores, special, mask).tolist() == [0.75, 0.0]


def test_drift_equals_scipy_and_the_padding_does_not_matter():
    from scipy.stats import spearmanr

    now, before = torch.randn(3, 10), torch.randn(3, 10)
    evaluable = torch.tensor([[i < n for i in range(10)] for n in (10, 5, 1)])
    got = drift(now, before, evaluable)
    for b, n in enumerate((10, 5)):
        assert got[b].item() == pytest.approx(spearmanr(now[b, :n], before[b, :n]).statistic, abs=1e-6)
    assert got[2].isnan()
    assert torch.equal(got[:2], drift(now, before.masked_fill(~evaluable, 7.0), evaluable)[:2])
    assert drift(now, now, evaluable)[:2].tolist() == [1.0, 1.0]


def test_a_nan_stays_one():
    mask = torch.ones(1, 2).bool()
    broken = torch.tensor([[1.0, float("nan")]])
    assert special_share(broken, ~mask, mask).isnan().all()
    assert layer_profile(broken[None], mask).isnan().all()
    assert drift(broken, torch.tensor([[1.0, 2.0]]), mask).isnan().all()
