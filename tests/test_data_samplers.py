"""Who reads which rows: shuffled by (seed, epoch), shared out, continued in the middle, evaluated once each."""

from collections import Counter

import pytest
import torch
from torch.utils.data import DataLoader

from calig.datamodules.samplers import EpochSampler, ExactSampler


def passes(count, processes, **arguments):
    return [
        list(EpochSampler(range(count), 5, rank=rank, processes=processes, **arguments)) for rank in range(processes)
    ]


@pytest.mark.parametrize("count", [1, 2, 7, 24])
@pytest.mark.parametrize("processes", [1, 2, 3, 5])
def test_every_process_takes_as_many_steps_and_together_they_read_all(count, processes):
    shares = passes(count, processes)
    assert len({len(share) for share in shares}) == 1
    assert set().union(*shares) == set(range(count))
    assert sum(map(len, shares)) - count < processes
    assert all(len(EpochSampler(range(count), 5, processes=processes)) == len(share) for share in shares)


def test_the_rows_of_a_step_do_not_depend_on_the_number_of_processes():
    (one,) = passes(24, 1)
    two = passes(24, 2)
    for step in range(6):
        assert set(one[4 * step : 4 * step + 4]) == {row for share in two for row in share[2 * step : 2 * step + 2]}


def test_the_order_is_that_of_seed_and_epoch():
    sampler = EpochSampler(range(50), 5)
    first = list(sampler)
    assert first == list(sampler) != list(EpochSampler(range(50), 6))
    sampler.set_epoch(1)
    assert list(sampler) != first
    assert list(sampler) == list(EpochSampler(range(50), 5, epoch=1))
    generator = torch.Generator().manual_seed(1_000_003 * 5)
    assert first == torch.randperm(50, generator=generator).tolist()


@pytest.mark.parametrize("workers", [0, 1])
def test_a_pass_starts_where_it_is_told_and_the_next_from_the_front(workers):
    whole = EpochSampler(range(20), 5, epoch=2)
    expected = [batch.tolist() for batch in DataLoader(range(20), 4, sampler=whole)]
    sampler = EpochSampler(range(20), 5, epoch=2, start=8)
    loader = DataLoader(range(20), 4, sampler=sampler, num_workers=workers, persistent_workers=workers > 0)
    assert len(loader) == 5  # the length of an epoch is that of a whole one
    batches = iter(loader)  # loader processes read ahead from here on
    sampler.set_epoch(2)
    assert [batch.tolist() for batch in batches] == expected[2:]
    sampler.set_epoch(3)
    whole.set_epoch(3)
    assert [batch.tolist() for batch in loader] == [batch.tolist() for batch in DataLoader(range(20), 4, sampler=whole)]


@pytest.mark.parametrize(("count", "processes"), [(7, 1), (7, 2), (8, 2), (7, 3), (3, 3)])
def test_evaluation_reads_every_row_once(count, processes):
    samplers = [ExactSampler(range(count), rank=rank, processes=processes) for rank in range(processes)]
    assert Counter(row for sampler in samplers for row in sampler) == dict.fromkeys(range(count), 1)
    assert [len(sampler) for sampler in samplers] == [len(list(sampler)) for sampler in samplers]
    assert min(map(len, samplers)) >= 1


def test_with_fewer_rows_than_processes_each_reads_all():
    for rank in range(3):
        sampler = ExactSampler(range(2), rank=rank, processes=3)
        assert list(sampler) == [0, 1] and len(sampler) == 2
