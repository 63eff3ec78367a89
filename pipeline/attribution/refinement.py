"""Refinement of paths until a bound on their error is small enough: `steps: auto` (METHODS 1.3).

Shapes: J objectives that are explained together, P nodes and I intervals of all examples of a group, K layers of the
path, T tokens, D width.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from calig.pipeline.attribution.path import LayerPath, Nodes
from calig.pipeline.attribution.quadrature import Integral, measure, scale_of

FIRST_NODES = 9  # where `steps: auto` starts, both ends counted
_KEPT_FLOATS = 2**28  # states and gradients kept while paths are refined: 1 GiB in float32


def integrate_to_tolerance(path: LayerPath, *, tolerance: float | Tensor, max_nodes: int) -> list[Integral]:
    """Integrate with end-point-averaged gradients and secant steps, refining until the error bound is small enough.

    Along the path the objective is known at every node, so each interval's true increment is known and the error of
    every layer's sum is measured for nothing. Objectives that are explained together share the nodes: an interval is
    split if one of them needs it.

    Args:
        path: The path.
        tolerance: Bound to reach, relative to max(|f(x) - f(x')|, 1e-3); one, or one per example (B,).
        max_nodes: Nodes after which an example is given up.

    Returns:
        J results.
    """
    batch, tokens, width = path.end.shape
    capacity = max(1, _KEPT_FLOATS // ((1 + len(path.objectives)) * len(path.layers) * tokens * width))
    # Room for twice the first nodes: most examples need no more at a time.
    group = max(1, capacity // (2 * FIRST_NODES))
    limits = torch.as_tensor(tolerance, dtype=torch.float64).expand(batch)
    groups = torch.arange(batch).split(group)
    parts = [_Refinement(path, rows, capacity, limits[rows], max_nodes).run() for rows in groups]
    # The same nodes for all objectives, as one tensor: who integrates along them again asks by its identity.
    first = [part[0] for part in parts]
    rows = torch.cat([part.rows for part in first if part.rows is not None])
    positions = torch.cat([part.positions for part in first if part.positions is not None])
    return [_join(own, rows, positions) for own in zip(*parts, strict=True)]


def _join(parts: tuple[Integral, ...], rows: Tensor, positions: Tensor) -> Integral:
    return Integral(
        torch.cat([part.evidence for part in parts]),
        torch.cat([part.error_bound for part in parts if part.error_bound is not None]),
        torch.cat([part.steps_used for part in parts]),
        rows,
        positions,
    )


class _Refinement:
    """The paths of one group of examples while they are refined together.

    Nodes and intervals of all examples lie in flat tables; `owner` says whose they are. Which intervals an example
    splits depends on its own errors only. Everything is on the host in float64 except the states and gradients, of
    which at most `capacity` nodes are kept on the model's device; what is missing is run again.
    """

    def __init__(self, path: LayerPath, rows: Tensor, capacity: int, tolerance: Tensor, max_nodes: int) -> None:
        self.path, self.rows, self.capacity = path, rows, capacity
        self.tolerance, self.max_nodes = tolerance, max_nodes
        self.kept: dict[int, tuple[Tensor, Tensor]] = {}  # node -> states (K, T, D), gradients (J, K, T, D)
        count = len(rows)
        self.owner = torch.arange(count).repeat_interleave(FIRST_NODES)
        self.position = torch.linspace(0, 1, FIRST_NODES, dtype=torch.float64).repeat(count)
        self.value = torch.zeros(len(path.objectives), count * FIRST_NODES, dtype=torch.float64)
        ends = torch.arange(count * FIRST_NODES).view(count, FIRST_NODES)
        for nodes in ends.flatten().split(self._piece()):
            self._keep(nodes, self._evaluate(nodes))
        # (I, 2): the two nodes of each interval.
        self.intervals = torch.stack([ends[:, :-1], ends[:, 1:]], dim=-1).flatten(0, 1)
        first, last = ends[:, 0], ends[:, -1]
        self.scale = scale_of(self.value[:, last] - self.value[:, first])  # (J, examples)
        self.parts, self.errors = self._measure(self.intervals)

    def run(self) -> list[Integral]:
        while chosen := self._worst():
            self._split(torch.tensor(chosen))
            self._forget()
        owner = self.owner[self.intervals[:, 0]]
        evidence = self.parts.new_zeros(len(self.value), len(self.rows), *self.parts.shape[2:])
        evidence.index_add_(1, owner, self.parts)
        used = torch.bincount(self.owner, minlength=len(self.rows))
        relative = self._bound() / self.scale[..., None]
        where = self.rows[self.owner], self.position
        return [Integral(own, error, used, *where) for own, error in zip(evidence, relative, strict=True)]

    # ---------------------------------------------------------------------------------------------- decisions

    def _bound(self) -> Tensor:
        """(J, examples, K) summed absolute errors."""
        total = self.errors.new_zeros(len(self.value), len(self.rows), self.errors.shape[2])
        return total.index_add_(1, self.owner[self.intervals[:, 0]], self.errors)

    def _in_first(self, errors: Tensor, owner: Tensor) -> Tensor:
        """Errors (J, N, K) to one per entry (N,), in units of the first objective: the largest of layers and goals."""
        share = self.scale[:1] / self.scale
        return (errors.amax(dim=2) * share[:, owner]).amax(dim=0)

    def _worst(self) -> list[int]:
        """The intervals to halve: per example the fewest that promise to do, worst first.

        The error of an interval is of third order, so its two halves keep about a quarter of it: as many as bring the
        bound within the tolerance then, or as leave half of it to the others, whichever are fewer.
        """
        allowed = (self.tolerance * self.scale[0]).tolist()
        bound = self._in_first(self._bound(), torch.arange(len(self.rows))).tolist()
        counts = torch.bincount(self.owner, minlength=len(self.rows)).tolist()
        owners = self.owner[self.intervals[:, 0]]
        errors = self._in_first(self.errors, owners).tolist()
        mine: list[list[int]] = [[] for _ in allowed]
        for interval, owner in enumerate(owners.tolist()):
            mine[owner].append(interval)
        chosen: list[int] = []
        for example, limit in enumerate(allowed):
            room = self.max_nodes - counts[example]
            if bound[example] <= limit or room <= 0:
                continue
            # Errors that differ by rounding alone must not change the order from one batch to another: they are
            # ranked by quarter powers of two, and then by their place on the path.
            starts = self.position[self.intervals[mine[example], 0]].tolist()
            place = dict(zip(mine[example], starts, strict=True))
            ranked = sorted(mine[example], key=lambda k: (-round(4 * math.log2(max(errors[k], 1e-30))), place[k]))
            rest = total = sum(errors[k] for k in ranked)
            for interval in ranked[:room]:
                chosen.append(interval)
                rest -= errors[interval]
                if rest <= limit / 2 or rest + (total - rest) / 4 <= limit:
                    break
        return chosen

    def _split(self, chosen: Tensor) -> None:
        a, b = self.intervals[chosen].T
        middle = torch.arange(len(self.owner), len(self.owner) + len(chosen))
        self.owner = torch.cat([self.owner, self.owner[a]])
        self.position = torch.cat([self.position, (self.position[a] + self.position[b]) / 2])
        self.value = torch.cat([self.value, self.value.new_zeros(len(self.value), len(chosen))], dim=1)
        halves, parts, errors = [], [], []
        for piece in torch.arange(len(chosen)).split(self._piece()):
            new = self._evaluate(middle[piece])
            left, right = self._nodes(a[piece]), self._nodes(b[piece])
            rows = self.rows[self.owner[a[piece]]]
            for ends, pair in (((left, new), (a, middle)), ((new, right), (middle, b))):
                part, error = measure(self.path, *ends, rows)
                halves.append(torch.stack([node[piece] for node in pair], dim=1))
                parts.append(part)
                errors.append(error)
            self._keep(middle[piece], new)
        remains = torch.ones(len(self.intervals), dtype=torch.bool)
        remains[chosen] = False
        self.intervals = torch.cat([self.intervals[remains], *halves])
        self.parts = torch.cat([self.parts[:, remains], *parts], dim=1)
        self.errors = torch.cat([self.errors[:, remains], *errors], dim=1)

    def _measure(self, intervals: Tensor) -> tuple[Tensor, Tensor]:
        found = [
            measure(self.path, self._nodes(piece[:, 0]), self._nodes(piece[:, 1]), self.rows[self.owner[piece[:, 0]]])
            for piece in intervals.split(self._piece())
        ]
        return torch.cat([part for part, _ in found], dim=1), torch.cat([error for _, error in found], dim=1)

    # -------------------------------------------------------------------------------------------------- nodes

    def _piece(self) -> int:
        """Intervals at a time: as many as a pass holds nodes."""
        return self.path.model.budget.rows(self.path.width)

    def _evaluate(self, nodes: Tensor) -> Nodes:
        found = self.path.evaluate(self.rows[self.owner[nodes]], self.position[nodes])
        self.value[:, nodes] = found.value
        return found

    def _keep(self, nodes: Tensor, found: Nodes) -> None:
        """Keep states and gradients while there is room; clones, because a slice would hold the whole pass."""
        room = max(0, self.capacity - len(self.kept))
        for place, node in enumerate(nodes.tolist()[:room]):
            self.kept[node] = found.states[place].clone(), found.gradients[:, place].clone()

    def _forget(self) -> None:
        """Make room: keep nodes of the worst intervals of examples that are not there yet, up to half of it."""
        owners = self.owner[self.intervals[:, 0]]
        unfinished = self._in_first(self._bound(), torch.arange(len(self.rows))) > self.tolerance * self.scale[0]
        errors = self._in_first(self.errors, owners) / self.scale[0, owners]
        useful: dict[int, None] = {}
        for interval in errors.argsort(descending=True).tolist():
            if unfinished[owners[interval]]:
                useful.update(dict.fromkeys(self.intervals[interval].tolist()))
        few = set(list(useful)[: max(1, self.capacity // 2)])
        self.kept = {node: tensors for node, tensors in self.kept.items() if node in few}

    def _nodes(self, nodes: Tensor) -> Nodes:
        """The nodes (N,), which may repeat; those forgotten are run again."""
        wanted = nodes.tolist()
        missing = torch.tensor([node for node in dict.fromkeys(wanted) if node not in self.kept], dtype=torch.long)
        again = dict(zip(missing.tolist(), _unbind(self._evaluate(missing)), strict=True)) if len(missing) else {}
        tensors = [self.kept[node] if node in self.kept else again[node] for node in wanted]
        states = torch.stack([states for states, _ in tensors])
        return Nodes(self.value[:, nodes], states, torch.stack([gradients for _, gradients in tensors], dim=1))


def _unbind(nodes: Nodes) -> list[tuple[Tensor, Tensor]]:
    return list(zip(nodes.states.unbind(), nodes.gradients.unbind(1), strict=True))
