"""Beyond Intuition: attention perception, then reasoning feedback (Chen et al., TMLR 2022)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from calig.pipeline.attribution.methods.base import AttributionMethod, BaselineOptions
from calig.pipeline.errors import InputError

if TYPE_CHECKING:
    from calig.pipeline.attribution.model import ExplainableModel, Inputs
    from calig.pipeline.attribution.objective import Objective
    from calig.pipeline.attribution.result import Attribution


@dataclass(frozen=True)
class BeyondIntuitionOptions(BaselineOptions):
    """Options of `beyond_intuition`."""

    steps: int = 20
    """Gauss-Legendre nodes of the gradient on the last map."""

    def __post_init__(self) -> None:
        if self.steps < 2:
            raise InputError(f"steps takes at least 2 nodes, got {self.steps}.")


class BeyondIntuition(AttributionMethod):
    """A rollout of head-weighted attention, times the last map's gradient integrated along the input's path.

    The paper's head-wise form: a head counts by how strongly its map and its gradient move together,
    `I_h ~ mean |A_h' dA_h|`; `R <- R + (sum_h I_h A_h) R` over all blocks; the read-out row of R is multiplied by the
    positive part of the last map's gradient, mean over heads, integrated from the baseline to the input. The rollout
    is over all blocks as in the paper's text; the authors' code for BERT takes the last block alone.
    """

    name = "beyond_intuition"
    summary = "head-weighted attention rollout times integrated gradients on the last map"
    source = "Chen et al. 2022 (TMLR)"
    needs_attention = True
    signed = False
    Options = BeyondIntuitionOptions

    def attribute(self, model: ExplainableModel, inputs: Inputs, objective: Objective) -> Attribution:
        """See `AttributionMethod.attribute`."""
        from calig.pipeline.attribution import inside, rollout
        from calig.pipeline.attribution.attention_path import last_attention_gradient
        from calig.pipeline.attribution.build import build_attribution

        matrices, readout = inside.attention_matrices(model, inputs, objective, rollout.weighted_heads)
        ends = inside.find_ends(model, inputs, objective, self.options.baseline, [0])
        perceived = rollout.rollout(matrices, readout)[:, -1] + readout  # the rollout leaves the identity out
        gradient = last_attention_gradient(model, inputs, objective, ends, self.options.steps)
        feedback = rollout.read_row(gradient.clamp_min(0).mean(dim=1), readout)
        return build_attribution(self, inputs, objective, ends.output_change, perceived * feedback)
