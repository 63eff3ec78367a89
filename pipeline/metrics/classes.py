"""The faithfulness metrics as thin `torchmetrics` classes (METRICS 2). Shapes: B examples, K bins, T positions."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from calig.pipeline.metrics import curves, draws, faithfulness
from calig.pipeline.metrics.dynamics_classes import RankCorrelation
from calig.pipeline.metrics.sample_metric import SampleIds, SampleMetric, SampleStates
from calig.pipeline.metrics.sensitivity import sensitivity_max


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


class DeletionAUC(SampleMetric):
    """Mean deletion AUC, see `curves.deletion_auc`; lower is better.

    Example:
        >>> metric = DeletionAUC()
        >>> metric.update(torch.linspace(1, 0, 11)[None], sample_id=[0])
        >>> metric.compute()
        tensor(0.5000)
    """

    higher_is_better = False

    def update(self, removed: Tensor, sample_id: SampleIds) -> None:
        """Add examples: (B, 11) p(x without the top k(q)), B ids."""
        self._record(curves.deletion_auc(removed), sample_id)


class InsertionAUC(SampleMetric):
    """Mean insertion AUC, see `curves.insertion_auc`; higher is better.

    Example:
        >>> metric = InsertionAUC()
        >>> metric.update(torch.linspace(0, 1, 11)[None], sample_id=[0])
        >>> metric.compute()
        tensor(0.5000)
    """

    higher_is_better = True

    def update(self, kept: Tensor, sample_id: SampleIds) -> None:
        """Add examples: (B, 11) p(the top k(q) only), B ids."""
        self._record(curves.insertion_auc(kept), sample_id)


class PositiveAUC(SampleMetric):
    """Area under the accuracy while the most relevant positions go, see `curves.perturbation_auc`; lower is better.

    Example:
        >>> metric = PositiveAUC()
        >>> metric.update(torch.tensor([[1] * 5 + [0] * 5, [1] * 10]), sample_id=[0, 1])
        >>> metric.compute()
        tensor(67.5000)
    """

    higher_is_better = False

    def update(self, correct: Tensor, sample_id: SampleIds) -> None:
        """Add examples: (B, 10) 1 where the prediction is right without the top k(q), else 0; B ids."""
        self._record(curves.perturbation_auc(correct.double()), sample_id)


class NegativeAUC(SampleMetric):
    """Area under the accuracy while the least relevant positions go, see `curves.perturbation_auc`; higher is better.

    Example:
        >>> metric = NegativeAUC()
        >>> metric.update(torch.ones(1, 10), sample_id=[0])
        >>> metric.compute()
        tensor(90.)
    """

    higher_is_better = True

    def update(self, correct: Tensor, sample_id: SampleIds) -> None:
        """Add examples: (B, 10) 1 where the prediction is right without the bottom k(q), else 0; B ids."""
        self._record(curves.perturbation_auc(correct.double()), sample_id)


class Infidelity(SampleMetric):
    """Mean infidelity, see `draws.infidelity`; lower is better.

    Example:
        >>> metric = Infidelity()
        >>> removed = torch.tensor([[True, False], [True, True]])
        >>> metric.update([removed], [torch.tensor([1.0, 2.0])], [torch.tensor([2.0, 6.0])], sample_id=[0])
        >>> metric.compute()
        tensor(0.)
    """

    higher_is_better = False

    def update(
        self, removed: Sequence[Tensor], scores: Sequence[Tensor], drops: Sequence[Tensor], sample_id: SampleIds
    ) -> None:
        """Add examples: B (D, N) what each of D draws removes, B (N,) scores, B (D,) drops of the logit, B ids."""
        examples = zip(removed, scores, drops, strict=True)
        self._record([float(draws.infidelity(*example)) for example in examples], sample_id)


class SensitivityMax(SampleMetric):
    """Mean of the largest relative change of the scores under noise (Yeh et al. 2019); lower is better.

    Examples whose scores are all 0 are skipped.

    Example:
        >>> metric = SensitivityMax()
        >>> scores, perturbed = torch.tensor([[3.0, 4.0]]), torch.tensor([[[3.0, 4.5], [3.0, 3.0]]])
        >>> metric.update(scores, perturbed, torch.ones(1, 2).bool(), sample_id=[0])
        >>> metric.compute()
        tensor(0.2000)
    """

    higher_is_better = False

    def update(self, scores: Tensor, perturbed: Tensor, mask: Tensor, sample_id: SampleIds) -> None:
        """Add examples: (B, T) scores, (B, R, T) those under R draws of noise, (B, T) real positions, B ids."""
        found = sensitivity_max(scores, perturbed, mask).tolist()
        silent = torch.where(mask.bool(), scores, 0.0).eq(0).all(dim=1).tolist()
        self._record([None if skipped else value for value, skipped in zip(found, silent, strict=True)], sample_id)


class CompletenessGap(SampleMetric):
    """Mean over examples of the largest completeness gap over layers (METHODS 1.1); lower is better.

    Example:
        >>> metric = CompletenessGap()
        >>> metric.update(torch.tensor([[0.01, 0.03], [0.05, 0.02]]), sample_id=[0, 1])
        >>> metric.compute()
        tensor(0.0400)
    """

    higher_is_better = False

    def update(self, gap: Tensor, sample_id: SampleIds) -> None:
        """Add examples: (B, L+1) gaps at every layer (`Attribution.completeness_gap`), B ids."""
        self._record(gap.amax(1), sample_id)


class CompletenessGapMax(SampleStates):
    """The worst example's largest completeness gap over layers; lower is better. NaN before any example.

    A maximum has no bootstrap interval worth its name, so there is none.

    Example:
        >>> metric = CompletenessGapMax()
        >>> metric.update(torch.tensor([[0.01, 0.03], [0.05, 0.02]]), sample_id=[0, 1])
        >>> metric.compute()
        tensor(0.0500)
    """

    higher_is_better = False

    def update(self, gap: Tensor, sample_id: SampleIds) -> None:
        """Add examples: (B, L+1) gaps at every layer, B ids."""
        self._record(gap.amax(1), sample_id)

    def compute(self) -> Tensor:
        """Return the largest value."""
        values = self._defined().flatten().tolist()
        return torch.tensor(max(values, default=float("nan")), dtype=torch.float32, device=self.device)


class Randomisation(RankCorrelation):
    """Mean Spearman correlation of scores before and after weights are randomised (Adebayo et al. 2018).

    Nearer 0 is better: scores that stay, or turn around, do not depend on what the model has learnt. Examples with
    fewer than two evaluable positions, or with equal scores only, are skipped.

    Example:
        >>> metric = Randomisation()
        >>> metric.update(torch.tensor([[1.0, 2.0]]), torch.tensor([[2.0, 1.0]]), torch.ones(1, 2).bool(), [0])
        >>> metric.compute()
        tensor(-1.)
    """

    higher_is_better = None

    def update(self, before: Tensor, after: Tensor, evaluable: Tensor, sample_id: SampleIds) -> None:
        """Add examples: (B, T) scores, (B, T) scores of the randomised model, (B, T) bool, B ids."""
        self._correlate(before, after, evaluable, sample_id)
