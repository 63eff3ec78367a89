"""How explanations move while a model trains (METRICS 4). Shapes: B examples, L layers, T positions."""

from __future__ import annotations

import torch
from torch import Tensor

from calig.pipeline.metrics.statistics import rank_correlation


def layer_profile(layer_scores: Tensor, mask: Tensor) -> Tensor:
    """Compute the share of the absolute relevance that each layer holds.

    Args:
        layer_scores: (B, L, T) signed relevance per layer.
        mask: (B, T) bool, real positions, special tokens included.

    Returns:
        (B, L) shares that sum to 1, or all 0 where there is no relevance.

    Example:
        >>> layer_profile(torch.tensor([[[1.0, -2.0], [1.0, 9.0]]]), torch.tensor([[True, False]]))
        tensor([[0.5000, 0.5000]])
    """
    absolute = torch.where(mask.bool().unsqueeze(1), layer_scores.abs(), 0.0).sum(-1)
    return _share(absolute, absolute.sum(-1, keepdim=True))


def special_share(scores: Tensor, special: Tensor, mask: Tensor) -> Tensor:
    """Compute the share of the absolute relevance that sits on special tokens.

    Args:
        scores: (B, T) signed relevance.
        special: (B, T) bool, special tokens.
        mask: (B, T) bool, real positions, special tokens included.

    Returns:
        (B,) shares in [0, 1], 0 where there is no relevance.

    Example:
        >>> special_share(torch.tensor([[-3.0, 1.0]]), torch.tensor([[True, False]]), torch.tensor([[True, True]]))
        tensor([0.7500])
    """
    absolute = torch.where(mask.bool(), scores.abs(), 0.0)
    return _share(torch.where(special.bool(), absolute, 0.0).sum(-1), absolute.sum(-1))


def drift(scores_now: Tensor, scores_before: Tensor, evaluable: Tensor) -> Tensor:
    """Compute the Spearman correlation of each example's scores at two moments; 1 means the same ranking.

    Args:
        scores_now: (B, T) signed scores.
        scores_before: (B, T) signed scores of the same examples.
        evaluable: (B, T) bool, neither special nor padding.

    Returns:
        (B,) float32 correlations on the CPU, NaN where undefined (fewer than two positions, all scores equal, or one of
        them NaN): leave those out and count them.

    Example:
        >>> drift(torch.tensor([[1.0, 2.0, 3.0]]), torch.tensor([[3.0, 2.0, 1.0]]), torch.ones(1, 3).bool())
        tensor([-1.])
    """
    return rank_correlation(scores_now.cpu(), scores_before.cpu(), evaluable.cpu()).float()


def _share(part: Tensor, whole: Tensor) -> Tensor:
    return torch.where(whole == 0, 0.0, part / whole)  # a NaN stays one
