"""Concepts as sets of example texts, and the random sets beside them."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, NamedTuple

from calig.datamodules.columns import read_texts
from calig.datamodules.examples import TextExample
from calig.datamodules.formats import TABLES
from calig.datamodules.readers import read_file, suffix_of
from calig.datamodules.rows import check_text
from calig.datamodules.tokenization import encode_all
from calig.pipeline.errors import InputError, unknown

if TYPE_CHECKING:
    from calig.datamodules.text import TextDataModule

MIN_EXAMPLES = 10
Encoded = dict[str, Any]


class ConceptSets(NamedTuple):
    """What is to be run, and which of it makes up which set.

    Attributes:
        rows: Encoded texts; `sample_id` is the place in this list.
        concepts: Name -> K draws of n places.
        random: K sets of n places.
        notes: What the user should know of the draw.
    """

    rows: list[Encoded]
    concepts: dict[str, list[list[int]]]
    random: list[list[int]]
    notes: list[str]


def draw_concept_sets(
    data: TextDataModule,
    sets: Mapping[str, str | Mapping[str, str]],
    *,
    random_sets: int,
    set_size: int,
    split: str,
    seed: int,
) -> ConceptSets:
    """Read the concepts and draw.

    All sets have the same number of examples: `set_size`, or that of the smallest concept. A concept with more is drawn
    anew for each random set, without an example in two draws where there are enough: vectors that share their examples
    vary too little. Of concepts that were random themselves, a quarter to a half came out significant at p < 0.05 where
    all vectors had the same examples, 3 to 5 % where none was shared.

    Args:
        data: Set up; random examples, and columns, are those of its training split (of `split` where it has none).
        sets: Name -> file of texts, or {column: value}.
        random_sets: K.
        set_size: n at most.
        split: The split that is analysed.
        seed: Of the draws.

    Raises:
        InputError: A file, column or value is not there, or there are too few examples.
    """
    source = "train" if "train" in data.splits else split
    own = data.dataset(source).rows
    # The labels stay behind: texts of a file have none.
    rows: list[Encoded] = [{key: value for key, value in row.items() if key != "labels"} for row in own]
    pools: dict[str, list[int]] = {}
    for name, given in sets.items():
        if isinstance(given, str):
            texts = _from_file(name, given, data)
            pools[name] = list(range(len(rows), len(rows) + len(texts)))
            rows += texts
        else:
            pools[name] = _from_column(name, given, data, source)
    for name, pool in pools.items():
        if len(pool) < MIN_EXAMPLES:
            raise InputError(
                f"{_key(name, sets[name])} has {len(pool)} examples; at least {MIN_EXAMPLES} are needed, and the test "
                f"is only sound with concepts.random_sets * concepts.set_size = {random_sets * set_size} or more."
            )
    size = min(set_size, *map(len, pools.values()))
    if len(own) < 2 * size:
        raise InputError(
            f"the {source} split has {len(own)} texts, too few for random sets of {size}: at least {2 * size} are "
            "needed. Lower concepts.set_size."
        )
    drawn = {name: _draws(pool, random_sets, size, f"{seed}/concept/{name}") for name, pool in pools.items()}
    sampled = _draws(range(len(own)), random_sets, size, f"{seed}/random")
    notes = [f"random sets from the {source} split"]
    if size < set_size:
        notes.append(f"the smallest concept has {size} texts, so all sets have {size}, not {set_size}")
    lengths = {**{name: len(pool) for name, pool in pools.items()}, "the random sets": len(own)}
    few = [name for name, length in lengths.items() if length < random_sets * size]
    if few:
        fitting = min(lengths.values()) // random_sets
        advice = f": take concepts.set_size={fitting}" if fitting >= MIN_EXAMPLES else ""
        notes.append(
            f"{', '.join(few)}: fewer than {random_sets} * {size} texts, draws share some and p is optimistic{advice}"
        )
    used = sorted({place for draws in (*drawn.values(), sampled) for one in draws for place in one})
    # Longest first, so that a batch holds little padding.
    used.sort(key=lambda place: -len(rows[place]["input_ids"]))
    at = {place: index for index, place in enumerate(used)}
    return ConceptSets(
        [{**rows[place], "sample_id": at[place]} for place in used],
        {name: [[at[place] for place in one] for one in draws] for name, draws in drawn.items()},
        [[at[place] for place in one] for one in sampled],
        notes,
    )


def _draws(pool: Sequence[int], count: int, size: int, seed: str) -> list[list[int]]:
    """`count` draws of `size` without an element in two of them where there are enough, else each of its own."""
    generator = random.Random(seed)
    if len(pool) < count * size:
        return [generator.sample(list(pool), size) for _ in range(count)]
    order = generator.sample(list(pool), count * size)
    return [order[start : start + size] for start in range(0, count * size, size)]


def _from_file(name: str, given: str, data: TextDataModule) -> list[Encoded]:
    path, key = Path(given), _key(name, given)
    if not path.is_file():
        raise InputError(
            f"{key}: there is no such file. Give a file with one text per line, a table ({' '.join(TABLES)}), or "
            "{column: value} of the data set."
        )
    try:
        if suffix_of(path) in TABLES:
            rows = read_file(path, data.config.header, data.config.quoted)
            named = data.config.columns.text
            column = named if named in rows.columns else None
            texts: Sequence[str | list[str]] = read_texts(
                rows, SimpleNamespace(text=column, text_pair=None, label=None, rationale=None)
            ).texts
        else:
            texts = [line.strip() for line in check_text(given, path.read_bytes()).splitlines() if line.strip()]
        if not texts:
            raise InputError("it holds no text.")
        examples = [TextExample(row, text, None) for row, text in enumerate(texts)]
        return list(encode_all(examples, data.tokenizer, data.config.max_length))
    except (InputError, OSError) as error:
        raise InputError(f"{key}: {error}") from error


def _from_column(name: str, given: Mapping[str, str], data: TextDataModule, split: str) -> list[int]:
    """The places of the rows that have the value."""
    ((column, wanted),) = given.items()
    values = [_spelled(value) for value in data.column(split, column, f"concepts.sets.{name}")]
    if wanted not in values:
        known = list(dict.fromkeys(values))
        raise unknown(
            f"value of column '{column}'",
            wanted,
            sorted(known)[:20],
            f"Named by concepts.sets.{name}, looked for in "
            f"the {split} split, whose column has {len(known)} different values.",
        )
    return [place for place, value in enumerate(values) if value == wanted]


def _spelled(value: object) -> str:
    """A value as the configuration spells it."""
    return str(value).lower() if isinstance(value, bool) else str(value)


def _key(name: str, given: str | Mapping[str, str]) -> str:
    spelled = given if isinstance(given, str) else "{" + ", ".join(f"{k}: {v}" for k, v in given.items()) + "}"
    return f"concepts.sets.{name}={spelled}"
