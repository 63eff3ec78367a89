"""Which samples of a run are explained: a manifest per shard, and what a broken-off session left behind.

A shard is up to three parquet files of one name, in `explanations/`, `metrics/` and `flow/`, the pictures of its
samples in `images/`, and its manifest in `manifest/`. The manifest is written last and makes the shard count: it names
the samples, what failed, and the size and checksum of the files. So a job that was killed leaves whole shards and
pieces that can be told from them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from calig.pipeline.errors import InputError
from calig.pipeline.explained import Explained
from calig.pipeline.image_rows import FOLDER as IMAGES
from calig.pipeline.records import (
    EXPLANATION_SCHEMA,
    FLOW_SCHEMA,
    METRIC_SCHEMA,
    Digest,
    atomic_write,
    write_json,
    write_table,
)

_FOLDERS = ("explanations", "metrics", "flow")
_ASKED = ("methods", "split", "target", "operator", "metrics", "limits", "flows", "perturbation_target")
_SETTINGS = (*_ASKED, "seed", "data", "model")


@dataclass
class Standing:
    """What a run has got so far.

    Attributes:
        by_method: Method -> the samples that it is done with; one that failed for all its methods is tried again.
        measured: Samples whose random control stands.
        damaged: Of shards that were taken out because their files are not what was written: what is wrong.
        settings: What the shards were explained with; the methods are those of all shards.
    """

    by_method: dict[str, set[int]] = field(default_factory=dict)
    measured: set[int] = field(default_factory=set)
    damaged: list[str] = field(default_factory=list)
    settings: dict[str, Any] = field(default_factory=dict)

    @property
    def done(self) -> set[int]:
        """Samples with an explanation."""
        return set().union(*self.by_method.values())


def write_shard(run: Path, name: str, rows: Explained, metadata: Mapping[str, Any]) -> None:
    """Write the rows of some samples; they count once the last of the files stands.

    Args:
        run: The run directory.
        name: Of the shard, without an ending.
        rows: Of samples and methods that no other shard has.
        metadata: Kept in the explanations' file, and what matters for going on in the manifest.

    Raises:
        OSError: Something cannot be written; the samples do not count then.
    """
    files: dict[str, Digest] = {}
    refs = {row[key] for row in rows.explanations for key in ("image_ref", "mask_ref") if row.get(key)}
    for place in sorted(refs & rows.files.keys()):
        # Written whole or not at all, and perhaps with other methods before: that file has its digest elsewhere too.
        if not (run / place).exists():
            (run / place).parent.mkdir(parents=True, exist_ok=True)
            atomic_write(run / place, rows.files[place])
        files[place] = Digest.of(run / place)
    for folder, table, schema, extra in (
        ("metrics", rows.metrics, METRIC_SCHEMA, None),
        ("flow", rows.flows, FLOW_SCHEMA, None),
        ("explanations", rows.explanations, EXPLANATION_SCHEMA, metadata),
    ):
        if table:
            files[f"{folder}/{name}.parquet"] = write_table(run / folder / f"{name}.parquet", table, schema, extra)
    path = run / "manifest" / f"{name}.json"
    path.parent.mkdir(exist_ok=True)
    values = {
        "explained": _explained(rows),
        "failures": rows.failures,
        "files": {file: digest._asdict() for file, digest in files.items()},
        "settings": {key: metadata[key] for key in _SETTINGS if key in metadata},
    }
    write_json(path, values)


def _explained(rows: Explained) -> list[dict[str, Any]]:
    """The samples by the methods that they are done with, and by whether their random control is there.

    A sample without any explanation is not done.
    """
    methods: dict[int, set[str]] = {row["sample_id"]: set() for row in rows.explanations}
    for row in [*rows.explanations, *rows.failures]:
        if row["sample_id"] in methods:
            methods[row["sample_id"]].add(row["method"])
    controlled = {row["sample_id"] for row in rows.metrics if row["control"] == "random"}
    groups: dict[tuple[tuple[str, ...], bool], list[int]] = {}
    for sample, names in sorted(methods.items()):
        groups.setdefault((tuple(sorted(names)), sample in controlled), []).append(sample)
    return [
        {"methods": list(names), "random_control": control, "samples": samples}
        for (names, control), samples in groups.items()
    ]


def next_number(run: Path, rank: int) -> int:
    """The first shard number of a process that no file has, whoever wrote it."""
    taken = [path.stem for folder in ("manifest", *_FOLDERS) for path in (run / folder).glob(f"part-{rank:05d}-*")]
    return max((int(stem.rsplit("-", 1)[1]) for stem in taken), default=-1) + 1


def take_up(run: Path) -> Standing:
    """Find out what is explained, and delete what does not count: unfinished shards and damaged ones.

    Nobody may be writing meanwhile.
    """
    standing = Standing()
    kept: set[str] = set()
    pictures: set[str] = set()
    for path in _manifests(run):
        try:
            manifest = json.loads(path.read_text(encoding="utf8"))
        except ValueError as error:
            wrong: str | None = f"{path} is damaged ({error})"
        else:
            wrong = _wrong(run, manifest)
        if wrong is not None:
            standing.damaged.append(wrong)
            path.unlink()
            continue
        kept.add(path.stem)
        pictures.update(manifest["files"])
        samples: set[int] = set()
        for group in manifest["explained"]:
            samples.update(group["samples"])
            standing.measured.update(group["samples"] if group["random_control"] else ())
            for method in group["methods"]:
                standing.by_method.setdefault(method, set()).update(group["samples"])
        known = standing.settings
        standing.settings = manifest["settings"] | {
            key: known.get(key, {}) | manifest["settings"][key] for key in ("methods", "limits")
        }
        # The others failed for every method: they are tried again, and may fail again.
        failed = [row for row in manifest["failures"] if row["sample_id"] in samples]
        if len(failed) < len(manifest["failures"]):
            write_json(path, manifest | {"failures": failed})
    for folder in _FOLDERS:
        for file in (run / folder).glob("part-*.parquet"):
            if file.stem not in kept:
                file.unlink()
    for file in (run / IMAGES).glob("*.png"):
        if f"{IMAGES}/{file.name}" not in pictures:
            file.unlink()
    for folder in ("manifest", IMAGES, *_FOLDERS):
        for file in (run / folder).glob(".*.tmp"):
            file.unlink()
    return standing


def check_settings(run: Path, standing: Standing, settings: Mapping[str, Any]) -> None:
    """Refuse to go on with other settings than the shards that stand were made with: one table would mix two.

    More methods are no other settings, with limits of their own if they have some.

    Raises:
        InputError: Names the setting.
    """
    given = json.loads(json.dumps(dict(settings)))
    standing_methods = standing.settings.get("methods", {})
    added = given["methods"].keys() - standing_methods.keys()
    for key, before in standing.settings.items():
        now = given[key]
        if key in ("methods", "limits"):
            now = {name: value for name, value in now.items() if name.partition("/")[0] not in added}
        if now != before:
            name = f"explain.{key}" if key in _ASKED else key
            raise InputError(
                f"{len(standing.done)} samples of {run} are explained with {name}={before}, and now it is {now}. Go on "
                f"with the same, or delete {run / 'manifest'} to explain all samples anew."
            )


def failures(run: Path) -> list[dict[str, Any]]:
    """What could not be explained, once per sample and method."""
    rows = [row for path in _manifests(run) for row in json.loads(path.read_text(encoding="utf8"))["failures"]]
    return list({(row["sample_id"], row["method"]): row for row in rows}.values())


def _manifests(run: Path) -> list[Path]:
    return sorted((run / "manifest").glob("part-*.json"))


def _wrong(run: Path, manifest: Mapping[str, Any]) -> str | None:
    """What is wrong with the files of a shard, None if they are whole."""
    for name, wanted in manifest["files"].items():
        file = run / name
        if not file.exists():
            return f"{file} is gone"
        size = file.stat().st_size
        if size != wanted["size"]:
            return f"{file} has {size:,} of {wanted['size']:,} bytes"
        if Digest.of(file) != Digest(**wanted):
            return f"{file} is damaged (its checksum is another)"
    return None
