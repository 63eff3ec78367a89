"""Within-layer flow: set-to-set integrated gradients inside a block, in closed form (LIG.md; arXiv:2606.21564).

Only `sum_d delta_id ds/dz_id` is asked for, and queries, keys and values are linear in the block's input or in its
layer norm: so nothing is differentiated through attention, and targets are not looped over (LIG.md 5). What lies
behind attention is differentiated once, for all nodes and targets together.

Shapes: T positions (source i, target j), H heads, d width of a head, D width, K nodes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from calig.pipeline.attribution.quadrature import gauss_legendre
from calig.pipeline.attribution.within_block import Block

MLPBaseline = Literal["att_itb_a0", "zero"]


class Flow(NamedTuple):
    """A map and what its columns must sum to.

    Attributes:
        values: (H, T, T) or (T, T) by source and target, or (T, H) or (T, D) for the MLP part of each target.
        total: (H, T) or (T,) `s_j(1)`, known exactly from the ends of the path.
    """

    values: Tensor
    total: Tensor


class Paths:
    """The paths of all targets of a block from one baseline: contexts at a node, and the integrand there."""

    def at(self, position: float) -> tuple[Tensor, Tensor]:
        """(H, T, T) attention (target, source) and (T, H, d) contexts at a position of the path."""
        raise NotImplementedError

    def integrand(self, position: float, gradient: Tensor) -> Tensor:
        """(H, T, T), target by source: `sum_d delta_id ds_j/dx_id` through head h, from ds/dc (T, H, d)."""
        raise NotImplementedError

    def residual(self, position: float) -> Tensor:
        """(T, D) what the residual path carries there."""
        raise NotImplementedError


class InputTokenPaths(Paths):
    """Baseline `itb`: every position starts as the target's own vector and goes to its own (LIG.md 3, 5).

    With a layer norm in front, key i is `((1 - a) kappa_j + a kappa_i) / sigma_ji(a) + kappa_0` with the norm's
    deviation sigma along the path, whose square is a quadratic in a; without one, sigma is 1 and kappa_0 is 0.
    """

    def __init__(self, block: Block) -> None:
        query, key, value, mask, scale = block.projections
        self.block, self.mask = block, mask
        states, norm = block.states, block.norm
        zero = block.project(torch.zeros_like(states)[None])
        if norm is None:
            self.gram, self.epsilon = None, 0.0
            key_start, value_start = torch.zeros_like(zero.key[0]), torch.zeros_like(zero.value[0])
            spread = torch.ones(len(states), 1, dtype=states.dtype, device=states.device)
        else:
            centred = norm.centre(states)
            self.gram, self.epsilon = centred @ centred.T / centred.shape[-1], norm.epsilon
            key_start, value_start = zero.key[0], zero.value[0]
            spread = norm.deviation(states)[:, None]
        self.value_start = value_start[:, :1]  # (H, 1, d): values know no position
        self.values = (value[0] - self.value_start) * spread  # (H, T, d)
        scaled = query[0] * scale
        self.scores_start = scaled @ key_start.transpose(-1, -2)
        self.scores = scaled @ ((key[0] - key_start) * spread).transpose(-1, -2)
        self.own_scores = self._own_scores(scaled, key[0], key_start, spread)

    def _own_scores(self, scaled: Tensor, key: Tensor, key_start: Tensor, spread: Tensor) -> Tensor:
        """(H, T, T) scores of target j with its own vector at position i, where rotary keys differ."""
        states = self.block.states
        rolled = self.block.project(states.roll(1, 0)[None]).key[0]
        if torch.allclose(rolled, key.roll(1, 1), atol=1e-5 * float(key.abs().max())):
            own = torch.einsum("hjd,hjd->hj", scaled, (key - key_start) * spread)
            return own[:, :, None].expand_as(self.scores)
        length = len(states)
        turned = self.block.project(states[:, None].expand(-1, length, -1)).key  # (target, H, position, d)
        return torch.einsum("hjd,jhid->hji", scaled, (turned - key_start) * spread[:, None, None])

    def _spread(self, position: float) -> tuple[Tensor | float, Tensor | float]:
        """sigma_ji(a) and its derivative, each (T, T), target by source."""
        if self.gram is None:
            return 1.0, 0.0
        a = position
        own = self.gram.diagonal()
        square = (1 - a) ** 2 * own[:, None] + 2 * a * (1 - a) * self.gram + a**2 * own[None, :] + self.epsilon
        sigma = square.sqrt()
        return sigma, ((a - 1) * own[:, None] + (1 - 2 * a) * self.gram + a * own[None, :]) / sigma

    def at(self, position: float) -> tuple[Tensor, Tensor]:
        """See `Paths.at`."""
        a = position
        sigma, _ = self._spread(a)
        scores = ((1 - a) * self.own_scores + a * self.scores) / sigma + self.scores_start + self.mask
        attention = scores.softmax(-1)
        share = attention / sigma
        mixed = a * share @ self.values + (1 - a) * share.sum(-1, keepdim=True) * self.values
        return attention, (mixed + self.value_start).transpose(0, 1)

    def integrand(self, position: float, gradient: Tensor) -> Tensor:
        """See `Paths.integrand`."""
        a = position
        sigma, slope = self._spread(a)
        attention, _ = self.at(a)
        g = gradient.transpose(0, 1)
        on_source = g @ self.values.transpose(-1, -2)
        on_own = torch.einsum("hjd,hjd->hj", g, self.values)[:, :, None]
        on_value = ((1 - a) * on_own + a * on_source) / sigma
        value_change = (on_source - on_own - on_value * slope) / sigma
        scores = ((1 - a) * self.own_scores + a * self.scores) / sigma
        score_change = (self.scores - self.own_scores - scores * slope) / sigma
        surplus = on_value - (attention * on_value).sum(-1, keepdim=True)
        found = attention * (value_change + surplus * score_change)
        # The target's own vector does not move; what is left there is rounding.
        return found * (1 - torch.eye(found.shape[-1], dtype=found.dtype, device=found.device))

    def residual(self, position: float) -> Tensor:
        """See `Paths.residual`."""
        return self.block.states


class ZeroPaths(Paths):
    """Baseline `zero`: all inputs grow from 0; post-norm blocks only (a norm would make everything happen near 0)."""

    def __init__(self, block: Block) -> None:
        self.block = block
        full, start = block.projections, block.project(torch.zeros_like(block.states)[None])
        self.mask, self.scale = full.mask, full.scale
        self.start = [part[0] for part in start[:3]]
        self.change = [part[0] - base for part, base in zip(full[:3], self.start, strict=True)]

    def _at(self, position: float) -> list[Tensor]:
        return [base + position * change for base, change in zip(self.start, self.change, strict=True)]

    def at(self, position: float) -> tuple[Tensor, Tensor]:
        """See `Paths.at`."""
        query, key, value = self._at(position)
        attention = (query @ key.transpose(-1, -2) * self.scale + self.mask).softmax(-1)
        return attention, (attention @ value).transpose(0, 1)

    def integrand(self, position: float, gradient: Tensor) -> Tensor:
        """See `Paths.integrand`."""
        query, key, value = self._at(position)
        attention, _ = self.at(position)
        query_change, key_change, value_change = self.change
        g = gradient.transpose(0, 1)
        on_value = g @ value.transpose(-1, -2)
        weight = attention * (on_value - (attention * on_value).sum(-1, keepdim=True)) * self.scale
        found = attention * (g @ value_change.transpose(-1, -2)) + weight * (query @ key_change.transpose(-1, -2))
        by_query = (weight * (query_change @ key.transpose(-1, -2))).sum(-1)
        return found + torch.diag_embed(by_query)

    def residual(self, position: float) -> Tensor:
        """See `Paths.residual`."""
        return position * self.block.states


def attention_flow(paths: Paths, nodes: int) -> Flow:
    """ATT, z -> c: (H, T, T) by source and target, for every head."""
    start = paths.at(0.0)[1]
    values: Tensor | None = None
    for position, weight in gauss_legendre(nodes):
        moved = paths.at(position)[1] - start
        found = weight * paths.integrand(position, moved / _length(moved))
        values = found if values is None else values + found
    assert values is not None  # at least one node
    return Flow(values.transpose(-1, -2), (paths.at(1.0)[1] - start).norm(dim=-1).T)


def layer_flow(paths: Paths, block: Block, nodes: int, max_tokens: int) -> Flow:
    """Layer-direct, z -> z': (T, T) by source and target, through the whole block."""
    with torch.no_grad():
        start = block.rest(paths.residual(0.0)[None], paths.at(0.0)[1][None])[0]
        end = block.rest(paths.residual(1.0)[None], paths.at(1.0)[1][None])[0]
    moves = isinstance(paths, ZeroPaths)
    values = torch.zeros_like(paths.at(0.0)[0][0])
    for part in _parts(nodes, len(block.states), max_tokens):
        contexts = torch.stack([paths.at(position)[1] for position, _ in part]).requires_grad_()
        carried = torch.stack([paths.residual(position) for position, _ in part]).requires_grad_(moves)
        moved = block.rest(carried, contexts) - start
        wanted = [contexts, carried] if moves else [contexts]
        gradients = torch.autograd.grad(_safe_norm(moved).sum(), wanted)
        for k, (position, weight) in enumerate(part):
            values = values + weight * paths.integrand(position, gradients[0][k]).sum(0)
            if moves:
                values = values + weight * torch.diag_embed((gradients[1][k] * block.states).sum(-1))
    return Flow(values.transpose(-1, -2), (end - start).norm(dim=-1))


def head_mlp_flow(block: Block, baseline: MLPBaseline, nodes: int, max_tokens: int) -> Flow:
    """MLP by heads, {c^h} -> z' with the residual fixed: (T, H)."""
    start = _context_start(block, baseline)

    def run(contexts: Tensor) -> Tensor:
        return block.rest(block.states.expand(len(contexts), -1, -1), contexts)

    found = _line(run, start, block.contexts, nodes, max_tokens)
    return Flow(found.values.sum(-1), found.total)


def slice_mlp_flow(block: Block, baseline: MLPBaseline, nodes: int, max_tokens: int) -> Flow:
    """MLP by dimensions, u -> z': (T, D), as the reference implementation cuts it.

    Raises:
        UnsupportedModelError: The block has no MLP part of its own behind attention.
    """
    with torch.no_grad():
        end, own = block.middle(torch.stack([block.contexts, _context_start(block, "att_itb_a0")]))
    start = torch.zeros_like(end) if baseline == "zero" else own
    return _line(block.rest_from_middle, start, end, nodes, max_tokens, check=block.check_middle)


def _context_start(block: Block, baseline: MLPBaseline) -> Tensor:
    """(T, H, d): what attention returns where every position holds the target's own vector, or nothing."""
    values = block.projections.value[0].transpose(0, 1)
    return torch.zeros_like(values) if baseline == "zero" else values


def _line(
    run: Callable[[Tensor], Tensor],
    start: Tensor,
    end: Tensor,
    nodes: int,
    max_tokens: int,
    check: Callable[[Tensor], None] | None = None,
) -> Flow:
    """Integrated gradients of `||run(x) - run(start)||` on the straight line, row by row: the shape of `start`.

    Args:
        run: The map, of (R, T, ...).
        start: (T, ...) where the line starts.
        end: Where it ends.
        nodes: Gauss-Legendre nodes.
        max_tokens: Rows of one internal pass.
        check: Called with what `run` gives at the end, before the nodes.
    """
    with torch.no_grad():
        first, last = run(torch.stack([start, end]))
    if check is not None:
        check(last)
    mean = torch.zeros_like(start)
    for part in _parts(nodes, len(start), max_tokens):
        points = torch.stack([start + position * (end - start) for position, _ in part]).requires_grad_()
        (gradient,) = torch.autograd.grad(_safe_norm(run(points) - first).sum(), [points])
        weights = torch.tensor([weight for _, weight in part], dtype=mean.dtype, device=mean.device)
        mean = mean + torch.einsum("k,k...->...", weights, gradient)
    return Flow(mean * (end - start), (last - first).norm(dim=-1))


@dataclass(frozen=True)
class Ratio:
    """How a self share was given back to an `itb` map.

    Attributes:
        values: The map, (..., T, T) by source and target.
        refused: (..., T) columns that kept theirs because the share was outside [0, 1] or could not be formed.
    """

    values: Tensor
    refused: Tensor


def give_self_share(itb: Tensor, ratio: Tensor, defined: Tensor) -> Ratio:
    """Give the self term of each column its share r and keep the column's sum S: `(1 - r) c + r S e_j` (LIG.md 3).

    Args:
        itb: (..., T, T) by source and target.
        ratio: (..., T) r of each target.
        defined: (..., T) where r is; elsewhere, and where r is outside [0, 1], the column stays.
    """
    usable = defined & (ratio >= 0) & (ratio <= 1)
    r = torch.where(usable, ratio, 0.0)[..., None, :]
    total = itb.sum(-2)
    values = (1 - r) * itb + torch.diag_embed(r.squeeze(-2) * total)
    return Ratio(values, ~usable)


def self_share(values: Tensor) -> tuple[Tensor, Tensor]:
    """The self share `g_jj / sum_i g_ij` of each column of (..., T, T), and where the sum does not vanish."""
    total = values.sum(-2)
    defined = total.abs() > 1e-12
    return values.diagonal(dim1=-2, dim2=-1) / torch.where(defined, total, 1.0), defined


def compose_heads(attention: Flow, mlp: Tensor) -> Tensor:
    """`C[i,j] = sum_h P[h,i,j] MLP[j,h]`, P the columns of (H, T, T) over their sums; vanishing columns stay 0."""
    total = attention.values.sum(-2, keepdim=True)
    present = (total.abs() > 1e-12) & (attention.total[:, None, :] > 1e-12)
    share = torch.where(present, attention.values / torch.where(present, total, 1.0), 0.0)
    return torch.einsum("hij,jh->ij", share, mlp)


def compose_slices(attention: Tensor, mlp: Tensor) -> Tensor:
    """`C[i,j] = sum_h ATT[h,i,j] sum_(d in slice h) MLP[j,d]`: the reference's product of raw numbers."""
    return torch.einsum("hij,jh->ij", attention, mlp.unflatten(-1, (attention.shape[0], -1)).sum(-1))


def _parts(nodes: int, rows: int, max_tokens: int) -> Iterator[tuple[tuple[float, float], ...]]:
    """Positions and weights in pieces that fit the token budget."""
    table = gauss_legendre(nodes)
    size = max(1, max_tokens // max(1, rows))
    for start in range(0, len(table), size):
        yield table[start : start + size]


def _length(vectors: Tensor) -> Tensor:
    """(..., 1) lengths; 1 where a vector vanishes, whose direction is then 0."""
    length = vectors.norm(dim=-1, keepdim=True)
    return torch.where(length > 0, length, 1.0)


def _safe_norm(vectors: Tensor) -> Tensor:
    """(...,) lengths of (..., D) whose gradient at 0 is 0, not NaN."""
    square = vectors.square().sum(-1)
    present = square > 0
    return torch.where(present, torch.where(present, square, 1.0).sqrt(), 0.0)
