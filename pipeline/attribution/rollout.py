"""Attention gradients, fusion and rollout: the algebra on (B, T, T) matrices, row = query, column = key."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from calig.pipeline.attribution.carried import carry
from calig.pipeline.attribution.windows import pool
from calig.pipeline.errors import InputError

Fusion = Literal["diagonal", "column", "gated", "late", "carried"]
Lam = float | Sequence[float]
"""The coefficient lambda: one for all blocks, or one for each."""


def normalise(values: Tensor, document: Tensor | None = None) -> Tensor:
    """N(.) of METHODS 2.3: divide each example by its largest absolute entry; all-zero stays zero.

    Args:
        values: (B, ...) zero at padding.
        document: (B,) of windows: those of one document are divided by the largest of them all, because what one of
            them holds more of must count more.
    """
    peak = values.abs().flatten(1).amax(dim=1)
    if document is not None:
        owner = document.to(peak.device)
        peak = pool(peak, owner, int(owner.max()) + 1, "max")[owner]
    peak = peak.view(-1, *[1] * (values.ndim - 1))
    return torch.where(peak > 0, values / peak.clamp_min(torch.finfo(values.dtype).tiny), 0.0)


def attention_gradient(attention: Tensor, gradient: Tensor, mask: Tensor, *, positive: bool) -> Tensor:
    """Class-specific attention gradient (METHODS 2.2).

    Args:
        attention: (B, H, T, T) probabilities.
        gradient: (B, H, T, T) gradient of the objective with respect to them; not zero at padding, even where the
            attention is.
        mask: (B, T) true on real positions.
        positive: Keep the positive part of each head before the mean over heads (Chefer et al. 2021).

    Returns:
        (B, T, T), zero in rows and columns of padding.
    """
    product = attention * gradient
    return mask_pairs((product.clamp_min(0) if positive else product).mean(dim=1), mask)


def positive_attention_gradient(attention: Tensor, gradient: Tensor, mask: Tensor) -> Tensor:
    """`attention_gradient` with each head's positive part."""
    return attention_gradient(attention, gradient, mask, positive=True)


def signed_attention_gradient(attention: Tensor, gradient: Tensor, mask: Tensor) -> Tensor:
    """`attention_gradient` with each head's signed value."""
    return attention_gradient(attention, gradient, mask, positive=False)


def mean_attention(attention: Tensor, _gradient: Tensor, mask: Tensor) -> Tensor:
    """The mean over heads (B, T, T), zero at padding; the gradient has no part in it."""
    return mask_pairs(attention.mean(dim=1), mask)


def gradcam(attention: Tensor, gradient: Tensor, mask: Tensor) -> Tensor:
    """Heads weighted by their mean gradient over real pairs, rectified (METHODS 5.3): (B, T, T), zero at padding."""
    pairs = mask.sum(dim=1).square().to(gradient.dtype)[:, None]
    # The gradient is not 0 at padding, even where the attention is.
    weights = mask_pairs(gradient, mask).sum(dim=(-2, -1)) / pairs
    return mask_pairs((attention * weights[..., None, None]).mean(dim=1).clamp_min(0), mask)


def weighted_heads(attention: Tensor, gradient: Tensor, mask: Tensor) -> Tensor:
    """Heads weighted by `I_h ~ mean |A_h' dA_h|`, which sum to 1 (Chen et al. 2022): (B, T, T), zero at padding."""
    attention, gradient = mask_pairs(attention, mask), mask_pairs(gradient, mask)
    importance = (attention.transpose(-1, -2) @ gradient).abs().sum(dim=(-2, -1))
    total = importance.sum(dim=1, keepdim=True)
    # A block that the objective does not depend on has no head that counts.
    share = importance / total.where(total > 0, total.new_ones(()))
    return (share[..., None, None] * attention).sum(dim=1)


def mask_pairs(matrix: Tensor, mask: Tensor) -> Tensor:
    """Set rows and columns of padding in (..., T, T) to 0; `torch.where`, because a masked row may be NaN."""
    pairs = mask[:, :, None] & mask[:, None, :]
    return torch.where(pairs.view(len(mask), *[1] * (matrix.ndim - 3), *pairs.shape[1:]), matrix, 0.0)


def read_row(matrix: Tensor, readout: Tensor) -> Tensor:
    """Row w of a matrix: (B, T) from (B, T, T) and read-out weights (B, T)."""
    return torch.einsum("bq,bqk->bk", readout.to(matrix.dtype), matrix)


def rollout(factors: Sequence[Tensor], readout: Tensor) -> Tensor:
    """Relevance rollout (METHODS 2.4): `R^l = R^{l-1} + F^l R^{l-1}`, read at row w of `R^l - I`.

    Args:
        factors: F^1 to F^L, each (B, T, T).
        readout: (B, T) weights w.

    Returns:
        (B, L, T): the layer-wise relevance map.
    """
    size = factors[0].shape[-1]
    identity = torch.eye(size, dtype=factors[0].dtype, device=factors[0].device)
    total = identity.expand_as(factors[0])
    rows = []
    for factor in factors:
        total = total + factor @ total
        rows.append(read_row(total - identity, readout))
    return torch.stack(rows, dim=1)


@dataclass(frozen=True)
class Ingredients:
    """What CA-LIG fuses (METHODS 2.3).

    Attributes:
        evidence: (B, L+1, T) r^0 to r^L.
        gradients: G^1 to G^L, each (B, T, T); for `carried` the mean attention A^1 to A^L.
        readout: (B, T) read-out weights w.
        mask: (B, T) true on real positions.
        document: (B,) of windows, see `Inputs.document`.
    """

    evidence: Tensor
    gradients: Sequence[Tensor]
    readout: Tensor
    mask: Tensor
    document: Tensor | None = None

    def fused(self, fusion: Fusion, lam: Lam) -> tuple[Tensor, list[Tensor] | None]:
        """Fuse and roll out.

        Returns:
            The layer-wise relevance map (B, L, T), whose last block holds the scores; and the factors F^1 to F^L, which
            `late` and `carried` do not have.

        Raises:
            InputError: There are more or fewer lambdas than blocks.
        """
        if fusion in ("late", "carried"):
            if not isinstance(lam, int | float):
                raise InputError(f"fusion='{fusion}' fuses once, behind all blocks, and takes one lam; got {lam}.")
            if fusion == "carried":
                return carry(self.evidence, self.gradients, self.readout, lam=lam), None
            return fuse_late(self.evidence, self.gradients, self.readout, lam=lam, document=self.document), None
        factors = fuse(self.evidence, self.gradients, self.mask, fusion=fusion, lam=lam, document=self.document)
        return rollout(factors, self.readout), factors


def shares(lam: Lam, blocks: int) -> list[float]:
    """One lambda for each block.

    Raises:
        InputError: There are more or fewer than blocks.
    """
    if isinstance(lam, int | float):
        return [lam] * blocks
    if len(lam) != blocks:
        raise InputError(f"lam has {len(lam)} values and the model {blocks} blocks: give one for each, or one for all.")
    return list(lam)


def attention_rollout(attentions: Sequence[Tensor]) -> list[Tensor]:
    """Attention rollout (METHODS 5.2): the products `Rb^l ... Rb^1` with `Rb = 0.5 A + 0.5 I`.

    Args:
        attentions: (B, T, T) mean over heads of each block.

    Returns:
        One (B, T, T) product per block.
    """
    identity = torch.eye(attentions[0].shape[-1], dtype=attentions[0].dtype, device=attentions[0].device)
    products: list[Tensor] = []
    for attention in attentions:
        mixed = 0.5 * attention + 0.5 * identity
        products.append(mixed @ products[-1] if products else mixed)
    return products


def fuse(
    evidence: Tensor,
    gradients: Sequence[Tensor],
    mask: Tensor,
    *,
    fusion: Fusion,
    lam: Lam,
    document: Tensor | None = None,
) -> list[Tensor]:
    """The factors F^l of METHODS 2.3 for the forms that have one; block l takes the evidence of its inputs, r^{l-1}.

    Args:
        evidence: (B, L+1, T) r^0 to r^L.
        gradients: G^1 to G^L, each (B, T, T).
        mask: (B, T) true on real positions.
        fusion: `diagonal`, `column` or `gated`.
        lam: The coefficient lambda; `gated` has none.
        document: (B,) of windows, see `normalise`.

    Raises:
        InputError: There are more or fewer lambdas than blocks.
    """
    factors = []
    per_block = shares(lam, len(gradients))
    real = mask.sum(dim=1).to(evidence.dtype)[:, None, None]
    for layer, (gradient, share) in enumerate(zip(gradients, per_block, strict=True)):
        own = normalise(evidence[:, layer], document)
        # "1 r'": every real query row holds the evidence of the keys.
        keys = mask_pairs(own[:, None, :].expand_as(gradient), mask)
        if fusion == "diagonal":
            factors.append(share * torch.diag_embed(own) + (1 - share) * normalise(gradient, document))
        elif fusion == "column":
            factors.append(share * keys / real + (1 - share) * normalise(gradient, document))
        elif fusion == "gated":
            factors.append(normalise(gradient.abs() * keys, document))
        else:
            raise ValueError(f"fusion '{fusion}' has no factors of its own")
    return factors


def fuse_late(
    evidence: Tensor, gradients: Sequence[Tensor], readout: Tensor, *, lam: float, document: Tensor | None = None
) -> Tensor:
    """The `late` form of METHODS 2.3: evidence summed over layers beside the rollout of the attention gradients.

    Returns:
        (B, L, T).
    """
    blocks = range(len(gradients))
    own = torch.stack([normalise(evidence[:, layer], document) for layer in blocks], dim=1).cumsum(dim=1)
    flow = rollout(gradients, readout)
    layers = [
        lam * normalise(own[:, layer], document) + (1 - lam) * normalise(flow[:, layer], document) for layer in blocks
    ]
    return torch.stack(layers, dim=1)
