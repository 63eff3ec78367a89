"""What the methods ask a model for: the two ends of a path, token evidence at every layer, matrices from attention.

A method asks for one objective. Where several are explained together (`Inputs.together`), the first question is
answered for all of them from the same forward passes, and the answers are kept for the others.

Shapes: B examples, J objectives that are explained together, T tokens, D width, H heads, L blocks.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, TypeVar

import torch
from torch import Tensor

from calig.pipeline.attribution.baselines import baseline_trace
from calig.pipeline.attribution.cuts import require_cuts
from calig.pipeline.attribution.methods.base import Baseline
from calig.pipeline.attribution.model import ExplainableModel, Inputs, UnsupportedModelError
from calig.pipeline.attribution.objective import Objective
from calig.pipeline.attribution.path import Differentiated, LayerPath, Nodes, differentiate
from calig.pipeline.attribution.quadrature import Integral, Rule, integrate_fixed, integrate_secant, scale_of
from calig.pipeline.attribution.refinement import integrate_to_tolerance
from calig.pipeline.attribution.windows import own_mean

Answer = TypeVar("Answer")
_ATTENTION_FLOATS = 2**27  # maps and their gradients held at once: 512 MiB in float32


@dataclass(frozen=True)
class Ends:
    """The input x and its baseline x'.

    Attributes:
        origin: b^l, (B, T, D) each, for the layers kept (None elsewhere).
        end: z^l likewise.
        output_change: (B,) f(x) - f(x') in float64, on the host.
        readout: (B, T) read-out weights w of x.
        baseline: Name of x'.
        nodes: With gradients: the two ends as nodes of the shared path, at all layers and for all objectives that are
            explained together.
    """

    origin: list[Tensor | None]
    end: list[Tensor | None]
    output_change: Tensor
    readout: Tensor
    baseline: Baseline
    nodes: Mapping[float, Nodes] = field(default_factory=dict)


def _together(inputs: Inputs, objective: Objective) -> tuple[Sequence[Objective], int]:
    """The objectives that are explained together with this one, itself included, and its place among them."""
    for place, goal in enumerate(inputs.together):
        if goal is objective:
            return inputs.together, place
    return (objective,), 0


def _key(key: Hashable, goals: Sequence[Objective]) -> Hashable:
    return key, tuple(id(goal) for goal in goals)


def _once(inputs: Inputs, goals: Sequence[Objective], key: Hashable, compute: Callable[[], Answer]) -> Answer:
    """What `compute` returned for these inputs and objectives when it was first asked."""
    where = _key(key, goals)
    if where not in inputs.memo:
        # The goals are kept beside it: an id is only good as long as its object lives.
        inputs.memo[where] = compute(), goals
    return inputs.memo[where][0]


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


@dataclass(frozen=True)
class _Input:
    """The input x, run once.

    Attributes:
        node: Value, states and gradients: of all layers, or of the last one only.
        states: z^0 to z^L, (B, T, D) each.
        readout: J read-out weights (B, T).
    """

    node: Nodes
    states: Sequence[Tensor]
    readout: list[Tensor]


def _run_input(model: ExplainableModel, inputs: Inputs, goals: Sequence[Objective], *, gradients: bool) -> _Input:
    """The pass of x: with gradients at every layer, or with no more than the read-out needs."""
    if (whole := inputs.memo.get(_key(("x", True), goals))) is not None:
        return whole[0]

    def run(rows: Tensor) -> tuple[Nodes, list[Tensor]]:
        trace = model.trace(inputs.select(rows))
        layers = range(model.depth + 1)
        node = differentiate(trace, goals, rows, layers if gradients else [model.depth]).nodes
        return node, [trace.state(layer).detach() for layer in layers]

    def compute() -> _Input:
        parts = model.budget.run(_rows(model, inputs), inputs.mask.shape[1], run)
        node = Nodes.join([node for node, _ in parts])
        return _as_input(inputs, node, [torch.cat(layer) for layer in zip(*(s for _, s in parts), strict=True)])

    return _once(inputs, goals, ("x", gradients), compute)


def _as_input(inputs: Inputs, node: Nodes, states: Sequence[Tensor]) -> _Input:
    return _Input(node, states, [readout_weights(gradient, inputs.mask) for gradient in node.gradients[:, :, -1]])


def _run_baseline(
    model: ExplainableModel, inputs: Inputs, goals: Sequence[Objective], baseline: Baseline, *, gradients: bool
) -> tuple[Tensor, Sequence[Tensor], Nodes | None]:
    """The pass of x': values (J, B), b^0 to b^L, and the node of the shared path if gradients are wanted."""

    def run(rows: Tensor) -> tuple[Tensor, Sequence[Tensor], Nodes | None]:
        trace = baseline_trace(model, inputs, rows, baseline, graph=gradients)
        if gradients:
            node = differentiate(trace, goals, rows, range(model.depth + 1)).nodes
            return node.value, node.states.unbind(1), node
        value = torch.stack([goal(trace.output, rows).cpu().double() for goal in goals])
        return value, [trace.state(layer) for layer in range(model.depth + 1)], None

    def compute() -> tuple[Tensor, Sequence[Tensor], Nodes | None]:
        parts = model.budget.run(_rows(model, inputs), inputs.mask.shape[1], run)
        value = torch.cat([value for value, _, _ in parts], dim=1)
        nodes = [node for _, _, node in parts if node is not None]
        states = [torch.cat(layer) for layer in zip(*(states for _, states, _ in parts), strict=True)]
        return value, states, Nodes.join(nodes) if nodes else None

    return _once(inputs, goals, ("x'", baseline, gradients), compute)


def find_ends(
    model: ExplainableModel,
    inputs: Inputs,
    objective: Objective,
    baseline: Baseline,
    layers: list[int] | None,
    *,
    gradients: bool = False,
) -> Ends:
    """Run x and x' once.

    Args:
        model: In an open session.
        inputs: B examples.
        objective: What is explained.
        baseline: Name of the baseline.
        layers: Layers whose states are kept; None keeps all.
        gradients: Differentiate at every layer on the way: both ends of the shared path are then known.
    """
    goals, own = _together(inputs, objective)
    x = _run_input(model, inputs, goals, gradients=gradients)
    value, states, node = _run_baseline(model, inputs, goals, baseline, gradients=gradients)
    kept = range(model.depth + 1) if layers is None else layers
    return Ends(
        origin=[state if layer in kept else None for layer, state in enumerate(states)],
        end=[state if layer in kept else None for layer, state in enumerate(x.states)],
        output_change=x.node.value[own] - value[own],
        readout=x.readout[own],
        baseline=baseline,
        nodes={} if node is None else {0.0: node, 1.0: x.node},
    )


def input_gradient(model: ExplainableModel, inputs: Inputs, objective: Objective, layer: int) -> Tensor:
    """(B, T, D) gradient of the objective at the input with respect to z^layer, in an open session."""
    goals, own = _together(inputs, objective)
    return _run_input(model, inputs, goals, gradients=True).node.gradients[own, :, layer]


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
    goals, own = _together(inputs, objective)
    limit: float | Tensor = tolerance
    if inputs.document is not None:
        # Windows may oppose each other: what is allowed is a share of what their document's output changes by.
        limit = tolerance * scale_of(own_mean(ends.output_change, inputs.document)) / scale_of(ends.output_change)

    def line(start: int, watched: list[int]) -> LayerPath:
        origin, end = ends.origin[start], ends.end[start]
        assert origin is not None and end is not None  # the caller kept the layers that its path starts at
        known = {at: node.at_layers(watched) for at, node in ends.nodes.items()} if path == "shared" else {}
        return LayerPath(model, inputs, goals, origin, end, start, watched, known)

    def integrate(one: LayerPath) -> list[Integral]:
        if steps == "auto":
            return integrate_to_tolerance(one, tolerance=limit, max_nodes=max_steps)
        if path == "shared":
            return integrate_secant(one, steps)
        return integrate_fixed(one, steps, quadrature or "gauss-legendre")

    def compute() -> list[Integral]:
        if path == "shared":
            return integrate(line(0, layers))
        if any(layers):
            # A tail is only a function of its layer's state if nothing is carried past it.
            one = inputs.select(torch.zeros(1, dtype=torch.long, device=model.device))
            with torch.no_grad():
                output = model.trace(one, state=_first(ends.origin[0])).output
            require_cuts(model, one, output, {layer: ends.origin[layer] for layer in layers})
        found = [integrate(line(layer, [layer])) for layer in layers]
        return [_stack_layers(parts, inputs.mask) for parts in zip(*found, strict=True)]

    key = ("evidence", ends.baseline, tuple(layers), path, steps, tolerance, max_steps, quadrature)
    return _once(inputs, goals, key, compute)[own]


def _stack_layers(parts: Sequence[Integral], mask: Tensor) -> Integral:
    """One integral from those of single layers, each on a path of its own."""
    evidence = torch.cat([part.evidence for part in parts], dim=1)
    bounds = [part.error_bound for part in parts if part.error_bound is not None]
    return Integral(
        torch.where(mask[:, None].cpu(), evidence, 0.0),
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

    Maps are reduced pass by pass, so that 2 L B H T^2 floats never stand in memory at once. The pass also knows what
    `find_ends` asks of x, which is not run again.

    Args:
        model: In an open session.
        inputs: B examples.
        objective: What is explained.
        combine: Reduces the maps and gradients of one block. The same function for objectives that are explained
            together, else they do not share the pass.

    Returns:
        L matrices of shape (B, T, T), and the read-out weights (B, T).

    Raises:
        UnsupportedModelError: The family does not use the attention interface.
    """
    goals, own = _together(inputs, objective)

    def run(rows: Tensor) -> tuple[Nodes, list[list[Tensor]]]:
        trace = model.trace(inputs.select(rows), attention=True)
        found = differentiate(trace, goals, rows, range(model.depth + 1))
        return found.nodes, _combine(found, combine, inputs.mask[rows])

    def compute() -> list[list[Tensor]]:
        parts = model.budget.run(_rows(model, inputs), inputs.mask.shape[1], run, most=_attention_rows(model, inputs))
        node = Nodes.join([node for node, _ in parts])
        _once(inputs, goals, ("x", True), lambda: _as_input(inputs, node, node.states.unbind(1)))
        return [_join_blocks([matrices[place] for _, matrices in parts]) for place in range(len(goals))]

    matrices = _once(inputs, goals, ("attention", combine), compute)[own]
    return matrices, _run_input(model, inputs, goals, gradients=True).readout[own]


def path_attention_matrices(
    model: ExplainableModel, inputs: Inputs, objective: Objective, combine: Combine, ends: Ends, integral: Integral
) -> list[Tensor]:
    """One matrix per block, averaged along the shared path (METHODS 2.2).

    Args:
        model: In an open session.
        inputs: B examples.
        objective: What is explained.
        combine: As in `attention_matrices`.
        ends: Of these inputs.
        integral: The shared path of this objective; its nodes are run again, with attention maps.

    Returns:
        L matrices of shape (B, T, T): `sum_k v_k combine(A(a_k), dA(a_k))`, v the trapezoid weights of the example's
        own nodes.
    """
    goals, own = _together(inputs, objective)
    rows, positions = integral.rows, integral.positions
    origin, end = ends.origin[0], ends.end[0]
    assert rows is not None and positions is not None and origin is not None and end is not None  # a shared path

    def compute() -> list[list[Tensor]]:
        path = LayerPath(model, inputs, goals, origin, end, 0, [model.depth])
        weights = trapezoid_weights(rows, positions)
        total: list[list[Tensor]] = []

        def run(part: Tensor) -> None:
            chosen = rows[part].to(model.device)
            found = differentiate(path.trace(rows[part], positions[part], attention=True), goals, chosen, path.layers)
            matrices = _combine(found, combine, inputs.mask[chosen])
            if not total:
                total.extend([[new.new_zeros(len(inputs), *new.shape[1:]) for new in own] for own in matrices])
            for sums, goal in zip(total, matrices, strict=True):
                for block, new in zip(sums, goal, strict=True):
                    block.index_add_(0, chosen, new * weights[part].to(new)[:, None, None])

        model.budget.run(torch.arange(len(rows)), path.width, run, most=_attention_rows(model, inputs))
        return total

    key = ("attention along the path", combine, id(integral.positions))
    return _once(inputs, goals, key, compute)[own]


def trapezoid_weights(rows: Tensor, positions: Tensor) -> Tensor:
    """Weights (P,) of nodes in any order: half the distance between an example's neighbouring nodes on either side."""
    weights = torch.zeros_like(positions)
    for example in rows.unique():
        mine = (rows == example).nonzero().flatten()
        mine = mine[positions[mine].argsort()]
        half = positions[mine].diff() / 2
        weights[mine[:-1]] += half
        weights[mine[1:]] += half
    return weights


def _combine(found: Differentiated, combine: Combine, mask: Tensor) -> list[list[Tensor]]:
    """J lists of L matrices."""
    return [
        [combine(attention, gradient, mask) for attention, gradient in zip(found.maps, gradients, strict=True)]
        for gradients in found.map_gradients
    ]


def _join_blocks(parts: Sequence[list[Tensor]]) -> list[Tensor]:
    return [torch.cat(block) for block in zip(*parts, strict=True)]


def _attention_rows(model: ExplainableModel, inputs: Inputs) -> int:
    """Rows whose attention maps stand in memory at once: a budget of tokens does not bound what grows with T^2."""
    heads = getattr(model.structure.config, "num_attention_heads", 12)
    heads = max(heads) if isinstance(heads, list | tuple) else heads  # one number for each stage of the network
    layers = getattr(model.structure.config, "num_hidden_layers", len(model.structure.blocks))
    return max(1, _ATTENTION_FLOATS // (2 * layers * heads * inputs.mask.shape[1] ** 2))


def _rows(model: ExplainableModel, inputs: Inputs) -> Tensor:
    return torch.arange(len(inputs), device=model.device)


def with_readout_special(model: ExplainableModel, inputs: Inputs, objective: Objective) -> Inputs:
    """Treat the read-out positions as special, for models that name no special tokens at all (ARCHITECTURE)."""
    weights = _run_input(model, inputs, [objective], gradients=False).readout[0]
    return replace(inputs, special=inputs.special | (weights == 1))
