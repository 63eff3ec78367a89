"""What a run keeps on disk: row schemas, atomic writing, and reading it back."""

from __future__ import annotations

import csv
import io
import json
import os
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from calig.pipeline.errors import InputError

SCHEMA_VERSION = 1
_ROWS = 4096  # unpacked at once when a table is read

EXPLANATION_SCHEMA = pa.schema(
    [
        ("sample_id", pa.int64()),
        ("tokens", pa.list_(pa.string())),
        ("word_ids", pa.list_(pa.int32())),
        ("scores", pa.list_(pa.float32())),
        ("layer_scores", pa.list_(pa.list_(pa.float32()))),
        ("label", pa.int32()),
        ("prediction", pa.int32()),
        ("target", pa.int32()),
        ("probability", pa.float32()),
        ("method", pa.string()),
        ("completeness_gap", pa.float32()),
        ("steps_used", pa.int32()),
        ("error_bound", pa.float32()),
        ("converged", pa.bool_()),
        ("rationale", pa.list_(pa.int8())),
        ("segment", pa.list_(pa.int8())),
        ("predictions", pa.list_(pa.int32())),
        ("labels", pa.list_(pa.int32())),
        ("value", pa.float32()),
        ("label_value", pa.float32()),
        ("window", pa.int32()),
        ("char_start", pa.list_(pa.int32())),
        ("char_end", pa.list_(pa.int32())),
        ("grid", pa.list_(pa.int32())),
        ("image_ref", pa.string()),
        ("mask_ref", pa.string()),
    ]
)
"""One row per sample, method and target: `tokens`, `word_ids`, `scores`, `rationale` and `segment` run over the real
tokens (word ids and segments are null on special ones; a segment is 0 on the first text of a pair and 1 on the second),
`layer_scores` over the blocks 1..L; what a method does not have is null. `prediction` is the largest output. Of several
labels per text, `predictions` and `labels` are those that are predicted and given, and `label` is null; of a regression
`value` is the output and `label_value` the true number, and `probability` is null. Of long texts `window` is how many
windows were pooled, and token i stands at [char_start[i], char_end[i]) of the text. Of an image the tokens are its
patches, `grid` is their rows and columns, and `image_ref` and `mask_ref` are PNG files in the folder that the table's
folder lies in (the run directory)."""

METRIC_SCHEMA = pa.schema(
    [
        ("sample_id", pa.int64()),
        ("method", pa.string()),
        ("control", pa.string()),
        ("metric", pa.string()),
        ("operator", pa.string()),
        ("space", pa.string()),
        ("q", pa.float64()),
        ("value", pa.float64()),
        ("target", pa.int32()),
    ]
)
"""Long form; `control` is none, random or reversed, `q` the bin or null for a number without bins or their mean;
`target` is the label that is explained where a text may have several, else null."""

FLOW_SCHEMA = pa.schema(
    [
        ("sample_id", pa.int64()),
        ("method", pa.string()),
        ("layers", pa.list_(pa.int32())),
        ("flow", pa.list_(pa.list_(pa.list_(pa.float32())))),
        ("agreement", pa.list_(pa.list_(pa.list_(pa.float32())))),
    ]
)
"""One row per sample and method that knows a flow from token to token: `layers` counts the blocks from 0, `flow` is by
block, source and target over the real tokens, or null where it is not kept; `agreement`, or null, is by block,
configuration and measure (`calig.pipeline.attribution.agreement`)."""


SampleKey = int | tuple[int, int]
"""Tells what is explained apart: the sample, or the sample and the label where a text may have several."""


def explained_key(row: Mapping[str, Any]) -> SampleKey:
    """Of an explanation row."""
    return row["sample_id"] if row.get("predictions") is None else (row["sample_id"], row["target"])


def measured_key(row: Mapping[str, Any]) -> SampleKey:
    """Of a metric row."""
    return row["sample_id"] if row.get("target") is None else (row["sample_id"], row["target"])


METRICS = "metrics.csv"
EARLIER = ".metrics-before.csv"
"""What earlier sessions of a run have logged, while a session is writing."""


class Digest(NamedTuple):
    """What a file must look like to be whole."""

    size: int
    crc32: int

    @classmethod
    def of(cls, path: Path) -> Digest:
        """Read a file through, a piece at a time."""
        size = crc = 0
        with path.open("rb") as stream:
            while piece := stream.read(2**20):
                size, crc = size + len(piece), zlib.crc32(piece, crc)
        return cls(size, crc)


def atomic_write(path: Path, data: str | bytes) -> None:
    """Write a file whole or not at all: temporary name, fsync, rename.

    Raises:
        OSError: It cannot be written, because the disk is full, say; it names the path, and nothing is left behind.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as stream:
            stream.write(data.encode() if isinstance(data, str) else data)
            stream.flush()
            os.fsync(stream.fileno())
        temporary.replace(path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        if error.errno is not None:
            error.filename = str(path)  # a failing write names no file, a failing rename the temporary one
            error.filename2 = None
        raise
    _sync_folder(path.parent)


def _sync_folder(folder: Path) -> None:
    """Make a rename outlast a power cut, where the system has folders to open."""
    if hasattr(os, "O_DIRECTORY"):
        number = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(number)
        finally:
            os.close(number)


def write_json(path: Path, values: Mapping[str, Any]) -> None:
    """Write a JSON object atomically; a NaN is an error, not invalid JSON."""
    atomic_write(path, json.dumps(values, indent=1, ensure_ascii=False, allow_nan=False) + "\n")


def write_table(
    path: Path, rows: Sequence[Mapping[str, Any]], schema: pa.Schema, metadata: Mapping[str, Any] | None = None
) -> Digest:
    """Write rows as one parquet file, atomically; returns what the file must look like.

    Args:
        path: Where to.
        rows: Mappings with the schema's keys; a missing key becomes null.
        schema: The file's schema.
        metadata: Kept in the file's metadata as JSON, beside `schema_version`.
    """
    values = {"schema_version": SCHEMA_VERSION, **(metadata or {})}
    encoded = {key.encode(): json.dumps(value).encode() for key, value in values.items()}
    table = pa.Table.from_pylist([dict(row) for row in rows], schema=schema.with_metadata(encoded))
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink)
    path.parent.mkdir(parents=True, exist_ok=True)
    data = sink.getvalue().to_pybytes()
    atomic_write(path, data)
    return Digest(len(data), zlib.crc32(data))


def table_metadata(path: Path) -> dict[str, Any]:
    """The metadata of a file written by `write_table`.

    Raises:
        InputError: The file is from a newer version than this one reads.
    """
    raw = pq.read_schema(path).metadata or {}
    values = {
        key.decode(): json.loads(value) for key, value in raw.items() if not key.startswith((b"ARROW:", b"pandas"))
    }
    version = values.get("schema_version", 0)
    if version > SCHEMA_VERSION:
        raise InputError(f"{path} has schema version {version}; this version of calig reads up to {SCHEMA_VERSION}.")
    return values


def shards(folder: Path) -> list[Path]:
    """The finished shards of a folder, in order."""
    return sorted(folder.glob("part-*.parquet"))


def read_rows(folder: Path, columns: list[str] | None = None) -> Iterator[dict[str, Any]]:
    """The rows of all shards of a folder, some thousands in memory at a time."""
    for batch in _batches(folder, columns):
        yield from batch.to_pylist()


def read_numbers(folder: Path) -> Iterator[dict[str, Any]]:
    """The rows of a metrics table that statistics are made of: those of single bins, most of it, are never unpacked."""
    for batch in _batches(folder, None):
        yield from batch.filter(batch.column("q").is_null()).to_pylist()


def read_bins(folder: Path, metrics: Sequence[str]) -> Iterator[dict[str, Any]]:
    """The rows of single bins of some metrics on probabilities: what perturbation curves are drawn from."""
    wanted = pa.array(metrics, pa.string())
    for batch in _batches(folder, None):
        chosen = pc.and_(batch.column("q").is_valid(), pc.is_in(batch.column("metric"), wanted))
        yield from batch.filter(pc.and_(chosen, pc.equal(batch.column("space"), "probability"))).to_pylist()


def read_samples(folder: Path, columns: list[str]) -> Iterator[list[dict[str, Any]]]:
    """The rows of each sample together; one shard at a time is in memory, and what methods were added to later."""
    files = shards(folder)
    last = {row["sample_id"]: path for path in files for row in _shard_rows(path, ["sample_id"])}
    found: dict[int, list[dict[str, Any]]] = {}
    for path in files:
        for row in _shard_rows(path, columns):
            found.setdefault(row["sample_id"], []).append(row)
        whole = [sample for sample in found if last[sample] == path]
        yield from (found.pop(sample) for sample in whole)


def _shard_rows(path: Path, columns: list[str]) -> Iterator[dict[str, Any]]:
    for batch in _shard_batches(path, columns):
        yield from batch.to_pylist()


def _batches(folder: Path, columns: list[str] | None) -> Iterator[pa.RecordBatch]:
    for path in shards(folder):
        yield from _shard_batches(path, columns)


def _shard_batches(path: Path, columns: list[str] | None) -> Iterator[pa.RecordBatch]:
    table_metadata(path)
    # ParquetFile, because a dataset reader would make columns of `key=value` in the folder's own path.
    with pq.ParquetFile(path) as file:
        # A column that came later is not there in what an older version wrote.
        known = None if columns is None else [name for name in columns if name in file.schema_arrow.names]
        yield from file.iter_batches(_ROWS, columns=known)


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The rows of a JSON-lines file; none if it does not exist."""
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf8").splitlines() if line.strip()]


def read_scalars(path: Path) -> list[dict[str, str]]:
    """The rows of a metrics.csv; none if it does not exist.

    A logger appends, so a process that was killed may leave half a row, or a block of zeros: these are left out.
    """
    if not path.exists():
        return []
    text = path.read_text(encoding="utf8", errors="replace")
    whole = text[: text.rfind("\n") + 1].replace("\0", "")
    rows = csv.DictReader(io.StringIO(whole))
    return [row for row in rows if None not in row and None not in row.values() and row.get("step", "").isdigit()]


def logged_rows(run: Path) -> list[dict[str, str]]:
    """The rows of a run's metrics.csv; those of earlier sessions, which are set aside while one writes, first."""
    return [*read_scalars(run / EARLIER), *read_scalars(run / METRICS)]


def write_csv(path: Path, names: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """Write a table, atomically: a line of column names, numbers to ten digits, `true` and `false`."""
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(names)
    writer.writerows([_spelled(value) for value in row] for row in rows)
    atomic_write(path, text.getvalue())


def _spelled(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return f"{value:.10g}" if isinstance(value, float) else str(value)


def read_csv(path: Path, kinds: Sequence[type]) -> Iterator[list[Any]]:
    """Yield the rows that `write_csv` wrote, each column as its type; none where there is no such file."""
    if not path.exists():
        return
    with path.open(encoding="utf8", newline="") as stream:
        _, *lines = csv.reader(stream)
    for line in lines:
        yield [text == "true" if kind is bool else kind(text) for kind, text in zip(kinds, line, strict=True)]


def append_lines(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Append rows to a JSON-lines file."""
    with path.open("a", encoding="utf8") as stream:
        stream.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
