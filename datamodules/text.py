"""The Lightning data module of all text sources."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import torch
from lightning import LightningDataModule
from lightning.pytorch.utilities import rank_zero_only
from rich.console import Console
from rich.progress import track
from torch.utils.data import DataLoader, Dataset, DistributedSampler, Subset
from transformers import PreTrainedTokenizerBase

from calig.datamodules.collate import TextCollator
from calig.datamodules.examples import TextExample
from calig.datamodules.samplers import EpochSampler, ExactSampler, ExactShare
from calig.datamodules.settings import TextDataConfig
from calig.datamodules.sources import Use, load_corpus, read_column
from calig.datamodules.splits import SPLITS
from calig.datamodules.tokenization import check_length, encode_all, ensure_pad_token, train_wordpiece
from calig.pipeline.errors import InputError, unknown

Encoded = dict[str, Any]
# Below this number of texts tokenising takes a moment and needs no progress bar.
QUICK = 4000


class Truncation(NamedTuple):
    """What ``data.max_length`` cut off a split: texts, tokens (special ones not counted), words of rationales."""

    texts: int
    truncated: int
    tokens: int
    tokens_cut: int
    rationale_words_cut: int

    @property
    def share(self) -> float:
        """Share of all tokens that was cut off."""
        return self.tokens_cut / max(1, self.tokens)


class EncodedDataset(Dataset[Encoded]):
    """The tokenised examples of one split, in row order; rows are those of ``encode_all``."""

    def __init__(self, rows: Sequence[Encoded]) -> None:
        self.rows = list(rows)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Encoded:
        return self.rows[index]


class TextDataModule(LightningDataModule):
    """Text classification data: read, tokenised once in ``setup``, loaded in padded batches (see ``TextCollator``).

    Every process of a distributed run builds the same data from (config, tokenizer, seed); samplers share the rows out.
    A checkpoint keeps the place in the training order (see ``state_dict``), so that a resumed run goes on behind it.

    Args:
        config: The ``data`` part of the configuration.
        tokenizer: The model's tokenizer; None trains a word-piece tokenizer on the training split.
        vocab_size: Its size, where it is trained here.
        seed: Decides cut splits, limits, the controlled corpus and the training order.
        padding_side: Where batches are padded; only models whose logits do not depend on it may take "left".
        label_names: The classes of a model that is trained already. Labels are then looked up among them (by name, or
            by number), no training split is needed, and nothing is cut from one. None: the training split has them.
        require_labels: False where texts are only explained: data without labels will do, as will a source without
            training split. Labels are read if ``label_names`` says what they mean.
        split: Which split the rows of a single file are, where nothing is trained (either argument above).
        max_positions: The longest input that the model takes (see ``longest_input``); None: what the tokenizer says.
    """

    def __init__(
        self,
        config: TextDataConfig,
        tokenizer: PreTrainedTokenizerBase | None = None,
        vocab_size: int = 8000,
        seed: int = 0,
        padding_side: Literal["right", "left"] = "right",
        label_names: Sequence[str] | None = None,
        require_labels: bool = True,
        split: str = "test",
        max_positions: int | None = None,
    ) -> None:
        super().__init__()
        self.config = config
        self.seed = seed
        self.vocab_size = vocab_size
        self.padding_side = padding_side
        self.max_positions = max_positions
        if split not in SPLITS:
            raise unknown("split", split, SPLITS)
        self._use = Use(label_names, require_labels, split)
        self._tokenizer = tokenizer
        self._datasets: dict[str, EncodedDataset] = {}
        self._label_names: list[str] = []
        self._notes: list[str] = []
        self._place: Mapping[str, int] = {"epoch": 0, "batches": 0}

    @property
    def label_names(self) -> list[str]:
        """The class names in the order of their indices; empty where neither model nor training split told them."""
        self._check_set_up()
        return self._label_names

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer that was given, or trained in ``setup``; it always has a pad token."""
        self._check_set_up()
        assert self._tokenizer is not None
        return self._tokenizer

    @property
    def collator(self) -> TextCollator:
        """What makes a batch of encoded examples."""
        tokenizer = self.tokenizer
        return TextCollator(
            tokenizer.pad_token_id,
            self.padding_side,
            tuple(tokenizer.model_input_names),
            tokenizer.pad_token_type_id,
        )

    @property
    def splits(self) -> list[str]:
        """The splits that exist."""
        self._check_set_up()
        return list(self._datasets)

    def setup(self, stage: str | None = None) -> None:
        """Read and tokenise all splits; further calls find it done.

        Raises:
            InputError: The configuration or the data is wrong; see ``load_corpus`` and ``encode_all``.
        """
        if self._datasets:
            return
        length = self.config.max_length
        if self._tokenizer is not None:  # before the data are read, which may take a while
            check_length(self._tokenizer, length, positions=self.max_positions)
        corpus = load_corpus(self.config, self.seed, self._use)
        if self._tokenizer is None:
            if "train" not in corpus.splits:
                raise InputError(
                    "there is no training split to train a tokenizer on, and no model that brings one: set model.name "
                    "or model.checkpoint to the folder of the model that is to be explained."
                )
            texts = [text for e in corpus.splits["train"] for text in (e.text, e.text_pair) if text is not None]
            self._tokenizer = train_wordpiece(texts, self.vocab_size, length)
        ensure_pad_token(self._tokenizer)
        pairs = any(examples[0].text_pair is not None for examples in corpus.splits.values())
        check_length(self._tokenizer, length, pairs, self.max_positions)
        self._label_names, self._notes = corpus.label_names, corpus.notes
        # Set last: an error above leaves the module as it was.
        self._datasets = {split: self._encoded(split, examples) for split, examples in corpus.splits.items()}

    def dataset(self, split: str) -> EncodedDataset:
        """The tokenised examples of ``train``, ``val`` or ``test``.

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
        start = place["batches"] * size
        sampler = EpochSampler(dataset, self.seed, rank=rank, processes=processes, epoch=place["epoch"], start=start)
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
        if num_samples is not None and num_samples < 1:
            raise InputError(f"explain.num_samples={num_samples} explains nothing: give 1 or more, or null for all.")
        generator = torch.Generator().manual_seed(self.seed if seed is None else seed)
        chosen = torch.randperm(len(dataset), generator=generator)[:num_samples].tolist()
        chosen = [index for index in chosen if dataset[index]["sample_id"] not in exclude]
        chosen.sort(key=lambda index: (-len(dataset[index]["input_ids"]), index))
        subset = Subset(dataset, chosen)
        return self._loader(
            subset, batch_size or self._eval_batch_size, ExactShare(subset, rank=rank, processes=world_size)
        )

    def rows_dataloader(self, rows: Sequence[Encoded], batch_size: int) -> DataLoader[Encoded]:
        """Encoded examples of any origin, in their order."""
        return self._loader(EncodedDataset(rows), batch_size)

    def column(self, split: str, column: str, named_by: str) -> list[Any]:
        """The values of any column of the source, one per row of a split that the source has, in its order.

        The source is read once more: rows keep what models need, not every column.

        Raises:
            InputError: There is no such column; ``named_by`` says which key asks for it.
        """
        values = read_column(self.config, self.seed, self._use, split, column, named_by)
        return [values[row["sample_id"]] for row in self.dataset(split).rows]

    def truncation(self) -> dict[str, Truncation]:
        """How many texts of every split ``data.max_length`` cuts, and how much of them."""
        self._check_set_up()
        result = {}
        for split, dataset in self._datasets.items():
            rows = dataset.rows
            cut = sum(row["tokens_cut"] for row in rows)
            kept = sum(row["special_tokens_mask"].count(0) for row in rows)
            missed = sum(row["rationale_missed"] for row in rows)
            result[split] = Truncation(len(rows), sum(row["truncated"] for row in rows), kept + cut, cut, missed)
        return result

    def has_labels(self, split: str) -> bool:
        """Whether the examples of a split are labelled."""
        rows = self.dataset(split).rows
        return bool(rows) and "labels" in rows[0]

    def describe(self) -> str:
        """One line: rows per split, classes with their share of the first split, rationales, truncation, remarks."""
        self._check_set_up()
        parts = [f"{split} {len(rows):,}" for split, rows in self._datasets.items()]
        first = next(iter(self._datasets.values()))
        counts = Counter(row["labels"] for row in first.rows if "labels" in row)
        total = counts.total()
        shares = [
            f"{name} {100 * counts[index] / total:.0f} %" if total else name
            for index, name in enumerate(self._label_names)
        ]
        more = f", {len(shares) - 8} more" if len(shares) > 8 else ""
        if shares:
            parts.append(f"{len(shares)} classes ({', '.join(shares[:8])}{more})")
        rows = [row for dataset in self._datasets.values() for row in dataset.rows]
        explained = sum(any(mark >= 0 for mark in row["rationale"]) for row in rows)
        if explained:
            parts.append(f"{explained:,} texts with rationale")
        return " · ".join([*parts, self._cut_in_words(), *self._notes])

    def _cut_in_words(self) -> str:
        parts = list(self.truncation().values())
        whole = Truncation(*(sum(numbers) for numbers in zip(*parts, strict=True)))
        length = self.config.max_length
        if not whole.truncated:
            return f"no text truncated at {length} tokens"
        text = f"{whole.truncated:,} of {whole.texts:,} texts truncated at {length} tokens ({whole.share:.1%} of all"
        missed = whole.rationale_words_cut
        return text + (f", {missed:,} rationale words)" if missed else ")")

    def _encoded(self, split: str, examples: Sequence[TextExample]) -> EncodedDataset:
        assert self._tokenizer is not None
        rows = encode_all(examples, self._tokenizer, self.config.max_length)
        console = Console(stderr=True)
        silent = len(examples) <= QUICK or not console.is_terminal or bool(getattr(rank_zero_only, "rank", None))
        title = f"tokenising {split}"
        shown = track(rows, title, total=len(examples), console=console, transient=True, disable=silent)
        return EncodedDataset(list(shown))

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
        self, dataset: Dataset[Encoded], batch_size: int, sampler: DistributedSampler[int] | None = None
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
            raise RuntimeError("TextDataModule.setup() has not run yet; a Trainer calls it, or call it yourself.")
