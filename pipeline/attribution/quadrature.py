"""Integration of gradients along paths by fixed rules (METHODS 1); `refinement` reaches a given error.

Shapes: B examples, J objectives that are explained together, K layers of the path, T tokens, D width; intervals lie
between neighbouring nodes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Literal

import torch
from torch import Tensor

from calig.pipeline.attribution.path import LayerPath, Nodes
from calig.pipeline.attribution.windows import own_mean

Rule = Literal["gauss-legendre", "trapezoid", "riemann-middle"]


@dataclass(frozen=True)
class Integral:
    """The integrated path of one objective.

    Attributes:
        evidence: (B, K, T) relevance of every token at every layer of the path; like the others on the host.
        error_bound: (B, K) bound on the error of each layer's sum, relative to max(|f(x) - f(x')|, 1e-3); None for
            rules whose nodes do not include the ends of their intervals.
        steps_used: (B,) nodes.
        rows: (P,) example of each node; with `positions` None where each layer has nodes of its own.
        positions: (P,) its place a in [0, 1].
    """

    evidence: Tensor
    error_bound: Tensor | None
    steps_used: Tensor
    rows: Tensor | None = None
    positions: Tensor | None = None


def scale_of(output_change: Tensor) -> Tensor:
    """The denominator of relative gaps and bounds: max(|f(x) - f(x')|, 1e-3)."""
    return output_change.abs().clamp_min(1e-3)


def relative_gap(evidence: Tensor, output_change: Tensor, document: Tensor | None = None) -> Tensor:
    """The completeness gap (METHODS 1.1): (B, K) from evidence (B, K, T) and output_change (B,).

    Of windows (`Inputs.document`) it is that of their document, at each of them.
    """
    change = own_mean(output_change.cpu().double()[:, None], document)
    return (own_mean(evidence.cpu().double().sum(dim=-1), document) - change).abs() / scale_of(change)


def in_document(bound: Tensor, output_change: Tensor, document: Tensor | None) -> Tensor:
    """Error bounds (B, K), relative to each window's change of output (B,), to the bound of its document, at each."""
    if document is None:
        return bound
    change = output_change.cpu().double()[:, None]
    return own_mean(bound.cpu().double() * scale_of(change), document) / scale_of(own_mean(change, document))


def integrate_fixed(path: LayerPath, nodes: int, rule: Rule) -> list[Integral]:
    """Integrate the straight path at one layer with a fixed rule over the line itself; J results."""
    if rule == "trapezoid":
        return integrate_secant(path, nodes)
    positions, weights = _nodes(rule, nodes)
    line = path.end - path.origin
    batch = line.shape[0]
    mean = line.new_zeros(len(path.objectives), *line.shape)
    # Node by node over the whole batch, or several nodes at once where the budget has room for them.
    for part in torch.arange(nodes).split(path.model.budget.rows(batch * path.width)):
        found = path.evaluate(torch.arange(batch).repeat(len(part)), positions[part].repeat_interleave(batch))
        gradients = found.gradients[:, :, 0].unflatten(1, (len(part), batch))
        mean += torch.einsum("k,jkbtd->jbtd", weights[part].to(mean), gradients)
    evidence = (mean * line).sum(dim=-1)[:, :, None].cpu().double()
    return [Integral(own, None, torch.full((batch,), nodes)) for own in evidence]


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


def integrate_secant(path: LayerPath, nodes: int) -> list[Integral]:
    """Integrate with end-point-averaged gradients and secant steps at uniform nodes, both ends counted; J results.

    Nodes are run in the order of the path and forgotten behind it, so that memory does not grow with their number.
    """
    batch = path.end.shape[0]
    rows = torch.arange(batch)
    positions = torch.linspace(0, 1, nodes, dtype=torch.float64)
    objectives, layers = len(path.objectives), len(path.layers)
    evidence = torch.zeros(objectives, batch, layers, path.width, dtype=torch.float64)
    bound = torch.zeros(objectives, batch, layers, dtype=torch.float64)
    change = torch.zeros(objectives, batch, dtype=torch.float64)

    def add(left: Nodes, right: Nodes) -> None:
        parts, errors = measure(path, left, right, rows.repeat(left.states.shape[0] // batch))
        evidence.add_(parts.unflatten(1, (-1, batch)).sum(dim=1))
        bound.add_(errors.unflatten(1, (-1, batch)).sum(dim=1))

    last: Nodes | None = None
    for part in _passes(positions, path, path.model.budget.rows(batch * path.width)):
        found = path.evaluate(rows.repeat(len(part)), part.repeat_interleave(batch))
        count = found.states.shape[0]
        # Neighbours within the pass, and the last of the pass before with the first of this one; nothing is copied.
        if count > batch:
            add(found.view(0, count - batch), found.view(batch, count))
        if last is not None:
            add(last, found.view(0, batch))
        change += found.value[:, -batch:] - (found.value[:, :batch] if last is None else last.value)
        last = found.select(torch.arange(count - batch, count))
        del found  # else it would stand beside the next pass
    relative = bound / scale_of(change)[..., None]
    used = torch.full((batch,), nodes)
    where = rows.repeat_interleave(nodes), positions.repeat(batch)
    return [Integral(own, error, used, *where) for own, error in zip(evidence, relative, strict=True)]


def _passes(positions: Tensor, path: LayerPath, most: int) -> Iterator[Tensor]:
    """Neighbouring positions, so many of which at once that at most `most` have to be run."""
    start = to_run = 0
    for stop, position in enumerate(positions.tolist()):
        if position in path.known:
            continue
        if to_run == most:
            yield positions[start:stop]
            start, to_run = stop, 0
        to_run += 1
    yield positions[start:]


def measure(path: LayerPath, left: Nodes, right: Nodes, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Integrate over I intervals, and measure the error against the true increments (METHODS 1.3).

    Args:
        path: Of the nodes.
        left: The nodes where the intervals begin.
        right: Those where they end.
        rows: (I,) example of each interval.

    Returns:
        Each interval's relevance (J, I, K, T) and the absolute error of its sum (J, I, K), on the host in float64.
    """
    mask = path.inputs.mask
    real = mask[rows.to(mask.device), None]
    mean = (left.gradients + right.gradients).mul_(0.5)
    steps = mean.mul_(right.states - left.states).sum(dim=-1)
    parts = torch.where(real, steps, 0.0).cpu().double()
    return parts, (parts.sum(dim=-1) - (right.value - left.value)[..., None]).abs()
