"""The directory of a run: opened, kept safe, and put back if nothing came of it."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from calig.pipeline.compose import save
from calig.pipeline.config import Config
from calig.pipeline.errors import InputError
from calig.pipeline.records import atomic_write, read_lines, write_json

_PACKAGES = ("calig", "torch", "lightning", "transformers", "datasets", "torchmetrics", "wandb", "omegaconf", "pyarrow")


@dataclass
class RunDirectory:
    """The files of a run (ARCHITECTURE, A run directory).

    Attributes:
        path: Where they are.
        fresh: Whether this session made the directory and nothing was done in it yet.
        replaced: Where the run that this one replaces waits until this one has got to work.
        others: Whether another process makes the directory anew; what is there may still be what it replaces.
    """

    path: Path
    fresh: bool = False
    replaced: Path | None = None
    others: bool = False

    def __truediv__(self, name: str) -> Path:
        return self.path / name

    @property
    def summary(self) -> dict[str, Any]:
        """`summary.json`: the last value of every scalar under its key, the best one under `<key>/best`."""
        file = self.path / "summary.json"
        return json.loads(file.read_text(encoding="utf8")) if file.exists() else {}

    def add_summary(self, values: Mapping[str, Any]) -> None:
        """Add scalars to `summary.json`."""
        write_json(self.path / "summary.json", self.summary | dict(values))

    @property
    def finished(self) -> list[str]:
        """The stages that have run to their end."""
        if self.others:
            return []
        file = self.path / ".stages.json"
        return json.loads(file.read_text(encoding="utf8"))["finished"] if file.exists() else []

    def mark_finished(self, stage: str) -> None:
        """Remember that a stage has run to its end."""
        write_json(self.path / ".stages.json", {"finished": [*self.finished, stage]})

    @property
    def failures(self) -> list[dict[str, Any]]:
        """What could not be explained, once per sample and method."""
        rows = read_lines(self.path / "failures.jsonl")
        return list({(row["sample_id"], row["method"]): row for row in rows}.values())

    def set_failures(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Write `failures.jsonl` anew; without failures there is none."""
        file = self.path / "failures.jsonl"
        if rows:
            atomic_write(file, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
        else:
            file.unlink(missing_ok=True)

    def keep(self) -> None:
        """The run gets to work: what it replaces may go, and from here on nothing is undone."""
        self.fresh = False
        if self.replaced is not None:
            shutil.rmtree(self.replaced, ignore_errors=True)
            self.replaced = None

    def give_up(self) -> None:
        """Undo the opening of a run that failed before any work, so that it does not stand in the way of the next."""
        if self.fresh:
            shutil.rmtree(self.path, ignore_errors=True)
            if self.replaced is not None:
                self.replaced.replace(self.path)
                self.replaced = None


def is_main_process() -> bool:
    """Whether this is rank 0, also before a Trainer exists (a launcher sets the ranks of the others)."""
    return all(int(os.environ.get(name, 0)) == 0 for name in ("LOCAL_RANK", "NODE_RANK", "SLURM_PROCID", "RANK"))


def open_directory(config: Config) -> RunDirectory:
    """Make or re-open the run directory; a run that is replaced is set aside, not deleted.

    Raises:
        InputError: It exists and neither `run.resume` nor `run.overwrite` says what to do, there is nothing to
            resume, or it cannot be written.
    """
    if config.run.resume is not None:
        directory = RunDirectory(Path(config.run.resume))
        if not (directory / "config.yaml").exists():
            raise InputError(f"run.resume={directory.path} is not a run directory: it has no config.yaml.")
        return directory
    assert config.run.dir is not None  # composed
    path = Path(config.run.dir)
    if not is_main_process():
        return RunDirectory(path, others=True)
    try:
        replaced = _set_aside(config, path)
        path.mkdir(parents=True, exist_ok=True)
        directory = RunDirectory(path, fresh=True, replaced=replaced)
        save(config, directory / "config.yaml")
        write_json(directory / "versions.json", versions())
    except OSError as error:
        reason = error.strerror or error
        raise InputError(
            f"the run directory {path} cannot be written: {reason}. Choose another with run.dir=DIR."
        ) from error
    return directory


def _set_aside(config: Config, path: Path) -> Path | None:
    if path.exists() and not path.is_dir():
        raise InputError(f"run.dir={path} is a file. Choose another with run.dir=DIR.")
    if not path.exists() or not any(path.iterdir()):
        return None
    if not config.run.overwrite:
        raise InputError(
            f"the run directory {path} exists. Continue it with run.resume={path}, replace it with "
            "run.overwrite=true, or choose another with run.dir=DIR."
        )
    if not (path / "config.yaml").exists():
        raise InputError(
            f"run.overwrite=true would delete {path}, which is not a run directory (it has no config.yaml). Choose "
            "another with run.dir=DIR."
        )
    aside = path.with_name(f".{path.name}.replaced")
    if aside.exists():
        shutil.rmtree(aside)
    return path.replace(aside)


def versions() -> dict[str, Any]:
    """Versions of what a result depends on, and the commit of the working folder if it is a git checkout."""
    found: dict[str, Any] = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = None
    try:
        commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, timeout=10, check=False)
        found["git_commit"] = commit.stdout.strip() or None
    except (OSError, subprocess.TimeoutExpired):
        found["git_commit"] = None
    return found
