"""Raw attention of the last block (METHODS 5.2)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from calig.pipeline.attribution.methods.base import AttributionMethod

if TYPE_CHECKING:
    from calig.pipeline.attribution.model import ExplainableModel, Inputs
    from calig.pipeline.attribution.objective import Objective
    from calig.pipeline.attribution.result import Attribution


class RawAttention(AttributionMethod):
    """Where the read-out looks in the last block, mean over heads: never negative, the same for every class.

    `layer_scores[:, l]` is the read-out row of block l: positions at that block, not input tokens.
    """

    name = "raw_attention"
    summary = "the attention of the read-out in the last block, mean over heads"
    source = "Vaswani et al. 2017"
    needs_attention = True
    signed = False

    def attribute(self, model: ExplainableModel, inputs: Inputs, objective: Objective) -> Attribution:
        """See `AttributionMethod.attribute`."""
        import torch

        from calig.pipeline.attribution import inside, rollout
        from calig.pipeline.attribution.build import build_attribution

        matrices, readout = inside.attention_matrices(model, inputs, objective, rollout.mean_attention)
        ends = inside.find_ends(model, inputs, objective, self.options.baseline, [0])
        layers = torch.stack([rollout.read_row(matrix, readout) for matrix in matrices], dim=1)
        return build_attribution(self, inputs, objective, ends.output_change, layers[:, -1], layer_scores=layers)
