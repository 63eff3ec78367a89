"""What the methods ask a model for: the two ends of a path, token evidence at every layer, matrices from attention.

Shapes: B examples, T tokens, D width, H heads, L blocks.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from calig.pipeline.attribution.baselines import baseline_trace
from calig.pipeline.attribution.cuts import require_cuts
from calig.pipeline.attribution.methods.base import Baseline
from calig.pipeline.attribution.model import ExplainableModel, Inputs, Trace, UnsupportedModelError
from calig.pipeline.attribution.objective import Objective
from calig.pipeline.attribution.path import LayerPath
from calig.pipeline.attribution.quadrature import FIRST_NODES, Integral, Rule, integrate_fixed, integrate_secant

_ATTENTION_FLOATS = 2**27  # maps and their gradients held at once: 512 MiB in float32


@dataclass(frozen=True)
class Ends:
    """The input x and its baseline x'.

    Attributes:
        origin: b^l, (B, T, D) each, for the layers kept (None elsewhere).
        end: z^l likewise.
        output_change: (B,) f(x) - f(x') in float64, on the host.
        readout: (B, T) read-out weights w of x.
    """

    origin: list[Tensor | None]
    end: list[Tensor | None]
    output_change: Tensor
    readout: Tensor


def readout_weights(gradient: Tensor, mask: Tensor) -> Tensor:
    """Read-out weights w (METHODS 0): the positions of the last block's output that the head looks at.

    Found from the gradient of the objective itself, so that no table of heads is needed: one position for a head on
    the first or the last token, uniform weights over exactly the positions that a pooling head averages.

    Args:
        gradient: (B, T, D) of the objective with respect to z^L.
        mask: (B, T) true on real positions.

    Returns:
        (B, T), rows summing to 1. Not a number where the gradient is not finite or vanishes (a saturated head): what is
        computed from it is then not finite either, and the sample is named.

    Raises:
        UnsupportedModelError: No example depends on the last block's output.
    """
    gradient = torch.where(mask[..., None], gradient, 0.0)
    seen = gradient.abs().sum(dim=-1) > 0
    count = seen.sum(dim=1, keepdim=True)
    finite = gradient.isfinite().flatten(1).all(dim=1, keepdim=True)
    if not finite.any():
        raise UnsupportedModelError(
            "the gradient of the objective is not finite: the model's output or weights hold NaN or infinity. Was the "
            "training stable? A lower learning rate, or float32 instead of float16, usually mends it."
        )
    if (count == 0).all():
        raise UnsupportedModelError(
            "the objective does not depend on the last block's output, so nothing can be attributed through the "
            "blocks; is the head connected to them, does it read real tokens (not padding: pad on the other side), and "
            "are its weights not all zero?"
        )
    return torch.where(finite & (count > 0), seen.to(gradient.dtype) / count.clamp_min(1), torch.nan)


def _pass_with_readout(
    model: ExplainableModel, inputs: Inputs, objective: Objective, rows: Tensor
) -> tuple[Trace, Tensor, Tensor]:
    """A traced pass of some examples, the objective (N,) in its graph, and their read-out weights (N, T)."""
    trace = model.trace(inputs.select(rows))
    value = objective(trace.output, rows)
    last = trace.states[-1]
    assert last is not None  # the pass started at the embedding, so every layer was recorded
    (gradient,) = torch.autograd.grad(value.sum(), [last])
    return trace, value, readout_weights(gradient, inputs.mask[rows])


def find_ends(
    model: ExplainableModel, inputs: Inputs, objective: Objective, baseline: Baseline, layers: list[int] | None
) -> Ends:
    """Run x and x' once.

    Args:
        model: In an open session.
        inputs: B examples.
        objective: What is explained.
        baseline: Name of the baseline.
        layers: Layers whose states are kept; None keeps all.
    """
    origins: list[list[Tensor]] = []
    ends: list[list[Tensor]] = []
    changes, readouts = [], []
    for rows in model.chunks(torch.arange(len(inputs), device=model.device), inputs.mask.shape[1]):
        trace, value, readout = _pass_with_readout(model, inputs, objective, rows)
        readouts.append(readout)
        other = baseline_trace(model, inputs, rows, baseline)
        changes.append(value.detach().cpu().double() - objective(other.output, rows).cpu().double())
        kept = range(model.depth + 1) if layers is None else layers
        ends.append([state.detach() for k in kept if (state := trace.states[k]) is not None])
        origins.append([state for k in kept if (state := other.states[k]) is not None])
    where = list(range(model.depth + 1)) if layers is None else layers
    origin: list[Tensor | None] = [None] * (model.depth + 1)
    end: list[Tensor | None] = [None] * (model.depth + 1)
    for slot, layer in enumerate(where):
        origin[layer] = torch.cat([part[slot] for part in origins])
        end[layer] = torch.cat([part[slot] for part in ends])
    return Ends(origin, end, torch.cat(changes), torch.cat(readouts))


def layer_evidence(
    model: ExplainableModel,
    inputs: Inputs,
    objective: Objective,
    ends: Ends,
    *,
    layers: list[int],
    path: Literal["shared", "straight"],
    steps: int | Literal["auto"],
    tolerance: float,
    max_steps: int,
    quadrature: Rule | None = None,
) -> Integral:
    """Token evidence r^l at the given layers (METHODS 1).

    Args:
        model: In an open session.
        inputs: B examples.
        objective: What is explained.
        ends: Of these inputs, with the states that the path needs (shared: layer 0; straight: every layer).
        layers: Layers l wanted.
        path: `shared` follows one line between the embedding outputs, `straight` takes a line at each layer.
        steps: Nodes, or `auto` to refine until the bound is below `tolerance`.
        tolerance: Relative error bound that `auto` works towards.
        max_steps: Nodes after which `auto` gives up.
        quadrature: Rule of the straight path at a fixed number of nodes; Gauss-Legendre if None.

    Returns:
        Evidence of shape (B, len(layers), T) in float64 on the host, zero at padding.
    """

    def line(start: int, watched: list[int]) -> LayerPath:
        origin, end = ends.origin[start], ends.end[start]
        assert origin is not None and end is not None  # the caller kept the layers that its path starts at
        return LayerPath(model, inputs, objective, origin, end, start=start, layers=watched)

    def refine(one: LayerPath) -> Integral:
        if steps == "auto":
            return integrate_secant(one, nodes=FIRST_NODES, tolerance=tolerance, max_nodes=max_steps)
        return integrate_secant(one, nodes=steps, tolerance=float("inf"), max_nodes=steps)

    if path == "shared":
        return refine(line(0, layers))
    if any(layers):
        # A tail is only a function of its layer's state if nothing is carried past it.
        one = inputs.select(torch.zeros(1, dtype=torch.long, device=model.device))
        with torch.no_grad():
            output = model.trace(one, state=_first(ends.origin[0])).output
        require_cuts(model, one, output, {layer: ends.origin[layer] for layer in layers})
    parts = [
        refine(line(layer, [layer]))
        if steps == "auto"
        else integrate_fixed(line(layer, [layer]), steps, quadrature or "gauss-legendre")
        for layer in layers
    ]
    evidence = torch.cat([part.evidence for part in parts], dim=1)
    bounds = [part.error_bound for part in parts if part.error_bound is not None]
    return Integral(
        torch.where(inputs.mask[:, None].cpu(), evidence, 0.0),
        torch.cat(bounds, dim=1) if bounds else None,
        torch.stack([part.steps_used for part in parts]).amax(dim=0),
    )


def _first(state: Tensor | None) -> Tensor:
    assert state is not None  # the straight path keeps every layer
    return state[:1]


Combine = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(B, H, T, T) maps, their gradients and the (B, T) mask to one (B, T, T) matrix."""


def attention_matrices(
    model: ExplainableModel, inputs: Inputs, objective: Objective, combine: Combine
) -> tuple[list[Tensor], Tensor]:
    """One matrix per block from the attention maps at the input and their gradients.

    Maps are reduced chunk by chunk, so that 2 L B H T^2 floats never stand in memory at once.

    Args:
        model: In an open session.
        inputs: B examples.
        objective: What is explained.
        combine: Reduces the maps and gradients of one block.

    Returns:
        L matrices of shape (B, T, T), and the read-out weights (B, T).

    Raises:
        UnsupportedModelError: The family does not use the attention interface.
    """
    tokens = inputs.mask.shape[1]
    blocks: list[list[Tensor]] = []
    readouts = []
    heads = getattr(model.structure.config, "num_attention_heads", 12)
    layers = getattr(model.structure.config, "num_hidden_layers", len(model.structure.blocks))
    # A budget of tokens does not bound what grows with their square.
    rows_at_once = max(1, _ATTENTION_FLOATS // (2 * layers * heads * tokens * tokens))
    narrow = min(rows_at_once, max(1, model.max_tokens // tokens))
    for rows in torch.arange(len(inputs), device=model.device).split(narrow):
        trace = model.trace(inputs.select(rows), attention=True)
        value = objective(trace.output, rows)
        last = trace.states[-1]
        assert last is not None
        # The objective may see the last block at the read-out only, but every map lies on a way to it.
        *gradients, state_gradient = torch.autograd.grad(value.sum(), [*trace.attentions, last])
        mask = inputs.mask[rows]
        readouts.append(readout_weights(state_gradient, mask))
        blocks.append(
            [
                combine(attention.detach(), gradient, mask)
                for attention, gradient in zip(trace.attentions, gradients, strict=True)
            ]
        )
    return [torch.cat(parts) for parts in zip(*blocks, strict=True)], torch.cat(readouts)


def with_readout_special(model: ExplainableModel, inputs: Inputs, objective: Objective) -> Inputs:
    """Treat the read-out positions as special, for models that name no special tokens at all (ARCHITECTURE)."""
    chunks = model.chunks(torch.arange(len(inputs), device=model.device), inputs.mask.shape[1])
    weights = torch.cat([_pass_with_readout(model, inputs, objective, rows)[2] for rows in chunks])
    return replace(inputs, special=inputs.special | (weights == 1))
