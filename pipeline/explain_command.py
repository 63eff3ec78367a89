"""What `calig explain` does: texts or images in, explanations to the terminal, to disk, to a page."""

from __future__ import annotations

import sys
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from calig.pipeline.attribution.methods import create_method
from calig.pipeline.errors import InputError
from calig.pipeline.explain_request import Request, free_file, free_folder, request_images, request_texts
from calig.pipeline.explanation import Explanation
from calig.pipeline.image_opening import takes_pictures
from calig.pipeline.image_rows import with_pictures
from calig.pipeline.opening import source_kind
from calig.pipeline.records import EXPLANATION_SCHEMA, append_lines, atomic_write, write_table

if TYPE_CHECKING:
    from calig.pipeline.explainer import Explained
    from calig.pipeline.next_token import NextTokenQuestion

BATCHES_PER_SHARD = 20


def run_explain(request: Request) -> int:
    """Explain, show and write; returns the exit code, 3 where some texts or images could not be explained.

    Raises:
        InputError: Whatever is wrong with the request; nothing has been written then.
    """
    # What is cheap to check comes first: a mistake must not cost the loading of a model, and must leave nothing.
    pictures = request_images(request)
    texts: Any
    texts, pairs = (pictures, None) if pictures else request_texts(request)
    options = dict(request.options or {})
    create_method(request.method, options)
    if request.batch_size < 1:
        raise InputError(f"--batch-size takes 1 or more, got {request.batch_size}.")
    source_kind(Path(request.source))
    if takes_pictures(request.source) != bool(pictures):
        given = f"the image {request.file}" if pictures else "texts"
        wanted = "images (--file IMAGE, or a folder of them)" if not pictures else "texts (--text, or --file of them)"
        raise InputError(f"{request.source} takes {wanted}, got {given}.")
    out = None if request.out is None else free_folder(Path(request.out))
    page = None if request.html is None else free_file(Path(request.html))

    from calig.pipeline.explaining import check_texts

    if not pictures:
        check_texts(texts, pairs)
    with _plain_warnings():
        asked = request.next_token
        job = _next_tokens(request, asked, texts, options) if asked else _decisions(request, texts, pairs, options)
        writer = _Writer(out, job.metadata, job.counted)
        shown = request.file is None or len(pictures) == 1
        keep = shown or page is not None
        kept: list[dict[str, Any]] = []
        for explained in _progress(job.batches, len(texts), request.batch_size):
            writer.add(explained.explanations, explained.failures, explained.files)
            if keep:
                kept += with_pictures(explained.explanations, explained.files)
        writer.flush()
    explanations = [job.explanation(row) for row in sorted(kept, key=_by_id)]
    if shown:
        _show(explanations)
    if page is not None:
        names = {number: Path(picture).name for number, picture in enumerate(pictures)}
        atomic_write(page, html_page(explanations, request, names if len(names) > 1 else {}))
    _report(writer, request, job)
    return 3 if writer.failed else 0


@dataclass(frozen=True)
class _Job:
    """What is explained: the batches to come, and how their rows are told to a reader.

    Attributes:
        batches: The rows of one batch after the other.
        explanation: A row to what is shown of it.
        name: The name of a class, or of a token, by its index.
        metadata: Of the files; may grow as batches come.
        unit: What a row explains.
        counted: Its column that the last line counts.
    """

    batches: Iterator[Explained]
    explanation: Callable[[Mapping[str, Any]], Explanation]
    name: Callable[[int], str]
    metadata: dict[str, Any]
    unit: str = "text"
    counted: str = "prediction"


def _decisions(request: Request, texts: Sequence[Any], pairs: Sequence[Any] | None, options: Mapping[str, Any]) -> _Job:
    from calig.pipeline.explaining import explain_batches, settings_of
    from calig.pipeline.opening import open_source

    opened = open_source(request.source)
    settings = settings_of(opened, request.method, request.target, options)
    names = dict(enumerate(opened.label_names))
    return _Job(
        explain_batches(opened, texts, pairs, settings, request.batch_size),
        lambda row: Explanation.from_row(row, opened.label_names, opened.segments),
        lambda index: names.get(index, f"class {index}"),
        {
            "label_names": opened.label_names,
            "methods": {name: dict(values) for name, values in settings.methods.items()},
            "source": request.source,
            "file": request.file,
        },
        unit="image" if opened.images else "text",
    )


def _next_tokens(request: Request, asked: NextTokenQuestion, texts: Sequence[Any], options: Mapping[str, Any]) -> _Job:
    from calig.pipeline.next_token import causal_defaults, next_token_batches, next_token_explanation
    from calig.pipeline.opening import open_language_model
    from calig.pipeline.vocabulary import quoted

    tokenizer = (opened := open_language_model(request.source)).tokenizer
    names: dict[int, str] = {}  # of the tokens that occur: a vocabulary is too long for every file

    def batches() -> Iterator[Explained]:
        for explained in next_token_batches(opened, texts, asked, request.method, options, request.batch_size):
            for row in explained.explanations:
                known = (row["prediction"], row["target"], row.get("versus"))
                names.update({token: quoted(tokenizer, token) for token in known if token is not None})
            yield explained

    return _Job(
        batches(),
        lambda row: next_token_explanation(row, tokenizer),
        lambda token: quoted(tokenizer, token),
        {
            "next_token": asdict(asked),
            "token_names": names,
            "methods": {request.method: {**causal_defaults(request.method, options), **options}},
            "source": request.source,
            "file": request.file,
        },
        unit="next token",
        counted="target",
    )


def html_page(explanations: Sequence[Explanation], request: Request, names: Mapping[int, str] | None = None) -> str:
    """One self-contained page of explanations; loads nothing. `names` stand above those of these samples."""
    title = escape(f"{request.method} · {Path(request.source).name}")
    names = names or {}
    sections = "\n".join(
        f"<section>{_heading(names.get(explanation.sample_id))}{explanation._repr_html_()}</section>"
        for explanation in explanations
    )
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><meta name="color-scheme" content="light dark">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>{title}</title><style>body{{max-width:50em;margin:2em auto;padding:0 1em;background:Canvas;"
        "color:CanvasText;font:15px/1.6 system-ui,sans-serif}section{margin:0 0 2em}h1{font-size:1.1em}"
        "h2{font-size:1em}</style></head>"
        f"<body><h1>{title}</h1>\n{sections}\n</body></html>\n"
    )


def _heading(name: str | None) -> str:
    return "" if name is None else f"<h2>{escape(name)}</h2>"


class _Writer:
    """Collects rows into shards, whole or not at all, and counts what the last line says."""

    def __init__(self, out: Path | None, metadata: Mapping[str, Any], counted: str) -> None:
        self.out = out
        self.counted = counted
        self.metadata = metadata
        self.counts: Counter[int] = Counter()
        self.values: list[float] = []
        self.units = 0
        self.gaps: list[float] = []
        self.failed: list[dict[str, Any]] = []
        self._rows: list[dict[str, Any]] = []
        self._waiting = self._shards = 0

    def add(
        self, rows: Sequence[dict[str, Any]], failures: Sequence[dict[str, Any]], files: Mapping[str, bytes]
    ) -> None:
        """Take a batch; write when a shard is full."""
        # A text may have several labels, a row for each.
        units = {row["sample_id"]: row for row in rows}.values() if self.counted == "prediction" else rows
        for row in units:
            several = row.get("predictions")
            self.counts.update([row[self.counted]] if several is None else several)
            self.values += [row["value"]] if row.get("value") is not None else []
        self.units += len(units)
        self.gaps += [row["completeness_gap"] for row in rows if row["completeness_gap"] is not None]
        self.failed += failures
        if self.out is None:
            return
        for place in [row["image_ref"] for row in rows if row.get("image_ref") in files]:
            (self.out / place).parent.mkdir(parents=True, exist_ok=True)
            atomic_write(self.out / place, files[place])
        if failures:
            self.out.mkdir(parents=True, exist_ok=True)
            append_lines(self.out / "failures.jsonl", failures)
        self._rows += rows
        self._waiting += 1
        if self._waiting >= BATCHES_PER_SHARD:
            self.flush()

    def flush(self) -> None:
        """Write what is waiting."""
        if self.out is not None and self._rows:
            path = self.out / "explanations" / f"part-00000-{self._shards:05d}.parquet"
            write_table(path, self._rows, EXPLANATION_SCHEMA, self.metadata)
            self._shards += 1
        self._rows, self._waiting = [], 0


def _show(explanations: Sequence[Explanation]) -> None:
    console = Console(highlight=False)
    for index, explanation in enumerate(explanations):
        if index:
            console.print()
        # Whole lines into a pipe; a terminal wraps between words.
        console.print(explanation, soft_wrap=not console.is_terminal)


def _report(writer: _Writer, request: Request, job: _Job) -> None:
    kind = "image" if job.unit == "image" else "text"
    for row in writer.failed[:5]:
        print(f"calig: {kind} {row['sample_id']} was not explained: {row['reason']}", file=sys.stderr)
    if len(writer.failed) > 5:
        print(f"calig: ... and {len(writer.failed) - 5} more", file=sys.stderr)
    if request.out is not None:
        count = writer.units
        parts = [f"{count:,} {job.unit}{'' if count == 1 else 's'} explained by {request.method}"]
        if writer.values:
            mean = sum(writer.values) / len(writer.values)
            parts.append(f"{job.name(0)} {min(writer.values):.3g} to {max(writer.values):.3g}, mean {mean:.3g}")
        else:
            parts += [f"{job.name(i)} {n:,}" for i, n in writer.counts.most_common(5)]
        if writer.gaps:
            parts.append(f"completeness gap {sum(writer.gaps) / len(writer.gaps):.1%}, worst {max(writer.gaps):.1%}")
        where = f" → {Path(request.out) / 'explanations'}" if count else ""
        print(" · ".join(parts) + where)
        if writer.failed:
            print(f"{len(writer.failed)} failed → {Path(request.out) / 'failures.jsonl'}")
    if request.html is not None:
        print(f"page → {request.html}")


def _progress(batches: Iterator[Any], texts: int, batch_size: int) -> Iterator[Any]:
    console = Console(stderr=True)
    total = -(-texts // batch_size)
    if total < 3 or not console.is_terminal:
        return batches
    from rich.progress import track

    return iter(track(batches, "explaining", total=total, console=console, transient=True))


@contextmanager
def _plain_warnings() -> Iterator[None]:
    """Warnings as one line on stderr, without the place in the code that a user of the command line never sees."""
    with warnings.catch_warnings():
        warnings.showwarning = lambda message, *_: print(f"warning: {message}", file=sys.stderr)
        yield


def _by_id(row: Mapping[str, Any]) -> int:
    return int(row["sample_id"])
