"""Long documents: rows of tokens that the model reads in overlapping windows, whose outputs are pooled.

Shapes: B documents, N tokens of the longest, V windows of a document at most, W windows of all documents, T tokens of a
window, C classes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from calig.pipeline.attribution.inputs import Inputs
from calig.pipeline.errors import InputError, unknown

Pooling = Literal["mean", "max"]
KEY = "calig_windows"
"""Where a model's Hugging Face config says how it reads long documents: `length`, `overlap`, `pooling`, `limit`."""


@dataclass(frozen=True)
class Windows:
    """How B documents are read: as W rows, each a choice of positions of its document.

    Attributes:
        places: (W, T) position in the document's row of tokens; -1 on padding.
        document: (W,) which document, in ascending order.
        size: B.
        pooling: `mean` or `max`, per class, of the windows' outputs.
        pad: The model's pad token, which fills `input_ids`.
    """

    places: Tensor
    document: Tensor
    size: int
    pooling: Pooling = "mean"
    pad: int = 0

    @classmethod
    def of(cls, windows: Tensor, shape: Sequence[int], pooling: Pooling = "mean", pad: int = 0) -> Windows:
        """Read what a batch says.

        Args:
            windows: (B, V, T) positions, -1 on padding; a window of nothing but padding is none.
            shape: (B, N) of the documents.
            pooling: See `Windows`.
            pad: See `Windows`.

        Raises:
            InputError: Another shape, a position that the documents do not have, a document without a window, or a
                pooling that does not exist.
        """
        if pooling not in get_args(Pooling):
            raise unknown("pooling", pooling, get_args(Pooling))
        size, length = shape
        if windows.ndim != 3 or len(windows) != size or windows.is_floating_point():
            raise InputError(
                f"windows has shape {tuple(windows.shape)} ({windows.dtype}); expected integers (B, V, T) for {size} "
                "documents: the positions that each window reads, -1 on padding."
            )
        if bool((windows >= length).any()) or bool((windows < -1).any()):
            raise InputError(
                f"windows holds positions from {int(windows.min())} to {int(windows.max())}; the documents have "
                f"{length} tokens, counted from 0, and -1 is padding."
            )
        there = (windows >= 0).any(dim=2)
        for empty in (~there.any(dim=1)).nonzero().flatten().tolist():
            raise InputError(f"document {empty} has no window: every position in windows[{empty}] is -1.")
        return cls(windows[there].long(), there.nonzero()[:, 0], size, pooling, pad)

    @property
    def counts(self) -> Tensor:
        """(B,) windows of each document."""
        return torch.bincount(self.document, minlength=self.size)

    def take(self, documents: Tensor) -> Windows:
        """The windows of some documents (M,), which are then numbered from 0."""
        documents = documents.to(self.document.device)
        kept, number = (documents[:, None] == self.document).nonzero().T.flip(0)
        return replace(self, places=self.places[kept], document=number, size=len(documents))

    def choose(self, rows: Tensor) -> Windows:
        """Some of the windows (M,); every document must keep one."""
        return replace(self, places=self.places[rows], document=self.document[rows])

    def cut(self, values: Tensor, fill: float = 0) -> Tensor:
        """Values of the documents' positions (B, N) as the windows hold them (W, T), `fill` on padding."""
        found = values.to(self.places.device)[self.document[:, None], self.places.clamp_min(0)]
        return found.masked_fill(self.places < 0, fill)

    def batch(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """What the model reads: every (B, N) tensor of a batch cut into windows, with their attention mask.

        Args:
            batch: Of documents; tensors of another shape than `input_ids` are left out.
        """
        shape = batch["input_ids"].shape
        cut = {
            key: self.cut(value, self.pad if key == "input_ids" else 0)
            for key, value in batch.items()
            if isinstance(value, Tensor) and value.shape == shape
        }
        if "attention_mask" not in cut:
            cut["attention_mask"] = (self.places >= 0).long()
        return cut | {key: value for key, value in batch.items() if not isinstance(value, Tensor)}

    def inputs(self, inputs: Inputs) -> Inputs:
        """The windows of documents as a batch of the engine's; each knows its document."""
        return Inputs(self.batch(inputs.batch), self.cut(inputs.mask), self.cut(inputs.special), document=self.document)

    def pool(self, values: Tensor) -> Tensor:
        """Outputs of the windows (W, ...) to those of the documents (B, ...)."""
        return pool(values, self.document, self.size, self.pooling)

    def winners(self, values: Tensor) -> Tensor:
        """(B,) of values (W,), which window of each document has the largest; of equals the first."""
        values = values.nan_to_num(nan=torch.inf)  # what is broken is to be found
        best = pool(values, self.document, self.size, "max")[self.document]
        place = torch.arange(len(values), device=values.device).where(values == best, len(values))
        return -pool(-place, self.document, self.size, "max")

    def spread(self, values: Tensor, length: int, axis: int = 1) -> Tensor:
        """Means over windows: values at their positions (W, .., T, ..) summed where documents hold them (B, .., N, ..).

        A token that several windows hold gets the sum of their shares, so that the sum over a document's tokens is the
        mean over its windows of the sums over theirs.

        Args:
            values: Zero at padding, on the host.
            length: N.
            axis: Which axis of `values` runs over the T positions.
        """
        places, document = self.places.cpu(), self.document.cpu()
        share = 1 / self.counts.cpu()[document]
        moved = values.movedim(axis, 1)
        weighted = moved * share.to(values.dtype).view(-1, *[1] * (moved.ndim - 1))
        whole = moved.new_zeros(self.size * length, *moved.shape[2:])
        real = places >= 0
        whole.index_add_(0, (document[:, None] * length + places)[real], weighted[real])
        return whole.view(self.size, length, *moved.shape[2:]).movedim(1, axis)


def pool(values: Tensor, document: Tensor, size: int, pooling: Pooling = "mean") -> Tensor:
    """Pool values (W, ...) by document (W,), in ascending order, to (B, ...): their mean, or the largest of each entry.

    By sums over a padded table, because reductions by index are not deterministic on every device.
    """
    document = document.to(values.device)
    counts = torch.bincount(document, minlength=size)
    first = counts.cumsum(0) - counts
    slot = torch.arange(len(document), device=values.device) - first[document]
    # The largest of a document's values is also that of them and some more of its first.
    table = values[first].unsqueeze(1).repeat(1, int(counts.max()), *[1] * (values.ndim - 1))
    table = table if pooling == "max" else torch.zeros_like(table)
    table = table.index_put((document, slot), values)
    if pooling == "max":
        return table.amax(dim=1)
    return table.sum(dim=1) / counts.to(values.dtype).view(-1, *[1] * (values.ndim - 1))


def own_mean(values: Tensor, document: Tensor | None) -> Tensor:
    """Each row's (N, ...) mean over the rows of its document (N,), at every row; the values where there is none."""
    if document is None:
        return values
    there = document.to(values.device)
    return pool(values, there, int(there.max()) + 1)[there]


def pooling_of(config: Any) -> Pooling:
    """How a model's Hugging Face config says that windows are pooled; the mean where it says nothing."""
    found: Any = getattr(config, KEY, None)
    return found["pooling"] if found else "mean"


def windows_in(
    batch: Mapping[str, Any], mask: Tensor, config: Any = None, pooling: Pooling | None = None
) -> Windows | None:
    """The windows of a batch, on the device of its mask (B, N), or of any tensor like it; None where it has none.

    Raises:
        InputError: See `Windows.of`.
    """
    windows = batch.get("windows")
    if windows is None:
        return None
    pad = getattr(config, "pad_token_id", None)
    given = windows.detach().clone().to(mask.device)
    return Windows.of(given, mask.shape, pooling or pooling_of(config), pad if isinstance(pad, int) else 0)
