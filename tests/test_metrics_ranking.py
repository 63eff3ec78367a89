import math
import random
from fractions import Fraction

import pytest
import torch

from calig.pipeline.errors import InputError
from calig.pipeline.metrics import as_scores, count, random_rank, random_scores, rank, reverse
from calig.pipeline.metrics.curves import ACCURACY_GRID, GRID

BIN_TABLE = {  # N -> k(q) for q = 0, .01, .05, .1, .2, .5, 1; frozen
    1: [0, 1, 1, 1, 1, 1, 1],
    2: [0, 1, 1, 1, 1, 1, 2],
    3: [0, 1, 1, 1, 1, 2, 3],
    5: [0, 1, 1, 1, 1, 3, 5],
    8: [0, 1, 1, 1, 2, 4, 8],
    12: [0, 1, 1, 2, 3, 6, 12],
    100: [0, 1, 5, 10, 20, 50, 100],
}

GRID_TABLE = {  # N -> k(q) for q = 0, .1, ..., 1; frozen
    1: [0, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1],
    2: [0, 1, 1, 1, 1, 1, 2, 2, 2, 2, 2],
    3: [0, 1, 1, 1, 2, 2, 2, 3, 3, 3, 3],
    5: [0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5],
    8: [0, 1, 2, 3, 4, 4, 5, 6, 7, 8, 8],
    12: [0, 2, 3, 4, 5, 6, 8, 9, 10, 11, 12],
    100: [0, 10, 20, 30, 40, 50, 60, 70, 80, 90, 100],
}


@pytest.mark.parametrize("n", GRID_TABLE)
def test_grid_table(n):
    assert [count(q, n) for q in GRID] == GRID_TABLE[n]
    assert GRID[:-1] == ACCURACY_GRID and GRID == (0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1)


@pytest.mark.parametrize("n", BIN_TABLE)
def test_bin_table(n):
    assert [count(q, n) for q in (0, 0.01, 0.05, 0.1, 0.2, 0.5, 1)] == BIN_TABLE[n]


def test_count_is_the_exact_ceiling():
    for n in range(1, 130):
        for a in range(1, 1001):
            assert count(a / 1000, n) == max(1, math.ceil(Fraction(a, 1000) * n))
    assert count(0.5, 0) == 0


@pytest.mark.parametrize("q", [-0.1, 1.001, 0.0005, 1 / 3, float("nan"), float("inf")])
def test_count_refuses_other_shares(q):
    with pytest.raises(InputError, match=r"multiple of 0\.001"):
        count(q, 10)
    with pytest.raises(InputError, match="-1"):
        count(0.1, -1)


def test_rank_is_signed_and_breaks_ties_by_position():
    scores = torch.tensor([99.0, -1.0, 0.0, 3.0, -0.0, 3.0, 50.0])
    evaluable = torch.tensor([0, 1, 1, 1, 1, 1, 0], dtype=torch.bool)
    ranking = rank(scores, evaluable)
    assert ranking.tolist() == [3, 5, 2, 4, 1]
    assert ranking.dtype == torch.long
    assert reverse(ranking).tolist() == [1, 4, 2, 5, 3]


def test_rank_equals_a_python_sort():
    generator = torch.Generator().manual_seed(0)
    for _ in range(50):
        scores = torch.randint(-3, 4, (40,), generator=generator).float()
        evaluable = torch.rand(40, generator=generator) < 0.7
        positions = [i for i in range(40) if evaluable[i]]
        assert rank(scores, evaluable).tolist() == sorted(positions, key=lambda i: (-scores[i].item(), i))


def test_rank_of_nothing_and_of_the_wrong_shape():
    assert rank(torch.ones(3), torch.zeros(3, dtype=torch.bool)).tolist() == []
    with pytest.raises(InputError, match="one example at a time"):
        rank(torch.ones(1, 3), torch.ones(1, 3, dtype=torch.bool))


def test_random_rank_depends_on_seed_and_sample_alone():
    evaluable = torch.ones(20, dtype=torch.bool)
    once = random_rank(evaluable, seed=1, sample_id=5).tolist()
    torch.manual_seed(123)
    assert once == random_rank(evaluable, seed=1, sample_id=5).tolist()
    assert sorted(once) == list(range(20))
    assert once != random_rank(evaluable, seed=2, sample_id=5).tolist()
    assert once != random_rank(evaluable, seed=1, sample_id=6).tolist()
    padded = torch.cat([evaluable, torch.zeros(7, dtype=torch.bool)])
    assert once == random_rank(padded, seed=1, sample_id=5).tolist()
    shifted = torch.cat([torch.zeros(3, dtype=torch.bool), evaluable])
    assert [i + 3 for i in once] == random_rank(shifted, seed=1, sample_id=5).tolist()


def test_random_rank_is_frozen():
    # A control must not change with a library's version: published numbers stand beside it.
    assert random_rank(torch.ones(8, dtype=torch.bool), seed=0, sample_id=3).tolist() == [6, 5, 4, 7, 3, 1, 0, 2]


def test_random_rank_is_uniform():
    evaluable = torch.ones(4, dtype=torch.bool)
    firsts = torch.tensor([random_rank(evaluable, seed=0, sample_id=i)[0].item() for i in range(2000)])
    assert torch.bincount(firsts).min() > 420


def test_random_scores_rank_as_the_random_control_and_are_frozen():
    evaluable = torch.tensor([0, 1, 1, 1, 1, 0], dtype=torch.bool)
    ranking = random_rank(evaluable, seed=0, sample_id=3)
    scores = random_scores(ranking, 6, seed=0, sample_id=3)
    assert rank(scores, evaluable).tolist() == ranking.tolist()
    assert scores[~evaluable].tolist() == [0, 0] and scores.abs().max() < 1
    by_hand = random.Random("0/3/scores")
    assert scores[ranking].tolist() == pytest.approx(sorted((2 * by_hand.random() - 1 for _ in range(4)), reverse=True))
    assert random_scores(ranking[:0], 6, seed=0, sample_id=3).tolist() == [0] * 6


def test_scores_of_a_ranking_rank_as_it_does():
    evaluable = torch.rand(30, generator=torch.Generator().manual_seed(0)) < 0.6
    ranking = random_rank(evaluable, seed=1, sample_id=1)
    assert rank(as_scores(ranking, 30), evaluable).tolist() == ranking.tolist()
