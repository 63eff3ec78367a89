"""Paths from a baseline to an input, and the gradients at their nodes (METHODS 1.1, 1.2).

Shapes: P nodes (pairs of an example and a position a in [0, 1]), J objectives that are explained together, K layers
that the path passes, T tokens, D width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from calig.pipeline.attribution.model import ExplainableModel, Inputs, Trace
from calig.pipeline.attribution.objective import Objective


@dataclass(frozen=True)
class Nodes:
    """What a path knows at P of its nodes.

    Attributes:
        value: (J, P) the objectives, in float64 on the host.
        states: (P, K, T, D) the states of the path's layers.
        gradients: (J, P, K, T, D) gradients of each objective with respect to them.
    """

    value: Tensor
    states: Tensor
    gradients: Tensor

    def select(self, index: Tensor) -> Nodes:
        """The nodes `index` (N,), in its order."""
        there = index.to(self.states.device)
        return Nodes(self.value[:, index.cpu()], self.states[there], self.gradients[:, there])

    def view(self, start: int, stop: int) -> Nodes:
        """The nodes from `start` to `stop`, without copying."""
        return Nodes(self.value[:, start:stop], self.states[start:stop], self.gradients[:, start:stop])

    def at_layers(self, layers: list[int]) -> Nodes:
        """The same nodes with the layers at some places of K only."""
        return Nodes(self.value, self.states[:, layers], self.gradients[:, :, layers])

    @staticmethod
    def join(parts: Sequence[Nodes]) -> Nodes:
        """The nodes of all parts, in their order."""
        if len(parts) == 1:
            return parts[0]
        return Nodes(
            torch.cat([part.value for part in parts], dim=1),
            torch.cat([part.states for part in parts]),
            torch.cat([part.gradients for part in parts], dim=1),
        )


@dataclass(frozen=True)
class Differentiated:
    """One traced pass of N rows, and what was asked of its graph, which is gone.

    Attributes:
        nodes: Values, states and gradients, P = N.
        maps: (N, H, T, T) attention of each block, where it was recorded.
        map_gradients: Gradients of each objective with respect to them: J lists.
    """

    nodes: Nodes
    maps: list[Tensor]
    map_gradients: list[list[Tensor]]


def differentiate(trace: Trace, objectives: Sequence[Objective], rows: Tensor, layers: Sequence[int]) -> Differentiated:
    """Differentiate all objectives in the graph of one forward pass.

    Args:
        trace: The pass, in its graph.
        objectives: What is explained.
        rows: (N,) example of each row of the pass.
        layers: K layers whose gradients are wanted.
    """
    states = [trace.state(layer) for layer in layers]
    wanted = [*states, *trace.attentions]
    values, gradients, map_gradients = [], [], []
    for index, objective in enumerate(objectives):
        value = objective(trace.output, rows)
        # Rows do not touch each other, so one backward of the sum gives every row its own gradient.
        found = torch.autograd.grad(value.sum(), wanted, retain_graph=index < len(objectives) - 1)
        values.append(value.detach().cpu().double())  # on the host: not every device has float64
        gradients.append(torch.stack(found[: len(states)], dim=1))
        map_gradients.append(list(found[len(states) :]))
    nodes = Nodes(torch.stack(values), torch.stack([state.detach() for state in states], dim=1), torch.stack(gradients))
    return Differentiated(nodes, [attention.detach() for attention in trace.attentions], map_gradients)


@dataclass(frozen=True)
class LayerPath:
    """A straight line between two states of one layer, and what it carries along in the layers behind.

    With `start=0` and `layers=range(L+1)` this is the shared path, whose every layer follows the image of the line
    between the embedding outputs; with `layers=[start]` it is the straight path at that layer, of which only the
    tail is run.

    Attributes:
        model: In an open session.
        inputs: B examples.
        objectives: What is explained; each node is run once for all of them.
        origin: (B, T, D) the baseline's state at layer `start`.
        end: (B, T, D) the input's state there.
        start: Layer of the line.
        layers: Layers whose states and gradients are wanted, each at or behind `start`.
        known: Nodes of all examples that were run already, by their position.
    """

    model: ExplainableModel
    inputs: Inputs
    objectives: Sequence[Objective]
    origin: Tensor
    end: Tensor
    start: int
    layers: list[int]
    known: Mapping[float, Nodes] = field(default_factory=dict)

    @property
    def width(self) -> int:
        """T, the tokens of a row."""
        return self.end.shape[1]

    def evaluate(self, rows: Tensor, positions: Tensor) -> Nodes:
        """Run nodes in passes within the model's token budget; those known already are not run again.

        Args:
            rows: (P,) example of each node.
            positions: (P,) a in [0, 1] of each node, in float64; both on the host.
        """
        found: list[Nodes] = []
        order: list[Tensor] = []
        unknown = torch.ones(len(rows), dtype=torch.bool)
        for position, nodes in self.known.items():
            at = positions == position
            if at.any():
                found.append(nodes.select(rows[at]))
                order.append(at.nonzero().flatten())
                unknown &= ~at
        rest = unknown.nonzero().flatten()
        found += self.model.budget.run(rest, self.width, lambda part: self._run(rows[part], positions[part]))
        joined = Nodes.join(found)
        return joined.select(torch.cat([*order, rest]).argsort()) if order else joined

    def trace(self, rows: Tensor, positions: Tensor, *, attention: bool = False) -> Trace:
        """One pass of nodes, in its graph; the arguments of `evaluate`, few enough for a pass."""
        chosen = rows.to(self.end.device)
        line = self.end[chosen] - self.origin[chosen]
        state = self.origin[chosen] + positions.to(line)[:, None, None] * line
        batch = self.inputs.select(chosen)
        return self.model.trace(batch, start=self.start, state=state.requires_grad_(), attention=attention)

    def _run(self, rows: Tensor, positions: Tensor) -> Nodes:
        trace = self.trace(rows, positions)
        return differentiate(trace, self.objectives, rows.to(self.end.device), self.layers).nodes
