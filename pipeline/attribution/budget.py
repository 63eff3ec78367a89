"""How many tokens one internal pass may hold, and what happens when memory does not suffice."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, TypeVar

import torch
from torch import Tensor

from calig.pipeline.errors import InputError

# Where "auto" starts. On a CPU larger passes are not faster, they only leave the cache.
CPU_TOKENS, ACCELERATOR_TOKENS = 1024, 8192

Result = TypeVar("Result")


class TokenBudget:
    """Rows times tokens of one internal pass. It bounds memory and speed, never results.

    Args:
        tokens: The budget; "auto" starts with what suits the device and halves when memory runs out, for good.
        device: Where the passes run.

    Raises:
        InputError: Neither "auto" nor a positive number.
    """

    def __init__(self, tokens: int | Literal["auto"], device: torch.device) -> None:
        if tokens != "auto" and (isinstance(tokens, bool) or not isinstance(tokens, int) or tokens < 1):
            raise InputError(f"max_tokens_per_pass takes 'auto' or a positive number of tokens, got {tokens!r}.")
        self.adapts = tokens == "auto"
        self.device = device
        default = CPU_TOKENS if device.type == "cpu" else ACCELERATOR_TOKENS
        self.tokens: int = default if tokens == "auto" else tokens

    def rows(self, width: int) -> int:
        """Rows of `width` tokens that fit into a pass: at least one."""
        return max(1, self.tokens // max(1, width))

    def run(
        self, rows: Tensor, width: int, work: Callable[[Tensor], Result], *, most: int | None = None
    ) -> list[Result]:
        """Do work on rows in passes that fit.

        Args:
            rows: (N,) whatever names a row.
            width: Tokens of a row.
            work: Called with consecutive pieces of `rows`, again with smaller ones where memory ran out.
            most: Rows that a piece must not exceed; None for the budget alone.

        Raises:
            torch.OutOfMemoryError: A single row does not fit, or a fixed budget is too large.
        """
        results: list[Result] = []
        start = 0
        while start < len(rows):
            size = self.rows(width) if most is None else min(most, self.rows(width))
            part = rows[start : start + size]
            try:
                results.append(work(part))
                start += len(part)
                continue
            except RuntimeError as error:
                if not _out_of_memory(error):
                    raise
                if len(part) == 1 or not self.adapts:
                    raise torch.OutOfMemoryError(self._advice(len(part), width)) from error
            # Not inside `except`: there the traceback still holds the tensors of the pass that failed.
            self.tokens = len(part) // 2 * width
            if self.device.type == "cuda":
                torch.cuda.empty_cache()
        return results

    def _advice(self, rows: int, width: int) -> str:
        if rows == 1:
            return (
                f"one row of {width} tokens does not fit into the memory of {self.device}: shorten the inputs, take a "
                "smaller model, or free memory there."
            )
        return (
            f"a pass of {rows} rows of {width} tokens does not fit into the memory of {self.device}; set "
            f"max_tokens_per_pass below {self.tokens}, or to 'auto'."
        )


def _out_of_memory(error: RuntimeError) -> bool:
    # Only CUDA has an error class of its own; the CPU's and MPS' allocators raise a RuntimeError that says so.
    text = str(error).lower()
    return isinstance(error, torch.OutOfMemoryError) or "not enough memory" in text or "out of memory" in text
