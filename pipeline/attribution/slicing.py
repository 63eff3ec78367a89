"""Cutting a batch into slices of similar lengths that fit into one pass, and putting their results together.

Shapes: B examples of the batch, T its tokens.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from calig.pipeline.attribution.model import Inputs
from calig.pipeline.attribution.objective import Objective
from calig.pipeline.attribution.result import Attribution

_SHORTER = 0.75  # a row this much shorter than the longest of its slice begins a slice of its own

# Axes of tokens in each field of a result; those of `parts` are the method's own.
_TOKEN_DIMS = {"scores": (1,), "mask": (1,), "special": (1,), "layer_scores": (2,), "flow": (2, 3)}


@dataclass(frozen=True)
class RowsObjective:
    """An objective of a batch, for some of its rows.

    Attributes:
        whole: The objective of the batch.
        rows: (N,) examples of the batch.
    """

    whole: Objective
    rows: Tensor

    @property
    def target(self) -> Tensor:
        """(N,) see `Objective`."""
        return self.whole.target[self.rows.to(self.whole.target.device)]

    def __call__(self, output: Any, rows: Tensor) -> Tensor:
        """Read the objective of examples that are counted within the slice; see `Objective`."""
        return self.whole(output, self.rows.to(rows.device)[rows])


def cut(inputs: Inputs, tokens: int, *, trim: bool) -> list[tuple[Tensor, int]]:
    """Decide on slices.

    Args:
        inputs: B examples.
        tokens: Rows times tokens of a slice, where it has more than one row.
        trim: Whether columns that are padding for all rows of a slice may go. They go only where padding is on the
            right, and where every tensor of the batch is (B, T).

    Windows of one document stay together, however many they are: they are scaled together.

    Returns:
        The rows of each slice and its number of columns.
    """
    width = inputs.mask.shape[1]
    if inputs.document is not None:
        return _cut_documents(inputs, inputs.document, tokens, trim=trim and _can_trim(inputs))
    if not (trim and _can_trim(inputs)):
        return [(rows, width) for rows in torch.arange(len(inputs)).split(max(1, tokens // max(1, width)))]
    lengths = inputs.mask.sum(dim=1).cpu()
    slices: list[tuple[list[int], int]] = []
    for row in lengths.argsort(descending=True, stable=True).tolist():
        length = max(1, int(lengths[row]))
        rows, columns = slices[-1] if slices else ([], 0)
        if not rows or length <= _SHORTER * columns or (len(rows) + 1) * columns > tokens:
            slices.append(([row], length))
        else:
            rows.append(row)
    return [(torch.tensor(rows), columns) for rows, columns in slices]


def _cut_documents(inputs: Inputs, document: Tensor, tokens: int, *, trim: bool) -> list[tuple[Tensor, int]]:
    owner, lengths = document.cpu(), inputs.mask.sum(dim=1).clamp_min(1).cpu()
    if not trim:
        lengths = torch.full_like(lengths, inputs.mask.shape[1])
    mine = [(owner == index).nonzero().flatten() for index in owner.unique()]
    slices: list[tuple[list[Tensor], int]] = []
    for rows in sorted(mine, key=lambda rows: -int(lengths[rows].max())):
        length = int(lengths[rows].max())
        held, columns = slices[-1] if slices else ([], 0)
        if not held or length <= _SHORTER * columns or (sum(map(len, held)) + len(rows)) * columns > tokens:
            slices.append(([rows], length))
        else:
            held.append(rows)
    return [(torch.cat(held).sort().values, columns) for held, columns in slices]


def _can_trim(inputs: Inputs) -> bool:
    shape = inputs.mask.shape
    tensors = [value for value in inputs.batch.values() if isinstance(value, Tensor) and value.ndim > 1]
    on_the_right = not (inputs.mask[:, 1:] & ~inputs.mask[:, :-1]).any()
    return on_the_right and "input_ids" in inputs.batch and all(value.shape == shape for value in tensors)


def take(inputs: Inputs, goals: Sequence[Objective], rows: Tensor, columns: int) -> Inputs:
    """The inputs of a slice; `together` holds the objectives for it."""
    there = rows.to(inputs.mask.device)
    width = inputs.mask.shape[1]
    batch = inputs.select(there)
    if columns < width:
        batch = {
            key: value[:, :columns].contiguous() if isinstance(value, Tensor) and value.ndim > 1 else value
            for key, value in batch.items()
        }
    return Inputs(
        batch,
        inputs.mask[there, :columns],
        inputs.special[there, :columns],
        inputs.pixels,
        together=tuple(RowsObjective(goal, rows) for goal in goals),
        document=None if inputs.document is None else inputs.document[there].unique(return_inverse=True)[1],
    )


def join(
    results: Sequence[Attribution],
    slices: Sequence[tuple[Tensor, int]],
    width: int,
    parts_axes: Mapping[str, tuple[int, ...]],
) -> Attribution:
    """Put the results of all slices together, in the order of the batch and `width` tokens wide.

    Args:
        results: One per slice.
        slices: From `cut`.
        width: Tokens of the batch.
        parts_axes: Name in `parts` -> its axes of tokens; a part that is not named has none.
    """
    order = torch.cat([rows for rows, _ in slices]).argsort()

    def together(tensors: Sequence[Tensor], dims: Sequence[int]) -> Tensor:
        padded = [_pad(tensor, dims, width) for tensor in tensors]
        return torch.cat(padded)[order]

    values: dict[str, Any] = {}
    for field in dataclasses.fields(Attribution):
        own = [getattr(result, field.name) for result in results]
        if isinstance(own[0], Tensor):
            values[field.name] = together(own, _TOKEN_DIMS.get(field.name, ()))
        elif field.name == "parts" and own[0] is not None:
            values["parts"] = {
                name: together([parts[name] for parts in own], parts_axes.get(name, ())) for name in own[0]
            }
        else:
            values[field.name] = own[0]
    return Attribution(**values)


def _pad(tensor: Tensor, dims: Sequence[int], width: int) -> Tensor:
    shape = [width if dim in dims else size for dim, size in enumerate(tensor.shape)]
    if shape == list(tensor.shape):
        return tensor
    whole = tensor.new_zeros(shape)
    whole[tuple(slice(size) for size in tensor.shape)] = tensor
    return whole
