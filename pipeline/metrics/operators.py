"""What it means to remove tokens from a text: the operators `mask`, `delete` and `attention` (METRICS 1).

Shapes: R requests, T positions of the batch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from calig.pipeline.errors import InputError, unknown

Operator = Literal["mask", "delete", "attention"]
OPERATORS: tuple[Operator, ...] = ("mask", "delete", "attention")
TEXT_KEYS = ("input_ids", "attention_mask", "token_type_ids")


@dataclass(frozen=True)
class PerturbationTokens:
    """The token ids that perturbed texts are built from.

    Attributes:
        pad_id: Fills batches on the right; must be the pad id of the model's config (decoders find their last token
            by it).
        mask_id: What `mask` puts in place of a token; None where there is none.
        empty_id: Fed alone if nothing of a text would be kept: bos, else eos; None where there is neither.
    """

    pad_id: int
    mask_id: int | None = None
    empty_id: int | None = None

    @classmethod
    def from_tokenizer(cls, tokenizer: Any) -> PerturbationTokens:
        """Read the ids off a Hugging Face tokenizer.

        `mask_id` is the mask token, or the unknown token where it is a token of its own (GPT-2's is also its eos).

        Raises:
            InputError: The tokenizer has no pad token.
        """
        names = ("pad", "mask", "unk", "bos", "eos", "cls", "sep")
        ids: dict[str, int | None] = {name: getattr(tokenizer, f"{name}_token_id", None) for name in names}
        if ids["pad"] is None:
            raise InputError(
                "the tokenizer has no pad token, so texts of different lengths cannot share a batch. "
                "Set tokenizer.pad_token = tokenizer.eos_token and the model's config.pad_token_id likewise."
            )
        unk = ids["unk"]
        if unk in [ids[name] for name in names if name != "unk"]:
            unk = None
        return cls(
            pad_id=ids["pad"],
            mask_id=unk if ids["mask"] is None else ids["mask"],
            empty_id=ids["eos"] if ids["bos"] is None else ids["bos"],
        )

    def named(self, operator: str) -> str:
        """The operator itself: of texts none has a second name."""
        return operator

    def check(self, operator: str) -> None:
        """Raise InputError if texts cannot be perturbed by ``operator`` with these tokens."""
        if operator not in OPERATORS:
            raise unknown("operator on texts", operator, OPERATORS)
        if operator == "mask" and self.mask_id is None:
            raise InputError(
                "the operator 'mask' needs a mask token, or an unknown token that is no other special token, and the "
                "tokenizer has neither. Use the operator 'delete'."
            )


def perturb_text(
    batch: Mapping[str, Tensor],
    example: Sequence[int],
    keep: Tensor,
    operator: Sequence[str],
    *,
    tokens: PerturbationTokens,
    special: Tensor,
    mask: Tensor,
) -> tuple[dict[str, Tensor], Tensor]:
    """Build the perturbed texts of R requests, special tokens untouched.

    `mask` replaces the tokens that are not kept. `delete` removes them and moves the rest together. `attention` sets
    their attention mask to 0 and leaves the rest in place; hidden tokens behind the last kept one are cut off, which
    no kept position sees, so that a decoder reads out at its last kept token (models that count positions by the
    attention mask, such as OPT, renumber them). If nothing would be kept, one bos (else eos) token is fed.

    Args:
        batch: (B, T) `input_ids`, `attention_mask` and perhaps `token_type_ids`, padded on either side.
        example: R indices into the batch.
        keep: (R, T) bool; what it says of special tokens and of padding does not matter.
        operator: R operators.
        tokens: The ids to build with.
        special: (B, T) bool, special tokens.
        mask: (B, T) bool, real positions.

    Returns:
        The texts under the keys of ``batch``, each (R, T) int64 on the CPU and padded on the right, and their (R,)
        lengths.

    Raises:
        InputError: The batch has other keys or lacks one, an operator is unknown or impossible, or nothing would be
            kept and there is neither bos nor eos.
    """
    _check_batch(batch, keep, special, mask)
    for name in dict.fromkeys(operator):
        tokens.check(name)
    index = torch.as_tensor(example, dtype=torch.long)
    codes = {str(name): i for i, name in enumerate(OPERATORS)}
    code = torch.tensor([codes[name] for name in operator], dtype=torch.uint8).unsqueeze(1)
    names = {name: code == codes[name] for name in OPERATORS}
    real = mask.cpu().bool()[index]
    kept = (keep.cpu().bool() | special.cpu().bool()[index]) & real
    no_later_kept = kept.long().flip(1).cumsum(1).flip(1) == 0
    fed = torch.where(names["delete"], kept, torch.where(names["attention"], real & ~no_later_kept, real))
    rows = {key: batch[key].cpu().long()[index] for key in TEXT_KEYS if key in batch}
    rows["attention_mask"] = torch.where(names["attention"], kept, fed).long()
    if tokens.mask_id is not None:
        rows["input_ids"] = torch.where(names["mask"] & ~kept, tokens.mask_id, rows["input_ids"])

    lengths = fed.sum(1)
    width = fed.shape[1]
    to_the_left = fed.cumsum(1) - 1
    in_place = bool((~fed | (to_the_left == torch.arange(width))).all())
    to_the_left.masked_fill_(~fed, width)  # what is not fed goes to a column that is cut off
    for key, fill in zip(TEXT_KEYS, (tokens.pad_id, 0, 0), strict=True):
        if key in rows and in_place:
            rows[key] = rows[key].masked_fill_(~fed, fill)
        elif key in rows:
            rows[key] = rows[key].new_full((len(fed), width + 1), fill).scatter_(1, to_the_left, rows[key])[:, :width]

    empty = lengths == 0
    if bool(empty.any()):
        if tokens.empty_id is None:
            raise InputError(
                "nothing of a text would be kept, and the tokenizer has neither a bos nor an eos token to feed "
                "instead. Tokenise with special tokens, or use the operator 'mask'."
            )
        rows["input_ids"][empty, 0] = tokens.empty_id
        rows["attention_mask"][empty, 0] = 1
        lengths = lengths.clamp(min=1)
    return rows, lengths


def _check_batch(batch: Mapping[str, Tensor], keep: Tensor, special: Tensor, mask: Tensor) -> None:
    for key in ("input_ids", "attention_mask"):
        if key not in batch:
            raise InputError(f"the batch lacks '{key}'. It has: {', '.join(batch) or 'nothing'}.")
    other = [key for key in batch if key not in TEXT_KEYS]
    if other:
        raise InputError(
            f"the batch has keys that text perturbations cannot follow: {', '.join(other)}. "
            f"Pass only {', '.join(TEXT_KEYS)}."
        )
    shape = batch["input_ids"].shape
    if special.shape != shape or mask.shape != shape or keep.shape[1:] != shape[1:]:
        raise InputError(
            f"special {tuple(special.shape)}, mask {tuple(mask.shape)} and keep {tuple(keep.shape)} do not fit "
            f"input_ids {tuple(shape)}."
        )
