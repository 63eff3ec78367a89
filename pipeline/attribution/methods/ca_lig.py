"""CA-LIG, Context-Aware Layer-wise Integrated Gradients (arXiv:2602.16608; METHODS 2)."""

from __future__ import annotations

from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Literal

from calig.pipeline.attribution.methods.base import AttributionMethod, PathOptions
from calig.pipeline.errors import InputError

if TYPE_CHECKING:
    from torch import Tensor

    from calig.pipeline.attribution.model import ExplainableModel, Inputs
    from calig.pipeline.attribution.objective import Objective
    from calig.pipeline.attribution.quadrature import Integral
    from calig.pipeline.attribution.result import Attribution
    from calig.pipeline.attribution.rollout import Ingredients


@dataclass(frozen=True)
class CALIGOptions(PathOptions):
    """Options of `ca_lig`."""

    path: Literal["shared", "straight"] = "shared"
    """One line between the embedding outputs for all layers, or a line of its own at each layer (METHODS 1)."""
    fusion: Literal["column", "diagonal", "gated", "late", "carried"] = "column"
    """How token evidence meets the attention gradient (METHODS 2.3); `carried`, for causal models, takes attention."""
    lam: float | list[float] | tuple[float, ...] = 0.7
    """Share of the evidence against the attention gradient, for all blocks or one for each; `gated` has none. The
    default is what docs/fusion.md supports: more evidence is more faithful, less agrees with human rationales."""
    attention_gradient: Literal["positive", "signed"] = "positive"
    """Positive part of each head's attention times gradient, or its signed value (METHODS 2.2)."""
    attention_gradient_at: Literal["point", "path"] = "point"
    """At the input, or averaged along the shared path, whose every node is then run again with attention maps."""
    return_flow: bool = False
    """Also return the fused matrices as `flow` (B, L, T, T)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        many = isinstance(self.lam, list | tuple)
        shares = tuple(self.lam) if isinstance(self.lam, list | tuple) else (self.lam,)
        if not shares or not all(0 <= share <= 1 for share in shares):
            raise InputError(f"lam takes a number in [0, 1], or one for each block, got {self.lam}.")
        if many and self.fusion in ("late", "gated", "carried"):
            reason = "has no lam" if self.fusion == "gated" else "fuses once, behind all blocks"
            raise InputError(
                f"fusion='{self.fusion}' {reason}: a lam for each block ({self.lam}) goes with 'column' and 'diagonal'."
            )
        if self.fusion == "diagonal" and all(share == 1 for share in shares):
            raise InputError("lam=1 with fusion='diagonal' lets nothing reach the read-out row; take lam < 1.")
        if self.attention_gradient_at == "path" and self.path != "shared":
            raise InputError("attention_gradient_at='path' follows the shared path; take path='shared', or 'point'.")
        if self.fusion in ("late", "carried") and self.return_flow:
            raise InputError(f"fusion='{self.fusion}' fuses once and has no flow of its own; drop return_flow.")
        if self.fusion == "carried" and (self.attention_gradient, self.attention_gradient_at) != ("positive", "point"):
            raise InputError(
                "fusion='carried' takes attention without gradients; drop the options attention_gradient*."
            )


class CALIG(AttributionMethod):
    """Layer-wise integrated gradients fused with attention gradients and rolled out over the blocks.

    `parts`: `evidence` (B, L+1, T), the integrated gradients r^0 to r^L before fusion, complete at every layer.
    `layer_scores[:, l]` is the relevance of the input tokens as far as blocks 1..l have carried it to the read-out.
    """

    name = "ca_lig"
    summary = "layer-wise integrated gradients, fused with attention gradients and rolled out"
    source = "arXiv:2602.16608"
    needs_attention = True
    parts_axes = MappingProxyType({"evidence": (2,)})
    Options = CALIGOptions

    def attribute(self, model: ExplainableModel, inputs: Inputs, objective: Objective) -> Attribution:
        """See `AttributionMethod.attribute`."""
        import torch

        from calig.pipeline.attribution.build import build_attribution

        options = self.options
        parts, integral, output_change = self.ingredients(model, inputs, objective)
        layers, factors = parts.fused(options.fusion, options.lam)
        flow = torch.stack(factors, dim=1).transpose(-1, -2) if options.return_flow and factors else None
        return build_attribution(
            self,
            inputs,
            objective,
            output_change,
            layers[:, -1],
            layer_scores=layers,
            integral=integral,
            flow=flow,
            parts={"evidence": parts.evidence},
        )

    def ingredients(
        self, model: ExplainableModel, inputs: Inputs, objective: Objective
    ) -> tuple[Ingredients, Integral, Tensor]:
        """What is fused, the costly part of an attribution: the same for every `lam` and `fusion`, `carried` apart.

        Args and what is raised: see `AttributionMethod.attribute`.

        Returns:
            The ingredients, the path behind their evidence, and f(x) - f(x') (B,).
        """
        from calig.pipeline.attribution import inside, rollout

        options = self.options
        shared, at_input = options.path == "shared", options.attention_gradient_at == "point"
        positive = options.attention_gradient == "positive"
        combine: inside.Combine = rollout.positive_attention_gradient if positive else rollout.signed_attention_gradient
        if options.fusion == "carried":
            combine = rollout.mean_attention
        if at_input:  # first, because this pass of the input is also the last node of the shared path
            gradients, readout = inside.attention_matrices(model, inputs, objective, combine)
        kept = [0] if shared else None
        ends = inside.find_ends(model, inputs, objective, options.baseline, kept, gradients=shared)
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
        if not at_input:
            gradients = inside.path_attention_matrices(model, inputs, objective, combine, ends, integral)
            readout = ends.readout
        evidence = integral.evidence.to(gradients[0].dtype).to(gradients[0].device)
        parts = rollout.Ingredients(evidence, gradients, readout, inputs.mask, inputs.document)
        return parts, integral, ends.output_change
