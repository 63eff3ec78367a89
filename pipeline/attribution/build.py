"""Putting an `Attribution` together from what a method computed."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from calig.pipeline.attribution.model import Inputs
from calig.pipeline.attribution.objective import Objective
from calig.pipeline.attribution.quadrature import Integral, in_document, relative_gap
from calig.pipeline.attribution.result import Attribution

if TYPE_CHECKING:
    from calig.pipeline.attribution.methods.base import AttributionMethod


def build_attribution(
    method: AttributionMethod,
    inputs: Inputs,
    objective: Objective,
    output_change: Tensor,
    scores: Tensor,
    *,
    layer_scores: Tensor | None = None,
    integral: Integral | None = None,
    flow: Tensor | None = None,
    parts: dict[str, Tensor] | None = None,
) -> Attribution:
    """Assemble a result; padding is set to 0, and completeness is measured where a path was integrated.

    Args:
        method: The method, whose name and options are kept with the result.
        inputs: B examples.
        objective: What was explained.
        output_change: (B,) f(x) - f(x').
        scores: (B, T).
        layer_scores: (B, L, T) or None.
        integral: The integrated path, if there was one; its evidence is what completeness is claimed for.
        flow: (B, L, T, T) or None.
        parts: Method-specific tensors.
    """
    mask = inputs.mask
    size = len(inputs)
    gap = bound = None
    steps = torch.ones(size, dtype=torch.long)
    converged = torch.ones(size, dtype=torch.bool)
    if integral is not None:
        gap = relative_gap(integral.evidence, output_change, inputs.document)
        if integral.error_bound is not None:
            bound = in_document(integral.error_bound, output_change, inputs.document)
        steps = integral.steps_used
        converged = (gap if bound is None else bound).amax(dim=1) <= method.options.tolerance
    return Attribution(
        scores=torch.where(mask.to(scores.device), scores, 0.0),
        layer_scores=None if layer_scores is None else torch.where(mask[:, None], layer_scores, 0.0),
        flow=flow,
        target=objective.target,
        mask=mask,
        special=inputs.special,
        output_change=output_change,
        completeness_gap=gap,
        error_bound=bound,
        steps_used=steps,
        converged=converged,
        parts=parts,
        method=method.name,
        options=dataclasses.asdict(method.options),
    )
