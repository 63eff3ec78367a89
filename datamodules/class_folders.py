"""Archives and folders in which a text is a file and its class the folder: ``<split>/<class>/<file>``."""

from __future__ import annotations

import stat
import tarfile
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path, PurePosixPath

from calig.datamodules.rows import WHOLE, Rows, check_text, gist, split_named
from calig.pipeline.errors import InputError

ARCHIVES = (".tar.gz", ".tgz", ".tar", ".zip")
Parts = tuple[str, ...]
Files = dict[Parts, Callable[[], bytes]]
"""The files below a root: the parts of each one's path, and what reads it."""

_IMAGES = (".png", ".jpg", ".jpeg", ".gif", ".bmp", ".webp")
_EXPECTED = "Expected one text per file as <split>/<class>/<file> or <class>/<file>."


def read_archive(path: Path) -> dict[str, Rows]:
    """Read an archive in place; nothing is written to disk, and links in it are not followed.

    Returns:
        The splits that its folders name, else one split ``WHOLE``. The rows are in the order of their paths, so
        neither the order inside the archive nor unpacking it changes a ``sample_id``.

    Raises:
        InputError: It is no archive, a member points out of it, a text is not UTF-8, or there are no class folders.
    """
    members = _zip_members if path.name.lower().endswith(".zip") else _tar_members
    files: Files = {}
    try:
        for name, data in members(path):
            parts = PurePosixPath(name).parts
            if ".." in parts or name.startswith("/"):
                raise InputError(f"{path} has a member '{name}', which points out of the archive. Pack it anew.")
            files[parts] = lambda data=data: data  # type: ignore[misc]  # bound now, not at the call
    except (OSError, EOFError, tarfile.TarError, zipfile.BadZipFile, zlib.error, RuntimeError) as error:
        raise InputError(f"{path} cannot be read: {gist(error)}") from error
    return _rows(str(path), files)


def read_folder(root: Path) -> dict[str, Rows]:
    """Read a folder of class folders, or of split folders that hold them; see ``read_archive``."""
    found = [file for pattern in ("*/*", "*/*/*") for file in root.glob(pattern)]
    files = {file.relative_to(root).parts: file.read_bytes for file in found if file.is_file()}
    return _rows(str(root), files)


def _tar_members(path: Path) -> Iterator[tuple[str, bytes]]:
    with tarfile.open(path) as archive:  # one pass: a compressed archive cannot jump
        for member in archive:
            stream = archive.extractfile(member) if member.isreg() else None
            if stream is not None:
                yield member.name, stream.read()


def _zip_members(path: Path) -> Iterator[tuple[str, bytes]]:
    with zipfile.ZipFile(path) as archive:
        for member in archive.infolist():
            if not member.is_dir() and not stat.S_ISLNK(member.external_attr >> 16):
                yield member.filename, archive.read(member)


def _rows(source: str, files: Files) -> dict[str, Rows]:
    # What file managers leave behind.
    hidden = {parts for parts in files if "__MACOSX" in parts or any(part.startswith(".") for part in parts)}
    files = {parts: read for parts, read in files.items() if parts not in hidden}
    depths = Counter(len(parts) for parts in files if len(parts) > 1)
    if not depths:
        found = ", ".join("/".join(parts) for parts in sorted(files)[:5]) or "no files"
        raise InputError(f"{source} holds no class folders. {_EXPECTED} Found: {found}.")
    depth = depths.most_common(1)[0][0]
    splits: dict[str, list[Parts]] = {}
    for parts in sorted(files):
        if len(parts) == depth:
            split = split_named(parts[-3]) if depth > 2 else None
            splits.setdefault(split or WHOLE, []).append(parts)
    if len(splits) > 1:
        splits.pop(WHOLE, None)
    kept = {parts for members in splits.values() for parts in members}
    image = next((parts for parts in kept if parts[-1].lower().endswith(_IMAGES)), None)
    if image:
        raise InputError(f"{source} holds images ({'/'.join(image)}), but texts are expected, one per file.")
    notes = _ignored(source, sorted(set(files) - kept))
    result = {}
    for split, members in splits.items():
        names = ["/".join(parts) for parts in members]
        texts = [check_text(f"{'/'.join(parts)} in {source}", files[parts]()) for parts in members]
        columns: dict[str, Sequence[str]] = {
            "text": texts,
            "label": [parts[-2] for parts in members],
            "file": names,
        }
        result[split] = Rows(source, columns, text="text", files=names, notes=notes)
    return result


def _ignored(source: str, files: list[Parts]) -> list[str]:
    if not files:
        return []
    listed = ", ".join("/".join(parts) for parts in files[:3]) + (", ..." if len(files) > 3 else "")
    return [f"{len(files)} files of {source} outside its class folders left out ({listed})"]
