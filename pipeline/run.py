"""A run: one directory, one Trainer, and its stages in order."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import os
import platform
import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from calig.pipeline.compose import save
from calig.pipeline.config import Config
from calig.pipeline.console import Console
from calig.pipeline.errors import InputError
from calig.pipeline.loggers import finish_loggers, make_loggers
from calig.pipeline.records import write_json

if TYPE_CHECKING:
    from lightning.pytorch import Trainer
    from lightning.pytorch.loggers import Logger

    from calig.datamodules.text import TextDataModule
    from calig.pipeline.module import ClassificationModule

_PACKAGES = ("calig", "torch", "lightning", "transformers", "datasets", "torchmetrics", "wandb", "omegaconf", "pyarrow")


@dataclass(frozen=True)
class RunDirectory:
    """The files of a run (ARCHITECTURE, A run directory)."""

    path: Path

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
        file = self.path / ".stages.json"
        return json.loads(file.read_text(encoding="utf8"))["finished"] if file.exists() else []

    def mark_finished(self, stage: str) -> None:
        """Remember that a stage has run to its end."""
        write_json(self.path / ".stages.json", {"finished": [*self.finished, stage]})

    @property
    def has_results(self) -> bool:
        """Whether anything was computed: a stage has ended, or weights or explanations were written."""
        return bool(self.finished) or any((self / name).exists() for name in ("checkpoints", "explanations"))

    def __truediv__(self, name: str) -> Path:
        return self.path / name


@dataclass
class RunContext:
    """What the stages of a run share.

    Attributes:
        config: The resolved configuration.
        directory: Where everything is written.
        console: What the user sees; also kept in `log.txt`.
        failed: Samples that a stage could not explain.
    """

    config: Config
    directory: RunDirectory
    console: Console
    failed: int = 0
    callbacks: list[Any] = field(default_factory=list)

    @cached_property
    def data(self) -> TextDataModule:
        """The data, read and tokenised."""
        from calig.datamodules.text import TextDataModule
        from calig.pipeline.models import load_tokenizer

        config = self.config
        tokenizer = self._saved_tokenizer() or load_tokenizer(config.model)
        data = TextDataModule(config.data, tokenizer, vocab_size=config.model.scratch.vocab_size, seed=config.seed)
        data.setup()
        self.console.say(f"data     {data.describe()}")
        return data

    def _saved_tokenizer(self) -> Any:
        # A run that is continued explains with the tokenizer that its weights were trained with.
        folder = self.directory / "model"
        if not folder.is_dir():
            return None
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(folder)

    @cached_property
    def module(self) -> ClassificationModule:
        """The LightningModule; its weights are the best ones once the fit stage has ended."""
        from lightning.pytorch import seed_everything

        from calig.pipeline.models import load_model
        from calig.pipeline.module import ClassificationModule, OptimizerSettings

        config = self.config.model
        data = self.data
        # Weights must not depend on what the data has drawn before.
        seed_everything(self.config.seed, workers=True, verbose=False)
        best = self.directory / "model"
        source = dataclasses.replace(config, checkpoint=str(best)) if best.is_dir() else config
        model = load_model(source, data.label_names, data.tokenizer)
        optimizer = OptimizerSettings(config.lr, config.weight_decay, config.warmup, config.schedule)
        size = sum(parameter.numel() for parameter in model.parameters())
        kind = config.name or f"{config.scratch.type} from scratch"
        self.console.say(f"model    {kind} · {size / 1e6:.1f} M parameters · {len(data.label_names)} classes")
        return ClassificationModule(model, data.label_names, optimizer)

    @cached_property
    def loggers(self) -> list[Logger]:
        """See `make_loggers`."""
        return make_loggers(self.config, self.directory.path, self.console, main=self.is_main)

    @cached_property
    def trainer(self) -> Trainer:
        """The one Trainer of the run."""
        from lightning.pytorch import Trainer

        arguments: dict[str, Any] = {
            # A short epoch is logged too.
            "log_every_n_steps": max(1, min(10, len(self.data.train_dataloader())))
            if "train" in self.data.splits
            else 10,
            "enable_model_summary": False,
            # Without the fit stage nothing is trained, and Lightning would add a checkpoint callback of its own.
            "enable_checkpointing": any(type(item).__name__ == "ModelCheckpoint" for item in self.callbacks),
            **self.config.trainer,
        }
        return Trainer(**arguments, logger=self.loggers, callbacks=self.callbacks, default_root_dir=self.directory.path)

    @property
    def is_main(self) -> bool:
        """Whether this process writes."""
        return is_main_process()

    def log(self, values: Mapping[str, float]) -> None:
        """Write scalars of a stage to every logger and to `summary.json`; every process may call it."""
        if not self.is_main:
            return
        for logger in self.loggers:
            try:
                logger.log_metrics(dict(values), step=self.trainer.global_step)
                logger.save()
            except Exception as error:
                self.console.warn(f"{type(logger).__name__} failed: {type(error).__name__}: {error}")
        self.directory.add_summary(values)


def is_main_process() -> bool:
    """Whether this is rank 0, also before a Trainer exists (a launcher sets the ranks of the others)."""
    return all(int(os.environ.get(name, 0)) == 0 for name in ("LOCAL_RANK", "NODE_RANK", "SLURM_PROCID", "RANK"))


def run(config: Config) -> int:
    """Run the stages of a configuration.

    Args:
        config: Resolved, as `compose` returns it.

    Returns:
        The exit code: 0 done, 3 finished with samples or methods that failed.

    Raises:
        InputError: The run directory exists, or the input is wrong.
    """
    from calig.pipeline.stages import stage_function

    directory, done = open_directory(config)
    try:
        with Console(directory / "log.txt", main=is_main_process()) as console:
            todo = [stage for stage in config.stages if stage not in done]
            if not todo:
                console.say(f"{directory.path} is finished; its results are in {directory / 'report.html'}")
                return 0
            context = RunContext(config, directory, console)
            console.say(f"run      {config.run.name} → {directory.path}")
            try:
                for stage in todo:
                    console.stage(stage)
                    stage_function(stage)(context)
                    if context.is_main:
                        directory.mark_finished(stage)
            finally:
                if "loggers" in vars(context):
                    finish_loggers(context.loggers, directory.path, main=context.is_main)
            if context.is_main:
                console.results(context)
            return 3 if context.failed else 0
    except InputError:
        # Bad input that shows before any work: the directory must not stand in the way of the next try.
        if config.run.resume is None and is_main_process() and not directory.has_results:
            shutil.rmtree(directory.path)
        raise


def open_directory(config: Config) -> tuple[RunDirectory, list[str]]:
    """Make or re-open the run directory.

    Returns:
        The directory, and the stages that have run to their end.

    Raises:
        InputError: It exists and neither `run.resume` nor `run.overwrite` says what to do, or there is nothing to
            resume.
    """
    if config.run.resume is not None:
        directory = RunDirectory(Path(config.run.resume))
        if not (directory / "config.yaml").exists():
            raise InputError(f"run.resume={directory.path} is not a run directory: it has no config.yaml.")
        return directory, directory.finished
    assert config.run.dir is not None  # composed
    directory = RunDirectory(Path(config.run.dir))
    if not is_main_process():
        return directory, []
    if directory.path.exists() and any(directory.path.iterdir()):
        if not config.run.overwrite:
            raise InputError(
                f"the run directory {directory.path} exists. Continue it with run.resume={directory.path}, replace it "
                "with run.overwrite=true, or choose another with run.dir=DIR."
            )
        if not (directory / "config.yaml").exists():
            raise InputError(
                f"run.overwrite=true would delete {directory.path}, which is not a run directory (it has no "
                "config.yaml). Choose another with run.dir=DIR."
            )
        shutil.rmtree(directory.path)
    directory.path.mkdir(parents=True, exist_ok=True)
    save(config, directory / "config.yaml")
    write_json(directory / "versions.json", versions())
    return directory, []


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
