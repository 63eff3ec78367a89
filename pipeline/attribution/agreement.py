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

MEASURES = ("raw", "normalised", "correlation", "ratio", "vanished", "refused", "refused_attention")
"""What is measured, in the order of the last axis: those of `FlowAgreement`, and of the columns of the direct flow and
of attention's the share that kept `itb` for want of a self share between 0 and 1 (LIG.md 3)."""

ZERO_NODES = 128
"""Nodes of paths from 0, which are stiff; at least this many (LIG.md 5: 64 to 192)."""


class Configuration(NamedTuple):
    """The baselines of the two flows that are compared."""

    direct: Baseline
    attention: Baseline
    mlp: MLPBaseline


class _Measured(NamedTuple):
    """A flow, and the share of its columns that kept `itb`."""

    flow: Flow
    refused: float = 0.0


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
        (C, 7) means over the real targets of `MEASURES`; NaN where a configuration is ill-posed for the block or no
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
        compose_heads(attention[one].flow, mlp[other])
        if composition == "heads"
        else compose_slices(attention[one].flow.values, mlp[other])
        for one, other in pairs
    ]
    found = dict.fromkeys(CONFIGURATIONS, torch.full((len(MEASURES),), torch.nan))
    for name, (flow, refused) in direct.items():
        several = flow.values.expand(1, len(pairs), -1, -1)
        agreement = flow_agreement(several, torch.stack(composed)[None], block.real[None])
        means = torch.stack([values[0].nanmean(-1) for values in agreement], dim=-1).cpu()
        for (one, other), mean in zip(pairs, means, strict=True):
            shares = mean.new_tensor([refused, attention[one].refused])
            found[Configuration(name, one, other)] = torch.cat([mean, shares])
    return torch.stack([found[configuration].to(torch.float32) for configuration in CONFIGURATIONS])


def _by_baseline(
    block: Block, nodes: int, max_tokens: int
) -> tuple[dict[Baseline, _Measured], dict[Baseline, _Measured]]:
    """The direct flow (T, T) and the attention flow (H, T, T) from every baseline that the block allows."""
    paths = InputTokenPaths(block)
    layer, att = layer_flow(paths, block, nodes, max_tokens), attention_flow(paths, nodes)
    own = block.probabilities.diagonal(dim1=-2, dim2=-1)
    by_map = _with_self_share(att, own, torch.ones_like(own, dtype=torch.bool), block.real)
    direct: dict[Baseline, _Measured] = {"itb": _Measured(layer)}
    attention: dict[Baseline, _Measured] = {"itb": _Measured(att), "itb_map_ratio": by_map}
    if not is_ill_posed(block, "zero", "att_itb_a0", "heads"):
        zero, more = ZeroPaths(block), max(nodes, ZERO_NODES)
        zeros = layer_flow(zero, block, more, max_tokens), attention_flow(zero, more)
        for flows, itb, other in zip((direct, attention), (layer, att), zeros, strict=True):
            flows["zero"] = _Measured(other)
            flows["itb_zero_ratio"] = _with_self_share(itb, *self_share(other.values), block.real)
    return direct, attention


def _with_self_share(itb: Flow, ratio: Tensor, defined: Tensor, real: Tensor) -> _Measured:
    given = give_self_share(itb.values, ratio, defined)
    return _Measured(Flow(given.values, itb.total), float(given.refused[..., real].float().mean()))
