"""Archives and folders in which a text or an image is a file, its class the folder: ``<split>/<class>/<file>``."""

from __future__ import annotations

import stat
import tarfile
import zipfile
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from calig.datamodules.rows import WHOLE, Rows, check_text, gist, split_named
from calig.pipeline.errors import InputError

ARCHIVES = (".tar.gz", ".tgz", ".tar", ".zip")
Parts = tuple[str, ...]
Files = dict[Parts, Path | bytes]
"""The files below a root: the parts of each one's path, and where it is or what it holds."""

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".gif", ".bmp", ".webp", ".tif", ".tiff", ".ppm", ".pgm", ".pbm")
_EXPECTED = "Expected one {} per file as <split>/<class>/<file> or <class>/<file>."


def read_archive(path: Path, noun: str = "text") -> dict[str, Rows]:
    """Read an archive in place; nothing is written to disk, and links in it are not followed.

    Args:
        path: The archive.
        noun: What its files are: ``text``, or ``image``; the column ``image`` then holds bytes or, of a folder, paths.

    Returns:
        The splits that its folders name, else one split ``WHOLE``. The rows are in the order of their paths, so
        neither the order inside the archive nor unpacking it changes a ``sample_id``.

    Raises:
        InputError: It is no archive, a member points out of it, a text is not UTF-8, or there are no class folders
            of texts (of images).
    """
    members = _zip_members if path.name.lower().endswith(".zip") else _tar_members
    files: Files = {}
    try:
        for name, data in members(path):
            parts = PurePosixPath(name).parts
            if ".." in parts or name.startswith("/"):
                raise InputError(f"{path} has a member '{name}', which points out of the archive. Pack it anew.")
            files[parts] = data
    except (OSError, EOFError, tarfile.TarError, zipfile.BadZipFile, zlib.error, RuntimeError) as error:
        raise InputError(f"{path} cannot be read: {gist(error)}") from error
    return _rows(str(path), files, noun)


def read_folder(root: Path, noun: str = "text") -> dict[str, Rows]:
    """Read a folder of class folders, or of split folders that hold them; see ``read_archive``."""
    found = [file for pattern in ("*/*", "*/*/*") for file in root.glob(pattern)]
    files: Files = {file.relative_to(root).parts: file for file in found if file.is_file()}
    return _rows(str(root), files, noun)


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


def _rows(source: str, files: Files, noun: str) -> dict[str, Rows]:
    # What file managers leave behind.
    hidden = {parts for parts in files if "__MACOSX" in parts or any(part.startswith(".") for part in parts)}
    files = {parts: file for parts, file in files.items() if parts not in hidden}
    everything = set(files)
    if noun == "image":
        files = {parts: file for parts, file in files.items() if parts[-1].lower().endswith(IMAGE_SUFFIXES)}
    depths = Counter(len(parts) for parts in files if len(parts) > 1)
    if not depths:
        found = ", ".join("/".join(parts) for parts in sorted(everything)[:5]) or "no files"
        raise InputError(f"{source} holds no class folders of {noun}s. {_EXPECTED.format(noun)} Found: {found}.")
    depth = depths.most_common(1)[0][0]
    splits: dict[str, list[Parts]] = {}
    for parts in sorted(files):
        if len(parts) == depth:
            split = split_named(parts[-3]) if depth > 2 else None
            splits.setdefault(split or WHOLE, []).append(parts)
    if len(splits) > 1:
        splits.pop(WHOLE, None)
    kept = {parts for members in splits.values() for parts in members}
    image = next((parts for parts in sorted(kept) if parts[-1].lower().endswith(IMAGE_SUFFIXES)), None)
    if image and noun == "text":
        raise InputError(
            f"{source} holds images ({'/'.join(image)}), but texts are expected, one per file. Set data.modality=image "
            "to classify images."
        )
    notes = _ignored(source, sorted(everything - kept))
    result = {}
    for split, members in splits.items():
        names = ["/".join(parts) for parts in members]
        columns: dict[str, Sequence[Any]] = {"label": [parts[-2] for parts in members], "file": names}
        if noun == "text":
            columns["text"] = [check_text(f"{'/'.join(parts)} in {source}", _bytes(files[parts])) for parts in members]
        else:
            columns["image"] = [files[parts] for parts in members]
        result[split] = Rows(source, columns, text=noun, files=names, notes=notes)
    return result


def _bytes(file: Path | bytes) -> bytes:
    return file if isinstance(file, bytes) else file.read_bytes()


def _ignored(source: str, files: list[Parts]) -> list[str]:
    if not files:
        return []
    listed = ", ".join("/".join(parts) for parts in files[:3]) + (", ..." if len(files) > 3 else "")
    return [f"{len(files)} files of {source} outside its class folders left out ({listed})"]
