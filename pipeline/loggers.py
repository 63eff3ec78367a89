"""The loggers of a run: metrics.csv always, Weights & Biases unless it is disabled or cannot be reached."""

from __future__ import annotations

import contextlib
import csv
import dataclasses
import io
import os
from pathlib import Path
from typing import TYPE_CHECKING

from calig.pipeline.config import Config
from calig.pipeline.console import Console
from calig.pipeline.records import atomic_write

if TYPE_CHECKING:
    from lightning.pytorch.loggers import Logger

METRICS = "metrics.csv"
_EARLIER = ".metrics-before.csv"


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
        (folder / METRICS).replace(folder / _EARLIER)
    loggers: list[Logger] = [CSVLogger(folder, name="", version="")]
    if config.logger.wandb.mode != "disabled":
        wandb_logger = _wandb_logger(config, folder, console)
        if wandb_logger is not None:
            loggers.append(wandb_logger)
    return loggers


def finish_loggers(loggers: list[Logger], folder: Path, *, main: bool) -> None:
    """Close what a run has opened; without it, the next run of the process would go on writing into this one."""
    if any(type(logger).__name__ == "WandbLogger" for logger in loggers):
        import wandb

        wandb.finish()
    if main:
        join_metrics(folder)


def join_metrics(folder: Path) -> None:
    """Put the rows of an earlier session in front of those of this one."""
    earlier, now = folder / _EARLIER, folder / METRICS
    if not earlier.exists():
        return
    rows = [*_rows(earlier), *_rows(now)]
    columns = sorted({key for row in rows for key in row})
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, columns, restval="")
    writer.writeheader()
    writer.writerows(rows)
    atomic_write(now, text.getvalue())
    earlier.unlink()


def _rows(path: Path) -> list[dict[str, str]]:
    if not path.exists():
        return []
    with path.open(encoding="utf8", newline="") as stream:
        return list(csv.DictReader(stream))


def _wandb_logger(config: Config, folder: Path, console: Console) -> Logger | None:
    from lightning.pytorch.loggers import WandbLogger

    settings = config.logger.wandb
    target = folder / "wandb"
    # Offline media and artifacts go where WANDB_DATA_DIR says; the default is outside the run directory.
    os.environ["WANDB_DATA_DIR"] = str(target.resolve())
    try:
        import wandb

        target.mkdir(exist_ok=True)
        logger = WandbLogger(
            name=config.run.name,
            project=settings.project,
            entity=settings.entity,
            save_dir=folder,
            offline=settings.mode == "offline",
            tags=settings.tags or None,
            config=dataclasses.asdict(config),
            settings=wandb.Settings(silent=True),
        )
        # Reach the service now: a run is told at its start, not after an epoch. Lightning passes an argument that
        # wandb 0.31 warns about; whatever else wandb has to say is passed on.
        heard = io.StringIO()
        with contextlib.redirect_stderr(heard):
            _ = logger.experiment
        for line in heard.getvalue().splitlines():
            if line.strip() and "anonymous setting" not in line:
                console.say(line)
        return logger
    except Exception as error:
        console.warn(
            f"Weights & Biases cannot be used and is left out: {type(error).__name__}: {error} "
            "Set logger.wandb.mode=offline or disabled."
        )
        return None
