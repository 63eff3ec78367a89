"""What a W&B run gets beside the curves: versions in its config, best values in its summary, and its artifacts."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from calig.pipeline.config import Config
from calig.pipeline.console import Console

_FILES = {
    "explanations": ("explanations/part-*.parquet", "metrics/part-*.parquet", "probe/epoch-*.parquet"),
    "model": ("model/*",),
    "report": ("report.html", "summary.json"),
}


def identity(config: Config, folder: Path) -> dict[str, Any]:
    """Arguments of `wandb.init` that say what the run is: its group, its kind, and its versions with the commit.

    Several runs of one group are averaged and compared there. Of many processes only the first logs, so a training on
    many nodes is one run; in a sweep W&B sets the group itself.
    """
    settings, versions = config.logger.wandb, folder / "versions.json"
    known = {"versions": json.loads(versions.read_text(encoding="utf8"))} if versions.exists() else {}
    kind = settings.job_type or ("train" if "fit" in config.stages else "evaluate")
    # W&B reads its environment once in a process; a program may start several runs.
    group = settings.group or os.environ.get("WANDB_RUN_GROUP")
    return {"group": group, "job_type": kind, "config": known}


def add_summary(loggers: Sequence[Any], values: Mapping[str, Any], console: Console) -> None:
    """Set values in the summaries of W&B runs without a point on a curve."""
    for logger in _wandb(loggers):
        try:
            logger.experiment.summary.update(dict(values))
        except Exception as error:
            console.warn(f"Weights & Biases got no summary: {type(error).__name__}: {error}")


def log_artifacts(loggers: Sequence[Any], folder: Path, names: Sequence[str], console: Console) -> None:
    """Log what a run has made as artifacts of W&B.

    Nothing is copied: offline runs refer to the files of the run directory, which `wandb sync` must find unchanged;
    the small report alone is copied, since `calig report` may write it anew.

    Args:
        loggers: Of the run.
        folder: The run directory.
        names: Of `calig.pipeline.config.ARTIFACTS`; what the run has not made is left out.
        console: Told if it fails: that never ends a run.
    """
    for logger in _wandb(loggers):
        try:
            import wandb

            for name in names:
                files = [path for pattern in _FILES[name] for path in sorted(folder.glob(pattern)) if path.is_file()]
                if not files:
                    continue
                artifact = wandb.Artifact(f"{name}-{logger.experiment.id}", type=name)
                for path in files:
                    inside = path.relative_to(folder).as_posix()
                    artifact.add_file(str(path), inside, policy="mutable" if name == "report" else "immutable")
                logger.experiment.log_artifact(artifact)
        except Exception as error:
            console.warn(f"Weights & Biases got no artifacts: {type(error).__name__}: {error}")


def _wandb(loggers: Sequence[Any]) -> list[Any]:
    from calig.callbacks.media import logger_kind

    return [logger for logger in loggers if logger_kind(logger) == "wandb"]
