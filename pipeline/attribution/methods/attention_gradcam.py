"""Grad-CAM on the attention of the last block (Selvaraju et al. 2017, as in Chefer et al. 2021; METHODS 5.3)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from calig.pipeline.attribution.methods.base import AttributionMethod

if TYPE_CHECKING:
    from calig.pipeline.attribution.model import ExplainableModel, Inputs
    from calig.pipeline.attribution.objective import Objective
    from calig.pipeline.attribution.result import Attribution


class AttentionGradCAM(AttributionMethod):
    """The last block's heads, each weighted by the mean gradient of its map: class-specific, never negative."""

    name = "attention_gradcam"
    summary = "the last block's attention, heads weighted by their mean gradient"
    source = "Selvaraju et al. 2017, Chefer et al. 2021"
    needs_attention = True
    signed = False

    def attribute(self, model: ExplainableModel, inputs: Inputs, objective: Objective) -> Attribution:
        """See `AttributionMethod.attribute`."""
        from calig.pipeline.attribution import inside, rollout
        from calig.pipeline.attribution.build import build_attribution

        matrices, readout = inside.attention_matrices(model, inputs, objective, rollout.gradcam)
        ends = inside.find_ends(model, inputs, objective, self.options.baseline, [0])
        scores = rollout.read_row(matrices[-1], readout)
        return build_attribution(self, inputs, objective, ends.output_change, scores)
