"""The perturbation planner: every distinct perturbed input of a batch runs once, in full batches of similar length."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from calig.pipeline.errors import InputError
from calig.pipeline.metrics.operators import PerturbationTokens, perturb_text

Forward = Callable[[dict[str, Tensor]], Tensor]
TOKEN_BUDGET = 8192  # 64 texts of 128 tokens: full batches on a GPU, still small in a CPU's memory


class Request(NamedTuple):
    """One perturbed input.

    Attributes:
        example: Index of the example in the batch.
        keep: (T,) bool, the positions that stay. Special tokens always stay, padding never does.
        operator: How the other positions go.
    """

    example: int
    keep: Tensor
    operator: str = "mask"


def perturbed_logits(
    forward: Forward,
    batch: Mapping[str, Tensor],
    requests: Sequence[Request],
    *,
    tokens: PerturbationTokens,
    special: Tensor,
    mask: Tensor,
    token_budget: int = TOKEN_BUDGET,
) -> Tensor:
    """Run all requests of a batch of texts and return their logits in the order of the requests.

    Pass everything that is asked of a batch (all bins, methods, controls and operators) in one call: identical inputs
    run once, so the unperturbed input runs once per example however many methods are compared.

    Args:
        forward: Maps the keys that ``batch`` has, on its device and in its dtypes, padded on the right, to (n, C)
            logits. Give it the unwrapped model in evaluation mode; it runs under `torch.inference_mode()`.
        batch: (B, T) `input_ids`, `attention_mask` and perhaps `token_type_ids`.
        requests: What to run.
        tokens: The ids that perturbed texts are built with.
        special: (B, T) bool, special tokens.
        mask: (B, T) bool, real positions.
        token_budget: Largest rows x length of one forward batch, padding counted; a longer text runs alone.

    Returns:
        (R, C) float32 logits on the CPU.

    Raises:
        InputError: See `perturb_text`; or ``forward`` does not return (n, C).

    Example:
        >>> batch = {"input_ids": torch.tensor([[5, 6, 7]]), "attention_mask": torch.ones(1, 3, dtype=torch.long)}
        >>> requests = [Request(0, torch.tensor([True, False, True]), "delete"), Request(0, torch.ones(3).bool())]
        >>> perturbed_logits(
        ...     lambda x: (x["input_ids"] * x["attention_mask"]).sum(1, keepdim=True).float(),
        ...     batch,
        ...     requests,
        ...     tokens=PerturbationTokens(pad_id=0, mask_id=1),
        ...     special=torch.zeros(1, 3).bool(),
        ...     mask=torch.ones(1, 3).bool(),
        ... )
        tensor([[12.],
                [18.]])
    """
    if not requests:
        raise InputError("there is nothing to run: the list of requests is empty.")
    rows, lengths = perturb_text(
        batch,
        [request.example for request in requests],
        torch.stack([request.keep.cpu() for request in requests]),
        [request.operator for request in requests],
        tokens=tokens,
        special=special,
        mask=mask,
    )
    unique, inverse = _distinct(rows)
    logits, order = [], []
    with torch.inference_mode():
        for chosen in _batches(unique, lengths.tolist(), token_budget):
            length = int(lengths[chosen[0]])
            fed = {key: row[chosen, :length].to(batch[key]) for key, row in rows.items()}
            output = forward(fed)
            if output.dim() != 2 or len(output) != len(chosen):
                raise InputError(f"forward returned {tuple(output.shape)}, expected logits ({len(chosen)}, C).")
            logits.append(output.to("cpu", torch.float32))
            order += chosen
    place = {row: i for i, row in enumerate(order)}
    return torch.cat(logits)[[place[unique[i]] for i in inverse]]


def _distinct(rows: Mapping[str, Tensor]) -> tuple[list[int], list[int]]:
    """Return the first row of each distinct input, and for every row the index of its input among those."""
    everything = torch.cat([rows[key] for key in sorted(rows)], dim=1).numpy()
    seen: dict[bytes, int] = {}
    unique: list[int] = []
    inverse: list[int] = []
    for i, row in enumerate(everything):
        inverse.append(seen.setdefault(row.tobytes(), len(unique)))
        if inverse[-1] == len(unique):
            unique.append(i)
    return unique, inverse


def _batches(rows: Sequence[int], lengths: Sequence[int], token_budget: int) -> Iterator[list[int]]:
    """Yield batches of rows, longest first: the first batch needs the most memory, so too little shows at once."""
    ordered = sorted(rows, key=lambda row: -lengths[row])
    start = 0
    while start < len(ordered):
        size = max(1, token_budget // lengths[ordered[start]])
        yield ordered[start : start + size]
        start += size
