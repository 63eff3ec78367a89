"""Attention-weighted concept sensitivity (METHODS 4.2): how the output moves with a concept at every layer.

A concept is a set of examples. Its activation vector is the normal of the plane that separates their pooled states from
those of random examples; the sensitivity of an input is its attention-weighted mean of `< df / dz_i, v >`. The mean is
taken before the product, so any number of vectors costs no more passes than one.

Shapes: B examples, P pairs of sets, n examples of a set, T tokens, D width, L blocks.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from calig.pipeline.attribution import inside
from calig.pipeline.attribution.model import ExplainableModel, Inputs
from calig.pipeline.attribution.objective import Objective
from calig.pipeline.attribution.rollout import attention_rollout, mask_pairs, mean_attention, read_row
from calig.pipeline.errors import InputError

Weights = Literal["attention", "rollout", "mean"]
HELD_OUT = 1 / 3
_NEWTON_STEPS = 100
_GRADIENT = 1e-8  # per example; Newton's method gets there in about ten steps


class ActivationVectors(NamedTuple):
    """What separates P pairs of sets.

    Attributes:
        vectors: (P, D) float64 unit normals that point to the first set of each pair.
        accuracy: (P,) float64 share of the held-out examples on their own side of the plane.
    """

    vectors: Tensor
    accuracy: Tensor


def pooled_states(model: ExplainableModel, inputs: Inputs) -> Tensor:
    """(B, L, D) mean of `z^l` over the real tokens, l = 0..L-1, in float64 on the host; in an open session."""

    @torch.no_grad()
    def run(rows: Tensor) -> Tensor:
        trace, real = model.trace(inputs.select(rows)), inputs.mask[rows][..., None]
        sums = [torch.where(real, trace.state(layer), 0.0).sum(dim=1) for layer in range(model.depth)]
        return torch.stack([total / real.sum(dim=1) for total in sums], dim=1).cpu().double()

    return torch.cat(model.budget.run(_every(inputs), inputs.mask.shape[1], run))


def weighted_gradients(
    model: ExplainableModel, inputs: Inputs, objective: Objective, weights: Weights = "attention"
) -> Tensor:
    """`sum_i a_i df / dz^l_i`: its product with a unit vector v is the sensitivity S(x) of METHODS 4.2.

    Args:
        model: In an open session.
        inputs: B examples.
        objective: What is explained.
        weights: `a`, summing to 1 over the real tokens: `attention`, row w of the head-averaged `A^{l+1}`; `rollout`,
            row w of the attention rollout up to layer l (at l = 0 that is w itself); `mean`, 1/n, which gives
            token-mean TCAV (Kim et al. 2018) and needs no attention maps.

    Returns:
        (B, L, D) for l = 0..L-1 in float64 on the host; not a number where the gradient of an example is not finite or
        vanishes.

    Raises:
        InputError: `weights` is none of the three.
        UnsupportedModelError: The family does not use the attention interface, and `weights` is not `mean`.
    """
    if weights not in ("attention", "rollout", "mean"):
        raise InputError(f"weights takes 'attention', 'rollout' or 'mean', got {weights!r}.")
    mask = inputs.mask
    if weights == "mean":
        first = inside.input_gradient(model, inputs, objective, 0)
        shares = [(mask / mask.sum(dim=1, keepdim=True)).to(first.dtype)] * model.depth
    else:
        maps, readout = inside.attention_matrices(model, inputs, objective, mean_attention)
        if weights == "rollout":
            identity = torch.eye(mask.shape[1], dtype=maps[0].dtype, device=maps[0].device).expand_as(maps[0])
            maps = [mask_pairs(product, mask) for product in (identity, *attention_rollout(maps)[:-1])]
        rows = [read_row(matrix, readout) for matrix in maps]
        shares = [row / row.sum(dim=1, keepdim=True) for row in rows]
    found = [
        torch.einsum(
            "bt,btd->bd",
            share,
            torch.where(mask[..., None], inside.input_gradient(model, inputs, objective, layer), 0.0),
        )
        for layer, share in enumerate(shares)
    ]
    return torch.stack(found, dim=1).cpu().double()


def activation_vectors(first: Tensor, second: Tensor, *, seed: int = 0, penalty: float = 1.0) -> ActivationVectors:
    """Concept activation vectors: one logistic regression for each pair of sets (Kim et al. 2018; METHODS 4.2).

    Each set is cut by the seed: two thirds fit, one third is held out. The states of a pair are centred and divided by
    one number, their root mean square; not feature by feature, which would turn the normal. The regression minimises
    `|w|^2 / (2 penalty) + sum of the log losses`, as scikit-learn's does with `C=penalty`.

    Args:
        first: (P, n, D) pooled states of the concept.
        second: (P, n, D) of the random examples.
        seed: Of the cut, the same for all pairs.
        penalty: The inverse strength of the L2 penalty.

    Raises:
        InputError: The shapes differ, or a set has fewer than 3 examples.
    """
    if first.ndim != 3 or first.shape != second.shape or first.shape[1] < 3:
        raise InputError(
            f"concept and random states have shapes {tuple(first.shape)} and {tuple(second.shape)}; expected two times "
            "(P, n, D) with n >= 3."
        )
    first, second = first.double(), second.double()
    held_out = max(1, round(HELD_OUT * first.shape[1]))
    generator = torch.Generator().manual_seed(seed)
    parts = []
    for states in (first, second):
        order = torch.randperm(states.shape[1], generator=generator).to(states.device)
        parts.append((states[:, order[held_out:]], states[:, order[:held_out]]))
    (fit_first, test_first), (fit_second, test_second) = parts
    fit = torch.cat([fit_first, fit_second], dim=1)
    centre = fit.mean(dim=1, keepdim=True)
    scale = (fit - centre).square().mean(dim=(1, 2), keepdim=True).sqrt()
    scale = torch.where(scale > 0, scale, 1.0)
    sides = torch.cat([torch.ones(fit_first.shape[1]), -torch.ones(fit_second.shape[1])]).to(fit)
    weight, bias = _logistic((fit - centre) / scale, sides, penalty)

    def margins(states: Tensor) -> Tensor:
        return ((states - centre) / scale) @ weight[..., None] + bias[:, None, None]

    right = torch.cat([margins(test_first) > 0, margins(test_second) < 0], dim=1)
    return ActivationVectors(_unit(weight), right.double().mean(dim=(1, 2)))


def _unit(weight: Tensor) -> Tensor:
    """Rows of length 1; a row of zeros (two equal sets) stays zero."""
    return weight / weight.norm(dim=1, keepdim=True).clamp_min(torch.finfo(weight.dtype).tiny)


def _logistic(states: Tensor, sides: Tensor, penalty: float) -> tuple[Tensor, Tensor]:
    """Weights (P, D) and biases (P,) of P regressions by Newton's method with step halving.

    Args:
        states: (P, n, D).
        sides: (n,) +1 or -1.
        penalty: See `activation_vectors`.
    """
    basis = None
    if states.shape[1] < states.shape[2]:
        # The solution lies in the span of the n examples, where the problem has n unknowns instead of D.
        basis, triangle = torch.linalg.qr(states.transpose(1, 2))
        states = triangle.transpose(1, 2)
    pairs, count, width = states.shape
    design = torch.cat([states, states.new_ones(pairs, count, 1)], dim=2)
    ridge = torch.full((width + 1,), 1 / penalty, dtype=states.dtype, device=states.device)
    ridge[-1] = 0  # the bias is free

    def loss(weight: Tensor) -> Tensor:
        margin = sides * (design @ weight[..., None]).squeeze(2)
        return (weight.square() * ridge).sum(dim=1) / 2 + torch.nn.functional.softplus(-margin).sum(dim=1)

    weight = states.new_zeros(pairs, width + 1)
    for _ in range(_NEWTON_STEPS):
        margin = sides * (design @ weight[..., None]).squeeze(2)
        wrong = torch.sigmoid(-margin)
        gradient = weight * ridge - torch.einsum("pnd,pn->pd", design, sides * wrong)
        if float(gradient.abs().amax()) <= _GRADIENT * count:
            break
        curvature = (wrong * (1 - wrong)).clamp_min(1e-12)  # never singular in the bias
        hessian = design.transpose(1, 2) @ (design * curvature[..., None]) + torch.diag(ridge)
        step = torch.linalg.solve(hessian, gradient)
        size, before = states.new_ones(pairs, 1), loss(weight)
        for _ in range(30):
            worse = loss(weight - size * step) > before + 1e-12 * before.abs()
            if not worse.any():
                break
            size = torch.where(worse[:, None], size / 2, size)
        weight = weight - size * step
    normal = weight[:, :-1]
    return normal if basis is None else (basis @ normal[..., None]).squeeze(2), weight[:, -1]


def _every(inputs: Inputs) -> Tensor:
    return torch.arange(len(inputs), device=inputs.mask.device)
