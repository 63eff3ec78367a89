"""CA-LIG, Context-Aware Layer-wise Integrated Gradients (arXiv:2602.16608; METHODS 2)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from calig.pipeline.attribution.methods.base import AttributionMethod, PathOptions
from calig.pipeline.errors import InputError

if TYPE_CHECKING:
    from torch import Tensor

    from calig.pipeline.attribution.model import ExplainableModel, Inputs
    from calig.pipeline.attribution.objective import Objective
    from calig.pipeline.attribution.result import Attribution


@dataclass(frozen=True)
class CALIGOptions(PathOptions):
    """Options of `ca_lig`."""

    path: Literal["shared", "straight"] = "shared"
    """One line between the embedding outputs for all layers, or a line of its own at each layer (METHODS 1)."""
    fusion: Literal["column", "diagonal", "gated", "late"] = "column"
    """How token evidence meets the attention gradient (METHODS 2.3)."""
    lam: float = 0.5
    """Share of the evidence against the attention gradient; `gated` has none."""
    attention_gradient: Literal["positive", "signed"] = "positive"
    """Positive part of each head's attention times gradient, or its signed value (METHODS 2.2)."""
    return_flow: bool = False
    """Also return the fused matrices as `flow` (B, L, T, T)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.lam <= 1:
            raise InputError(f"lam takes a number in [0, 1], got {self.lam}.")
        if self.fusion == "diagonal" and self.lam == 1:
            raise InputError("lam=1 with fusion='diagonal' lets nothing reach the read-out row; take lam < 1.")
        if self.fusion == "late" and self.return_flow:
            raise InputError("fusion='late' fuses after the rollout and has no flow of its own; drop return_flow.")


class CALIG(AttributionMethod):
    """Layer-wise integrated gradients fused with attention gradients and rolled out over the blocks.

    `parts`: `evidence` (B, L+1, T), the integrated gradients r^0 to r^L before fusion, complete at every layer.
    `layer_scores[:, l]` is the relevance of the input tokens as far as blocks 1..l have carried it to the read-out.
    """

    name = "ca_lig"
    summary = "layer-wise integrated gradients, fused with attention gradients and rolled out"
    source = "arXiv:2602.16608; METHODS 2"
    needs_attention = True
    Options = CALIGOptions

    def attribute(self, model: ExplainableModel, inputs: Inputs, objective: Objective) -> Attribution:
        """See `AttributionMethod.attribute`."""
        import torch

        from calig.pipeline.attribution import inside, rollout
        from calig.pipeline.attribution.build import build_attribution

        options = self.options
        straight = options.path == "straight"
        ends = inside.find_ends(model, inputs, objective, options.baseline, None if straight else [0])

        def combine(attention: Tensor, gradient: Tensor, mask: Tensor) -> Tensor:
            positive = options.attention_gradient == "positive"
            return rollout.attention_gradient(attention, gradient, mask, positive=positive)

        gradients, readout = inside.attention_matrices(model, inputs, objective, combine)
        integral = inside.layer_evidence(
            model,
            inputs,
            objective,
            ends,
            layers=list(range(model.depth + 1)),
            path=options.path,
            steps=options.steps,
            tolerance=options.tolerance,
            max_steps=options.max_steps,
        )
        evidence = integral.evidence.to(gradients[0].dtype).to(gradients[0].device)
        flow = None
        if options.fusion == "late":
            layers = rollout.fuse_late(evidence, gradients, readout, lam=options.lam)
        else:
            factors = rollout.fuse(evidence, gradients, inputs.mask, fusion=options.fusion, lam=options.lam)
            layers = rollout.rollout(factors, readout)
            if options.return_flow:
                flow = torch.stack(factors, dim=1).transpose(-1, -2)
        return build_attribution(
            self,
            inputs,
            objective,
            ends.output_change,
            layers[:, -1],
            layer_scores=layers,
            integral=integral,
            flow=flow,
            parts={"evidence": evidence},
        )
