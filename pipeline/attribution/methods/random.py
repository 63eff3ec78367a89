"""A random ranking: the control beside every method (METHODS 5.6)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from calig.pipeline.attribution.methods.base import AttributionMethod, BaselineOptions

if TYPE_CHECKING:
    from calig.pipeline.attribution.model import ExplainableModel, Inputs
    from calig.pipeline.attribution.objective import Objective
    from calig.pipeline.attribution.result import Attribution


@dataclass(frozen=True)
class RandomOptions(BaselineOptions):
    """Options of `random`."""

    seed: int = 0
    """Seed of the ranking."""


class Random(AttributionMethod):
    """Uniform scores in [-1, 1), drawn from the seed and the example's own tokens.

    So they are the same in every batch, on every process and at every amount of padding, and touch no global state.
    """

    name = "random"
    summary = "a seeded random ranking: the control for every metric"
    source = "the control"
    Options = RandomOptions

    def attribute(self, model: ExplainableModel, inputs: Inputs, objective: Objective) -> Attribution:
        """See `AttributionMethod.attribute`."""
        import torch

        from calig.pipeline.attribution import inside
        from calig.pipeline.attribution.build import build_attribution

        ends = inside.find_ends(model, inputs, objective, self.options.baseline, [0])
        mask = inputs.mask.cpu()
        scores = torch.zeros(mask.shape)
        for row in range(len(inputs)):
            generator = torch.Generator().manual_seed(inputs.seed_of(row, self.options.seed))
            scores[row, mask[row]] = 2 * torch.rand(int(mask[row].sum()), generator=generator) - 1
        return build_attribution(self, inputs, objective, ends.output_change, scores.to(model.device))
