"""AttCAT, attentive class activation tokens (Qiang et al., NeurIPS 2022; METHODS 5.4)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from calig.pipeline.attribution.methods.base import AttributionMethod

if TYPE_CHECKING:
    from torch import Tensor

    from calig.pipeline.attribution.model import ExplainableModel, Inputs
    from calig.pipeline.attribution.objective import Objective
    from calig.pipeline.attribution.result import Attribution


class AttCAT(AttributionMethod):
    """States times their gradients at every block, weighted by the attention that the token receives there; signed.

    `layer_scores[:, l]` is the sum over blocks 1..l. A block's states are what it returns, as METHODS 5.4 writes the
    paper's formula; public implementations pair its attention with what enters it (`hidden_states[l]`).
    """

    name = "attcat"
    summary = "states times gradients at every block, weighted by the attention received"
    source = "Qiang et al. 2022"
    needs_attention = True

    def attribute(self, model: ExplainableModel, inputs: Inputs, objective: Objective) -> Attribution:
        """See `AttributionMethod.attribute`."""
        import torch

        from calig.pipeline.attribution import inside, rollout
        from calig.pipeline.attribution.build import build_attribution

        ends = inside.find_ends(model, inputs, objective, self.options.baseline, [0])

        def run(rows: Tensor) -> Tensor:
            trace = model.trace(inputs.select(rows), attention=True)
            states = [trace.state(layer) for layer in range(1, model.depth + 1)]
            gradients = torch.autograd.grad(objective(trace.output, rows).sum(), states)
            mask = inputs.mask[rows]
            real = mask.sum(dim=1, keepdim=True)
            found = []
            for attention, state, gradient in zip(trace.attentions, states, gradients, strict=True):
                # Mean over heads and over real queries.
                received = rollout.mask_pairs(attention.detach().mean(dim=1), mask).sum(dim=1) / real
                found.append(received * (state.detach() * gradient).sum(dim=-1))
            return torch.stack(found, dim=1)

        parts = model.budget.run(torch.arange(len(inputs), device=model.device), inputs.mask.shape[1], run)
        layers = torch.where(inputs.mask[:, None], torch.cat(parts), 0.0).cumsum(dim=1)
        return build_attribution(self, inputs, objective, ends.output_change, layers[:, -1], layer_scores=layers)
