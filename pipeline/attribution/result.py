"""The result of an attribution."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Attribution:
    """Relevance of B examples with up to T tokens in a model of L blocks; tensors are CPU float32, padding is 0.

    Attributes:
        scores: (B, T) signed relevance; positive supports the objective, negative opposes it.
        layer_scores: (B, L, T) relevance as known after block l = 1..L; None for methods that see one layer only.
        flow: (B, L, T, T) with `flow[b, l, i, j]` from source i to target j; None unless asked for.
        target: (B,) class index that was explained.
        mask: (B, T) true on real positions, special tokens included.
        special: (B, T) true on special tokens.
        output_change: (B,) objective at the input minus objective at the baseline.
        completeness_gap: (B, L+1) relative distance of the layer's sum from `output_change`, the denominator being
            at least 1e-3; None for methods that do not claim completeness. A method of one layer has (B, 1). Of
            `attn_lrp` it is what leaks under its rules; of `lig` (B, L), the worst target of each block.
        error_bound: Shape of `completeness_gap`: bound on the gap measured from the path itself (METHODS 1.3).
        steps_used: (B,) nodes of the path; 1 for methods without a path.
        converged: (B,) whether the bound (else the gap) stayed within the tolerance.
        parts: What the method documents beside the scores; CA-LIG: `evidence` (B, L+1, T), r^0 to r^L.
        method: Name of the method.
        options: The options that the method ran with.
    """

    scores: Tensor
    target: Tensor
    mask: Tensor
    special: Tensor
    output_change: Tensor
    steps_used: Tensor
    converged: Tensor
    method: str
    options: dict[str, Any]
    layer_scores: Tensor | None = None
    flow: Tensor | None = None
    completeness_gap: Tensor | None = None
    error_bound: Tensor | None = None
    parts: dict[str, Tensor] | None = None

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(value, Tensor):
                object.__setattr__(self, field.name, _to_host(value))
            elif field.name == "parts" and value is not None:
                object.__setattr__(self, field.name, {name: _to_host(part) for name, part in value.items()})

    def __len__(self) -> int:
        return self.scores.shape[0]

    def non_finite(self) -> Tensor:
        """(B,) true for examples with a NaN or an infinity in their scores, at any layer."""
        bad = ~self.scores.isfinite().all(dim=1)
        if self.layer_scores is not None:
            bad |= ~self.layer_scores.isfinite().flatten(1).all(dim=1)
        return bad


def _to_host(value: Tensor) -> Tensor:
    value = value.detach().to("cpu")
    return value.to(torch.float32) if value.is_floating_point() else value
