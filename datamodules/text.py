"""The Lightning data module of all text sources."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

from lightning.pytorch.utilities import rank_zero_only
from rich.console import Console
from rich.progress import track
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerBase

from calig.datamodules.base import ClassificationData, Encoded
from calig.datamodules.collate import TextCollator
from calig.datamodules.examples import TextExample
from calig.datamodules.settings import TextDataConfig
from calig.datamodules.sources import TEXTS, load_corpus
from calig.datamodules.tokenization import check_length, encode_all, ensure_pad_token
from calig.datamodules.trained_tokenizers import Trained, train_tokenizer
from calig.datamodules.windows import WindowSettings
from calig.pipeline.errors import InputError
from calig.pipeline.tasks import Task

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


class TextDataModule(ClassificationData[EncodedDataset]):
    """Text classification data: read, tokenised once in ``setup``, loaded in padded batches (see ``TextCollator``).

    Args:
        config: The ``data`` part of the configuration.
        tokenizer: The model's tokenizer; None trains one on the training split.
        vocab_size: Its size, where it is trained here.
        seed: Decides cut splits, limits, the controlled corpus and the training order.
        padding_side: Where batches are padded; only models whose logits do not depend on it may take "left".
        label_names: The classes of a model that is trained already. Labels are then looked up among them (by name, or
            by number), no training split is needed, and nothing is cut from one. None: the training split has them.
        require_labels: False where texts are only explained: data without labels will do, as will a source without
            training split. Labels are read if ``label_names`` says what they mean.
        split: Which split the rows of a single file are, where nothing is trained (either argument above).
        max_positions: The longest input that the model takes (see ``longest_input``); None: what the tokenizer says.
        task: What the labels are: one class, any number of labels, or a number.
        train_kind: What is trained where there is no tokenizer; see ``train_tokenizer``.
    """

    kind = TEXTS

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
        task: Task = "classification",
        train_kind: Trained = "wordpiece",
    ) -> None:
        super().__init__(config, seed, label_names, require_labels, split, task)
        self.train_kind = train_kind
        self.vocab_size = vocab_size
        self.padding_side = padding_side
        self.max_positions = max_positions
        self._tokenizer = tokenizer

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer that was given, or trained in ``setup``; it always has a pad token."""
        self._check_set_up()
        assert self._tokenizer is not None
        return self._tokenizer

    @property
    def windows(self) -> WindowSettings | None:
        """How texts longer than ``data.max_length`` are read; None: they are truncated."""
        return WindowSettings.of_config(self.config)

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
            self._tokenizer = train_tokenizer(self.train_kind, texts, self.vocab_size, length)
        ensure_pad_token(self._tokenizer)
        pairs = any(examples[0].text_pair is not None for examples in corpus.splits.values())
        check_length(self._tokenizer, length, pairs, self.max_positions)
        if self.windows is not None:  # an overlap that is too large is found before anything is tokenised
            self.windows.room(self._tokenizer.num_special_tokens_to_add(False))
        self._label_names, self._notes = corpus.label_names, corpus.notes
        # Set last: an error above leaves the module as it was.
        self._datasets = {split: self._encoded(split, examples) for split, examples in corpus.splits.items()}

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

    def _facts(self) -> list[str]:
        parts = []
        rows = [row for dataset in self._datasets.values() for row in dataset.rows]
        explained = sum(any(mark >= 0 for mark in row["rationale"]) for row in rows)
        if explained:
            parts.append(f"{explained:,} texts with rationale")
        return [*parts, self._cut_in_words()]

    def _length(self, row: Encoded) -> int:
        return len(row["input_ids"])

    def _cut_in_words(self) -> str:
        parts = list(self.truncation().values())
        whole = Truncation(*(sum(numbers) for numbers in zip(*parts, strict=True)))
        length = f"{self.config.max_length} tokens"
        if self.windows is not None:
            counts = [len(row["windows"]) for dataset in self._datasets.values() for row in dataset.rows]
            length = f"{max(counts)} windows of {length} ({sum(counts) / len(counts):.1f} on average)"
        if not whole.truncated:
            return f"no text truncated at {length}"
        text = f"{whole.truncated:,} of {whole.texts:,} texts truncated at {length} ({whole.share:.1%} of all"
        missed = whole.rationale_words_cut
        return text + (f", {missed:,} rationale words)" if missed else ")")

    def _encoded(self, split: str, examples: Sequence[TextExample]) -> EncodedDataset:
        assert self._tokenizer is not None
        rows = encode_all(examples, self._tokenizer, self.config.max_length, self.windows)
        console = Console(stderr=True)
        silent = len(examples) <= QUICK or not console.is_terminal or bool(getattr(rank_zero_only, "rank", None))
        title = f"tokenising {split}"
        shown = track(rows, title, total=len(examples), console=console, transient=True, disable=silent)
        return EncodedDataset(list(shown))
