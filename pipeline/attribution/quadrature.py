"""Integration of gradients along paths: fixed rules, and the refinement that reaches a given error (METHODS 1).

Shapes: B examples, K layers of the path, T tokens, D width; intervals lie between neighbouring nodes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache
from typing import Literal

import torch
from torch import Tensor

from calig.pipeline.attribution.path import LayerPath

FIRST_NODES = 9  # where `steps: auto` starts, both ends counted
_CACHE_FLOATS = 2**28  # states and gradients kept while paths are refined: 1 GiB in float32

Rule = Literal["gauss-legendre", "trapezoid", "riemann-middle"]


@dataclass(frozen=True)
class Integral:
    """An integrated path.

    Attributes:
        evidence: (B, K, T) relevance of every token at every layer of the path; like the others on the host.
        error_bound: (B, K) bound on the error of each layer's sum, relative to max(|f(x) - f(x')|, 1e-3); None for
            rules whose nodes do not include the ends of their intervals.
        steps_used: (B,) nodes.
    """

    evidence: Tensor
    error_bound: Tensor | None
    steps_used: Tensor


def scale_of(output_change: Tensor) -> Tensor:
    """The denominator of relative gaps and bounds: max(|f(x) - f(x')|, 1e-3)."""
    return output_change.abs().clamp_min(1e-3)


def relative_gap(evidence: Tensor, output_change: Tensor) -> Tensor:
    """The completeness gap (METHODS 1.1): (B, K) from evidence (B, K, T) and output_change (B,)."""
    change = output_change.cpu().double()[:, None]
    return (evidence.cpu().double().sum(dim=-1) - change).abs() / scale_of(change)


def integrate_fixed(path: LayerPath, nodes: int, rule: Rule) -> Integral:
    """Integrate the straight path at one layer with a fixed rule over the line itself."""
    if rule == "trapezoid":
        return integrate_secant(path, nodes=nodes, tolerance=math.inf, max_nodes=nodes)
    positions, weights = _nodes(rule, nodes)
    line = path.end - path.origin
    mean = torch.zeros_like(line)
    batch = line.shape[0]
    rows = torch.arange(batch)
    # Node by node over the whole batch, or several nodes at once where the budget has room for them.
    per_pass = max(1, path.model.max_tokens // max(1, batch * line.shape[1]))
    for part in torch.arange(nodes).split(per_pass):
        found = path.evaluate(rows.repeat(len(part)), positions[part].repeat_interleave(batch))
        gradients = found.gradients[:, 0].unflatten(0, (len(part), batch))
        mean += torch.einsum("k,kbtd->btd", weights[part].to(mean), gradients)
    evidence = (mean * line).sum(dim=-1)[:, None].cpu().double()
    return Integral(evidence, None, torch.full((batch,), nodes))


def _nodes(rule: Rule, count: int) -> tuple[Tensor, Tensor]:
    """Positions in [0, 1] and weights summing to 1, both (count,) float64."""
    if rule == "riemann-middle":
        return (torch.arange(count, dtype=torch.float64) + 0.5) / count, torch.full((count,), 1 / count).double()
    table = torch.tensor(gauss_legendre(count), dtype=torch.float64)
    return table[:, 0], table[:, 1]


@cache
def gauss_legendre(count: int) -> tuple[tuple[float, float], ...]:
    """Gauss-Legendre nodes in (0, 1) with their weights, which sum to 1."""
    # Golub-Welsch: the nodes are the eigenvalues of the Legendre recurrence's Jacobi matrix.
    k = torch.arange(1, count, dtype=torch.float64)
    off = k / torch.sqrt(4 * k * k - 1)
    values, vectors = torch.linalg.eigh(torch.diag(off, 1) + torch.diag(off, -1))
    return tuple(zip(((values + 1) / 2).tolist(), (vectors[0] ** 2).tolist(), strict=True))


def integrate_secant(path: LayerPath, *, nodes: int, tolerance: float, max_nodes: int) -> Integral:
    """Integrate with end-point-averaged gradients and secant steps, refining until the error bound is small enough.

    Along the path the objective is known at every node, so each interval's true increment is known and the error of
    every layer's sum is measured for nothing (METHODS 1.3).

    Args:
        path: The path.
        nodes: Uniform nodes to start with, both ends counted.
        tolerance: Bound to reach, relative to max(|f(x) - f(x')|, 1e-3); infinity for a fixed rule.
        max_nodes: Nodes after which an example is given up.
    """
    batch, tokens, width = path.end.shape
    per_example = 2 * max_nodes * len(path.layers) * tokens * width
    group = max(1, _CACHE_FLOATS // per_example)
    parts = [_Refinement(path, rows, nodes, tolerance, max_nodes).run() for rows in torch.arange(batch).split(group)]
    bounds = [part.error_bound for part in parts if part.error_bound is not None]
    return Integral(
        torch.cat([part.evidence for part in parts]), torch.cat(bounds), torch.cat([part.steps_used for part in parts])
    )


class _Refinement:
    """The paths of one group of examples while they are refined together.

    Nodes and intervals of all examples lie in flat tables; `owner` says whose they are. Which intervals an example
    splits depends on its own errors only. States and gradients stay on the model's device, everything else is on the
    host in float64.
    """

    def __init__(self, path: LayerPath, rows: Tensor, nodes: int, tolerance: float, max_nodes: int) -> None:
        self.path, self.rows, self.tolerance, self.max_nodes = path, rows, tolerance, max_nodes
        count = len(rows)
        grid = torch.linspace(0, 1, nodes, dtype=torch.float64)
        self.owner = torch.arange(count).repeat_interleave(nodes)
        self.position = grid.repeat(count)
        found = path.evaluate(rows[self.owner], self.position)
        self.value, self.states, self.gradients = found.value, found.states, found.gradients
        ends = torch.arange(count * nodes).view(count, nodes)
        # (intervals, 2): the two nodes of each interval.
        self.intervals = torch.stack([ends[:, :-1], ends[:, 1:]], dim=-1).flatten(0, 1)
        self.parts, self.errors = self._measure(self.intervals)
        first, last = ends[:, 0], ends[:, -1]
        self.scale = scale_of(self.value[last] - self.value[first])

    def _measure(self, intervals: Tensor) -> tuple[Tensor, Tensor]:
        """Each interval's relevance (I, K, T) and the error of its sum (I, K)."""
        a, b = intervals.T
        mask = self.path.inputs.mask
        real = mask[self.rows[self.owner[a]].to(mask.device), None]
        x, y = a.to(mask.device), b.to(mask.device)
        mean = (self.gradients[x] + self.gradients[y]) / 2
        steps = (mean * (self.states[y] - self.states[x])).sum(dim=-1)
        part = torch.where(real, steps, 0.0).cpu().double()
        return part, (part.sum(dim=-1) - (self.value[b] - self.value[a])[:, None]).abs()

    def _bound(self) -> Tensor:
        """(examples, K) summed absolute errors."""
        total = torch.zeros(len(self.rows), self.errors.shape[1], dtype=torch.float64)
        return total.index_add_(0, self.owner[self.intervals[:, 0]], self.errors)

    def run(self) -> Integral:
        while True:
            chosen = self._worst()
            if not chosen:
                break
            self._split(torch.tensor(chosen))
        owner = self.owner[self.intervals[:, 0]]
        evidence = torch.zeros(len(self.rows), *self.parts.shape[1:], dtype=torch.float64)
        evidence.index_add_(0, owner, self.parts)
        used = torch.bincount(self.owner, minlength=len(self.rows))
        return Integral(evidence, self._bound() / self.scale[:, None], used)

    def _worst(self) -> list[int]:
        """The intervals to halve: per example the fewest whose going leaves half of the allowed error to the rest."""
        if math.isinf(self.tolerance):
            return []
        allowed = (self.tolerance * self.scale).tolist()
        bound = self._bound().amax(dim=1).tolist()
        counts = torch.bincount(self.owner, minlength=len(self.rows)).tolist()
        errors = self.errors.amax(dim=1).tolist()
        owners = self.owner[self.intervals[:, 0]].tolist()
        mine: list[list[int]] = [[] for _ in allowed]
        for interval, owner in enumerate(owners):
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
            rest = sum(errors[k] for k in ranked)
            for interval in ranked[:room]:
                chosen.append(interval)
                rest -= errors[interval]
                if rest <= limit / 2:
                    break
        return chosen

    def _split(self, chosen: Tensor) -> None:
        a, b = self.intervals[chosen].T
        position, owner = (self.position[a] + self.position[b]) / 2, self.owner[a]
        found = self.path.evaluate(self.rows[owner], position)
        middle = torch.arange(len(self.owner), len(self.owner) + len(chosen))
        self.owner, self.position = torch.cat([self.owner, owner]), torch.cat([self.position, position])
        self.value = torch.cat([self.value, found.value])
        self.states = torch.cat([self.states, found.states])
        self.gradients = torch.cat([self.gradients, found.gradients])
        halves = torch.cat([torch.stack([a, middle], dim=1), torch.stack([middle, b], dim=1)])
        parts, errors = self._measure(halves)
        keep = torch.ones(len(self.intervals), dtype=torch.bool)
        keep[chosen] = False
        self.intervals = torch.cat([self.intervals[keep], halves])
        self.parts, self.errors = torch.cat([self.parts[keep], parts]), torch.cat([self.errors[keep], errors])
