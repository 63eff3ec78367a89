"""Input times gradient at the embedding output (METHODS 5.1)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from calig.pipeline.attribution.methods.base import AttributionMethod

if TYPE_CHECKING:
    from calig.pipeline.attribution.model import ExplainableModel, Inputs
    from calig.pipeline.attribution.objective import Objective
    from calig.pipeline.attribution.result import Attribution


class InputXGradient(AttributionMethod):
    """The embedding output times the gradient of the objective at the input: one backward pass, no baseline.

    The baseline option only says what `output_change` is measured against.
    """

    name = "input_x_gradient"
    summary = "the input's embeddings times the gradient at the input"
    source = "Shrikumar et al. 2016"

    def attribute(self, model: ExplainableModel, inputs: Inputs, objective: Objective) -> Attribution:
        """See `AttributionMethod.attribute`."""
        from calig.pipeline.attribution import inside
        from calig.pipeline.attribution.build import build_attribution

        gradient = inside.input_gradient(model, inputs, objective, 0)
        ends = inside.find_ends(model, inputs, objective, self.options.baseline, [0])
        embedded = ends.end[0]
        assert embedded is not None
        return build_attribution(self, inputs, objective, ends.output_change, (embedded * gradient).sum(dim=-1))
