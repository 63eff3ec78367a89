"""A batch as the engine works on it."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from calig.pipeline.attribution.windows import Windows


@dataclass(frozen=True)
class Inputs:
    """A batch as the engine works on it.

    Attributes:
        batch: What the model's forward takes, cloned, so that tensors made under inference mode can be used.
        mask: (B, T) true on real positions.
        special: (B, T) true on real special tokens.
        pixels: Key of the images (B, C, H, W) in `batch`; None where the input is not images.
        together: Objectives that are explained together: what one of them needs is computed for all in the same
            passes, and kept in `memo` (see `inside`) as long as these inputs live.
        windows: Of long documents: how each row is cut into what the model reads; None where it reads the rows.
        document: (B,) of windows: which of them belong together. What is explained is the mean over those, so errors
            and scales are theirs in common; None where every row stands for itself.
    """

    batch: dict[str, Any]
    mask: Tensor
    special: Tensor
    pixels: str | None = None
    together: tuple[Any, ...] = ()
    windows: Windows | None = None
    document: Tensor | None = None
    memo: dict[Any, Any] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __len__(self) -> int:
        return self.mask.shape[0]

    @property
    def filled(self) -> float:
        """Share of what the model reads that is no padding."""
        read = self.mask if self.windows is None else self.windows.cut(self.mask)
        return float(read.float().mean())

    @property
    def content(self) -> Tensor:
        """(B, T) true on real tokens that are not special: what a baseline replaces and a ranking ranks."""
        return self.mask & ~self.special

    def seed_of(self, row: int, seed: int) -> int:
        """A seed from an example's own input: the same in every batch, on every process, at every amount of padding."""
        digest = hashlib.sha256(repr((seed, self.content_of(row))).encode()).digest()
        return int.from_bytes(digest[:8], "little") >> 1

    def content_of(self, row: int) -> list[Any]:
        """What tells an example from others, whatever its batch and padding: its token ids, else its tensors."""
        if "input_ids" in self.batch:
            # Numbers above the token are those of `embedding_noise`.
            return (self.batch["input_ids"][row, self.mask[row]] & (2**30 - 1)).tolist()
        one = self.select(torch.tensor([row], device=self.mask.device))
        own = [value[0] for key, value in one.items() if isinstance(value, Tensor) and value.shape[:1] == (1,)]
        size = self.mask.shape[1]
        return [
            (value[self.mask[row]] if value.shape[:1] == (size,) else value).float().cpu().flatten().tolist()
            for value in own
        ]

    def select(self, rows: Tensor) -> dict[str, Any]:
        """The forward's arguments for the examples `rows` (N,), which may repeat."""
        size = len(self)
        return {
            key: value[rows] if isinstance(value, Tensor) and value.ndim > 0 and value.shape[0] == size else value
            for key, value in self.batch.items()
        }
