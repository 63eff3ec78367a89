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
    source = "Shrikumar et al. 2016; METHODS 5.1"

    def attribute(self, model: ExplainableModel, inputs: Inputs, objective: Objective) -> Attribution:
        """See `AttributionMethod.attribute`."""
        import torch

        from calig.pipeline.attribution import inside
        from calig.pipeline.attribution.build import build_attribution
        from calig.pipeline.attribution.path import LayerPath

        ends = inside.find_ends(model, inputs, objective, self.options.baseline, [0])
        embedded = ends.end[0]
        assert embedded is not None
        line = LayerPath(model, inputs, objective, torch.zeros_like(embedded), embedded, start=0, layers=[0])
        here = line.evaluate(torch.arange(len(inputs)), torch.ones(len(inputs), dtype=torch.float64))
        scores = (embedded * here.gradients[:, 0]).sum(dim=-1)
        return build_attribution(self, inputs, objective, ends.output_change, scores)
