"""What the data modules of texts and of images have in common: loaders, their order, and the place in the training."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, Generic, Protocol, TypeVar

import torch
from lightning import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader, DistributedSampler, Subset

from calig.datamodules.describe import describe_labels
from calig.datamodules.samplers import EpochSampler, ExactSampler, ExactShare
from calig.datamodules.sources import Kind, Use, read_column
from calig.datamodules.splits import SPLITS
from calig.datamodules.windows import WindowSettings
from calig.pipeline.errors import InputError, unknown
from calig.pipeline.tasks import Task

Encoded = dict[str, Any]


class Rows(Protocol):
    """The examples of one split, in row order."""

    @property
    def rows(self) -> Sequence[Encoded]:
        """What is known of every example without loading it: ``sample_id``, ``labels`` where there is one, ..."""

    def __len__(self) -> int: ...
    def __getitem__(self, index: Any) -> Encoded: ...


Split = TypeVar("Split", bound=Rows)


class ClassificationData(LightningDataModule, Generic[Split]):
    """Splits of labelled examples, read once in ``setup`` and loaded in an order that a resumed run meets again.

    Every process of a distributed run builds the same data from (config, seed); samplers share the rows out. A
    checkpoint keeps the place in the training order (see ``state_dict``), so that a resumed run goes on behind it.

    Args:
        config: The ``data`` part of the configuration.
        seed: Decides cut splits, limits, generated data and the training order.
        label_names: The classes of a model that is trained already. Labels are then looked up among them (by name, or
            by number), no training split is needed, and nothing is cut from one. None: the training split has them.
        require_labels: False where examples are only explained: data without labels will do, as will a source without
            training split. Labels are read if ``label_names`` says what they mean.
        split: Which split the rows of a single file are, where nothing is trained (either argument above).
        task: What the labels are: one class, any number of labels, or a number.
    """

    kind: Kind

    def __init__(
        self,
        config: Any,
        seed: int = 0,
        label_names: Sequence[str] | None = None,
        require_labels: bool = True,
        split: str = "test",
        task: Task = "classification",
    ) -> None:
        super().__init__()
        self.config = config
        self.task = task
        self.seed = seed
        if split not in SPLITS:
            raise unknown("split", split, SPLITS)
        self._use = Use(label_names, require_labels, split, task)
        self._datasets: dict[str, Split] = {}
        self._label_names: list[str] = []
        self._notes: list[str] = []
        self._place: Mapping[str, int] = {"epoch": 0, "batches": 0}

    @abstractmethod
    def setup(self, stage: str | None = None) -> None:
        """Read all splits; further calls find it done."""

    @property
    @abstractmethod
    def collator(self) -> Callable[[Sequence[Encoded]], dict[str, Tensor]]:
        """What makes a batch of examples."""

    @property
    def tokenizer(self) -> Any:
        """What makes model inputs of texts; None for images."""
        return None

    @property
    def processor(self) -> Any:
        """What makes model inputs of images; None for texts."""
        return None

    @property
    def windows(self) -> WindowSettings | None:
        """How examples that are too long for the model are read; None: they are cut, or none is."""
        return None

    @property
    def label_names(self) -> list[str]:
        """The class names in the order of their indices; empty where neither model nor training split told them."""
        self._check_set_up()
        return self._label_names

    @property
    def splits(self) -> list[str]:
        """The splits that exist."""
        self._check_set_up()
        return list(self._datasets)

    def dataset(self, split: str) -> Split:
        """The examples of ``train``, ``val`` or ``test``.

        Raises:
            InputError: The split is none of these, or the data do not have it.
        """
        self._check_set_up()
        if split not in SPLITS:
            raise unknown("split", split, SPLITS)
        if split not in self._datasets:
            cut = f"set data.{split}_fraction above 0 to cut it from the training split"
            other = f"set explain.split={next(iter(self._datasets))}"
            raise InputError(
                f"there is no {split} split: the data have {', '.join(self._datasets)}. Give it as a file, or "
                f"{cut if self._use.trains and split != 'train' else other}."
            )
        return self._datasets[split]

    def train_dataloader(self) -> DataLoader[Encoded]:
        """Shuffled anew every epoch, by (seed, epoch); the first pass of a resumed run starts where it stopped."""
        dataset, (rank, processes) = self.dataset("train"), self._share
        size, place = self.config.batch_size, self._place
        sampler = EpochSampler(
            dataset,
            self.seed,
            rank=rank,
            processes=processes,
            epoch=place["epoch"],
            start=place["batches"] * size,
            tell_epoch=self._changes_by_epoch,
        )
        return self._loader(dataset, size, sampler)

    def val_dataloader(self) -> DataLoader[Encoded]:
        """In row order, every row once over all processes."""
        return self._eval_loader("val")

    def test_dataloader(self) -> DataLoader[Encoded]:
        """In row order, every row once over all processes."""
        return self._eval_loader("test")

    def state_dict(self) -> dict[str, int]:
        """Where the training stands: the epoch, the batches of it that every process has done, and what they mean."""
        assert self.trainer is not None  # it asks
        loop = self.trainer.fit_loop
        epochs: Any = loop.epoch_progress.current
        within = epochs.processed < epochs.ready
        batches = loop.epoch_loop.batch_progress.current.ready if within else 0
        return {"epoch": epochs.processed, "batches": batches, **self._cut}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """Go on behind the place that ``state_dict`` gave.

        Raises:
            InputError: It lies within an epoch, and the batches of this run are cut otherwise.
        """
        now = self._cut
        other = [f"{key}={state_dict[key]} (now {now[key]})" for key in now if now[key] != state_dict[key]]
        if other and state_dict["batches"]:
            raise InputError(
                f"the checkpoint lies within epoch {state_dict['epoch']}, after {state_dict['batches']} batches with "
                f"{', '.join(other)}. Resume it with the same, or start anew with run.overwrite=true."
            )
        self._place = state_dict

    def restart(self) -> None:
        """Forget the place in the training: what trains next begins with the first epoch."""
        self._place = {"epoch": 0, "batches": 0}

    def explain_dataloader(
        self,
        split: str,
        num_samples: int | None = None,
        batch_size: int | None = None,
        seed: int | None = None,
        exclude: Collection[int] = (),
        rank: int = 0,
        world_size: int = 1,
    ) -> DataLoader[Encoded]:
        """A fixed, seeded subset of a split in a fixed order: longest first, so that a batch holds little padding.

        Args:
            split: ``train``, ``val`` or ``test``.
            num_samples: How many; None or more than there are: all.
            batch_size: Defaults to that of the evaluation loaders.
            seed: Chooses the subset; defaults to the module's seed.
            exclude: Sample ids to leave out of the chosen subset (those that are explained already).
            rank: Which share of what is left.
            world_size: How many shares there are.
        """
        dataset = self.dataset(split)
        rows = dataset.rows
        if num_samples is not None and num_samples < 1:
            raise InputError(f"explain.num_samples={num_samples} explains nothing: give 1 or more, or null for all.")
        generator = torch.Generator().manual_seed(self.seed if seed is None else seed)
        chosen = torch.randperm(len(dataset), generator=generator)[:num_samples].tolist()
        chosen = [index for index in chosen if rows[index]["sample_id"] not in exclude]
        chosen.sort(key=lambda index: (-self._length(rows[index]), index))
        subset: Subset[Encoded] = Subset(dataset, chosen)  # type: ignore[arg-type]  # a data set by its methods
        return self._loader(
            subset, batch_size or self._eval_batch_size, ExactShare(subset, rank=rank, processes=world_size)
        )

    def rows_dataloader(self, rows: Sequence[Encoded], batch_size: int) -> DataLoader[Encoded]:
        """Examples of any origin, as a data set gives them, in their order."""
        return self._loader(list(rows), batch_size)

    def column(self, split: str, column: str, named_by: str) -> list[Any]:
        """The values of any column of the source, one per row of a split that the source has, in its order.

        The source is read once more: rows keep what models need, not every column.

        Raises:
            InputError: There is no such column; ``named_by`` says which key asks for it.
        """
        values = read_column(self.config, self.seed, self._use, split, column, named_by, self.kind)
        return [values[row["sample_id"]] for row in self.dataset(split).rows]

    def has_labels(self, split: str) -> bool:
        """Whether the examples of a split are labelled."""
        rows = self.dataset(split).rows
        return bool(rows) and "labels" in rows[0]

    def describe(self) -> str:
        """One line: rows per split, classes with their share of the first split, what is special, remarks."""
        self._check_set_up()
        parts = [f"{split} {len(rows):,}" for split, rows in self._datasets.items()]
        first = next(iter(self._datasets.values()))
        labels = [row["labels"] for row in first.rows if "labels" in row]
        parts += describe_labels(self.task, self._label_names, labels)
        return " · ".join([*parts, *self._facts(), *self._notes])

    def _facts(self) -> list[str]:
        """What ``describe`` says of this kind of examples."""
        return []

    def _length(self, row: Encoded) -> int:
        """What a batch is padded to; the same for all where nothing is padded."""
        return 0

    @property
    def _changes_by_epoch(self) -> bool:
        """Whether the training data set is asked for (epoch, row): it changes what it gives."""
        return False

    @property
    def _share(self) -> tuple[int, int]:
        """The rank of this process and how many there are; a Trainer knows."""
        return (self.trainer.global_rank, self.trainer.world_size) if self.trainer is not None else (0, 1)

    @property
    def _cut(self) -> dict[str, int]:
        """What decides which rows a training batch has."""
        rows = len(self.dataset("train"))
        return {"data.batch_size": self.config.batch_size, "processes": self._share[1], "training rows": rows}

    def _eval_loader(self, split: str) -> DataLoader[Encoded]:
        dataset, (rank, processes) = self.dataset(split), self._share
        sampler = ExactSampler(dataset, rank=rank, processes=processes) if processes > 1 else None
        return self._loader(dataset, self._eval_batch_size, sampler)

    def _loader(
        self, dataset: Any, batch_size: int, sampler: DistributedSampler[int] | None = None
    ) -> DataLoader[Encoded]:
        return DataLoader(
            dataset,
            batch_size=batch_size,  # by name: Lightning makes predict loaders anew from what they were given
            sampler=sampler,
            num_workers=self.config.num_workers,
            collate_fn=self.collator,
            persistent_workers=self.config.num_workers > 0,
            # Without one of its own, a loader draws its workers' seed from the global generator at every pass.
            generator=torch.Generator().manual_seed(self.seed),
        )

    @property
    def _eval_batch_size(self) -> int:
        return getattr(self.config, "eval_batch_size", None) or self.config.batch_size

    def _check_set_up(self) -> None:
        if not self._datasets:
            raise RuntimeError(
                f"{type(self).__name__}.setup() has not run yet; a Trainer calls it, or call it yourself."
            )
