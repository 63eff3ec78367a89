import pytest
import torch

from calig.pipeline.errors import InputError
from calig.pipeline.metrics import centre_prior, mask_auprc, mask_iou, pointing_game


def maps(number=40, seed=0):
    generator = torch.Generator().manual_seed(seed)
    for _ in range(number):
        heat = torch.randn(6, 5, generator=generator)
        mask = (torch.rand(6, 5, generator=generator) < 0.3).long()
        mask[0, 0], mask[5, 4] = 1, 0
        yield heat, mask


def test_against_sklearn_and_numpy():
    import numpy as np
    from sklearn.metrics import average_precision_score, jaccard_score

    hits = []
    for heat, mask in maps():
        flat = mask.flatten()
        assert mask_auprc(heat, mask) == pytest.approx(average_precision_score(flat, heat.flatten()))
        assert mask_iou(heat, mask) == pytest.approx(jaccard_score(flat, (heat > heat.mean()).flatten()))
        place = np.unravel_index(heat.numpy().argmax(), heat.shape)
        hits.append(pointing_game(heat, mask))
        assert hits[-1] == float(mask[place])
    assert 0 < sum(hits) < len(hits)


def test_tolerance_of_the_pointing_game():
    heat, mask = torch.zeros(5, 5), torch.zeros(5, 5)
    heat[2, 2] = mask[3, 3] = 1.0
    assert [pointing_game(heat, mask, tolerance=t) for t in (0, 1, 2)] == [0.0, 0.0, 1.0]  # the distance is 1.41


def test_ties_and_constant_maps():
    for value in (0.0, 0.1, 1 / 3):
        heat = torch.full((3, 3), value)
        assert mask_iou(heat, torch.eye(3)) == 0.0
        assert mask_auprc(heat, torch.eye(3)) == pytest.approx(1 / 3)
        assert pointing_game(heat, torch.eye(3)) == 1.0  # the first cell
    assert pointing_game(torch.ones(1, 1), torch.ones(1, 1)) == 1.0


def test_an_exact_map_is_perfect_and_beats_the_centre():
    for _, mask in maps(10):
        prior = centre_prior(*mask.shape)
        assert pointing_game(mask, mask) == mask_auprc(mask, mask) == mask_iou(mask, mask) == 1.0
        assert mask_auprc(prior, mask) < 1.0 and mask_iou(prior, mask) < 1.0


def test_the_centre_prior_is_symmetric_and_falls_from_the_centre():
    prior = centre_prior(5, 7)
    assert prior[2, 3] == prior.max() == 1.0
    torch.testing.assert_close(prior, prior.flip(0).flip(1))
    assert bool((prior[2, 3:].diff() < 0).all()) and bool((prior[2:, 3].diff() < 0).all())
    torch.testing.assert_close(prior, prior[:, 3:4] @ prior[2:3])  # a product of two bumps
    with pytest.raises(InputError, match="0 x 3"):
        centre_prior(0, 3)


def test_errors():
    heat = torch.ones(2, 2)
    for pure in (pointing_game, mask_auprc, mask_iou):
        with pytest.raises(InputError, match="empty"):
            pure(heat, torch.zeros(2, 2))
        with pytest.raises(InputError, match=r"heat \(2, 2\) and mask \(2, 3\)"):
            pure(heat, torch.ones(2, 3))
        with pytest.raises(InputError, match="not finite"):
            pure(heat.masked_fill(heat > 0, float("nan")), torch.eye(2))
    with pytest.raises(InputError, match="tolerance is -1"):
        pointing_game(heat, torch.eye(2), tolerance=-1)
    with pytest.raises(InputError, match="undefined"):
        mask_auprc(heat, heat)
