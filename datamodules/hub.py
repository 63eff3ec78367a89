"""Data sets of the ``datasets`` library: from the hub, or from a folder that ``save_to_disk`` wrote."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa

from calig.datamodules.rows import SPLIT_NAMES, WHOLE, Rows, from_table, gist
from calig.pipeline.errors import InputError


def read_hub(name: str, config: str | None = None, revision: str | None = None) -> dict[str, Rows]:
    """Read the splits of a data set by its hub name; ``datasets`` answers from its cache where it can.

    Integer classes come back as their declared names; -1, the hub's sign for a withheld label, as None.

    Args:
        name: ``owner/name``, or the bare name of an old data set.
        config: Which configuration, where the data set has several.
        revision: Branch, tag or commit.

    Raises:
        InputError: It is not there or not reachable, ``config`` is missing or unknown, or no split has a usual name.
    """
    import datasets  # a second of import that local files need not pay

    failures = (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError)
    try:
        loaded = datasets.load_dataset(name, config, revision=revision)
    except failures as error:
        given = f"data.name='{name}'" + (f" with data.config='{config}'" if config else "")
        raise InputError(
            f"{given} could not be loaded from the hub: {gist(error)} A configuration is chosen by data.config; "
            "a local file or folder is given by data.path (with data.name=null)."
        ) from error
    return _splits(f"data.name='{name}'", name, loaded)


def is_saved(folder: Path) -> bool:
    """Whether ``save_to_disk`` wrote this folder."""
    return (folder / "dataset_dict.json").is_file() or (
        (folder / "state.json").is_file() and (folder / "dataset_info.json").is_file()
    )


def read_saved(folder: Path) -> dict[str, Rows]:
    """Read what ``save_to_disk`` wrote: a data set with its splits, or one without (``WHOLE``)."""
    import datasets

    try:
        loaded = datasets.load_from_disk(str(folder))
        return _splits(f"data.path='{folder}'", str(folder), loaded)
    except InputError:
        raise
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, pa.ArrowException) as error:
        raise InputError(
            f"data.path='{folder}' looks like a folder of save_to_disk and cannot be read: {gist(error)} "
            "Save it again, or give its data as parquet."
        ) from error


def _splits(key: str, name: str, loaded: Any) -> dict[str, Rows]:
    if not isinstance(loaded, dict):
        return {WHOLE: _rows(name, loaded)}
    splits: dict[str, Rows] = {}
    used = []
    for split, names in SPLIT_NAMES.items():
        found = next((candidate for candidate in names if candidate in loaded), None)
        if found is not None:
            splits[split] = _rows(f"{name} ({found})", loaded[found])
            used.append(found)
    if not splits:
        raise InputError(f"{key} has no split of a usual name (train, validation, test). Splits: {', '.join(loaded)}.")
    others = [split for split in loaded if split not in used]
    if others:
        first = next(iter(splits))
        splits[first] = replace(splits[first], notes=[f"splits of {name} left out: {', '.join(others)}"])
    return splits


def _rows(source: str, dataset: Any) -> Rows:
    return from_table(source, dataset.with_format("arrow")[:])
