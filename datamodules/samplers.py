"""Which rows a process reads, and in which order: a function of (seed, epoch, processes) and nothing else."""

from __future__ import annotations

from collections.abc import Iterator, Sized
from typing import Any

import torch
from torch.utils.data import DistributedSampler

# Lightning puts a sampler of its own into a loader unless it finds a DistributedSampler there.


class EpochSampler(DistributedSampler[int]):
    """A shuffled order that depends on (seed, epoch) alone, so that a resumed run meets the same order.

    Process r of W takes the places r, r + W, ... of the order, so the rows of a step do not depend on W. A few rows
    are repeated where the processes would take different numbers of steps. Lightning calls ``set_epoch`` before every
    epoch.

    Args:
        dataset: What the indices are for.
        seed: Of the order.
        rank: This process.
        processes: How many there are.
        epoch: Of the first pass. Loader processes read ahead before ``set_epoch`` is called.
        start: Rows of this process that the first pass leaves out without loading them: they were trained on.
        tell_epoch: Give (epoch, row) in place of the row: a data set in a loader process cannot know the epoch.
    """

    def __init__(
        self,
        dataset: Any,
        seed: int,
        *,
        rank: int = 0,
        processes: int = 1,
        epoch: int = 0,
        start: int = 0,
        tell_epoch: bool = False,
    ) -> None:
        super().__init__(dataset, num_replicas=processes, rank=rank, shuffle=True, seed=seed)
        self.epoch = epoch
        self.start = start
        self.tell_epoch = tell_epoch

    def set_epoch(self, epoch: int) -> None:
        """Choose the order of the next pass."""
        if epoch != self.epoch:
            self.start = 0
        super().set_epoch(epoch)

    def __iter__(self) -> Iterator[Any]:
        generator = torch.Generator().manual_seed(1_000_003 * self.seed + self.epoch)
        order = torch.randperm(len(self.dataset), generator=generator).tolist()  # type: ignore[arg-type]
        while 0 < len(order) < self.total_size:
            order += order[: self.total_size - len(order)]
        mine = order[self.rank :: self.num_replicas][self.start :]
        yield from ((self.epoch, row) for row in mine) if self.tell_epoch else mine


class ExactShare(DistributedSampler[int]):
    """Every n-th row, none repeated to even out the processes: shares may differ by one row, and be empty.

    Args:
        dataset: What the indices are for.
        rank: This process.
        processes: How many there are.
    """

    def __init__(self, dataset: Sized, *, rank: int, processes: int) -> None:
        super().__init__(dataset, num_replicas=processes, rank=rank, shuffle=False)  # type: ignore[arg-type]
        self.num_samples = len(range(rank, len(dataset), processes))

    def __iter__(self) -> Iterator[int]:
        yield from range(self.rank, len(self.dataset), self.num_replicas)  # type: ignore[arg-type]


class ExactSampler(ExactShare):
    """Evaluation: every row once, and no process without a row.

    Torch's own sampler repeats rows to even out the processes, and accuracy then counts them twice. Where there are
    fewer rows than processes, every process takes all of them: DDP waits for a process without a batch, and a mean over
    equal shares is the same mean.

    Args:
        dataset: What the indices are for.
        rank: This process.
        processes: How many there are.
    """

    def __init__(self, dataset: Sized, *, rank: int, processes: int) -> None:
        alone = len(dataset) < processes
        super().__init__(dataset, rank=0 if alone else rank, processes=1 if alone else processes)
