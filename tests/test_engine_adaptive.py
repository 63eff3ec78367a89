"""Error control (METHODS 1.3): what `steps="auto"` promises, on a model that is rough enough to need it."""

import pytest
import torch
from conftest import make_batch, make_bert

from calig.pipeline.attribution import attribute

LENGTHS = (9, 6, 8, 7, 5)


@pytest.fixture(scope="module")
def rough():
    return make_bert(spread=0.5, layers=4)


def test_auto_reaches_its_tolerance_and_says_how(rough):
    batch = make_batch(LENGTHS)
    coarse = attribute(rough, batch, target=0, steps=9)
    assert (coarse.error_bound.amax(1) > 0.02).any(), "the model must be rough for this test to mean anything"
    fine = attribute(rough, batch, target=0, steps="auto", tolerance=0.02, max_steps=2000)
    assert fine.converged.all()
    assert (fine.error_bound.amax(1) <= 0.02).all()
    assert (fine.completeness_gap <= fine.error_bound * 1.001 + 1e-4).all()
    assert (fine.steps_used >= 9).all() and (fine.steps_used > 9).any()


def test_the_bound_bounds_the_gap_at_any_number_of_nodes(rough):
    for steps in (2, 5, 9, 33):
        result = attribute(rough, make_batch(LENGTHS), target=0, steps=steps)
        assert (result.completeness_gap <= result.error_bound * 1.001 + 1e-4).all()
        assert (result.steps_used == steps).all()


def test_giving_up_is_flagged(rough):
    result = attribute(rough, make_batch(LENGTHS), target=0, steps="auto", tolerance=1e-6, max_steps=12)
    assert not result.converged.any()
    assert (result.steps_used <= 12).all()
    assert (result.error_bound.amax(1) > 1e-6).all()


def test_refinement_of_an_example_does_not_depend_on_the_others(rough):
    batch = make_batch(LENGTHS)
    together = attribute(rough, batch, target=0, steps="auto")
    for row, length in enumerate(LENGTHS):
        one = {key: value[row : row + 1, :length] for key, value in batch.items()}
        alone = attribute(rough, one, target=0, steps="auto")
        assert alone.steps_used[0] == together.steps_used[row]
        assert torch.allclose(alone.parts["evidence"][0], together.parts["evidence"][row, :, :length], atol=1e-4)


def test_the_worst_example_is_better_off_than_with_as_many_uniform_nodes(rough):
    batch = make_batch(LENGTHS)
    auto = attribute(rough, batch, target=0, steps="auto", tolerance=0.02, max_steps=600)
    nodes = int(auto.steps_used.float().mean())
    uniform = attribute(rough, batch, target=0, steps=nodes)
    assert auto.completeness_gap.max() < uniform.completeness_gap.max()


def test_gauss_legendre_nodes_are_exact_for_polynomials():
    from calig.pipeline.attribution.quadrature import _nodes

    for count in (2, 5, 10, 33):
        positions, weights = _nodes("gauss-legendre", count)
        assert abs(float(weights.sum()) - 1) < 1e-12
        for power in range(2 * count):
            assert abs(float((weights * positions**power).sum()) - 1 / (power + 1)) < 1e-12
