"""From the configuration to the examples of every split: read, label, cut, limit."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from calig.datamodules.columns import label_column, read_texts
from calig.datamodules.examples import TextExample
from calig.datamodules.labels import all_present, class_indices, class_order, label_keys
from calig.datamodules.readers import Rows, read_hub, read_local
from calig.datamodules.settings import TextDataConfig
from calig.pipeline.errors import InputError

CONTROLLED = "controlled"
SPLITS = ("train", "val", "test")


@dataclass(frozen=True)
class TextCorpus:
    """The examples of every split that exists, the class names in index order, and remarks for the user."""

    splits: dict[str, list[TextExample]]
    label_names: list[str]
    notes: list[str] = field(default_factory=list)


def load_corpus(config: TextDataConfig, seed: int) -> TextCorpus:
    """Read the source that the configuration names; deterministic by ``seed``.

    A split that the source does not have is cut from train, never from test. ``sample_id`` is the row index in the
    file or hub split that a row comes from, whatever was cut or limited.

    Raises:
        InputError: No source or two are named, a file or a row is wrong, or a split is empty.
    """
    if (config.name is None) == (config.path is None):
        given = "none" if config.path is None else f"both '{config.name}' and '{config.path}'"
        raise InputError(
            f"one data source is needed, {given} given: data.path=FILE_OR_FOLDER (with data.name=null), "
            f"data.name=HUB_NAME (with data.path=null) or data.name={CONTROLLED}."
        )
    if config.name == CONTROLLED:
        from calig.datamodules.controlled import LABELS, generate

        size = config.size
        sizes = size if isinstance(size, Mapping) else {split: getattr(size, split) for split in SPLITS}
        corpus = TextCorpus(dict(generate(sizes, seed)), list(LABELS))
    elif config.path is not None:
        corpus = _label(read_local(config.path, config.header, config.quoted), config)
    else:
        corpus = _label(read_hub(str(config.name), config.revision), config)
    splits = cut_missing(corpus.splits, config.val_fraction, config.test_fraction, seed)
    limits = {"train": config.limit_train, "val": config.limit_val, "test": config.limit_test}
    limited = {
        split: limit(splits[split], limits[split], f"data.limit_{split}", f"{seed}/limit/{split}")
        for split in SPLITS
        if split in splits
    }
    return replace(corpus, splits=limited)


def cut_missing(
    splits: Mapping[str, list[TextExample]], val_fraction: float, test_fraction: float, seed: int
) -> dict[str, list[TextExample]]:
    """Cut the splits that are not there from ``train``: a seeded draw of rows, each part in row order.

    A fraction counts rows of the whole training split; 0 leaves the split out.
    """
    fractions = {"test": test_fraction, "val": val_fraction}
    missing = {split: fraction for split, fraction in fractions.items() if split not in splits and fraction}
    for split, fraction in missing.items():
        if not 0 <= fraction < 1:
            raise InputError(f"data.{split}_fraction={fraction} is not a share of the training rows: 0 <= share < 1.")
    train = splits["train"]
    order = _shuffled(len(train), f"{seed}/cut")
    result = dict(splits)
    start = 0
    for split, fraction in missing.items():
        count = max(1, round(fraction * len(train)))
        result[split] = [train[row] for row in sorted(order[start : start + count])]
        start += count
    if start >= len(train):
        raise InputError(
            f"the training split has {len(train)} rows: too few to cut {' and '.join(missing) or 'anything'} from it. "
            "Give the splits as files, or lower data.val_fraction and data.test_fraction."
        )
    result["train"] = [train[row] for row in sorted(order[start:])]
    return result


def limit(examples: list[TextExample], count: int | None, key: str, seed: str) -> list[TextExample]:
    """A seeded random subset in row order; a smaller ``count`` gives a part of the larger one's rows."""
    if count is None or count >= len(examples):
        return examples
    if count < 1:
        raise InputError(f"{key}={count} leaves nothing: expected 1 or more, or null for all rows.")
    return [examples[row] for row in sorted(_shuffled(len(examples), seed)[:count])]


def _label(splits: Mapping[str, Rows], config: TextDataConfig) -> TextCorpus:
    examples: dict[str, list[TextExample]] = {}
    notes: list[str] = []
    names: list[str] = []
    for split in SPLITS:
        if split not in splits:
            continue
        rows = splits[split]
        if not len(rows):
            raise InputError(f"{rows.source} holds no rows: the {split} split is empty.")
        texts, pairs, rationales = read_texts(rows, config.columns)
        column = label_column(rows, config.columns.label)
        keys = label_keys(rows, column)
        declared = rows.class_names.get(column, [])
        if split != "train" and declared and not any(keys):
            # Public benchmarks withhold the labels of their test split.
            notes.append(f"{rows.source} has no labels: left out")
            continue
        present = all_present(keys, rows, column)
        if split == "train":
            names = class_order(present, config.label_map, declared)
        labels = class_indices(present, names, config.label_map, rows, column)
        examples[split] = [
            TextExample(row, texts[row], labels[row], pairs[row] if pairs else None, rationales[row])
            for row in range(len(rows))
        ]
    return TextCorpus(examples, names, notes)


def _shuffled(count: int, seed: str) -> list[int]:
    order = list(range(count))
    random.Random(seed).shuffle(order)
    return order
