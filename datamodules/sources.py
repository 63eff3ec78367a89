"""From the configuration to the examples of every split: read, label, cut, limit."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from calig.datamodules.columns import has_label_column, label_column, read_texts
from calig.datamodules.examples import TextExample
from calig.datamodules.hub import read_hub
from calig.datamodules.label_sets import indicated, label_lists, set_vectors
from calig.datamodules.label_values import label_values
from calig.datamodules.labels import (
    all_present,
    class_indices,
    class_order,
    fits_model,
    label_keys,
    model_indices,
    unnamed,
)
from calig.datamodules.readers import nothing_for, read_local
from calig.datamodules.rows import WHOLE, Rows
from calig.datamodules.selection import select
from calig.datamodules.settings import TextDataConfig
from calig.datamodules.splits import SPLITS, cut_missing, limit, shared_examples
from calig.pipeline.errors import InputError, unknown
from calig.pipeline.tasks import Task

CONTROLLED = "controlled"


@dataclass(frozen=True)
class Corpus:
    """The examples of every split that exists, the class names in index order, and remarks for the user."""

    splits: dict[str, list[Any]]
    label_names: list[str]
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Use:
    """What the data are for.

    Attributes:
        label_names: The classes of a model that is trained already; None: the training split defines them.
        require_labels: False where texts are only explained.
        split: The split that the rows of a source without splits are, where nothing is trained.
        task: What the labels are.
    """

    label_names: Sequence[str] | None = None
    require_labels: bool = True
    split: str = "test"
    task: Task = "classification"

    @property
    def trains(self) -> bool:
        """Whether the data define the classes: a training split must be there, and missing splits are cut from it."""
        return self.label_names is None and self.require_labels


@dataclass(frozen=True)
class Kind:
    """What the examples are: texts, or images (``image_sources``).

    Attributes:
        noun: In messages.
        generated: The name of the data set that is generated.
        classes: Its classes.
        generate: Its splits, of the configuration and the seed.
        examples: Makes examples of rows and their labels.
    """

    noun: str
    generated: str
    classes: Callable[[], Sequence[str]]
    generate: Callable[[Any, int], dict[str, list[Any]]]
    examples: Callable[[Rows, Any, Sequence[Any] | None], list[Any]]


def load_corpus(config: Any, seed: int, use: Use | None = None, kind: Kind | None = None) -> Corpus:
    """Read the source that the configuration names; deterministic by ``seed``.

    To train, a split that the source does not have is cut from train, never from test. For a model that is trained
    already (see ``Use``) the splits are those of the source. ``sample_id`` is the row index in the file or hub split
    that a row comes from, whatever was cut or limited.

    Args:
        config: The ``data`` part of the configuration.
        seed: Of cuts, limits and generated data.
        use: What the data are for; None: to train.
        kind: What the examples are; None: texts.

    Raises:
        InputError: No source or two are named, a file or a row is wrong, or a split is empty.
    """
    use, kind = use or Use(), kind or TEXTS
    if (config.name is None) == (config.path is None):
        given = "none" if config.path is None else f"both '{config.name}' and '{config.path}'"
        raise InputError(
            f"one data source is needed, {given} given: data.path=FILE_OR_FOLDER (with data.name=null), "
            f"data.name=HUB_NAME (with data.path=null) or data.name={kind.generated}."
        )
    if config.name == kind.generated:
        corpus = _generated(config, seed, use, kind)
    else:
        source = _read(config, use, kind)
        corpus = _trained(source, config, kind, use.task) if use.trains else _given(source, config, use, kind)
        if use.trains:
            corpus.notes.extend(shared_examples(corpus.splits, kind.noun))
    splits = corpus.splits
    if use.trains:
        splits = cut_missing(splits, config.val_fraction, config.test_fraction, seed)
    limits = {"train": config.limit_train, "val": config.limit_val, "test": config.limit_test}
    limited = {
        split: limit(splits[split], limits[split], f"data.limit_{split}", f"{seed}/limit/{split}")
        for split in SPLITS
        if split in splits
    }
    if use.trains and use.task != "regression":
        met = {index for example in limited["train"] for index in _classes(example.label)}
        unmet = [name for index, name in enumerate(corpus.label_names) if index not in met]
        if unmet:
            corpus.notes.append(f"no training {kind.noun} of {', '.join(unmet[:8])}{', ...' if len(unmet) > 8 else ''}")
    return replace(corpus, splits=limited)


def read_column(
    config: Any, seed: int, use: Use, split: str, column: str, named_by: str, kind: Kind | None = None
) -> Sequence[Any]:
    """The values of any column of a split, one per row of the source: entry i is that of ``sample_id`` i.

    The controlled corpus has the columns of ``controlled_columns``, generated images have none.

    Raises:
        InputError: There is no such column; ``named_by`` says which key asks for it.
    """
    kind = kind or TEXTS
    if config.name == CONTROLLED:
        from calig.datamodules.controlled_columns import COLUMNS, columns_of

        if column not in COLUMNS:
            raise unknown("column", column, COLUMNS, f"Named by {named_by}; the columns of data.name={CONTROLLED}.")
        return [columns_of(example)[column] for example in kind.generate(config, seed)[split]]
    if config.name == kind.generated:
        raise unknown("column", column, (), f"Named by {named_by}; data.name={kind.generated} has no columns.")
    splits = _read(config, use, kind)
    rows = splits.get(split, next(iter(splits.values())))  # a split that was cut from train counts train's rows
    if column not in rows.columns:
        raise unknown("column", column, rows.columns, f"Named by {named_by}, looked for in {rows.source}.")
    return rows.values(column)


def _read(config: Any, use: Use, kind: Kind) -> dict[str, Rows]:
    if config.path is not None:
        splits = read_local(config.path, config.header, config.quoted, kind.noun)
    else:
        splits = read_hub(str(config.name), getattr(config, "config", None), config.revision)
    if WHOLE in splits:
        splits = {"train" if use.trains else use.split: splits[WHOLE]}
    if use.trains and "train" not in splits:
        if config.path is not None:
            raise nothing_for(config.path, "training")
        raise InputError(f"data.name='{config.name}' has no train split, only {', '.join(splits)}.")
    splits = {split: select(rows, config) for split, rows in splits.items()}
    for split, rows in splits.items():
        if not len(rows):
            raise InputError(f"{rows.source} holds no rows: the {split} split is empty. Fill it, or remove it.")
    return {split: splits[split] for split in SPLITS if split in splits}


def _classes(label: int | float | list[float] | None) -> list[int]:
    """The class of an example, or its labels."""
    if isinstance(label, list):
        return [index for index, value in enumerate(label) if value]
    return [label] if isinstance(label, int) else []


def _set_keys(rows: Rows, config: Any) -> tuple[str, list[list[str] | None], list[str]]:
    """Of several labels per text: what messages call their column, the labels, and the declared names."""
    indicators = getattr(config.columns, "indicators", None)
    if indicators is not None:
        return ", ".join(indicators), indicated(rows, indicators), list(indicators)
    column = label_column(rows, config.columns.label)
    return column, label_lists(rows, column), rows.class_names.get(column, [])


def _trained_sets(splits: Mapping[str, Rows], config: Any, kind: Kind) -> Corpus:
    """Several labels per text, as labels of the training split."""
    examples: dict[str, list[Any]] = {}
    notes = [note for rows in splits.values() for note in rows.notes]
    names: list[str] = []
    met: set[int] | None = None
    for split, rows in splits.items():
        column, keys, declared = _set_keys(rows, config)
        present = all_present(keys, rows, column)
        if split == "train":
            names = class_order((key for some in present for key in some), config.label_map, declared)
        vectors = set_vectors(present, names, config.label_map, rows, column, met)
        if split == "train":
            met = {index for vector in vectors for index in _classes(vector)}
        examples[split] = kind.examples(rows, config, vectors)
    return Corpus(examples, names, list(dict.fromkeys(notes)))


def _trained_values(splits: Mapping[str, Rows], config: Any, kind: Kind) -> Corpus:
    """Numbers; the one output is called by their column."""
    notes = [note for rows in splits.values() for note in rows.notes]
    columns = {split: label_column(rows, config.columns.label) for split, rows in splits.items()}
    examples = {
        split: kind.examples(rows, config, all_present(label_values(rows, columns[split]), rows, columns[split]))
        for split, rows in splits.items()
    }
    return Corpus(examples, [columns["train"]], list(dict.fromkeys(notes)))


def _trained(splits: Mapping[str, Rows], config: Any, kind: Kind, task: Task) -> Corpus:
    """Labels as classes of the training split."""
    if task != "classification":
        return (_trained_sets if task == "multi_label" else _trained_values)(splits, config, kind)
    examples: dict[str, list[Any]] = {}
    notes = [note for rows in splits.values() for note in rows.notes]
    names: list[str] = []
    trained: set[int] | None = None
    for split, rows in splits.items():
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
        labels = class_indices(present, names, config.label_map, rows, column, trained)
        trained = set(labels) if split == "train" else trained
        examples[split] = kind.examples(rows, config, labels)
    return Corpus(examples, names, list(dict.fromkeys(notes)))


def _given(splits: Mapping[str, Rows], config: Any, use: Use, kind: Kind) -> Corpus:
    """Labels, where there are any, as classes of the model."""
    examples: dict[str, list[Any]] = {}
    notes = [note for rows in splits.values() for note in rows.notes]
    for split, rows in splits.items():
        labels, note = _labels_for_model(rows, config, use)
        notes += [note] if note else []
        examples[split] = kind.examples(rows, config, labels)
    return Corpus(examples, list(use.label_names or []), list(dict.fromkeys(notes)))


def _labels_for_model(
    rows: Rows, config: Any, use: Use
) -> tuple[Sequence[int] | Sequence[float] | Sequence[list[float]] | None, str]:
    """The labels of all rows, or None and why."""
    named = config.columns.label
    if not use.require_labels:
        indicators = getattr(config.columns, "indicators", None)
        if named is None and indicators is None and not has_label_column(rows):
            return None, f"{rows.source} has no labels"
        if use.label_names is None:
            return None, "labels not read: the classes of the model are not known"
    if use.task == "multi_label":
        column, sets, _ = _set_keys(rows, config)
        if not use.require_labels and (missing := sets.count(None)):
            return None, f"{rows.source}: {missing:,} of {len(sets):,} rows have no label, so none is used"
        present_sets = all_present(sets, rows, column)
        return set_vectors(present_sets, use.label_names or (), config.label_map, rows, column, of_model=True), ""
    column = label_column(rows, named)
    if use.task == "regression":
        values = label_values(rows, column)
        if not use.require_labels and (missing := values.count(None)):
            return None, f"{rows.source}: {missing:,} of {len(values):,} rows have no label, so none is used"
        return all_present(values, rows, column), ""
    keys = label_keys(rows, column)
    names = list(use.label_names or [])
    if not use.require_labels:
        missing = keys.count(None)
        if missing:  # all or none: what a row is compared with must not depend on its batch
            return None, f"{rows.source}: {missing:,} of {len(keys):,} rows have no label, so none is used"
        if named is None and not config.label_map and not fits_model(keys, names):
            return None, f"column '{column}' of {rows.source} holds no class of the model, so it is not read as labels"
    present = all_present(keys, rows, column)
    declared = rows.class_names.get(column, [])
    if declared and unnamed(names) and len(declared) == len(names) and not config.label_map:
        return [declared.index(key) for key in present], ""
    return model_indices(present, names, config.label_map, rows, column), ""


def _examples(
    rows: Rows, config: TextDataConfig, labels: Sequence[int] | Sequence[float] | Sequence[list[float]] | None
) -> list[TextExample]:
    read = read_texts(rows, config.columns, bool(getattr(config, "strip_quotes", False)))
    return [
        TextExample(
            row,
            read.texts[row],
            None if labels is None else labels[row],
            read.pairs[row] if read.pairs else None,
            read.rationales[row],
            read.spans[row],
        )
        for row in range(len(rows))
    ]


def _generated(config: Any, seed: int, use: Use, kind: Kind) -> Corpus:
    splits, labels = kind.generate(config, seed), kind.classes()
    if use.label_names is None:
        return Corpus(splits, list(labels))
    names = list(use.label_names)
    if set(labels) <= set(names):
        index = [names.index(label) for label in labels]
    elif unnamed(names) and len(names) == len(labels):
        index = list(range(len(labels)))
    else:
        raise InputError(
            f"data.name={kind.generated} has the classes {', '.join(labels)}, the model has {', '.join(names[:8])}: "
            "explain a model that was trained on these data, or other data."
        )
    relabelled = {
        split: [replace(e, label=index[e.label]) if isinstance(e.label, int) else e for e in examples]
        for split, examples in splits.items()
    }
    return Corpus(relabelled, names)


def sizes_of(config: Any) -> dict[str, int]:
    """``data.size``: how many examples of every split are generated."""
    size = config.size
    return {split: size[split] if isinstance(size, Mapping) else getattr(size, split) for split in SPLITS}


def _sentences(config: TextDataConfig, seed: int) -> dict[str, list[TextExample]]:
    from calig.datamodules.controlled import generate

    return generate(sizes_of(config), seed)


def _polarities() -> Sequence[str]:
    from calig.datamodules.controlled import LABELS

    return LABELS


TEXTS = Kind("text", CONTROLLED, _polarities, _sentences, _examples)
