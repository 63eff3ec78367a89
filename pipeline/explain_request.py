"""What `calig explain` is asked for: texts or images, options and places, all checked before anything slow."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from calig.pipeline.errors import InputError, unknown
from calig.pipeline.image_opening import image_files

if TYPE_CHECKING:
    from calig.pipeline.next_token import NextTokenQuestion


@dataclass(frozen=True)
class Request:
    """What was typed.

    Attributes:
        source: A run directory, a Hugging Face folder or a checkpoint.
        texts: Given in place of a file.
        text_pairs: Their second texts.
        file: A file of texts, given in place of them; or an image, or a folder of images.
        text_column: Its column; None: found by name.
        pair_column: The column of second texts.
        method: Attribution method.
        target: `predicted`, a class name or its index.
        options: Options of the method.
        batch_size: Texts at a time.
        out: Directory for the rows.
        html: File for the page.
        next_token: Explain what a causal language model would write next; None for the decision of a classifier.
    """

    source: str
    texts: Sequence[str] | None = None
    text_pairs: Sequence[str] | None = None
    file: str | None = None
    text_column: str | None = None
    pair_column: str | None = None
    method: str = "ca_lig"
    target: str = "predicted"
    options: Mapping[str, Any] | None = None
    batch_size: int = 16
    out: str | None = None
    html: str | None = None
    next_token: NextTokenQuestion | None = None


def parse_options(pairs: Sequence[str], steps: str | None = None) -> dict[str, Any]:
    """Options of a method from `key=value`, values as YAML would read them: numbers, true, false, null, else text.

    Raises:
        InputError: A pair without `=`, or an option given twice.
    """
    options: dict[str, Any] = {} if steps is None else {"steps": _value(steps)}
    for pair in pairs:
        key, equals, text = pair.partition("=")
        if not equals or not key:
            raise InputError(f"--option takes key=value, got '{pair}'; `calig methods` lists the options of each.")
        if key in options:
            raise InputError(f"option '{key}' is given twice.")
        options[key] = _value(text)
    return options


def parse_next_token(
    asked: bool, target: str, versus: str | None, top: int | None, position: int | None, log_prob: bool
) -> NextTokenQuestion | None:
    """The question of `--next-token`; None without it.

    Raises:
        InputError: A flag that belongs to it stands alone, or flags that exclude each other.
    """
    alone = {"--versus": versus, "--top": top, "--position": position, "--log-prob": log_prob or None}
    given = [flag for flag, value in alone.items() if value is not None]
    if not asked:
        if given:
            raise InputError(f"{', '.join(given)} belongs to --next-token, which explains a causal language model.")
        return None
    from calig.pipeline.next_token import NextTokenQuestion

    return NextTokenQuestion(
        None if target == "predicted" else target,
        versus,
        1 if top is None else top,
        -1 if position is None else position,
        log_prob,
    )


def request_images(request: Request) -> list[Path]:
    """Return the images that `--file` names, one or a folder of them; none where it names no image.

    Raises:
        InputError: Flags of texts beside them, or many images without a place for what is found.
    """
    found = [] if request.file is None else image_files(Path(request.file))
    if not found:
        return []
    if request.texts or request.text_pairs or request.text_column or request.pair_column:
        raise InputError(f"--file {request.file} is of images: drop --text, --text-pair and --text-column.")
    if len(found) > 1 and request.out is None and request.html is None:
        raise InputError(f"--file {request.file} holds {len(found)} images: add --out DIR or --html FILE.")
    return found


def request_texts(request: Request) -> tuple[list[Any], list[Any] | None]:
    """Return the texts, and the second texts if there are any.

    Raises:
        InputError: Flags that exclude or need each other, or a file that cannot be read.
    """
    if (request.texts is None) == (request.file is None):
        given = "both are" if request.texts else "neither is"
        raise InputError(f"give either --text (one or more) or --file; {given} given.")
    if request.next_token is not None and (request.text_pairs is not None or request.pair_column is not None):
        raise InputError("--next-token takes one text at a time; put a second one behind it, as the model reads it.")
    if request.file is None:
        if request.text_column or request.pair_column:
            raise InputError("--text-column and --pair-column belong to --file.")
        return list(request.texts or ()), None if request.text_pairs is None else list(request.text_pairs)
    if request.text_pairs is not None:
        raise InputError("--text-pair belongs to --text; the second texts of a file are named by --pair-column.")
    if request.out is None:
        raise InputError(f"--file {request.file} needs --out DIR, where the explanations are written.")
    return read_text_file(Path(request.file), request.text_column, request.pair_column)


def read_text_file(
    path: Path, text_column: str | None = None, pair_column: str | None = None
) -> tuple[list[Any], list[Any] | None]:
    """The texts of a csv, tsv, json, jsonl or parquet file by column, or of a txt file by line.

    Raises:
        InputError: The file cannot be read, a column is not there, or a text is missing; names the row.
    """
    from calig.datamodules.columns import TEXT_NAMES
    from calig.datamodules.formats import TABLES
    from calig.datamodules.readers import read_file

    if not path.is_file():
        raise InputError(f"--file {path} " + ("is a folder; name a file." if path.is_dir() else "does not exist."))
    suffix = path.suffix.lower()
    if suffix == ".txt":
        if text_column or pair_column:
            raise InputError(f"--file {path} has no columns: one text a line. Drop --text-column and --pair-column.")
        return _lines(path), None
    if suffix not in TABLES:
        raise unknown("file type", suffix or path.name, (".txt", *TABLES), f"Named by --file {path}.")
    rows = read_file(path)
    if not len(rows):
        raise InputError(f"{path} holds no rows.")

    def values(column: str) -> list[Any]:
        if column not in rows.columns:
            raise unknown("column", column, rows.columns, f"Looked for in {path}.")
        found = rows.values(column)
        for index, text in enumerate(found):
            words = isinstance(text, list) and all(isinstance(word, str) for word in text)
            if not (isinstance(text, str) or words) or not "".join(text).strip():
                raise InputError(f"{rows.place(index)}: column '{column}' holds {str(text)[:40]!r}, no text.")
        return found

    if text_column is None:
        by_lower = {name.lower(): name for name in rows.columns}
        text_column = next((by_lower[name] for name in TEXT_NAMES if name in by_lower), None)
        if text_column is None:
            raise InputError(
                f"{path} has no text column of a known name ({', '.join(TEXT_NAMES)}). Name it by --text-column; "
                f"columns: {', '.join(name[:40] for name in rows.columns)}."
            )
    return values(text_column), None if pair_column is None else values(pair_column)


def free_folder(path: Path) -> Path:
    """Return the folder of `--out`, which is new or empty; InputError otherwise, and where it cannot be made."""
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        problem = "is not empty" if path.is_dir() else "is a file"
        raise InputError(f"--out {path} {problem}; nothing is overwritten. Choose another, or remove it.")
    _check_writable(path if path.exists() else path.parent, f"--out {path}")
    return path


def free_file(path: Path) -> Path:
    """Return the file of `--html`; InputError where it cannot be written."""
    if path.is_dir():
        raise InputError(f"--html {path} is a folder; name a file.")
    if not path.parent.is_dir():
        raise InputError(f"--html {path}: the folder {path.parent} does not exist.")
    _check_writable(path.parent, f"--html {path}")
    return path


def _lines(path: Path) -> list[str]:
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise InputError(f"--file {path} cannot be read: {error.strerror}.") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8: byte {error.start}. Save the file as UTF-8.") from error
    lines = [line.removesuffix("\r") for line in text.rstrip().split("\n")]
    if not text.strip():
        raise InputError(f"{path} is empty.")
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            raise InputError(f"{path}, line {number}, is empty; one text a line is expected.")
    return lines


def _check_writable(folder: Path, what: str) -> None:
    while not folder.exists():
        folder = folder.parent
    if not folder.is_dir() or not os.access(folder, os.W_OK | os.X_OK):
        raise InputError(f"{what} cannot be written: {folder} is not a folder that you may write to.")


def _value(text: str) -> Any:
    words = {"true": True, "false": False, "null": None, "none": None}
    if text.lower() in words:
        return words[text.lower()]
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text
