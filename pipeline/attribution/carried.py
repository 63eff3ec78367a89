"""The `carried` form of CA-LIG: evidence goes back to the tokens that it was gathered from (METHODS 2.3, 2.6).

A rollout keeps the identity: what stands at a position in block l counts for the token at that position. In a causal
model that fails. No token sees what comes behind it, so blocks gather clauses at later tokens (a comma, the full stop),
and there is where a rollout leaves the relevance. But evidence is complete at every layer, and so tells how much of
it each position has gathered.

Shapes: B examples, T tokens, L blocks; row = where evidence stands, column = where it came from.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def sources(evidence: Tensor, attention: Sequence[Tensor]) -> list[Tensor]:
    """Where the evidence of every position comes from: C^0 = I and `C^l = (K + (1 - K) W) C^{l-1}`.

    K is diagonal: the share of r^l at a position that r^{l-1} held there already, in [0, 1]. The rest was read from
    other positions, in proportion W to the attention that they got times the evidence that they lost or won.

    Args:
        evidence: (B, L+1, T) r^0 to r^L.
        attention: A^1 to A^L, mean over heads, (B, T, T), zero at padding.

    Returns:
        L+1 matrices (B, T, T) whose rows sum to 1.
    """
    one = torch.eye(evidence.shape[-1], dtype=evidence.dtype, device=evidence.device)
    found = [one.expand(len(evidence), -1, -1)]
    for layer, maps in enumerate(attention, start=1):
        before, after = evidence[:, layer - 1], evidence[:, layer]
        kept = torch.where(after == 0, 1.0, before / after.where(after != 0, 1.0)).clamp(0, 1)[..., None]
        read = maps * (1 - one) * (before - after).abs()[:, None]
        total = read.sum(dim=-1, keepdim=True)
        kept = torch.where(total > 0, kept, 1.0)  # whoever read nothing has what it has from itself
        share = read / total.where(total > 0, 1.0)
        found.append((kept * one + (1 - kept) * share) @ found[-1])
    return found


def carry(evidence: Tensor, attention: Sequence[Tensor], readout: Tensor, *, lam: float) -> Tensor:
    """Evidence of all layers, and the attention of the read-out, both carried back to the input.

    `lam mean_{k<=l} r^k C^k + (1 - lam) (f(x) - f(x')) mean_{k<=l} (row w of A^k) C^{k-1}`: at every layer the sum over
    tokens is f(x) - f(x'), as far as evidence is complete.

    Args:
        evidence: (B, L+1, T) r^0 to r^L.
        attention: A^1 to A^L, mean over heads, (B, T, T), zero at padding.
        readout: (B, T) read-out weights w.
        lam: Share of the evidence.

    Returns:
        (B, L, T).
    """
    change = evidence[:, 0].sum(dim=-1, keepdim=True)
    back = sources(evidence, attention)
    own = [_row(evidence[:, layer], matrix) for layer, matrix in enumerate(back)]
    seen = [_row(_row(readout, maps), matrix) for maps, matrix in zip(attention, back, strict=False)]
    return torch.stack(
        [
            lam * torch.stack(own[: layer + 1]).mean(dim=0) + (1 - lam) * change * torch.stack(seen[:layer]).mean(dim=0)
            for layer in range(1, len(back))
        ],
        dim=1,
    )


def _row(weights: Tensor, matrix: Tensor) -> Tensor:
    return (weights[:, None].to(matrix.dtype) @ matrix).squeeze(1)
