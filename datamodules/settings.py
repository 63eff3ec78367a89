"""What a text source asks of its configuration: any object with these attributes will do."""

# ruff: noqa: D102

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol


class ColumnNames(Protocol):
    """``data.columns``: the column of each role, by index for files without header; None: found by usual names."""

    @property
    def text(self) -> str | None: ...
    @property
    def text_pair(self) -> str | None: ...
    @property
    def label(self) -> str | None: ...
    @property
    def rationale(self) -> str | None: ...


class SplitSizes(Protocol):
    """``data.size``, sentences per split."""

    @property
    def train(self) -> int: ...
    @property
    def val(self) -> int: ...
    @property
    def test(self) -> int: ...


class TextDataConfig(Protocol):
    """The keys below ``data`` of the configuration.

    Attributes:
        name: ``controlled``, a hub data set, or None.
        path: A file, or a folder (see ``read_local``).
        revision: Commit or tag of the hub data set.
        header: False for csv and tsv without header line.
        quoted: Whether quote characters enclose fields; None: in csv yes, in tsv no.
        label_map: Label in the data -> class name.
        max_length: Tokens per text, special ones counted; longer texts are truncated.
        limit_train: Rows of the training split in use: a seeded random subset; None: all.
        limit_val: As ``limit_train``.
        limit_test: As ``limit_train``.
        columns: See ``ColumnNames``.
        batch_size: Examples per batch and process.
        num_workers: Loader processes.
        val_fraction: Share of the training rows that becomes ``val`` where the source has none.
        test_fraction: Share of the training rows that becomes ``test`` where the source has none.
        size: Sentences per split of the controlled corpus.

    Read where they exist: ``config``, the configuration of a hub data set that has several; ``eval_batch_size``
    (None: ``batch_size``), for the loaders of val and test; ``windows`` (see ``WindowSettings``); ``keep_labels`` and
    ``remove`` (see ``select``); ``strip_quotes``, whether texts lose the quotes that they stand in as a whole; and
    ``columns.indicators``, a column of 0 and 1 per label.
    """

    @property
    def name(self) -> str | None: ...
    @property
    def path(self) -> str | None: ...
    @property
    def revision(self) -> str | None: ...
    @property
    def header(self) -> bool: ...
    @property
    def quoted(self) -> bool | None: ...
    @property
    def label_map(self) -> Mapping[str, str] | None: ...
    @property
    def max_length(self) -> int: ...
    @property
    def limit_train(self) -> int | None: ...
    @property
    def limit_val(self) -> int | None: ...
    @property
    def limit_test(self) -> int | None: ...
    @property
    def columns(self) -> ColumnNames: ...
    @property
    def batch_size(self) -> int: ...
    @property
    def num_workers(self) -> int: ...
    @property
    def val_fraction(self) -> float: ...
    @property
    def test_fraction(self) -> float: ...
    @property
    def size(self) -> Mapping[str, int] | SplitSizes: ...
