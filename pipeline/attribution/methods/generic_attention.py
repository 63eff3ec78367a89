"""Generic attention explainability (Chefer, Gur, Wolf, ICCV 2021; METHODS 5.4)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from calig.pipeline.attribution.methods.base import AttributionMethod

if TYPE_CHECKING:
    from calig.pipeline.attribution.model import ExplainableModel, Inputs
    from calig.pipeline.attribution.objective import Objective
    from calig.pipeline.attribution.result import Attribution


class GenericAttention(AttributionMethod):
    """Positive attention-times-gradient, rolled out over the blocks: class-specific, never negative."""

    name = "generic_attention"
    summary = "positive attention times gradient, rolled out over the blocks"
    source = "Chefer et al. 2021"
    needs_attention = True
    signed = False

    def attribute(self, model: ExplainableModel, inputs: Inputs, objective: Objective) -> Attribution:
        """See `AttributionMethod.attribute`."""
        from calig.pipeline.attribution import inside, rollout
        from calig.pipeline.attribution.build import build_attribution

        factors, readout = inside.attention_matrices(model, inputs, objective, rollout.positive_attention_gradient)
        ends = inside.find_ends(model, inputs, objective, self.options.baseline, [0])
        layers = rollout.rollout(factors, readout)
        return build_attribution(self, inputs, objective, ends.output_change, layers[:, -1], layer_scores=layers)
