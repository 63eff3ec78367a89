"""Attention Shapley: each token's fair share of the attention exchanged (arXiv:2508.08966; METHODS 4.1)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from calig.pipeline.attribution.methods.base import AttributionMethod, BaselineOptions

if TYPE_CHECKING:
    from calig.pipeline.attribution.model import ExplainableModel, Inputs
    from calig.pipeline.attribution.objective import Objective
    from calig.pipeline.attribution.result import Attribution


@dataclass(frozen=True)
class AttentionShapleyOptions(BaselineOptions):
    """Options of `attention_shapley`."""

    weights: Literal["attention", "last", "rollout", "gradient"] = "attention"
    """What is exchanged: attention (mean over heads and blocks, or of the last block), the rollout, or attention times
    gradient (mean over blocks), which alone is signed and knows the class."""


class AttentionShapley(AttributionMethod):
    """Exact Shapley values of the game in which a set of tokens is worth the attention exchanged inside it.

    The game lives on the edges of a graph, so the value is closed-form (Deng & Papadimitriou 1994): half of what a
    token gives and receives. Where rows sum to 1, as those of attention do, that ranks tokens by the attention they
    receive. Scores sum to the whole of the exchanged attention.
    """

    name = "attention_shapley"
    summary = "exact Shapley values of the attention that tokens exchange"
    source = "arXiv:2508.08966, Deng & Papadimitriou 1994"
    needs_attention = True
    Options = AttentionShapleyOptions

    def attribute(self, model: ExplainableModel, inputs: Inputs, objective: Objective) -> Attribution:
        """See `AttributionMethod.attribute`."""
        import torch

        from calig.pipeline.attribution import inside, rollout
        from calig.pipeline.attribution.build import build_attribution

        kind = self.options.weights
        combine = rollout.signed_attention_gradient if kind == "gradient" else rollout.mean_attention

        matrices, _ = inside.attention_matrices(model, inputs, objective, combine)
        ends = inside.find_ends(model, inputs, objective, self.options.baseline, [0])
        if kind == "last":
            worth = matrices[-1]
        elif kind == "rollout":
            worth = rollout.mask_pairs(rollout.attention_rollout(matrices)[-1], inputs.mask)
        else:
            worth = torch.stack(matrices).mean(dim=0)
        # W_ii counts once: it is in both means.
        scores = (worth.sum(dim=1) + worth.sum(dim=2)) / 2
        return build_attribution(self, inputs, objective, ends.output_change, scores)
