"""fit: fine-tune the classifier, probing its explanations on the way; the best weights end as `model/`."""

from __future__ import annotations

import math
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from calig.pipeline.config import asked_options, without_asked
from calig.pipeline.loggers import drop_rows
from calig.pipeline.records import logged_rows
from calig.pipeline.run import RunContext
from calig.pipeline.tasks import MONITORED

_LOWER_IS_BETTER = {
    "loss",
    "rmse",
    "sufficiency",
    "log_odds",
    "deletion_auc",
    "positive_auc",
    "infidelity",
    "sensitivity_max",
    "randomisation",
    "completeness_gap",
    "completeness_gap_max",
    "failed",
    "seconds",
}


def run_stage(context: RunContext) -> None:
    """Train, keep the best checkpoint, and save its weights as a Hugging Face folder.

    A training that was broken off goes on from its newest checkpoint that is whole.

    Raises:
        InputError: There are checkpoints, and none can be read.
        RuntimeError: The training diverged.
        Stopped: A signal asked for the end; a checkpoint is written.
    """
    from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint

    from calig.callbacks import AttributionCallback
    from calig.callbacks.collectives import from_first
    from calig.callbacks.exact_resume import ExactResume
    from calig.pipeline.checkpoint import find_resumable
    from calig.pipeline.models import finish_training, load_checkpoint, prepare_training

    config, directory = context.config, context.directory
    data = context.data
    module = context.module
    module.model = prepare_training(module.model, config.model)  # type: ignore[arg-type]  # plain: the run loaded it
    monitor = config.model.monitor or MONITORED[context.task]
    mode = "min" if lower_is_better(monitor) else "max"
    checkpoint = ModelCheckpoint(
        directory / "checkpoints",
        "best-{epoch:02d}",
        monitor=monitor,
        mode=mode,
        save_weights_only=True,  # what a training goes on from is written by ExactResume
        enable_version_counter=False,  # an epoch that is done again after a crash writes the same file again
    )
    resume = ExactResume(directory / "checkpoints", context.signals, **vars(config.checkpoint))
    context.callbacks += [checkpoint, resume]
    if config.model.early_stopping is not None:
        context.callbacks.append(EarlyStopping(monitor, patience=config.model.early_stopping, mode=mode))
    if config.probe.enabled:
        context.callbacks.insert(
            0,
            AttributionCallback(
                config.probe.method,
                config.probe.num_samples,
                config.probe.every_n_epochs,
                steps=config.probe.steps,
                options=_probe_options(context),
                tokenizer=context.reader,
                label_names=data.label_names,
                folder=directory / "probe",
                seed=config.seed,
                strict=config.explain.strict,
            ),
        )
    # What another process makes anew may still hold the checkpoints of what it replaces.
    found = None if directory.others else find_resumable(directory / "checkpoints", context.console.warn)
    last, step = found or (None, 0)
    if context.is_main:
        # What the broken-off session logged behind the checkpoint is logged again.
        drop_rows(directory.path, step)
    # A Trainer that an earlier stage made has none of these callbacks.
    vars(context).pop("trainer", None)
    trainer = context.trainer
    trainer.fit(module, data, ckpt_path=last)
    resume.end_if_asked()
    # One process looks and decides: on a file system of several machines the others may see something else.
    if (kept := from_first(lambda: best_weights(context, checkpoint.best_model_path))) is not None:
        load_checkpoint(module.model, kept)
    module.model = model = finish_training(module.model)

    def finish() -> None:
        # Where the last epoch was done before the run was continued, only the file knows its values.
        values = last_values(logged_rows(directory.path))
        values |= {key: float(value) for key, value in trainer.callback_metrics.items()}
        if diverged := [key for key, value in values.items() if not math.isfinite(value)]:
            raise RuntimeError(
                f"the training diverged: {', '.join(diverged)} is not finite, so nothing was saved as a model. Lower "
                f"model.lr (now {config.model.lr:g}), or set trainer.gradient_clip_val=1."
            )
        save_model(model, data.tokenizer or data.processor, directory / "model")
        context.summarise(values | best_values(logged_rows(directory.path)))
        score = checkpoint.best_model_score
        epoch = trainer.current_epoch
        best = f"best {monitor} {float(score):.4f}, " if score is not None else ""
        context.console.say(f"fit      {best}{epoch} epochs, {trainer.global_step:,} steps → {directory / 'model'}")

    from_first(finish)  # not stopped by a signal: what the training came to is saved first


def best_weights(context: RunContext, path: str) -> str | None:
    """The file of the best weights; None where there is none, which is said."""
    if not path:
        return None
    # By its name: the run directory may have been moved since.
    kept = context.directory / "checkpoints" / Path(path).name
    if kept.exists():
        return str(kept)
    context.console.warn(f"{kept} is not there (deleted, or no space to write it): the last weights are taken.")
    return None


def _probe_options(context: RunContext) -> dict[str, Any] | None:
    """Those of the explain stage; while it is not known what the calibrate stage will choose, the defaults for that."""
    options, method = context.config.explain.options, context.config.probe.method
    if asked := asked_options(options).get(method):
        names = ", ".join(f"{name}={word}" for name, word in asked.items())
        context.console.say(f"probe    {method} with its defaults for {names}: calibrate chooses after the training")
    return without_asked(options).get(method)


def save_model(model: Any, preprocessor: Any, folder: Path) -> None:
    """Save a Hugging Face folder, with its tokenizer or image processor, whole or not at all."""
    temporary = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    model.save_pretrained(temporary)
    preprocessor.save_pretrained(temporary)
    shutil.rmtree(folder, ignore_errors=True)
    temporary.replace(folder)


def last_values(rows: Iterable[Mapping[str, str]]) -> dict[str, float]:
    """The last value of every scalar in the rows of metrics.csv."""
    return {key: float(text) for row in rows for key, text in row.items() if text and key not in ("epoch", "step")}


def best_values(rows: Iterable[Mapping[str, str]]) -> dict[str, float]:
    """The best value of every scalar in the rows of metrics.csv, under `<key>/best`."""
    best: dict[str, float] = {}
    for row in rows:
        for key, text in row.items():
            if not text or key in ("epoch", "step"):
                continue
            value = float(text)
            if not math.isfinite(value):
                continue
            choose = min if lower_is_better(key) else max
            name = f"{key}/best"
            best[name] = choose(best[name], value) if name in best else value
    return best


def lower_is_better(key: str) -> bool:
    """Whether a scalar improves by falling."""
    name = key.rsplit("/", 1)[-1].split("@")[0]
    return name in _LOWER_IS_BETTER
