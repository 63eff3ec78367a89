"""A file or folder to the rows of its splits: plain values, nothing interpreted yet."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from calig.datamodules.class_folders import ARCHIVES, read_archive, read_folder
from calig.datamodules.formats import TABLES, read_table
from calig.datamodules.hub import is_saved, read_saved
from calig.datamodules.rows import SPLIT_NAMES, WHOLE, Rows, gist, split_named
from calig.pipeline.errors import InputError, unknown

SUFFIXES = (*TABLES, *ARCHIVES)


def read_local(path: str, header: bool = True, quoted: bool | None = None, noun: str = "text") -> dict[str, Rows]:
    """Read a file or folder as far as it goes: which splits there must be is for the caller to say.

    Args:
        path: A file with one of ``SUFFIXES``; a folder with a file per split, whose name is the split or ends with it
            (``train.csv``, ``en_ewt-ud-dev.conllu``, ``train-00000-of-00002.parquet``; ``valid``, ``validation`` and
            ``dev`` mean ``val``); a folder that ``save_to_disk`` wrote; a folder of class folders.
        header: False where a csv or tsv file has no header line; its columns are then named "0", "1", ...
        quoted: Whether quote characters in csv or tsv enclose a field; None: in csv they do, in tsv they do not.
        noun: What the files of class folders are: ``text`` or ``image``.

    Returns:
        Rows by split; a source without splits is the one split ``WHOLE``.

    Raises:
        InputError: Nothing is there, two files claim one split, or a file cannot be read.
    """
    root = Path(path)
    if not root.is_dir():
        return _read_any(root, header, quoted, noun)
    try:
        return _read_folder(path, root, header, quoted, noun)
    except OSError as error:
        raise InputError(f"data.path='{path}' cannot be read: {gist(error)}") from error


def _read_folder(path: str, root: Path, header: bool, quoted: bool | None, noun: str) -> dict[str, Rows]:
    if is_saved(root):
        return read_saved(root)
    entries = sorted(entry for entry in root.iterdir() if not entry.name.startswith("."))
    files = [entry for entry in entries if entry.is_file()]
    splits = {}
    for split in SPLIT_NAMES:
        claiming = _claiming(split, files)
        if claiming:
            splits[split] = _one_split(path, split, claiming, header, quoted, noun)
    if splits:
        return splits
    below = [file for pattern in ("*/*", "*/*/*") for file in root.glob(pattern) if file.is_file()]
    # Texts and images have no suffix of a table or archive: such a folder is one of data sets, not of classes.
    if below and not any(suffix_of(file) in SUFFIXES for file in below):
        return read_folder(root, noun)
    raise nothing_for(path, "train, val or test", entries)


def read_file(path: Path, header: bool = True, quoted: bool | None = None) -> Rows:
    """Read one table by its suffix; see ``read_table``."""
    _check_exists(path)
    if suffix_of(path) not in TABLES:
        raise unknown("file type", path.suffix or path.name, SUFFIXES, f"Named by data.path='{path}'.")
    return read_table(path, header, quoted)


def suffix_of(path: Path) -> str:
    """The suffix in lower case, ``.tar.gz`` as one."""
    name = path.name.lower()
    return next((suffix for suffix in SUFFIXES if name.endswith(suffix)), path.suffix.lower())


def nothing_for(path: str, what: str, entries: Sequence[Path] | None = None) -> InputError:
    """Build the error for a folder without a file for a split."""
    if entries is None:
        entries = sorted(Path(path).iterdir()) if Path(path).is_dir() else []
    found = ", ".join(entry.name for entry in entries[:20]) or "no files"
    return InputError(
        f"data.path='{path}' holds no {what} file: looked for names that are or end with the split and have one of "
        f"{' '.join(SUFFIXES)}, for a folder of save_to_disk, and for <split>/<class>/<file>. Found: {found}. "
        "A single file can be given by its own path."
    )


def _read_any(path: Path, header: bool, quoted: bool | None, noun: str) -> dict[str, Rows]:
    if suffix_of(path) in ARCHIVES:
        _check_exists(path)
        return read_archive(path, noun)
    return {WHOLE: read_file(path, header, quoted)}


def _claiming(split: str, files: Sequence[Path]) -> list[Path]:
    """The files of a split: of its very name, else those whose name ends with it."""
    stems = {file: file.name[: -len(suffix_of(file))] for file in files if suffix_of(file) in SUFFIXES}
    exact = [file for file, stem in stems.items() if stem.lower() in SPLIT_NAMES[split]]
    return exact or [file for file, stem in stems.items() if split_named(stem) == split]


def _one_split(path: str, split: str, files: Sequence[Path], header: bool, quoted: bool | None, noun: str) -> Rows:
    shards = [file for file in files if re.search(r"-\d+-of-\d+\.", file.name)]
    if len(files) > 1 and len(shards) < len(files):
        names = ", ".join(file.name for file in files)
        raise InputError(f"data.path='{path}' holds {len(files)} files for the {split} split: {names}. Keep one.")
    if shards:
        count = int(shards[0].name.rpartition("-of-")[2].partition(".")[0])
        if len(shards) != count:
            raise InputError(
                f"data.path='{path}' holds {len(shards)} of the {count} parts of the {split} split "
                f"({', '.join(file.name for file in shards[:5])}). Fetch the others."
            )
    parts: list[Rows] = []
    for file in files:
        found = _read_any(file, header, quoted, noun)
        if set(found) - {WHOLE, split}:
            raise InputError(
                f"{file} holds the splits {', '.join(found)}, but its name says {split}. "
                "Give an archive of several splits by its own path, as data.path."
            )
        parts += found.values()
    return parts[0] if len(parts) == 1 else _joined(f"{files[0]} and {len(files) - 1} more", parts)


def _joined(source: str, parts: Sequence[Rows]) -> Rows:
    first = parts[0]
    for part in parts[1:]:
        if part.columns.keys() != first.columns.keys():
            raise InputError(
                f"{part.source} has the columns {', '.join(part.columns)}, {first.source} has "
                f"{', '.join(first.columns)}: the parts of one split must agree."
            )
    columns: dict[str, Sequence[Any]] = {
        name: [value for part in parts for value in part.values(name)] for name in first.columns
    }
    return Rows(source, columns, first.class_names, first.text)


def _check_exists(path: Path) -> None:
    if not path.is_file():
        siblings = [entry.name for entry in sorted(path.parent.iterdir())[:20]] if path.parent.is_dir() else []
        raise unknown("file", path, siblings, "Named by data.path; listed is what its folder holds.")
