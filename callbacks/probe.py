"""The probe: a fixed, seeded set of validation samples, and how processes share it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, DistributedSampler, IterableDataset, SubsetRandomSampler

from calig.pipeline.errors import InputError
from calig.pipeline.explained import Explained
from calig.pipeline.explainer import Explainer
from calig.pipeline.records import explained_key

Adapter = Callable[[Any], Mapping[str, Any]]


@dataclass(frozen=True)
class Probe:
    """The samples to explain.

    Attributes:
        loader: The validation loader they come from.
        indices: Dataset indices, which are the sample ids.
        batch_size: Samples per attribution batch.
        inputs: Turns a batch into the model's inputs; None where it already is a mapping of them.
        rows: The samples of a dataset that has no random access, read once, so that later probes see the same ones.
        collated: Each of the `rows` is a batch of one already.
    """

    loader: DataLoader[Any]
    indices: list[int]
    batch_size: int
    inputs: Adapter | None = None
    rows: Mapping[int, Any] | None = None
    collated: bool = False

    @classmethod
    def choose(
        cls, loader: DataLoader[Any], num_samples: int, seed: int, batch_size: int, inputs: Adapter | None = None
    ) -> Probe:
        """Choose seeded indices of the loader's dataset; of an iterable dataset, its first rows."""
        dataset: Any = loader.dataset
        iterable = isinstance(dataset, IterableDataset)
        if loader.batch_sampler is None and not _asks_for_lists(loader):
            # Nothing is collated: what the dataset gives are batches.
            batches = iter(dataset) if iterable else (dataset[index] for index in range(len(dataset)))
            ones = (_one(batch, row) for batch in batches for row in range(_size(batch)))
            rows = dict(enumerate(islice(ones, num_samples)))
            return cls(loader, list(rows), 1, inputs, rows, collated=True)
        if iterable:
            rows = dict(enumerate(islice(iter(dataset), num_samples)))
            return cls(loader, list(rows), batch_size, inputs, rows)
        allowed = sampled_indices(loader)
        generator = torch.Generator().manual_seed(seed)
        chosen = torch.randperm(len(allowed), generator=generator)[:num_samples].tolist()
        return cls(loader, sorted(allowed[place] for place in chosen), batch_size, inputs)

    def chunks(self, rank: int, world_size: int) -> list[list[int]]:
        """The dataset indices that fall to a process, in batches."""
        mine = self.indices[rank::world_size]
        return [mine[start : start + self.batch_size] for start in range(0, len(mine), self.batch_size)]

    def batch(self, indices: Sequence[int], transfer: Callable[[Any], Any]) -> dict[str, Any]:
        """Samples as a validation step gets them, with their `sample_id`.

        Args:
            indices: Of the dataset.
            transfer: Moves a collated batch to the model's device, with the module's own hooks.

        Raises:
            InputError: The batch is no mapping with `input_ids` or `pixel_values`.
        """
        collate = self.loader.collate_fn
        dataset: Any = self.loader.dataset
        if self.collated:
            assert self.rows is not None  # made with them
            batch = collate(self.rows[indices[0]])
        elif self.rows is None and _asks_for_lists(self.loader):
            batch = collate(dataset[list(indices)])
        else:
            batch = collate([dataset[index] if self.rows is None else self.rows[index] for index in indices])
        batch = transfer(batch)
        return model_inputs(batch if self.inputs is None else self.inputs(batch), indices)


def sampled_indices(loader: DataLoader[Any]) -> Sequence[int]:
    """The dataset indices that a loader can give: those of its subset sampler, else all.

    A training and a validation loader may share a dataset and differ in their `SubsetRandomSampler`.
    """
    dataset: Any = loader.dataset
    sampler = getattr(loader.batch_sampler, "sampler", None) or loader.sampler
    if isinstance(sampler, SubsetRandomSampler):
        return [int(index) for index in sampler.indices]
    # Lightning's distributed sampler around a user's own takes that one's indices for its dataset.
    if isinstance(sampler, DistributedSampler) and sampler.dataset is not dataset:
        listed: Any = sampler.dataset
        if len(listed) < len(dataset):
            return sorted({int(listed[place]) for place in range(len(listed))})
    return range(len(dataset))


def model_inputs(batch: Any, indices: Sequence[int]) -> dict[str, Any]:
    """A validation batch as the explainer takes it; keys that mean something else in a user's data are left out.

    Args:
        batch: A mapping with `input_ids` (B, T), or `pixel_values` (B, C, H, W), and what else the model's forward
            takes.
        indices: B dataset indices, which are the sample ids; numbers that the batch has of its own go to `own_id`.

    Raises:
        InputError: It is something else; the message says how to hand over an adapter.
    """
    ids = batch.get("input_ids") if isinstance(batch, Mapping) else None
    pixels = batch.get("pixel_values") if isinstance(batch, Mapping) else None
    images = ids is None and isinstance(pixels, Tensor) and pixels.ndim == 4
    ids = pixels if images else ids
    if not isinstance(ids, Tensor) or ids.ndim != (4 if images else 2):
        if not isinstance(batch, Mapping):
            given = f"a {type(batch).__name__}"
        elif ids is None:
            given = f"a mapping with {', '.join(map(str, batch)) or 'no keys'}"
        else:
            shape = f"of shape {tuple(ids.shape)}" if isinstance(ids, Tensor) else f"as {type(ids).__name__}"
            given = f"`input_ids` {shape}"
        raise InputError(
            f"the validation loader gives {given}; AttributionCallback needs a mapping with a tensor `input_ids` "
            "(batch, tokens), and `attention_mask` and `labels` where there are any; or with `pixel_values` (batch, "
            "channels, height, width). Say how to make it: "
            "AttributionCallback(inputs=lambda batch: {'input_ids': batch[0], 'attention_mask': batch[1]})."
        )
    kept = dict(batch)
    if "labels" not in kept and "label" in kept:
        kept["labels"] = kept["label"]
    size = len(ids)
    if "sample_id" in kept:
        kept["own_id"] = kept.pop("sample_id")
    labels = kept.pop("labels", None)
    if isinstance(labels, Tensor) and labels.ndim and len(labels) == size:
        # One class or number per sample, or an indicator for each of its labels.
        kept["labels"] = labels.reshape(size) if labels.numel() == size and not _indicates(labels) else labels
    for key in ("own_id", "rationale_missed"):
        value = kept.pop(key, None)
        if isinstance(value, Tensor) and value.numel() == size and not _is_float(value):
            kept[key] = value.reshape(size)
    for key in ("special_tokens_mask", "word_ids", "rationale", "segment"):
        value = kept.pop(key, None)
        if isinstance(value, Tensor) and value.shape == ids.shape and not _is_float(value):
            kept[key] = value
    mask = kept.pop("object_mask", None)
    if images and isinstance(mask, Tensor) and mask.ndim == 3 and len(mask) == size and not _is_float(mask):
        kept["object_mask"] = mask
    return kept | {"sample_id": torch.tensor(list(indices))}


def explain_each(
    explainer: Explainer, probe: Probe, chunks: Sequence[Sequence[int]], transfer: Callable[[Any], Any]
) -> Explained:
    """Explain batches; what fails is tried again sample by sample, and kept as a failure where it still fails."""
    rows = Explained()
    for indices in chunks:
        try:
            batch = probe.batch(indices, transfer)
            found = explainer.explain(batch)
            own = dict(zip(indices, batch.get("own_id", torch.tensor(list(indices))).tolist(), strict=True))
            found.explanations = [{**row, "own_id": own[row["sample_id"]]} for row in found.explanations]
            rows.extend(found)
        except Exception as error:
            if len(indices) > 1:
                rows.extend(explain_each(explainer, probe, [[index] for index in indices], transfer))
            else:
                method = next(iter(explainer.settings.methods))
                reason = f"{type(error).__name__}: {error}"
                rows.fail([indices[0]], method, reason)
    return rows


def numbered(explanations: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Each sample once, in order, under the number that its data has of its own if those tell the samples apart."""
    rows = {explained_key(row): row for row in explanations}
    own = {row["own_id"] for row in rows.values()}
    key = "own_id" if len(own) == len({row["sample_id"] for row in rows.values()}) else "sample_id"
    named = [
        {name: value for name, value in row.items() if name != "own_id"} | {"sample_id": row[key]}
        for row in rows.values()
    ]
    return sorted(named, key=lambda row: row["sample_id"])  # stable: several labels of a sample keep their order


def _asks_for_lists(loader: DataLoader[Any]) -> bool:
    """Whether the loader asks its dataset for a list of indices at once (`sampler=BatchSampler, batch_size=None`)."""
    return loader.batch_sampler is None and isinstance(loader.sampler, BatchSampler)


def _indicates(labels: Tensor) -> bool:
    """Whether labels are indicators of one label each, (B, 1) float."""
    return labels.ndim == 2 and labels.is_floating_point()


def _is_float(value: Tensor) -> bool:
    return value.is_floating_point() or value.is_complex()


def _tensors(batch: Any) -> Iterator[Tensor]:
    if isinstance(batch, Tensor):
        yield batch
    elif isinstance(batch, Mapping):
        for value in batch.values():
            yield from _tensors(value)
    elif isinstance(batch, list | tuple):
        for value in batch:
            yield from _tensors(value)


def _size(batch: Any) -> int:
    return next((len(tensor) for tensor in _tensors(batch) if tensor.ndim), 0)


def _one(batch: Any, row: int) -> Any:
    """One row of a batch, as a batch."""
    if isinstance(batch, Tensor):
        return batch[row : row + 1] if batch.ndim else batch
    if isinstance(batch, Mapping):
        return {key: _one(value, row) for key, value in batch.items()}
    if isinstance(batch, list | tuple):
        return [_one(value, row) for value in batch]
    return batch
