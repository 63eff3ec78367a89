"""Encoded examples of different lengths to one padded batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from calig.datamodules.windows import places

# Kept beside the model's inputs: per token with its value on padding, and per example.
TOKEN_FILL = {
    "special_tokens_mask": 1,
    **dict.fromkeys(("word_ids", "rationale", "segment", "char_start", "char_end"), -1),
}
EXAMPLE_KEYS = ("sample_id", "rationale_missed")


@dataclass(frozen=True)
class TextCollator:
    """Pad what ``calig.datamodules.tokenization.encode`` gives; plain and picklable, so workers can have it.

    Shapes: B examples, T tokens of the longest, C labels; all tensors int64 but for some ``labels``. The result holds
    ``model_keys`` as far as the examples have them, ``special_tokens_mask`` (1 on padding), ``word_ids``, ``rationale``
    and, of pairs, ``segment`` (-1 on padding), all (B, T); ``sample_id`` and ``rationale_missed`` (B,); where all
    examples have one, ``labels`` (B,): classes, or float32 numbers of a regression; or (B, C) float32 indicators. Of
    texts that are cut into windows also ``windows`` (B, V, W), the positions of the row that each of up to V windows
    reads, -1 on padding, and ``char_start`` and ``char_end`` (B, T).

    Attributes:
        pad_token_id: Fills ``input_ids``.
        padding_side: Where the filling goes.
        model_keys: What the model's forward takes: pass it ``batch`` reduced to these keys.
        pad_token_type_id: Fills ``token_type_ids``.
    """

    pad_token_id: int
    padding_side: Literal["right", "left"] = "right"
    model_keys: tuple[str, ...] = ("input_ids", "attention_mask", "token_type_ids")
    pad_token_type_id: int = 0

    def __call__(self, examples: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
        """Pad and stack."""
        padding = {"input_ids": self.pad_token_id, "token_type_ids": self.pad_token_type_id}
        fills = {key: padding.get(key, 0) for key in self.model_keys} | TOKEN_FILL
        batch = {key: self._padded(examples, key, fill) for key, fill in fills.items() if key in examples[0]}
        for key in EXAMPLE_KEYS:
            batch[key] = torch.tensor([example[key] for example in examples])
        if all("labels" in example for example in examples):
            batch["labels"] = torch.tensor([example["labels"] for example in examples])
        if "windows" in examples[0]:
            batch["windows"] = self._windows(examples)
        return batch

    def _windows(self, examples: Sequence[dict[str, Any]]) -> Tensor:
        lengths = [len(example["input_ids"]) for example in examples]
        windows = [places(example["windows"], length) for example, length in zip(examples, lengths, strict=True)]
        size = max(map(len, windows)), max(len(window) for of in windows for window in of)
        filled = torch.full((len(windows), *size), -1)
        for row, (of, length) in enumerate(zip(windows, lengths, strict=True)):
            shift = max(lengths) - length if self.padding_side == "left" else 0
            for number, window in enumerate(of):
                own = slice(len(window)) if self.padding_side == "right" else slice(size[1] - len(window), None)
                filled[row, number, own] = torch.tensor(window) + shift
        return filled

    def _padded(self, examples: Sequence[dict[str, Any]], key: str, fill: int) -> Tensor:
        length = max(len(example[key]) for example in examples)
        rows = []
        for example in examples:
            filling = [fill] * (length - len(example[key]))
            rows.append(example[key] + filling if self.padding_side == "right" else filling + example[key])
        return torch.tensor(rows)
