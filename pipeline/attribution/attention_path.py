"""Attention gradients integrated along a path: of the map itself from 0 to all of it, or of the input from a baseline.

Shapes: N rows, B examples, T tokens, H heads, d width of a head, L blocks.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from calig.pipeline.attribution.attention import eager_function
from calig.pipeline.attribution.inside import Ends
from calig.pipeline.attribution.model import ExplainableModel, Inputs
from calig.pipeline.attribution.objective import Objective
from calig.pipeline.attribution.quadrature import gauss_legendre
from calig.pipeline.attribution.rollout import mask_pairs
from calig.pipeline.attribution.within_block import attention_calls


def attribute_attention(
    model: ExplainableModel, inputs: Inputs, objective: Objective, ends: Ends, block: int, nodes: int
) -> Tensor:
    """Attention attribution of one block: `A * integral of df/dA (aA) da`, all heads of the block scaled together.

    Every entry is what its attention weight adds to the objective; over heads and pairs they sum to the objective's
    change from no attention in this block to all of it (Hao et al. 2021).

    Args:
        model: In an open session.
        inputs: B examples.
        objective: What is explained.
        ends: With the states z^block kept.
        block: Which block, counted from 0.
        nodes: Gauss-Legendre nodes.

    Returns:
        (B, H, T, T), row = query, zero at padding.
    """
    entry = ends.end[block]
    assert entry is not None  # the caller kept it
    host = model.require_interface()

    def run(rows: Tensor) -> Tensor:
        total: Tensor | None = None
        for position, weight in gauss_legendre(nodes):
            found = _scaled_pass(model, host, inputs, objective, rows, entry[rows], block, position)
            total = weight * found if total is None else total + weight * found
        assert total is not None  # at least two nodes
        return mask_pairs(total, inputs.mask[rows])

    return torch.cat(model.budget.run(torch.arange(len(inputs), device=model.device), inputs.mask.shape[1], run))


def _scaled_pass(
    model: ExplainableModel,
    host: Any,
    inputs: Inputs,
    objective: Objective,
    rows: Tensor,
    entry: Tensor,
    block: int,
    scale: float,
) -> Tensor:
    """`A * df/dA` at the scaled map of one block, (N, H, T, T)."""
    seen: list[tuple[Tensor, Tensor, Tensor]] = []

    def scaled(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Any:
        output, weights = eager_function(module)(module, query, key, value, *args, **kwargs)
        if seen:  # a later block
            return output, weights
        # What attention returns is linear in the map, so scaling the one scales the other.
        leaf = (scale * output).detach().requires_grad_()
        seen.append((leaf, weights.detach(), value.detach().repeat_interleave(query.shape[1] // value.shape[1], dim=1)))
        return leaf, weights

    with attention_calls(host, scaled):
        trace = model.trace(inputs.select(rows), start=block, state=entry)
        leaf, weights, value = seen[0]
        (gradient,) = torch.autograd.grad(objective(trace.output, rows).sum(), [leaf])
    return weights * torch.einsum("nqhd,nhkd->nhqk", gradient, value)


def last_attention_gradient(
    model: ExplainableModel, inputs: Inputs, objective: Objective, ends: Ends, nodes: int
) -> Tensor:
    """Gradient of the objective with respect to the last block's map, mean along the path from baseline to input.

    Args:
        model: In an open session.
        inputs: B examples.
        objective: What is explained.
        ends: With layer 0 kept.
        nodes: Gauss-Legendre nodes.

    Returns:
        (B, H, T, T), zero at padding.
    """
    origin, end = ends.origin[0], ends.end[0]
    assert origin is not None and end is not None  # the caller kept them

    def run(rows: Tensor) -> Tensor:
        total: Tensor | None = None
        for position, weight in gauss_legendre(nodes):
            state = (origin[rows] + position * (end[rows] - origin[rows])).requires_grad_()
            trace = model.trace(inputs.select(rows), state=state, attention=True)
            (gradient,) = torch.autograd.grad(objective(trace.output, rows).sum(), [trace.attentions[-1]])
            total = weight * gradient if total is None else total + weight * gradient
        assert total is not None  # at least two nodes
        return mask_pairs(total, inputs.mask[rows])

    return torch.cat(model.budget.run(torch.arange(len(inputs), device=model.device), inputs.mask.shape[1], run))
