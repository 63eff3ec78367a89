"""Integrated gradients at one given layer (Captum's `LayerIntegratedGradients`; METHODS 1.1, 5.1)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from calig.pipeline.attribution.methods.base import AttributionMethod, PathOptions
from calig.pipeline.errors import InputError

if TYPE_CHECKING:
    from calig.pipeline.attribution.model import ExplainableModel, Inputs
    from calig.pipeline.attribution.objective import Objective
    from calig.pipeline.attribution.result import Attribution


@dataclass(frozen=True)
class LayerIntegratedGradientsOptions(PathOptions):
    """Options of `layer_integrated_gradients`."""

    layer: int = 1
    """The layer l: the output of block l, 0 being the embedding output; negative counts from the last block."""
    quadrature: Literal["gauss-legendre", "trapezoid", "riemann-middle"] = "gauss-legendre"
    """Rule at a fixed number of steps; `steps=auto` refines a trapezoid."""


class LayerIntegratedGradients(AttributionMethod):
    """Gradients integrated along the straight line between the states of baseline and input at one layer.

    Scores belong to positions at that layer. Behind the last block of a model that reads one position, all of it sits
    there.
    """

    name = "layer_integrated_gradients"
    summary = "gradients integrated along a straight line at one layer"
    source = "Sundararajan et al. 2017"
    Options = LayerIntegratedGradientsOptions

    def attribute(self, model: ExplainableModel, inputs: Inputs, objective: Objective) -> Attribution:
        """See `AttributionMethod.attribute`."""
        from calig.pipeline.attribution import inside
        from calig.pipeline.attribution.build import build_attribution

        options = self.options
        ends = inside.find_ends(model, inputs, objective, options.baseline, None)
        layer = options.layer if options.layer >= 0 else model.depth + 1 + options.layer
        if not 0 <= layer <= model.depth:
            raise InputError(
                f"layer {options.layer} is not there; the model has {model.depth} blocks (0 to {model.depth})."
            )
        integral = inside.layer_evidence(
            model,
            inputs,
            objective,
            ends,
            layers=[layer],
            path="straight",
            steps=options.steps,
            tolerance=options.tolerance,
            max_steps=options.max_steps,
            quadrature=options.quadrature,
        )
        return build_attribution(
            self, inputs, objective, ends.output_change, integral.evidence[:, 0], integral=integral
        )
