"""Paths from a baseline to an input, and the gradients at their nodes (METHODS 1.1, 1.2).

Shapes: P nodes (pairs of an example and a position a in [0, 1]), K layers that the path passes, T tokens, D width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from calig.pipeline.attribution.model import ExplainableModel, Inputs
from calig.pipeline.attribution.objective import Objective


@dataclass(frozen=True)
class Nodes:
    """What a path knows at P of its nodes.

    Attributes:
        value: (P,) the objective, in float64 on the host.
        states: (P, K, T, D) the states of the path's layers.
        gradients: (P, K, T, D) gradients of the objective with respect to them.
    """

    value: Tensor
    states: Tensor
    gradients: Tensor


class LayerPath:
    """A straight line between two states of one layer, and what it carries along in the layers behind.

    With `start=0` and `layers=range(L+1)` this is the shared path, whose every layer follows the image of the line
    between the embedding outputs; with `layers=[start]` it is the straight path at that layer, of which only the
    tail is run.

    Args:
        model: In an open session.
        inputs: B examples.
        objective: What is explained.
        origin: (B, T, D) the baseline's state at layer `start`.
        end: (B, T, D) the input's state there.
        start: Layer of the line.
        layers: Layers whose states and gradients are wanted, each at or behind `start`.
    """

    def __init__(
        self,
        model: ExplainableModel,
        inputs: Inputs,
        objective: Objective,
        origin: Tensor,
        end: Tensor,
        *,
        start: int,
        layers: list[int],
    ) -> None:
        self.model, self.inputs, self.objective = model, inputs, objective
        self.origin, self.end = origin.detach(), end.detach()
        self.start, self.layers = start, layers

    def evaluate(self, rows: Tensor, positions: Tensor) -> Nodes:
        """Run nodes in batches within the model's token budget.

        Args:
            rows: (P,) example of each node.
            positions: (P,) a in [0, 1] of each node, in float64; both on the host.
        """
        values, states, gradients = [], [], []
        for part in self.model.chunks(torch.arange(len(rows)), self.end.shape[1]):
            chosen = rows[part].to(self.end.device)
            line = self.end[chosen] - self.origin[chosen]
            state = self.origin[chosen] + positions[part].to(line)[:, None, None] * line
            trace = self.model.trace(self.inputs.select(chosen), start=self.start, state=state.requires_grad_())
            value = self.objective(trace.output, chosen)
            wanted = [self._recorded(trace.states[layer]) for layer in self.layers]
            # Rows do not touch each other, so one backward of the sum gives every row its own gradient.
            grads = torch.autograd.grad(value.sum(), wanted)
            values.append(value.detach().cpu().double())  # on the host: not every device has float64
            states.append(torch.stack([item.detach() for item in wanted], dim=1))
            gradients.append(torch.stack(grads, dim=1))
        return Nodes(torch.cat(values), torch.cat(states), torch.cat(gradients))

    @staticmethod
    def _recorded(state: Tensor | None) -> Tensor:
        if state is None:
            raise ValueError("a path cannot look at layers in front of its start")
        return state
