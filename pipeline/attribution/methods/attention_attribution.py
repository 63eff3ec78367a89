"""Attention attribution: integrated gradients on attention maps (Hao et al., AAAI 2021)."""

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
class AttentionAttributionOptions(BaselineOptions):
    """Options of `attention_attribution`."""

    steps: int = 16
    """Gauss-Legendre nodes on the way from no attention to the block's own map."""
    return_flow: bool = False
    """Also return the attributed maps, mean over heads and signed, as `flow` (B, L, T, T)."""

    def __post_init__(self) -> None:
        if self.steps < 2:
            raise InputError(f"steps takes at least 2 nodes, got {self.steps}.")


class AttentionAttribution(AttributionMethod):
    """What each attention weight adds to the decision, block by block, rolled out over the blocks.

    One block's map is scaled from 0 to all of it while the others stay: its entries sum to the change of the objective
    (their sum is `parts["attributed"]` (B, L)). The paper draws a tree of
    the strongest edges; for token relevance the positive parts are rolled out as generic attention's are, so that the
    two differ in the gradient alone. Paths cost L times `steps` passes of the tails.
    """

    name = "attention_attribution"
    summary = "integrated gradients on the attention maps, rolled out over the blocks"
    source = "Hao et al. 2021"
    needs_attention = True
    signed = False
    Options = AttentionAttributionOptions

    def attribute(self, model: ExplainableModel, inputs: Inputs, objective: Objective) -> Attribution:
        """See `AttributionMethod.attribute`."""
        import torch

        from calig.pipeline.attribution import inside, rollout
        from calig.pipeline.attribution.attention_path import attribute_attention
        from calig.pipeline.attribution.build import build_attribution

        ends = inside.find_ends(model, inputs, objective, self.options.baseline, None)
        factors, flows, attributed = [], [], []
        for block in range(model.depth):
            maps = attribute_attention(model, inputs, objective, ends, block, self.options.steps)
            factors.append(maps.clamp_min(0).mean(dim=1))
            flows.append(maps.mean(dim=1).transpose(-1, -2))
            attributed.append(maps.sum(dim=(1, 2, 3)))
        layers = rollout.rollout(factors, ends.readout)
        return build_attribution(
            self,
            inputs,
            objective,
            ends.output_change,
            layers[:, -1],
            layer_scores=layers,
            flow=torch.stack(flows, dim=1) if self.options.return_flow else None,
            parts={"attributed": torch.stack(attributed, dim=1)},
        )
