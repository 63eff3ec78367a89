"""How well compositions of attention and MLP flow agree with the flow of the whole block (LIG.md 4).

Every part is integrated once and meets all others: 3 direct flows, 4 of attention and 2 of the MLP part.
Shapes: T positions, H heads; C configurations in the order of `CONFIGURATIONS`.
"""

from __future__ import annotations

import itertools
from typing import NamedTuple

import torch
from torch import Tensor

from calig.pipeline.attribution.flow import (
    Flow,
    InputTokenPaths,
    MLPBaseline,
    ZeroPaths,
    attention_flow,
    compose_heads,
    compose_slices,
    give_self_share,
    head_mlp_flow,
    layer_flow,
    self_share,
    slice_mlp_flow,
)
from calig.pipeline.attribution.within_block import Block
from calig.pipeline.attribution.within_layer import Baseline, Composition, flow_agreement, is_ill_posed

MEASURES = ("raw", "normalised", "correlation", "ratio")
"""What is measured, in the order of the last axis; see `FlowAgreement`."""

ZERO_NODES = 128
"""Nodes of paths from 0, which are stiff; at least this many (LIG.md 5: 64 to 192)."""


class Configuration(NamedTuple):
    """The baselines of the two flows that are compared."""

    direct: Baseline
    attention: Baseline
    mlp: MLPBaseline


_DIRECT: tuple[Baseline, ...] = ("itb", "itb_zero_ratio", "zero")
_ATTENTION: tuple[Baseline, ...] = ("itb", "itb_map_ratio", "itb_zero_ratio", "zero")
_MLP: tuple[MLPBaseline, ...] = ("att_itb_a0", "zero")
CONFIGURATIONS = tuple(Configuration(*names) for names in itertools.product(_DIRECT, _ATTENTION, _MLP))


def block_agreement(block: Block, nodes: int, composition: Composition, max_tokens: int) -> Tensor:
    """Measure all configurations on one block.

    Args:
        block: From `take_apart`, in the same session.
        nodes: Gauss-Legendre nodes; paths from 0 take `ZERO_NODES` or more.
        composition: How attention and MLP flows are put together.
        max_tokens: Rows of one internal pass.

    Returns:
        (C, 4) means over the real targets of `MEASURES`; NaN where a configuration is ill-posed for the block or no
        target has a value.
    """
    direct, attention = _by_baseline(block, nodes, max_tokens)
    mlp_flow = head_mlp_flow if composition == "heads" else slice_mlp_flow
    mlp = {
        name: mlp_flow(block, name, max(nodes, ZERO_NODES) if name == "zero" else nodes, max_tokens).values
        for name in _MLP
        if not is_ill_posed(block, "itb", name, composition)
    }
    pairs = [(one, other) for one in attention for other in mlp]
    composed = [
        compose_heads(attention[one], mlp[other])
        if composition == "heads"
        else compose_slices(attention[one].values, mlp[other])
        for one, other in pairs
    ]
    found = dict.fromkeys(CONFIGURATIONS, torch.full((len(MEASURES),), torch.nan))
    for name, values in direct.items():
        agreement = flow_agreement(values.expand(1, len(pairs), -1, -1), torch.stack(composed)[None], block.real[None])
        means = torch.stack([getattr(agreement, measure)[0].nanmean(-1) for measure in MEASURES], dim=-1)
        found.update({Configuration(name, *pair): mean for pair, mean in zip(pairs, means.cpu(), strict=True)})
    return torch.stack([found[configuration].to(torch.float32) for configuration in CONFIGURATIONS])


def _by_baseline(block: Block, nodes: int, max_tokens: int) -> tuple[dict[Baseline, Tensor], dict[Baseline, Flow]]:
    """The direct flow (T, T) and the attention flow (H, T, T) from every baseline that the block allows."""
    paths = InputTokenPaths(block)
    layer, att = layer_flow(paths, block, nodes, max_tokens).values, attention_flow(paths, nodes)
    own = block.probabilities.diagonal(dim1=-2, dim2=-1)
    by_map = give_self_share(att.values, own, torch.ones_like(own, dtype=torch.bool)).values
    direct: dict[Baseline, Tensor] = {"itb": layer}
    attention: dict[Baseline, Flow] = {"itb": att, "itb_map_ratio": Flow(by_map, att.total)}
    if not is_ill_posed(block, "zero", "att_itb_a0", "heads"):
        zero, more = ZeroPaths(block), max(nodes, ZERO_NODES)
        direct["zero"] = layer_flow(zero, block, more, max_tokens).values
        attention["zero"] = attention_flow(zero, more)
        direct["itb_zero_ratio"] = give_self_share(layer, *self_share(direct["zero"])).values
        by_zero = give_self_share(att.values, *self_share(attention["zero"].values)).values
        attention["itb_zero_ratio"] = Flow(by_zero, att.total)
    return direct, attention
