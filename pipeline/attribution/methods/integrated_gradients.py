"""Integrated gradients at the embedding output (Sundararajan, Taly, Yan 2017; METHODS 1.1, 5.1)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from calig.pipeline.attribution.methods.base import AttributionMethod, PathOptions

if TYPE_CHECKING:
    from calig.pipeline.attribution.model import ExplainableModel, Inputs
    from calig.pipeline.attribution.objective import Objective
    from calig.pipeline.attribution.result import Attribution


@dataclass(frozen=True)
class IntegratedGradientsOptions(PathOptions):
    """Options of `integrated_gradients`."""

    quadrature: Literal["gauss-legendre", "trapezoid", "riemann-middle"] = "gauss-legendre"
    """Rule at a fixed number of steps; `steps=auto` refines a trapezoid."""


class IntegratedGradients(AttributionMethod):
    """Gradients integrated along the straight line from the baseline's embedding output to the input's."""

    name = "integrated_gradients"
    summary = "gradients integrated from a baseline to the input's embeddings"
    source = "Sundararajan et al. 2017"
    Options = IntegratedGradientsOptions

    def attribute(self, model: ExplainableModel, inputs: Inputs, objective: Objective) -> Attribution:
        """See `AttributionMethod.attribute`."""
        from calig.pipeline.attribution import inside
        from calig.pipeline.attribution.build import build_attribution

        options = self.options
        ends = inside.find_ends(model, inputs, objective, options.baseline, [0])
        integral = inside.layer_evidence(
            model,
            inputs,
            objective,
            ends,
            layers=[0],
            path="straight",
            steps=options.steps,
            tolerance=options.tolerance,
            max_steps=options.max_steps,
            quadrature=options.quadrature,
        )
        return build_attribution(
            self, inputs, objective, ends.output_change, integral.evidence[:, 0], integral=integral
        )
