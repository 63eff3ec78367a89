"""The metrics as thin `torchmetrics` classes: right on any number of processes, also with repeated samples.

States are 1-D float32 (PLATFORM, Distributed): the value, and the id as `id // 2**20` and `id % 2**20`, both exact.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from calig.pipeline.errors import InputError
from calig.pipeline.metrics import faithfulness, plausibility
from calig.pipeline.metrics.rows import MetricError
from calig.pipeline.metrics.statistics import Summary, summary_of, unique_by_id

_BASE = 2**20
SampleIds = Tensor | Sequence[int]


class SampleMetric(Metric):
    """Mean over unique samples of a value per sample; subclasses say what the value is.

    `compute()` sorts by id, keeps the first value of each id and averages; it returns NaN if every sample was skipped.
    """

    is_differentiable = False
    full_state_update = False

    values: list[Tensor]
    id_high: list[Tensor]
    id_low: list[Tensor]

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        for state in ("values", "id_high", "id_low"):
            self.add_state(state, default=[], dist_reduce_fx="cat")

    def compute(self) -> Tensor:
        """Average over unique samples.

        Raises:
            MetricError: A sample occurs twice with values that differ by more than 1e-4.
        """
        values = self._unique()
        return values[~values.isnan()].mean().to(self.device, torch.float32)

    def compute_interval(self, *, seed: int = 0, resamples: int = 1000, level: float = 0.95) -> Summary:
        """Compute mean, bootstrap interval and the numbers of unique samples used and skipped, over all processes.

        Every process must call it.
        """
        with self.sync_context(
            dist_sync_fn=self.dist_sync_fn, process_group=self.process_group, should_sync=self.sync_on_compute
        ):
            return summary_of(self._unique(), seed=seed, resamples=resamples, level=level)

    def _record(self, values: Tensor | Iterable[float | None], sample_id: SampleIds) -> None:
        """Append (B,) values, None for skipped samples; a value that is not finite raises."""
        if isinstance(values, Tensor):
            values = values.tolist()
        ids = torch.as_tensor(sample_id, dtype=torch.long, device="cpu").reshape(-1)
        kept = list(values)
        if len(kept) != len(ids) or bool((ids.abs() >= 2**44).any()):
            raise InputError(f"{len(kept)} values came with {len(ids)} sample ids; ids must be below 2**44.")
        for value, i in zip(kept, ids.tolist(), strict=True):
            if value is not None and not abs(value) < float("inf"):
                raise MetricError(f"{type(self).__name__} is {value}", sample_id=i)
        numbers = [float("nan") if value is None else value for value in kept]
        self.values.append(torch.tensor(numbers, dtype=torch.float32, device=self.device))
        self.id_high.append((ids // _BASE).to(self.device, torch.float32))
        self.id_low.append((ids % _BASE).to(self.device, torch.float32))

    def _unique(self) -> Tensor:
        values, high, low = (_cat(state).double() for state in (self.values, self.id_high, self.id_low))
        return unique_by_id((high * _BASE + low).long(), values)[1]


class Comprehensiveness(SampleMetric):
    """Mean comprehensiveness, see `faithfulness.comprehensiveness`; higher is better.

    Example:
        >>> metric = Comprehensiveness()
        >>> full, removed = torch.tensor([0.9, 0.5]), torch.tensor([[0.8, 0.4], [0.5, 0.5]])
        >>> metric.update(full, removed, sample_id=[0, 1])
        >>> metric.update(full[:1], removed[:1], sample_id=[0])  # a distributed sampler repeats samples
        >>> metric.compute()
        tensor(0.1500)
    """

    higher_is_better = True

    def update(self, full: Tensor, removed: Tensor, sample_id: SampleIds) -> None:
        """Add examples: (B,) p(x), (B, K) p(x without the top k(q)), B ids."""
        self._record(faithfulness.comprehensiveness(full, removed), sample_id)


class Sufficiency(SampleMetric):
    """Mean sufficiency, see `faithfulness.sufficiency`; lower is better.

    Example:
        >>> metric = Sufficiency()
        >>> metric.update(torch.tensor([0.9]), torch.tensor([[0.5, 0.9]]), sample_id=[0])
        >>> metric.compute()
        tensor(0.2000)
    """

    higher_is_better = False

    def update(self, full: Tensor, kept: Tensor, sample_id: SampleIds) -> None:
        """Add examples: (B,) p(x), (B, K) p(the top k(q) only), B ids."""
        self._record(faithfulness.sufficiency(full, kept), sample_id)


class LogOdds(SampleMetric):
    """Mean log-odds, see `faithfulness.log_odds`; more negative is better.

    Example:
        >>> metric = LogOdds()
        >>> metric.update(torch.tensor([-0.5]), torch.tensor([[-1.0, -2.0]]), sample_id=[0])
        >>> metric.compute()
        tensor(-1.)
    """

    higher_is_better = False

    def update(self, full: Tensor, removed: Tensor, sample_id: SampleIds) -> None:
        """Add examples: (B,) log p(x), (B, K) log p(x without the top k(q)), B ids."""
        self._record(faithfulness.log_odds(full, removed), sample_id)


class TokenF1(SampleMetric):
    """Mean token-F1 with oracle k, see `plausibility.token_f1`; higher is better. Empty rationales are skipped.

    Example:
        >>> metric = TokenF1()
        >>> scores, rationales = [torch.tensor([0.9, 0.1, 0.5]), torch.tensor([0.3])], [[1, 1, 0], [0]]
        >>> metric.update(scores, [torch.tensor(r) for r in rationales], sample_id=[0, 1])
        >>> metric.compute(), metric.compute_interval().n_skipped
        (tensor(0.5000), 1)
    """

    higher_is_better = True

    def update(
        self,
        scores: Sequence[Tensor],
        rationale: Sequence[Tensor],
        sample_id: SampleIds,
        missed: Sequence[int] | None = None,
    ) -> None:
        """Add examples: B (V,) word scores, B (V,) rationales, B ids, B numbers of words that truncation cut off."""
        missed = [0] * len(scores) if missed is None else missed
        self._record(
            [
                plausibility.token_f1(values, gold, missed=cut) if bool((gold != 0).any()) or cut else None
                for values, gold, cut in zip(_finite(scores, sample_id), rationale, missed, strict=True)
            ],
            sample_id,
        )


class AUPRC(SampleMetric):
    """Mean average precision per example, see `plausibility.average_precision`; higher is better.

    Examples whose words are all of one class are skipped.

    Example:
        >>> metric = AUPRC()
        >>> metric.update([torch.tensor([0.9, 0.1, 0.5, 0.2])], [torch.tensor([1, 1, 0, 0])], sample_id=[0])
        >>> metric.compute()
        tensor(0.7500)
    """

    higher_is_better = True

    def update(self, scores: Sequence[Tensor], rationale: Sequence[Tensor], sample_id: SampleIds) -> None:
        """Add examples: B (V,) word scores, B (V,) rationales, B ids."""
        self._record(
            [
                plausibility.average_precision(values, gold) if len((gold != 0).unique()) == 2 else None
                for values, gold in zip(_finite(scores, sample_id), rationale, strict=True)
            ],
            sample_id,
        )


def _finite(scores: Sequence[Tensor], sample_id: SampleIds) -> Iterable[Tensor]:
    for values, i in zip(scores, torch.as_tensor(sample_id).reshape(-1).tolist(), strict=True):
        if not bool(values.isfinite().all()):
            raise MetricError("a word's score is not finite", sample_id=int(i))
        yield values


def _cat(state: list[Tensor] | Tensor) -> Tensor:
    """Join a state: a list before the processes are joined, one tensor after."""
    if isinstance(state, Tensor):
        return state.cpu().reshape(-1)
    return torch.cat([torch.empty(0), *(part.cpu() for part in state)])
