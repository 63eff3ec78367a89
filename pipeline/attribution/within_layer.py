"""All flows of one block under one configuration, the token relevance that they add up to, and how well they agree.

Source: LIG.md 3, 4, 7 (arXiv:2606.21564). Shapes: B examples, L blocks, H heads, T positions (source i, target j).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

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
from calig.pipeline.attribution.model import UnsupportedModelError
from calig.pipeline.attribution.within_block import Block

Baseline = Literal["itb", "zero", "itb_zero_ratio", "itb_map_ratio"]
Composition = Literal["heads", "slices"]
VANISHES = 1e-12


@dataclass(frozen=True)
class BlockFlows:
    """The flows of one block on one example.

    Attributes:
        att: (H, T, T) z -> c.
        mlp: (T, H) by heads, or (T, D) by dimensions for `slices`.
        layer: (T, T) z -> z'.
        composed: (T, T) from `att` and `mlp`.
        att_total: (H, T) what the columns of `att` sum to.
        mlp_total: (T,) likewise for `mlp`.
        layer_total: (T,) likewise for `layer`.
        gap: The largest relative error of a column's sum, in any of the three integrated parts and, where self shares
            come from them, of the maps from 0.
        refused: Columns of `att` and `layer` that kept the `itb` map because their self share was undefined or outside
            [0, 1].
    """

    att: Tensor
    mlp: Tensor
    layer: Tensor
    composed: Tensor
    att_total: Tensor
    mlp_total: Tensor
    layer_total: Tensor
    gap: float
    refused: int


def is_ill_posed(block: Block, baseline: Baseline, mlp_baseline: MLPBaseline, composition: Composition) -> bool:
    """Whether a path starts where a norm in front of the block makes everything happen at once (LIG.md 3)."""
    if block.norm is None:
        return False
    return baseline in ("zero", "itb_zero_ratio") or (composition == "slices" and mlp_baseline == "zero")


def check_baseline(block: Block, baseline: Baseline, mlp_baseline: MLPBaseline, composition: Composition) -> None:
    """Raise UnsupportedModelError for what is ill-posed in a block with its norm in front (LIG.md 3)."""
    if not is_ill_posed(block, baseline, mlp_baseline, composition):
        return
    from_zero = baseline in ("zero", "itb_zero_ratio")
    named = f"baseline='{baseline}'" if from_zero else "composition='slices' with mlp_baseline='zero'"
    raise UnsupportedModelError(
        f"{named} is ill-posed for '{block.family}': its blocks normalise their input, so on the way from 0 "
        "everything happens at the start. Take baseline='itb' (and mlp_baseline='att_itb_a0')."
    )


def block_flows(
    block: Block,
    nodes: int,
    *,
    baseline: Baseline,
    mlp_baseline: MLPBaseline,
    composition: Composition,
    max_tokens: int,
) -> BlockFlows:
    """Compute every flow of a block.

    Args:
        block: From `take_apart`, in the same session.
        nodes: Gauss-Legendre nodes of every integral.
        baseline: Of ATT and layer-direct; `itb_map_ratio` is ATT's alone, layer-direct then takes `itb`.
        mlp_baseline: Of the MLP part.
        composition: How ATT and MLP are put together.
        max_tokens: Rows of one internal pass.

    Raises:
        UnsupportedModelError: The configuration is ill-posed for this block.
    """
    check_baseline(block, baseline, mlp_baseline, composition)
    paths = ZeroPaths(block) if baseline == "zero" else InputTokenPaths(block)
    att = attention_flow(paths, nodes)
    layer = layer_flow(paths, block, nodes, max_tokens)
    mlp_flow = head_mlp_flow if composition == "heads" else slice_mlp_flow
    mlp = mlp_flow(block, mlp_baseline, nodes, max_tokens)
    real = block.real
    integrated = [att, layer, Flow(mlp.values.T, mlp.total)]
    refused = 0
    if baseline == "itb_zero_ratio":
        zero = ZeroPaths(block)
        att_zero, layer_zero = attention_flow(zero, nodes), layer_flow(zero, block, nodes, max_tokens)
        integrated += [att_zero, layer_zero]  # stiff, so these decide how many nodes are enough
        for_att = give_self_share(att.values, *self_share(att_zero.values))
        for_layer = give_self_share(layer.values, *self_share(layer_zero.values))
        att, layer = Flow(for_att.values, att.total), Flow(for_layer.values, layer.total)
        refused = sum(int(one.refused[..., real].sum()) for one in (for_att, for_layer))
    elif baseline == "itb_map_ratio":
        share = block.probabilities.diagonal(dim1=-2, dim2=-1)
        att = Flow(give_self_share(att.values, share, torch.ones_like(share, dtype=torch.bool)).values, att.total)
    composed = compose_heads(att, mlp.values) if composition == "heads" else compose_slices(att.values, mlp.values)
    pairs = real[:, None] & real
    return BlockFlows(
        att=torch.where(pairs, att.values, 0.0),
        mlp=torch.where(real[:, None], mlp.values, 0.0),
        layer=torch.where(pairs, layer.values, 0.0),
        composed=torch.where(pairs, composed, 0.0),
        att_total=torch.where(real, att.total, 0.0),
        mlp_total=torch.where(real, mlp.total, 0.0),
        layer_total=torch.where(real, layer.total, 0.0),
        gap=max(_gap(flow, real) for flow in integrated),
        refused=refused,
    )


def flow_scores(flow: Tensor, readout: Tensor, mask: Tensor, *, has_self_share: bool) -> Tensor:
    """Relevance of the input tokens for the read-out, as the blocks carry it (LIG.md 7).

    `M^l` is the column-normalised magnitude of the flow (e_j where a column vanishes), half of it the residual path
    where the flow has no self share; relevance after block l is `M^1 ... M^l w`.

    Args:
        flow: (B, L, T, T) by source and target.
        readout: (B, T) read-out weights w.
        mask: (B, T) true on real positions.
        has_self_share: Whether the diagonal of the flow holds a share of its own (`itb` flows: it does not).

    Returns:
        (B, L, T), non-negative, each row summing to 1.
    """
    pairs = (mask[:, :, None] & mask[:, None, :])[:, None]
    size = torch.where(pairs, flow.abs(), 0.0)
    total = size.sum(-2, keepdim=True)
    identity = torch.eye(flow.shape[-1], dtype=flow.dtype, device=flow.device)
    share = torch.where(total < VANISHES, identity, size / total.clamp_min(VANISHES))
    if not has_self_share:
        share = (identity + share) / 2
    carried = identity.expand(len(flow), -1, -1)
    rows = []
    for layer in range(flow.shape[1]):
        carried = carried @ share[:, layer]
        rows.append((carried @ readout.to(flow.dtype)[:, :, None]).squeeze(-1))
    return torch.stack(rows, dim=1)


class FlowAgreement(NamedTuple):
    """How a composed flow compares with the direct one, target by target; NaN at padding and where undefined.

    Attributes:
        raw: (B, L, T) `||direct - composed||_2` of each column.
        normalised: (B, L, T) the same, each column divided by its absolute sum first.
        correlation: (B, L, T) Pearson correlation of the two columns.
        ratio: (B, L, T) sum of the composed column over that of the direct one.
        vanished: (B, L, T) 1 where one of the two columns vanishes (that of a first causal token) and all but `raw` is
            undefined, else 0.
    """

    raw: Tensor
    normalised: Tensor
    correlation: Tensor
    ratio: Tensor
    vanished: Tensor


def flow_agreement(direct: Tensor, composed: Tensor, mask: Tensor) -> FlowAgreement:
    """The L2 agreement diagnostic of a composition (LIG.md 4).

    Args:
        direct: (B, L, T, T) layer-direct flow by source and target.
        composed: (B, L, T, T) composed flow.
        mask: (B, T) true on real positions.

    Example:
        >>> direct = torch.tensor([[[[1.0, 1.0], [1.0, 3.0]]]])
        >>> flow_agreement(direct, 2 * direct, torch.ones(1, 2).bool()).ratio
        tensor([[[2., 2.]]])
    """
    pairs = (mask[:, :, None] & mask[:, None, :])[:, None]
    one, other = (torch.where(pairs, flow, 0.0) for flow in (direct, composed))
    real = mask[:, None].expand(one.shape[0], one.shape[1], -1)
    sizes = [flow.abs().sum(-2) for flow in (one, other)]
    present = real & (sizes[0] > VANISHES) & (sizes[1] > VANISHES)
    shares = [flow / size.clamp_min(VANISHES)[..., None, :] for flow, size in zip((one, other), sizes, strict=True)]
    count = mask.sum(1).to(one.dtype)[:, None, None, None]
    centred = [torch.where(pairs, flow - flow.sum(-2, keepdim=True) / count, 0.0) for flow in (one, other)]
    norms = centred[0].norm(dim=-2) * centred[1].norm(dim=-2)
    correlation = (centred[0] * centred[1]).sum(-2) / norms.clamp_min(VANISHES**2)
    total = one.sum(-2)
    summed = present & (total.abs() > VANISHES)
    nan = torch.full_like(total, torch.nan)
    return FlowAgreement(
        raw=torch.where(real, (one - other).norm(dim=-2), nan),
        normalised=torch.where(present, (shares[0] - shares[1]).norm(dim=-2), nan),
        correlation=torch.where(present & (norms > 0), correlation, nan),
        ratio=torch.where(summed, other.sum(-2) / torch.where(summed, total, 1.0), nan),
        vanished=torch.where(real, (~present).to(nan.dtype), nan),
    )


def _gap(flow: Flow, real: Tensor) -> float:
    """Largest error of a real column's sum relative to what it must be (at least 1e-3)."""
    return float(((flow.values.sum(-2) - flow.total).abs() / flow.total.clamp_min(1e-3))[..., real].max())
