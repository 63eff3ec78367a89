"""The perturbation planner: every distinct perturbed input of a batch runs once, in full batches of similar length.

Shapes: B examples, T positions of the batch, R requests, U distinct inputs among them, C classes.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from calig.pipeline.attribution.windows import Windows, pool
from calig.pipeline.errors import InputError
from calig.pipeline.metrics.operators import TEXT_KEYS, PerturbationTokens, perturb_text

if TYPE_CHECKING:
    from calig.pipeline.metrics.patches import Perturber

Forward = Callable[[dict[str, Tensor]], Tensor]
TOKEN_BUDGET = 8192  # 64 texts of 128 tokens: full batches on a GPU, still small in a CPU's memory
_CHUNK = 2**19  # positions perturbed at once: some 30 MiB of work space however many requests there are
_HELD = 2**22  # logits that wait on the device: reading each batch at once would make the device wait for Python


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
    tokens: Perturber,
    special: Tensor,
    mask: Tensor,
    token_budget: int = TOKEN_BUDGET,
    windows: Windows | None = None,
) -> Tensor:
    """Run all requests of a batch of texts or images and return their logits in the order of the requests.

    Pass everything that is asked of a batch (all bins, methods, controls and operators) in one call: identical inputs
    run once, so the unperturbed input runs once per example however many methods are compared.

    Args:
        forward: Maps the keys that ``batch`` has, on its device and in its dtypes, padded on the right, to (n, C)
            logits. Give it the unwrapped model in evaluation mode; it runs under `torch.inference_mode()`.
        batch: (B, T) `input_ids`, `attention_mask` and perhaps `token_type_ids`; or `pixel_values` (B, C, H, W).
        requests: What to run.
        tokens: The ids that perturbed texts are built with; of images a `PatchPerturbation`.
        special: (B, T) bool, special tokens.
        mask: (B, T) bool, real positions.
        token_budget: Largest rows x length of one forward batch, padding counted; a longer text runs alone.
        windows: Of long documents, how they are read: a position that goes, goes from every window that holds it, and
            what is returned are the pooled logits. With `delete`, too, the windows stay what they are but for it: cut
            anew, the words that stay would move to other windows, and the difference would be theirs as well.

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
    logits, inverse = distinct_logits(
        forward, batch, requests, tokens=tokens, special=special, mask=mask, token_budget=token_budget, windows=windows
    )
    return logits[inverse]


def distinct_logits(
    forward: Forward,
    batch: Mapping[str, Tensor],
    requests: Sequence[Request],
    *,
    tokens: Perturber,
    special: Tensor,
    mask: Tensor,
    token_budget: int = TOKEN_BUDGET,
    windows: Windows | None = None,
) -> tuple[Tensor, Tensor]:
    """Run requests as `perturbed_logits` does, and return what ran: less memory where many requests are the same.

    Args:
        forward: See `perturbed_logits`, and so for all arguments.
        batch: (B, T) tensors.
        requests: What to run.
        tokens: The ids that perturbed texts are built with.
        special: (B, T) bool, special tokens.
        mask: (B, T) bool, real positions.
        token_budget: Largest rows x length of one forward batch.
        windows: How long documents are read; distinct are then the windows, and each request has a row.

    Returns:
        (U, C) float32 logits on the CPU, one row per distinct input, and (R,) int64: the row of each request.

    Raises:
        InputError: See `perturbed_logits`.
    """
    if not requests:
        raise InputError("there is nothing to run: the list of requests is empty.")
    if windows is not None:
        more = {"tokens": tokens, "token_budget": token_budget}
        pooled = _document_logits(forward, batch, requests, windows, special=special, mask=mask, **more)
        return pooled, torch.arange(len(requests))
    given = {"special": special, "mask": mask}
    if isinstance(tokens, PerturbationTokens):
        inputs: Any = _Texts(batch, requests, tokens=tokens, **given)
    else:
        inputs = tokens.distinct(batch, requests, **given)
    held: list[Tensor] = []
    logits: list[Tensor] = []
    order: list[int] = []
    with torch.inference_mode():
        for chosen in _batches(inputs.lengths, inputs.groups, token_budget):
            output = inputs.run(forward, chosen)
            if output.dim() != 2 or len(output) != len(chosen):
                raise InputError(f"forward returned {tuple(output.shape)}, expected logits ({len(chosen)}, C).")
            held.append(output)
            order += chosen
            if sum(map(torch.numel, held)) > _HELD:
                logits.append(torch.cat(held).to("cpu", torch.float32))
                held.clear()
        logits += [torch.cat(held).to("cpu", torch.float32)] if held else []
    ran = torch.cat(logits)
    of_input = torch.empty(len(order), dtype=torch.long).scatter_(0, torch.tensor(order), torch.arange(len(order)))
    return ran, of_input[inputs.inverse]


class _Texts:
    """The distinct perturbed texts of a batch, see `PatchRequests`."""

    def __init__(self, batch: Mapping[str, Tensor], requests: Sequence[Request], **given: Any) -> None:
        self.batch = batch
        self.keys = [key for key in TEXT_KEYS if key in batch]
        self.texts, self.lengths, self.inverse = _distinct(batch, requests, self.keys, **given)
        self.groups: list[Hashable] = [None] * len(self.lengths)

    def run(self, forward: Forward, chosen: Sequence[int]) -> Tensor:
        """The (n, C) logits of some of the texts, the longest first."""
        rows = torch.frombuffer(bytearray(b"".join([self.texts[i] for i in chosen])), dtype=torch.int32)
        rows = rows.view(len(chosen), len(self.keys), -1)[..., : self.lengths[chosen[0]]]
        return forward({key: _like(rows[:, i], self.batch[key]) for i, key in enumerate(self.keys)})


def _document_logits(
    forward: Forward,
    batch: Mapping[str, Tensor],
    requests: Sequence[Request],
    windows: Windows,
    *,
    special: Tensor,
    mask: Tensor,
    **given: Any,
) -> Tensor:
    """(R, C) pooled logits: each request of a document is one of each of its windows."""
    places, document = windows.places.cpu(), windows.document.cpu()
    mine = [(document == index).nonzero().flatten().tolist() for index in range(windows.size)]
    within = places.clamp_min(0)
    parts = [
        Request(row, request.keep.cpu()[within[row]], request.operator)
        for request in requests
        for row in mine[request.example]
    ]
    logits, inverse = distinct_logits(
        forward, windows.batch(batch), parts, special=windows.cut(special), mask=windows.cut(mask), **given
    )
    owner = torch.tensor([len(mine[request.example]) for request in requests])
    owner = torch.arange(len(requests)).repeat_interleave(owner)
    return pool(logits[inverse], owner, len(requests), windows.pooling)


def _distinct(
    batch: Mapping[str, Tensor], requests: Sequence[Request], keys: Sequence[str], **given: Any
) -> tuple[list[bytes], list[int], Tensor]:
    """Build all texts a chunk at a time.

    Returns:
        The U distinct texts, each the bytes of (keys, T) int32, their lengths, and (R,) int64: the text of a request.
    """
    given = {"special": given["special"].cpu(), "mask": given["mask"].cpu(), "tokens": given["tokens"]}
    batch = {key: value.cpu() for key, value in batch.items()}
    seen: dict[bytes, int] = {}
    lengths: list[int] = []
    inverse: list[int] = []
    size = max(1, _CHUNK // max(1, len(requests[0].keep)))
    for start in range(0, len(requests), size):
        chunk = requests[start : start + size]
        keep = torch.stack([request.keep.cpu() for request in chunk])
        operators = [request.operator for request in chunk]
        rows, ends = perturb_text(batch, [request.example for request in chunk], keep, operators, **given)
        raw = torch.cat([rows[key] for key in keys], 1).int().numpy().tobytes()
        width = len(raw) // len(chunk)
        for i, length in enumerate(ends.tolist()):
            place = seen.setdefault(raw[i * width : (i + 1) * width], len(lengths))
            if place == len(lengths):
                lengths.append(length)
            inverse.append(place)
    return list(seen), lengths, torch.tensor(inverse)


def _like(values: Tensor, example: Tensor) -> Tensor:
    """Bring values to the device and the dtype of ``example``; int32 travels, and the host does not wait for it."""
    return values.contiguous().to(example.device, non_blocking=True).to(example.dtype)


def _batches(lengths: Sequence[int], groups: Sequence[Hashable], token_budget: int) -> Iterator[list[int]]:
    """Yield batches of one group, longest first: the first batch needs the most memory, so too little shows at once."""
    kinds = {group: number for number, group in enumerate(dict.fromkeys(groups))}
    ordered = sorted(range(len(lengths)), key=lambda one: (-lengths[one], kinds[groups[one]]))
    start = 0
    while start < len(ordered):
        size = max(1, token_budget // lengths[ordered[start]])
        kind = groups[ordered[start]]
        batch = [one for one in ordered[start : start + size] if groups[one] == kind]
        yield batch
        start += len(batch)
