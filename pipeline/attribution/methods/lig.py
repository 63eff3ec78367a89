"""LIG, within-layer flow by set-to-set integrated gradients (arXiv:2606.21564; LIG.md)."""

from __future__ import annotations

from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Literal

from calig.pipeline.attribution.methods.base import AttributionMethod, check_nodes
from calig.pipeline.errors import InputError

if TYPE_CHECKING:
    from torch import Tensor

    from calig.pipeline.attribution.model import ExplainableModel, Inputs
    from calig.pipeline.attribution.objective import Objective
    from calig.pipeline.attribution.result import Attribution

_FIRST_NODES = 16  # where `steps: auto` starts


@dataclass(frozen=True)
class LIGOptions:
    """Options of `lig`."""

    baseline: Literal["itb", "zero", "itb_zero_ratio", "itb_map_ratio"] = "itb"
    """Where the paths of attention and of the whole layer start: every position holds the target's own vector (`itb`,
    which knows no self share; the ratios give it one afterwards), or zeros (LIG.md 3)."""
    mlp_baseline: Literal["att_itb_a0", "zero"] = "att_itb_a0"
    """Where the path of the MLP part starts: the contexts of the `itb` baseline, or zeros."""
    composition: Literal["heads", "slices"] = "heads"
    """How attention and MLP flows meet: head by head in proportions, or the reference's raw product of slices."""
    flow: Literal["layer", "composed"] = "layer"
    """What fills `flow`, and so decides the scores: the whole layer at once, or the composition."""
    agreement: bool = False
    """Also measure how well compositions agree with the whole block, for every baseline: several times the cost."""
    layers: list[int] | None = None
    """Blocks to look into, counted from 0, each once; null takes all. The parts come in the order given, relevance
    goes through the blocks in that of the model."""
    steps: int | Literal["auto"] = 32
    """Gauss-Legendre nodes; `auto` doubles them from 16 until every column sums to what it must."""
    tolerance: float = 0.02
    """Relative error of a column's sum at which `auto` stops and above which a sample is flagged."""
    max_steps: int = 129
    """Nodes that `auto` does not go beyond."""

    def __post_init__(self) -> None:
        check_nodes(self.steps, self.tolerance)
        if self.max_steps < _FIRST_NODES:
            raise InputError(
                f"max_steps takes at least {_FIRST_NODES} nodes, where `auto` starts; got {self.max_steps}."
            )
        if self.layers is not None and not self.layers:
            raise InputError("layers is empty: name at least one block, or leave it out for all.")
        if self.layers is not None and len(set(self.layers)) < len(self.layers):
            raise InputError(f"layers names a block twice: {self.layers}; name each once.")


class LIG(AttributionMethod):
    """Which token flows into which, inside every block; the same for every class.

    `flow` (B, L, T, T) by source and target is signed and each column sums to how far the target's vector moves from
    the baseline. `scores` follow the column-normalised magnitudes back from the read-out: never negative, sum 1.
    `parts`: `att` (B, L, H, T, T), `mlp` (B, L, T, H), or (B, L, T, D) for `slices`, `layer` and `composed`
    (B, L, T, T), the totals that their columns sum to, `att_total` (B, L, H, T), `mlp_total` and `layer_total`
    (B, L, T), and `refused` (B, L), columns without a usable self share. `completeness_gap` is (B, L): the largest
    relative error of a column's sum in a block, also in the maps from 0 that `itb_zero_ratio` takes shares from. With
    `layers`, L counts those. `agreement=True` adds `agreement` (B, L, C, 7): for the `CONFIGURATIONS` of
    `calig.pipeline.attribution.agreement` its `MEASURES`, means over targets.
    """

    name = "lig"
    summary = "flow from token to token inside every block, by set-to-set integrated gradients"
    source = "arXiv:2606.21564"
    needs_attention = True
    signed = False
    parts_axes = MappingProxyType(
        {
            "att": (3, 4),
            "mlp": (2,),
            "layer": (2, 3),
            "composed": (2, 3),
            "att_total": (3,),
            "mlp_total": (2,),
            "layer_total": (2,),
        }
    )
    Options = LIGOptions

    def attribute(self, model: ExplainableModel, inputs: Inputs, objective: Objective) -> Attribution:
        """See `AttributionMethod.attribute`."""
        import dataclasses

        import torch

        from calig.pipeline.attribution import inside
        from calig.pipeline.attribution.result import Attribution
        from calig.pipeline.attribution.within_layer import flow_scores

        options = self.options
        # The baseline is for `output_change` alone; zero is one that every model has.
        ends = inside.find_ends(model, inputs, objective, "zero", [0])
        examples = [self._example(model, inputs, row) for row in range(len(inputs))]
        parts = {
            name: _padded([example[0][name] for example in examples], inputs.mask.shape[1], axes)
            for name, axes in self.parts_axes.items()
        }
        flow = parts["layer" if options.flow == "layer" else "composed"]
        # itb_map_ratio is attention's alone: the direct flow of the layer stays without a self share.
        own = options.baseline in ("zero", "itb_zero_ratio")
        own |= options.baseline == "itb_map_ratio" and options.flow == "composed"
        order = torch.tensor(options.layers or range(flow.shape[1])).argsort()
        layers = flow_scores(flow[:, order], ends.readout, inputs.mask, has_self_share=own)
        gap = torch.stack([example[0]["gap"] for example in examples])
        for name in ("refused", "agreement") if options.agreement else ("refused",):
            parts[name] = torch.stack([example[0][name] for example in examples])
        return Attribution(
            scores=torch.where(inputs.mask, layers[:, -1], 0.0),
            layer_scores=torch.where(inputs.mask[:, None], layers[:, order.argsort()], 0.0),
            flow=flow,
            target=objective.target,
            mask=inputs.mask,
            special=inputs.special,
            output_change=ends.output_change,
            completeness_gap=gap,
            steps_used=torch.tensor([example[1] for example in examples]),
            converged=gap.amax(dim=1) <= options.tolerance,
            parts=parts,
            method=self.name,
            options=dataclasses.asdict(options),
        )

    def _example(self, model: ExplainableModel, inputs: Inputs, row: int) -> tuple[dict[str, Tensor], int]:
        """The parts of one example, each with L first and without padding, and the nodes that were used."""
        import torch

        from calig.pipeline.attribution.agreement import block_agreement
        from calig.pipeline.attribution.within_block import take_apart
        from calig.pipeline.attribution.within_layer import block_flows

        options = self.options
        chosen = options.layers
        blocks = take_apart(model, inputs, row)
        if chosen is not None:
            if max(chosen) >= len(blocks) or min(chosen) < 0:
                raise InputError(f"layers {chosen} names a block that is not there; the model has {len(blocks)}.")
            blocks = [blocks[layer] for layer in chosen]
        nodes = _FIRST_NODES if options.steps == "auto" else options.steps
        while True:
            flows = [
                block_flows(
                    block,
                    nodes,
                    baseline=options.baseline,
                    mlp_baseline=options.mlp_baseline,
                    composition=options.composition,
                    max_tokens=model.max_tokens,
                )
                for block in blocks
            ]
            enough = options.steps != "auto" or max(flow.gap for flow in flows) <= options.tolerance
            if enough or 2 * nodes > options.max_steps:
                break
            nodes *= 2
        parts = {name: torch.stack([getattr(flow, name) for flow in flows]).detach() for name in self.parts_axes}
        parts["gap"] = torch.tensor([flow.gap for flow in flows])
        parts["refused"] = torch.tensor([flow.refused for flow in flows])
        if options.agreement:
            measured = [block_agreement(block, nodes, options.composition, model.max_tokens) for block in blocks]
            parts["agreement"] = torch.stack(measured)
        return parts, nodes


def _padded(parts: list[Tensor], tokens: int, axes: tuple[int, ...]) -> Tensor:
    """Stack the parts of B examples, zeros behind the tokens of each; `axes` count that of the examples."""
    shape = [tokens if axis in axes else size for axis, size in enumerate(parts[0].shape, start=1)]
    whole = parts[0].new_zeros(len(parts), *shape)
    for row, part in enumerate(parts):
        whole[row][tuple(slice(size) for size in part.shape)] = part
    return whole
