"""The probe: a fixed, seeded set of validation samples, and how processes share it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader, IterableDataset
from transformers import PreTrainedModel

from calig.pipeline.errors import InputError


def find_model(module: nn.Module, choose: Callable[[Any], nn.Module] | None) -> nn.Module:
    """The model to explain inside a LightningModule.

    Args:
        module: The LightningModule.
        choose: Names the model; None takes the only `PreTrainedModel` that is not part of another.

    Raises:
        InputError: There is none, or more than one; the candidates are listed.
    """
    if choose is not None:
        return choose(module)
    found = {name: part for name, part in module.named_modules() if isinstance(part, PreTrainedModel)}
    outer = {
        name: part
        for name, part in found.items()
        if not any(name != other and name.startswith(f"{other}.") for other in found)
    }
    if len(outer) == 1:
        return next(iter(outer.values()))
    listed = ", ".join(f"module.{name} ({type(part).__name__})" for name, part in outer.items()) or "none"
    raise InputError(
        f"{type(module).__name__} holds {len(outer)} Hugging Face models: {listed}. "
        "Name the one to explain: AttributionCallback(model=lambda module: module.<name>)."
    )


@dataclass(frozen=True)
class Probe:
    """The samples to explain.

    Attributes:
        loader: The validation loader they come from.
        indices: Dataset indices, which are the sample ids.
        batch_size: Samples per attribution batch.
    """

    loader: DataLoader[Any]
    indices: list[int]
    batch_size: int

    @classmethod
    def choose(cls, loader: DataLoader[Any], num_samples: int, seed: int, batch_size: int) -> Probe:
        """Choose seeded indices of the loader's dataset; of an iterable dataset, its first rows."""
        if isinstance(loader.dataset, IterableDataset):
            return cls(loader, list(range(num_samples)), batch_size)
        size = len(loader.dataset)  # type: ignore[arg-type]
        generator = torch.Generator().manual_seed(seed)
        return cls(loader, sorted(torch.randperm(size, generator=generator)[:num_samples].tolist()), batch_size)

    def batches(self, rank: int, world_size: int) -> Iterator[dict[str, Any]]:
        """The samples that fall to this process, collated as the loader collates, each with its `sample_id`."""
        dataset = self.loader.dataset
        rows: dict[int, Any] | None = None
        if isinstance(dataset, IterableDataset):
            rows = dict(enumerate(islice(iter(dataset), len(self.indices))))
        mine = [index for index in self.indices[rank::world_size] if rows is None or index in rows]
        collate = self.loader.collate_fn
        for start in range(0, len(mine), self.batch_size):
            chosen = mine[start : start + self.batch_size]
            batch = collate([dataset[index] if rows is None else rows[index] for index in chosen])
            if not isinstance(batch, Mapping) or "input_ids" not in batch:
                raise InputError(
                    f"the validation loader's collate_fn returns {type(batch).__name__}; AttributionCallback needs a "
                    "mapping with `input_ids` (and `attention_mask`, `labels`)."
                )
            batch = dict(batch)
            if "labels" not in batch and "label" in batch:
                batch["labels"] = batch["label"]
            # A data module that numbers its rows itself knows better than the position in its dataset.
            yield {"sample_id": torch.tensor(chosen)} | batch


def gather(values: Sequence[Any]) -> list[Any]:
    """The lists of all processes, joined in rank order, on every process; every process must call it."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return list(values)
    parts: list[list[Any]] = [[] for _ in range(torch.distributed.get_world_size())]
    torch.distributed.all_gather_object(parts, list(values))
    return [value for part in parts for value in part]
