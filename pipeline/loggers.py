"""The loggers of a run: metrics.csv always, Weights & Biases unless it is disabled or cannot be reached."""

from __future__ import annotations

import contextlib
import csv
import dataclasses
import io
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from calig.pipeline.config import Config
from calig.pipeline.console import Console
from calig.pipeline.records import EARLIER, METRICS, atomic_write, logged_rows
from calig.pipeline.wandb_run import identity

if TYPE_CHECKING:
    from lightning.pytorch.loggers import Logger


def make_loggers(config: Config, folder: Path, console: Console, *, main: bool) -> list[Logger]:
    """Build the loggers of a run directory.

    Args:
        config: Of the run.
        folder: The run directory.
        console: Told if Weights & Biases cannot be used: that never ends a run.
        main: Whether this process writes.
    """
    from lightning.pytorch.loggers import CSVLogger

    if main and (folder / METRICS).exists():
        # CSVLogger deletes what an earlier session of this run wrote: set it aside, and join it at the end.
        join_metrics(folder)
        (folder / METRICS).replace(folder / EARLIER)
    loggers: list[Logger] = [_guarded(CSVLogger, METRICS, console)(folder, name="", version="")]
    if config.logger.wandb.mode != "disabled":
        wandb_logger = _wandb_logger(config, folder, console, main=main)
        if wandb_logger is not None:
            loggers.append(wandb_logger)
    return loggers


def finish_loggers(loggers: list[Logger], folder: Path, console: Console, *, main: bool) -> None:
    """Close what a run has opened; without it, the next run of the process would go on writing into this one."""
    if len(loggers) > 1:
        import wandb

        try:
            wandb.finish()
        except Exception as error:
            console.warn(f"Weights & Biases did not finish: {type(error).__name__}: {error}")
    if main:
        join_metrics(folder)


def join_metrics(folder: Path) -> None:
    """Put the rows of an earlier session in front of those of this one."""
    earlier, now = folder / EARLIER, folder / METRICS
    if not earlier.exists():
        return
    _write(now, logged_rows(folder))
    earlier.unlink()


def _write(path: Path, rows: list[dict[str, str]]) -> None:
    columns = sorted({key for row in rows for key in row})
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, columns, restval="")
    writer.writeheader()
    writer.writerows(rows)
    atomic_write(path, text.getvalue())


def drop_rows(folder: Path, step: int, *, pretraining: bool = False) -> None:
    """Drop what was logged from optimiser step `step` (from 0) on: a resumed training comes to it again.

    Args:
        folder: The run directory.
        step: Of the training, or of the pre-training, whose steps are counted for themselves.
        pretraining: Which of the two goes on; the rows of the other stay.
    """
    rows = logged_rows(folder)

    def of_it(row: dict[str, str]) -> bool:
        return any(text and key.startswith("pretrain/") for key, text in row.items()) == pretraining

    kept = [row for row in rows if int(row["step"]) < step or not of_it(row)]
    if len(kept) < len(rows):
        _write(folder / METRICS, kept)
        (folder / EARLIER).unlink(missing_ok=True)


def _guarded(cls: type[Any], what: str, console: Console) -> type[Any]:
    """A logger that says once that it failed and is silent from then on: a logger never ends a training."""

    def guard(name: str) -> Callable[..., Any]:
        original = getattr(cls, name)

        def call(self: Any, *args: Any, **kwargs: Any) -> Any:
            if getattr(self, "calig_failed", False):
                return None
            try:
                return original(self, *args, **kwargs)
            except Exception as error:
                self.calig_failed = True
                console.warn(f"{what} failed and is left out from here: {type(error).__name__}: {error}")
                return None

        return call

    names = ("log_metrics", "log_hyperparams", "save", "finalize", "after_save_checkpoint")
    return type(cls.__name__, (cls,), {name: guard(name) for name in names})


def _wandb_logger(config: Config, folder: Path, console: Console, *, main: bool) -> Logger | None:
    from lightning.pytorch.loggers import WandbLogger

    settings = config.logger.wandb
    target = folder / "wandb"
    known_id = target / "run-id"
    # Offline media and artifacts go where WANDB_DATA_DIR says; the default is outside the run directory.
    os.environ["WANDB_DATA_DIR"] = str(target.resolve())
    try:
        import wandb

        target.mkdir(exist_ok=True)
        about = identity(config, folder)
        logger = _guarded(WandbLogger, "Weights & Biases", console)(
            name=config.run.name,
            project=settings.project,
            entity=settings.entity,
            save_dir=folder,
            offline=settings.mode == "offline",
            tags=settings.tags or None,
            # A run that is continued stays one run; offline, its parts are files of their own under one id.
            id=known_id.read_text(encoding="utf8").strip() if known_id.exists() else None,
            group=about["group"],
            job_type=about["job_type"],
            config=dataclasses.asdict(config) | about["config"],
            settings=wandb.Settings(silent=True),
        )
        # Reach the service now: a run is told at its start, not after an epoch. Lightning passes an argument that
        # wandb 0.31 warns about; whatever else wandb has to say is passed on.
        heard = io.StringIO()
        with contextlib.redirect_stderr(heard):
            _ = logger.experiment
        for line in heard.getvalue().splitlines():
            if line.strip() and "anonymous setting" not in line and "resume will be ignored" not in line:
                console.say(line)
        if main:
            atomic_write(known_id, str(logger.experiment.id))
        return logger
    except Exception as error:
        console.warn(
            f"Weights & Biases cannot be used and is left out: {type(error).__name__}: {error} "
            "Set logger.wandb.mode=offline or disabled."
        )
        return None
