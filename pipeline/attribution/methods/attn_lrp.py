"""AttnLRP: layer-wise relevance propagation for transformers (Achtibat et al., ICML 2024; METHODS 5.5)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from calig.pipeline.attribution.methods.base import AttributionMethod

if TYPE_CHECKING:
    from torch import Tensor

    from calig.pipeline.attribution.model import ExplainableModel, Inputs
    from calig.pipeline.attribution.objective import Objective
    from calig.pipeline.attribution.result import Attribution


class AttnLRP(AttributionMethod):
    """Relevance propagated from the objective to the embeddings, as gradient times input under changed gradients.

    LRP conserves relevance but for what biases and the offset of softmax take: that leak is reported as
    `completeness_gap` (B, L+1), the distance of each layer's sum from the objective itself (there is no baseline),
    relative to at least 1e-3. `layer_scores[:, l]` is the relevance of the positions behind block l.

    No family is named: the rules go by what a model computes. A norm of queries, keys or states may be written in any
    way that divides a vector by one number. A factor that is one number for a whole vector (what a router weighs its
    experts with) is held fixed like that number, where the authors' code gives the router half.

    LRP is patented: free for personal and scientific use, ask its owners otherwise.
    """

    name = "attn_lrp"
    summary = "layer-wise relevance propagation for transformers (patented: scientific use)"
    source = "Achtibat et al. 2024"
    needs_attention = True

    def attribute(self, model: ExplainableModel, inputs: Inputs, objective: Objective) -> Attribution:
        """See `AttributionMethod.attribute`."""
        import dataclasses

        import torch

        from calig.pipeline.attribution import inside
        from calig.pipeline.attribution.build import build_attribution
        from calig.pipeline.attribution.lrp import lrp_rules
        from calig.pipeline.attribution.quadrature import relative_gap

        ends = inside.find_ends(model, inputs, objective, self.options.baseline, [0])

        def run(rows: Tensor) -> tuple[Tensor, Tensor]:
            with lrp_rules(model):
                trace = model.trace(inputs.select(rows))
                states = [trace.state(layer) for layer in range(model.depth + 1)]
                value = objective(trace.output, rows)
                gradients = torch.autograd.grad(value.sum(), states)
            pairs = zip(states, gradients, strict=True)
            return torch.stack([(state.detach() * gradient).sum(-1) for state, gradient in pairs], 1), value.detach()

        passes = model.budget.run(torch.arange(len(inputs), device=model.device), inputs.mask.shape[1], run)
        relevance = torch.where(inputs.mask[:, None], torch.cat([found for found, _ in passes]), 0.0)
        result = build_attribution(
            self, inputs, objective, ends.output_change, relevance[:, 0], layer_scores=relevance[:, 1:]
        )
        gap = relative_gap(relevance, torch.cat([value for _, value in passes]), inputs.document)
        return dataclasses.replace(result, completeness_gap=gap)
