"""A run: one directory, one Trainer, and its stages in order."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from calig.pipeline.calibration import calibrated_options, check_evaluation
from calig.pipeline.config import Config, ModelConfig, asked_options, shared_options, without_asked
from calig.pipeline.console import Console
from calig.pipeline.directory import RunDirectory, is_main_process, open_directory
from calig.pipeline.errors import InputError
from calig.pipeline.headlines import headlines
from calig.pipeline.loggers import finish_loggers, logged_rows, make_loggers
from calig.pipeline.signals import REQUEUE, Stopped, StopSignals, let_parent_end, requeue
from calig.pipeline.tasks import Task, task_of, threshold_of
from calig.pipeline.wandb_run import add_summary, log_artifacts

if TYPE_CHECKING:
    from lightning.pytorch import Trainer
    from lightning.pytorch.loggers import Logger

    from calig.datamodules.base import ClassificationData
    from calig.datamodules.concept_sets import ConceptSets
    from calig.pipeline.explainer import Explainer
    from calig.pipeline.module import ClassificationModule


_FIRST = "CALIG_FIRST_PROCESS"
PRETRAINED = "pretrained"
"""The folder of a run directory that keeps what the stage pretrain has trained."""


@dataclass
class RunContext:
    """What the stages of a run share.

    Attributes:
        config: The resolved configuration.
        directory: Where everything is written.
        console: What the user sees; also kept in `log.txt`.
        callbacks: What the Trainer gets when it is made.
        signals: Who is asked to end the run.
    """

    config: Config
    directory: RunDirectory
    console: Console
    callbacks: list[Any] = field(default_factory=list)
    signals: StopSignals = field(default_factory=StopSignals)

    @cached_property
    def data(self) -> ClassificationData[Any]:
        """The data, read and tokenised."""
        data = self._image_data() if self.config.data.modality == "image" else self._text_data()
        data.setup()
        self.console.say(f"data     {data.describe()}")
        return data

    def _image_data(self) -> ClassificationData[Any]:
        from calig.datamodules.image import ImageDataModule
        from calig.pipeline.image_models import image_size
        from calig.pipeline.models import class_names, load_processor, saved_config

        config = self.config
        known = saved_config(self.model_config)
        return ImageDataModule(
            config.data,
            load_processor(self.model_config),
            config.model.scratch.image_size if known is None else image_size(known),
            seed=config.seed,
            label_names=None if self.trains or known is None else class_names(known),
            require_labels=self.trains or "test" in config.stages,
            split=self._split_in_use,
        )

    def _text_data(self) -> ClassificationData[Any]:
        from calig.datamodules.text import TextDataModule
        from calig.datamodules.tokenization import longest_input
        from calig.pipeline.models import class_names, load_tokenizer, saved_config

        config = self.config
        tokenizer = self._saved_tokenizer() or load_tokenizer(config.model)
        known = saved_config(self.model_config)
        # A run that trains reads and cuts all splits, also when it is continued; one that only explains or tests takes
        # what there is, and the class names are the model's.
        names = None if self.trains or known is None else class_names(known)
        return TextDataModule(
            config.data,
            tokenizer,
            vocab_size=config.model.scratch.vocab_size,
            seed=config.seed,
            label_names=names,
            require_labels=self.trains or "test" in config.stages,
            split=self._split_in_use,
            max_positions=config.model.scratch.max_positions if known is None else longest_input(known),
            task=self.task,
            train_kind=config.model.scratch.tokenizer,
        )

    @property
    def _split_in_use(self) -> str:
        """Which split the rows of a single file are, where nothing is trained."""
        config = self.config
        if "test" in config.stages:
            return "test"
        only_concepts = "concepts" in config.stages and "explain" not in config.stages
        return config.concepts.split if only_concepts else config.explain.split

    @cached_property
    def concept_sets(self) -> ConceptSets:
        """What the concepts stage runs: the examples of every concept, and the random sets."""
        from calig.datamodules.concept_sets import draw_concept_sets
        from calig.datamodules.text import TextDataModule

        assert isinstance(self.data, TextDataModule)  # the configuration says so
        config = self.config.concepts
        return draw_concept_sets(
            self.data,
            config.sets,
            random_sets=config.random_sets,
            set_size=config.set_size,
            split=config.split,
            seed=self.config.seed,
        )

    @property
    def trains(self) -> bool:
        """Whether this run trains its model, or has trained it."""
        return bool({"pretrain", "fit"} & {*self.config.stages, *self.directory.finished})

    @cached_property
    def task(self) -> Task:
        """What the model says of a text: as configured, else as a model that is trained already says itself."""
        if self.config.data.task is not None:
            return self.config.data.task
        if self.trains:
            return "classification"
        from calig.pipeline.models import saved_config

        known = saved_config(self.model_config)
        return "classification" if known is None else task_of(known)

    @property
    def model_config(self) -> ModelConfig:
        """The `model` section; once a stage has trained, what it has left stands in for what was named."""
        config = self.config.model
        if (best := self.trained_model) is not None:
            return dataclasses.replace(config, checkpoint=str(best))
        if "pretrain" in self.directory.finished:
            return dataclasses.replace(config, name=str(self.directory / PRETRAINED), checkpoint=None, revision=None)
        return config

    def _saved_tokenizer(self) -> Any:
        # A run that is continued explains with the tokenizer that its weights were trained with.
        if self.trained_model is None:
            return None
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(self.trained_model)

    @property
    def trained_model(self) -> Path | None:
        """The folder of the best weights, once the fit stage has ended."""
        return self.directory / "model" if "fit" in self.directory.finished else None

    @cached_property
    def module(self) -> ClassificationModule:
        """The LightningModule; its weights are the best ones once the fit stage has ended."""
        from lightning.pytorch import seed_everything

        from calig.datamodules.windows import remember_windows
        from calig.pipeline.models import load_model
        from calig.pipeline.module import ClassificationModule, OptimizerSettings, loss_settings

        config = self.config.model
        data = self.data
        # Weights must not depend on what the data has drawn before.
        seed_everything(self.config.seed, workers=True, verbose=False)
        model = load_model(
            self.model_config,
            data.label_names,
            data.tokenizer,
            need_head=not self.trains,
            processor=data.processor,
            task=self.task,
        )
        if (other := remember_windows(model, data.windows)) and not self.trains:
            self.console.warn(other)
        optimizer = OptimizerSettings(config.lr, config.weight_decay, config.warmup, config.schedule)
        size = sum(parameter.numel() for parameter in model.parameters())
        kind = config.name or f"{config.scratch.type} from scratch"
        outputs = {"classification": "classes", "multi_label": "labels", "regression": "output"}[self.task]
        self.console.say(f"model    {kind} · {size / 1e6:.1f} M parameters · {len(data.label_names)} {outputs}")
        loss = None
        if "fit" in self.config.stages:
            rows = data.dataset("train").rows
            loss = loss_settings(config, data.label_names, lambda: [row["labels"] for row in rows], self.task)
        return ClassificationModule(model, data.label_names, optimizer, loss, self.task, threshold_of(model.config))

    @cached_property
    def loggers(self) -> list[Logger]:
        """See `make_loggers`."""
        return make_loggers(self.config, self.directory.path, self.console, main=self.is_main)

    @cached_property
    def trainer(self) -> Trainer:
        """The one Trainer of the run; pretrain alone has one of its own."""
        return self.make_trainer(self.callbacks)

    def make_trainer(self, callbacks: Sequence[Any], **changes: Any) -> Trainer:
        """A Trainer with the run's loggers and signals.

        Args:
            callbacks: Its callbacks.
            changes: Arguments in place of those that the configuration gives.
        """
        from lightning.pytorch import Trainer
        from lightning.pytorch.callbacks import Checkpoint
        from lightning.pytorch.plugins import TorchCheckpointIO

        from calig.callbacks.exact_resume import AtomicCheckpointIO
        from calig.callbacks.take_signals import TakeSignals

        arguments: dict[str, Any] = {
            # A short epoch is logged too.
            "log_every_n_steps": max(1, min(10, len(self.data.train_dataloader())))
            if "train" in self.data.splits
            else 10,
            "enable_model_summary": False,
            # Without the fit stage nothing is trained, and Lightning would add a checkpoint callback of its own.
            "enable_checkpointing": any(isinstance(item, Checkpoint) for item in callbacks),
            **self.config.trainer,
            **changes,
        }
        # First: what the others do when a stage starts may take a while.
        first = [TakeSignals(self.signals), *callbacks]
        trainer = Trainer(**arguments, logger=self.loggers, callbacks=first, default_root_dir=self.directory.path)
        # A strategy that writes in a way of its own keeps it.
        if type(trainer.strategy.checkpoint_io) is TorchCheckpointIO:
            trainer.strategy.checkpoint_io = AtomicCheckpointIO()
        return trainer

    @cached_property
    def explainer(self) -> Explainer:
        """What the explain stage computes with; what the calibrate stage chooses must have been chosen."""
        check_evaluation(self.config, self.directory.path)
        return self._make_explainer(calibrated_options(self.config.explain.options, self.directory.path))

    def method_options(self, methods: list[str], options: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
        """The options that methods are computed with: those that all share, then their own."""
        from calig.pipeline.explainer import settings_for

        return settings_for(methods, options, shared_options(self.config.explain))

    def _make_explainer(self, options: Mapping[str, Mapping[str, Any]]) -> Explainer:
        from calig.pipeline.explainer import Explainer, ExplainSettings

        config = self.config.explain
        settings = ExplainSettings(
            self.method_options(config.methods, options),
            target=config.target,
            operators=[config.operator] if isinstance(config.operator, str) else config.operator,
            metrics=config.metrics,
            perturbation_target=config.perturbation_target,
            strict=config.strict,
            costs=True,
            seed=self.config.seed,
            max_tokens_per_pass=config.max_tokens_per_pass,
        )
        return Explainer(self.module.model, self.reader, settings)

    @property
    def reader(self) -> Any:
        """What knows how the data become the model's inputs: the tokenizer, or the processor of images."""
        return self.data.processor or self.data.tokenizer

    def prepare(self, stages: list[str]) -> None:
        """Read the data, build the model and check what later stages will ask: a mistake shows now, not in hours.

        Raises:
            InputError: Whatever is wrong.
        """
        if not {"pretrain", "fit", "test", "calibrate", "explain", "concepts"} & set(stages):
            return
        data, module = self.data, self.module
        if "calibrate" in stages:
            self._prepare_calibration()
        if "concepts" in stages:
            from calig.pipeline.stages.concepts import check

            check(self)
        if "explain" in stages:
            from calig.pipeline.attribution.rollout import shares

            config = self.config.explain
            data.dataset(config.split)
            if config.target == "label" and not data.has_labels(config.split):
                raise InputError(f"explain.target=label needs labels, and the {config.split} split has none.")
            if config.perturbation_target == "label" and not data.has_labels(config.split):
                raise InputError(
                    f"explain.perturbation_target=label needs labels, and the {config.split} split has none."
                )
            classes = len(module.label_names)
            if isinstance(config.target, int) and config.target >= classes:
                raise InputError(f"explain.target={config.target} names no class: the model has {classes}, from 0.")
            lam = config.options.get("ca_lig", {}).get("lam")
            if isinstance(lam, list):  # else every sample would fail for it
                shares(lam, getattr(module.model.config, "num_hidden_layers", len(lam)))
            if "calibrate" in stages:  # a first look, with defaults for what is not chosen yet
                self._make_explainer(without_asked(config.options))
            else:
                _ = self.explainer

    def _prepare_calibration(self) -> None:
        """Check what the calibrate stage will ask; see `prepare`."""
        from calig.pipeline.attribution import ExplainableModel
        from calig.pipeline.perturbers import perturber

        chosen, data = self.config.calibrate, self.data
        rows = data.dataset(chosen.split).rows
        tokens = perturber(ExplainableModel(self.module.model), self.reader)
        tokens.check(tokens.named(chosen.operator))
        if self.config.explain.target == "label" and not data.has_labels(chosen.split):
            raise InputError(f"explain.target=label needs labels, and the {chosen.split} split has none.")
        marked = any(mark >= 0 for row in rows for mark in row.get("rationale", ()))
        if chosen.objective in ("token_f1", "auprc") and not marked:
            raise InputError(
                f"calibrate.objective={chosen.objective} needs rationales, and the {chosen.split} split has none. "
                "Set data.columns.rationale, or calibrate.objective='comprehensiveness - sufficiency'."
            )

    @property
    def is_main(self) -> bool:
        """Whether this process writes."""
        return is_main_process()

    def alone(self, work: Callable[[], None]) -> None:
        """Let the first process work, once all have come here, while the others wait; every process must call it.

        How the work ends, by an error or a signal too, is how it ends for all.
        """
        from calig.callbacks.collectives import from_first, gather

        def stoppable() -> None:
            if self.is_main:  # before there is a group of processes, each takes itself for the first
                with self.signals.at_once():
                    work()

        gather([])  # what the others have written until here is there
        from_first(stoppable)

    def log(self, values: Mapping[str, float]) -> None:
        """Write scalars of a stage to every logger and to `summary.json`; every process may call it."""
        if not self.is_main:
            return
        # A stage that only reads files makes no Trainer: it logs behind what is there.
        made = "trainer" in vars(self)
        rows = [] if made else logged_rows(self.directory.path)
        step = self.trainer.global_step if made else max((int(row["step"] or 0) for row in rows), default=0)
        for logger in self.loggers:
            try:
                logger.log_metrics(dict(values), step=step)
                logger.save()
            except Exception as error:
                self.console.warn(f"{type(logger).__name__} failed: {type(error).__name__}: {error}")
        self.directory.add_summary(values)

    def summarise(self, values: Mapping[str, float]) -> None:
        """Add values to `summary.json` and to the summaries of the loggers, without a point on a curve."""
        self.directory.add_summary(values)
        add_summary(self.loggers, values, self.console)


def run(config: Config) -> int:
    """Run the stages of a configuration.

    A process that ends with anything but 0 ends behind the one that has started it.

    Args:
        config: Resolved, as `compose` returns it.

    Returns:
        The exit code, the same on all processes: 0 done, 3 finished with samples or methods that failed.

    Raises:
        InputError: The run directory exists, or the input is wrong. Nothing is left of a run that failed before any
            work, and what it was to replace is back.
        Stopped: A signal asked for the end; what is done is kept, and a SLURM job is back in its queue.
    """
    from calig.callbacks.collectives import leave

    if is_main_process():
        os.environ[_FIRST] = str(os.getpid())  # read by the processes that it starts
    try:
        try:
            code = _run(config)
        finally:
            leave()
    except (Exception, Stopped):
        let_parent_end(_FIRST)
        raise
    if code:
        let_parent_end(_FIRST)
    return code


def _run(config: Config) -> int:
    from calig.callbacks.collectives import end_if_asked, from_first
    from calig.pipeline.devices import require_devices
    from calig.pipeline.stages import stage_function

    require_devices(config.trainer)
    directory = open_directory(config)
    main = is_main_process()
    try:
        with Console(directory / "log.txt", main=main) as console, StopSignals() as signals:
            stages = config.stages
            if not asked_options(config.explain.options):
                stages = [stage for stage in stages if stage != "calibrate"]
            todo = [stage for stage in stages if stage not in directory.finished]
            if not todo:
                console.say(f"{directory.path} is finished; its results are in {_results(directory)}")
                return 3 if directory.failures else 0
            context = RunContext(config, directory, console, signals=signals)
            console.say(f"run      {config.run.name} → {directory.path}")
            try:
                context.prepare(todo)
                directory.keep()
                # From here on processes wait for each other, so none may leave by itself; nor is the end of a run,
                # the closing of its loggers and its way back into a queue, for another signal to break off.
                signals.deferred = True
                try:
                    for stage in todo:
                        console.stage(stage)
                        stage_function(stage)(context)
                        if main:
                            directory.mark_finished(stage)
                        if stage != todo[-1]:
                            end_if_asked(signals)
                    if main and "loggers" in vars(context):
                        log_artifacts(context.loggers, directory.path, config.logger.wandb.artifacts, console)
                finally:
                    if "loggers" in vars(context):
                        finish_loggers(context.loggers, directory.path, console, main=main)
            except Stopped as stop:
                # Last of all: a job that is put back into the queue is ended by that. The others wait, because a
                # launcher kills what still runs when one process ends with an error.
                from_first(partial(_say_stopped, stop, directory, console))
                raise
            if main:
                console.results(directory.path, len(directory.failures), headlines(directory, config))
            # The others would look before the first process has written it.
            return from_first(lambda: 3 if directory.failures else 0)
    except BaseException:
        if main:
            directory.give_up()
        raise


def _say_stopped(stop: Stopped, directory: RunDirectory, console: Console) -> None:
    """Say that a signal has ended the run, and how it goes on; SLURM is asked by one process alone."""
    again = "start it again" if directory.fresh else f"go on with run.resume={directory.path}"
    console.say(f"\nended by {stop}; {again}")
    if stop.asked == REQUEUE and console.main and (done := requeue()) is not None:
        console.say(done)


def _results(directory: RunDirectory) -> Path:
    report = directory / "report.html"
    return report if report.exists() else directory / "summary.json"
