"""What the `torchmetrics` classes share: states per sample, right on any number of processes with repeated samples.

States are 1-D float32 (PLATFORM, Distributed): the C values of each sample, and the id as `id // 2**20` and
`id % 2**20`, both exact. Shapes: B examples, C values per sample, U unique samples.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from calig.pipeline.errors import InputError
from calig.pipeline.metrics.rows import MetricError
from calig.pipeline.metrics.statistics import Summary, first_mean, summary_of, unique_by_id

_BASE = 2**20
SampleIds = Tensor | Sequence[int]


class SampleStates(Metric):
    """Keeps C values per sample and gives back those of unique samples; subclasses say what they are."""

    is_differentiable = False
    full_state_update = False

    columns: int = 1
    """C."""

    values: list[Tensor]
    id_high: list[Tensor]
    id_low: list[Tensor]

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        for state in ("values", "id_high", "id_low"):
            self.add_state(state, default=[], dist_reduce_fx="cat")

    def _record(self, values: Tensor | Iterable[float | Sequence[float] | None], sample_id: SampleIds) -> None:
        """Append B values (C each), None for skipped samples; a value that is not finite raises."""
        given = values.tolist() if isinstance(values, Tensor) else list(values)
        ids = torch.as_tensor(sample_id, dtype=torch.long, device="cpu").reshape(-1)
        if len(given) != len(ids) or bool((ids.abs() >= 2**44).any()):
            raise InputError(f"{len(given)} values came with {len(ids)} sample ids; ids must be below 2**44.")
        numbers: list[float] = []
        for value, i in zip(given, ids.tolist(), strict=True):
            of_sample = [float("nan")] * self.columns if value is None else torch.tensor(value).reshape(-1).tolist()
            for number in of_sample:
                if value is not None and not abs(number) < float("inf"):
                    raise MetricError(f"{type(self).__name__} is {number}", sample_id=i)
            numbers += of_sample
        self.values.append(torch.tensor(numbers, dtype=torch.float32, device=self.device))
        self.id_high.append((ids // _BASE).to(self.device, torch.float32))
        self.id_low.append((ids % _BASE).to(self.device, torch.float32))

    def _unique(self) -> Tensor:
        """Return (U, C) float64 values, NaN for skipped samples."""
        values, high, low = (_cat(state).double() for state in (self.values, self.id_high, self.id_low))
        return unique_by_id((high * _BASE + low).long(), values.reshape(-1, self.columns))[1]

    def _defined(self) -> Tensor:
        """Return the (U', C) values of the samples that were not skipped."""
        values = self._unique()
        return values[~values.isnan().any(1)]

    def _unique_of_all(self) -> Tensor:
        """Return `_unique` over all processes; every process must call it."""
        with self.sync_context(
            dist_sync_fn=self.dist_sync_fn, process_group=self.process_group, should_sync=self.sync_on_compute
        ):
            return self._unique()


class SampleMetric(SampleStates):
    """Mean over unique samples of a value per sample; subclasses say what the value is.

    `compute()` sorts by id, keeps the first value of each id and averages; it returns NaN if every sample was skipped.
    """

    def compute(self) -> Tensor:
        """Average over unique samples.

        Raises:
            MetricError: A sample occurs twice with values that differ by more than 1e-4.
        """
        return self._of_means(self._defined().mean(0)).to(self.device, torch.float32)

    def compute_interval(self, *, seed: int = 0, resamples: int = 1000, level: float = 0.95) -> Summary:
        """Compute mean, bootstrap interval and the numbers of unique samples used and skipped, over all processes.

        Every process must call it.
        """
        return summary_of(self._unique_of_all(), self._of_means, seed=seed, resamples=resamples, level=level)

    def _of_means(self, means: Tensor) -> Tensor:
        """Turn (..., C) means into (...) the metric."""
        return first_mean(means)


def finite_items(scores: Sequence[Tensor], sample_id: SampleIds, what: str = "a word's score") -> Iterable[Tensor]:
    """Yield what belongs to each sample.

    Raises:
        MetricError: A value is not finite; names the sample.
    """
    for values, i in zip(scores, torch.as_tensor(sample_id).reshape(-1).tolist(), strict=True):
        if not bool(values.isfinite().all()):
            raise MetricError(f"{what} is not finite", sample_id=int(i))
        yield values


def _cat(state: list[Tensor] | Tensor) -> Tensor:
    """Join a state: a list before the processes are joined, one tensor after."""
    if isinstance(state, Tensor):
        return state.cpu().reshape(-1)
    return torch.cat([torch.empty(0), *(part.cpu() for part in state)])
