"""AttributionCallback: explains a fixed set of validation samples while a model trains."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.seed import isolate_rng
from torch import nn

from calig.callbacks.collectives import gather
from calig.callbacks.development import Development, layer_shares, probe_scalars, sample_metrics
from calig.callbacks.media import MediaLog, probe_media
from calig.callbacks.probe import Probe, explain_each, numbered
from calig.callbacks.sharded import is_sharded, whole_copy
from calig.callbacks.target import candidates, check_strategy, find_model, first_loader, half_precision
from calig.pipeline.attribution import UnsupportedModelError
from calig.pipeline.errors import InputError
from calig.pipeline.explained import SampleFailure
from calig.pipeline.explainer import Explainer, ExplainSettings, settings_for
from calig.pipeline.image_rows import with_pictures
from calig.pipeline.perturbation import Curves, perturbation_curves
from calig.pipeline.perturbers import default_operator
from calig.pipeline.records import EXPLANATION_SCHEMA, atomic_write, explained_key, write_table


class AttributionCallback(Callback):
    """Explains a fixed, seeded set of validation samples every n epochs and logs how the explanations develop.

    Scalars appear as `val/explain/<method>/<metric>` in `trainer.callback_metrics` before ModelCheckpoint and
    EarlyStopping look: completeness gap, comprehensiveness and sufficiency beside the controls `random` and
    `reversed`, plausibility where the data has rationales, special-token share, layer profile, and drift against the
    previous probe. Media (signed token highlighting, layers x tokens heatmaps, overlays and strips of images, the layer
    profile) go to every logger that can show them. Training is not touched: weights end bit-identical with and without
    the callback.

    Args:
        method: One of `calig.pipeline.attribution.available_methods()`.
        num_samples: Validation samples, spread over the processes.
        every_n_epochs: Epochs between two probes.
        steps: Nodes of the path, for methods that have one; an int or "auto".
        options: Further options of the method.
        target: "predicted", "label" or a class index.
        operator: Perturbation operator of the faithfulness metrics; None chooses `mask` where the tokenizer has a
            token for it, else `attention`.
        model: Picks the model out of the LightningModule; None takes the only `PreTrainedModel` in it.
        tokenizer: Shows tokens as text and names special tokens; without it tokens are shown as ids. Of images the
            image processor, which knows their colours.
        label_names: Class names for display.
        folder: Where to write `epoch-*.parquet` and the pictures of images; None writes no files.
        num_shown: Samples that are logged as pictures.
        batch_size: Samples per attribution batch.
        seed: Chooses the samples and the random control.
        inputs: Makes the model's inputs of a validation batch, where the loader gives tuples or other keys; None
            takes the batch for a mapping with `input_ids`, `attention_mask` and `labels` (or `label`), or with
            `pixel_values` and, where it is known, `object_mask`.
        strict: End the training at the first sample that cannot be explained.

    Raises:
        InputError: Before the first step, for an unknown method or option, a strategy that shards parameters, no
            validation loader, a batch without `input_ids` or `pixel_values`, or no model to explain; the message
            names the way out. Later on nothing is raised: samples that cannot be explained are counted and named in one
            warning.
        SampleFailure: With `strict`, on all processes.

    Example::

        Trainer(callbacks=[AttributionCallback(method="ca_lig", num_samples=64, every_n_epochs=1)])
    """

    def __init__(
        self,
        method: str = "ca_lig",
        num_samples: int = 64,
        every_n_epochs: int = 1,
        *,
        steps: int | str = 16,
        options: Mapping[str, Any] | None = None,
        target: Any = "predicted",
        operator: str | None = None,
        model: Callable[[Any], nn.Module] | None = None,
        tokenizer: Any = None,
        label_names: list[str] | None = None,
        folder: str | Path | None = None,
        num_shown: int = 8,
        batch_size: int = 16,
        seed: int = 0,
        inputs: Callable[[Any], Mapping[str, Any]] | None = None,
        strict: bool = False,
    ) -> None:
        super().__init__()
        if num_samples < 1 or every_n_epochs < 1:
            raise InputError(f"num_samples and every_n_epochs take at least 1, got {num_samples} and {every_n_epochs}.")
        self.method = method
        self.num_samples = num_samples
        self.every_n_epochs = every_n_epochs
        self.methods = settings_for([method], {method: dict(options or {})}, {"steps": steps})
        self.target = target
        self.operator = operator
        self.model = model
        self.tokenizer = tokenizer
        self.label_names = label_names
        self.folder = Path(folder) if folder is not None else None
        self.num_shown = num_shown
        self.batch_size = batch_size
        self.seed = seed
        self.inputs = inputs
        self.strict = strict
        self._explainer: Explainer | None = None
        self._probe: Probe | None = None
        self._last = Development()
        self._shown: list[dict[str, Any]] = []
        self._curves: dict[tuple[str, str], Curves] = {}
        self._media: MediaLog | None = None
        self._warned: set[str] = set()

    @property
    def state_key(self) -> str:
        """Tells several probes of one Trainer apart."""
        return self._generate_state_key(method=self.method, seed=self.seed, num_samples=self.num_samples)

    def state_dict(self) -> dict[str, Any]:
        """The last probe's scores, which the drift is measured against, and the profiles so far; plain values only."""
        return self._last.state()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take the last probe and the profiles up again."""
        self._last = Development.restore(state_dict)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Check the strategy and, where it is there already, the model, the method and the operator."""
        if stage not in ("fit", "validate"):
            return
        check_strategy(trainer.strategy)
        same = [item for item in trainer.callbacks if getattr(item, "method", None) == self.method]  # type: ignore[attr-defined]
        if sum(type(item).__name__ == type(self).__name__ for item in same) > 1:
            raise InputError(
                f"two callbacks with method '{self.method}' would log under the same keys val/explain/{self.method}/. "
                "Give a Trainer one AttributionCallback per method."
            )
        self._media = MediaLog(trainer.loggers)
        self._warned.clear()
        # The module's own `setup` and `configure_model` come later and may make the model.
        if self.model is None and candidates(pl_module):
            self._connect(pl_module)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Connect to the model as it is trained."""
        self._connect(pl_module)
        if trainer.limit_val_batches and not trainer.enable_validation:
            raise InputError(
                "AttributionCallback explains validation samples, and this Trainer has none: it needs a validation "
                "loader and a `validation_step`."
            )
        epochs = trainer.max_epochs or -1
        if not trainer.limit_val_batches or (0 < epochs < self.every_n_epochs and not _is_dry(trainer)):
            reason = f"every_n_epochs={self.every_n_epochs} of {epochs} epochs"
            reason = reason if trainer.limit_val_batches else "limit_val_batches=0"
            self._warn_once("never", f"nothing will be explained in this training, because of {reason}.")

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Try one sample, so that what cannot work at all is said before the first step."""
        if trainer.val_dataloaders is not None:
            self._try_one(trainer)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The same for `Trainer.validate`."""
        if trainer.state.fn == "validate":
            self._connect(pl_module)
            self._try_one(trainer)

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Explain and log the scalars; here they are in time for ModelCheckpoint and EarlyStopping."""
        self._shown = []
        if not self._should_skip(trainer):
            # Every process holds the same numbers; the reduction only states it.
            pl_module.log_dict(self._explain(trainer), sync_dist=trainer.world_size > 1)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log the pictures."""
        if not self._shown or self._media is None or not self._media.shows or not trainer.is_global_zero:
            return
        try:
            names = self.label_names or []
            media = probe_media(
                self.method, self._shown, self._last.profiles, self._curves, names, trainer.current_epoch
            )
        except Exception as error:
            self._warn_once("pictures", f"the pictures could not be drawn: {type(error).__name__}: {error}")
        else:
            self._media.log(trainer.global_step, **media)

    def _should_skip(self, trainer: Trainer) -> bool:
        if trainer.sanity_checking:
            return True
        if trainer.state.fn != "fit" or _is_dry(trainer):
            return False
        # Due at the first validation at or after every n-th epoch: `check_val_every_n_epoch` may step over it.
        epoch, last = trainer.current_epoch, self._last.epoch
        last = -1 if last > epoch else last
        return epoch != last and (epoch + 1) // self.every_n_epochs <= (last + 1) // self.every_n_epochs

    def _connect(self, pl_module: LightningModule) -> None:
        model = find_model(pl_module, self.model)
        if self._explainer is not None and self._explainer.model.module is not model:
            self._last = Development()  # of another training
        operator = self.operator
        if operator is None:
            operator = default_operator(model, self.tokenizer)
        settings = ExplainSettings(self.methods, target=self.target, operators=(operator,), seed=self.seed)
        self._explainer = Explainer(model, self.tokenizer, settings)
        if coarse := half_precision(model):
            self._warn_once(
                "precision",
                f"the parameters are {coarse}, so completeness and drift carry rounding noise; "
                "precision='bf16-mixed' keeps them in float32.",
            )

    def _choose(self, trainer: Trainer) -> Probe:
        loader = first_loader(trainer.val_dataloaders)
        if self._probe is None or self._probe.loader.dataset is not loader.dataset:
            count = min(self.num_samples, 2) if _is_dry(trainer) else self.num_samples
            probe = Probe.choose(loader, count, self.seed, self.batch_size, self.inputs)
            # A sampler may draw its indices, and no two processes need draw alike.
            self._probe = dataclasses.replace(probe, indices=trainer.strategy.broadcast(probe.indices))
        return self._probe

    def _try_one(self, trainer: Trainer) -> None:
        assert self._explainer is not None  # on_fit_start ran
        with isolate_rng():
            probe = self._choose(trainer)
            if not probe.indices:
                return
            explainer = self._current()
            settings = dataclasses.replace(explainer.settings, strict=True)
            strict = Explainer(explainer.model.module, self.tokenizer, settings)
            try:
                strict.explain(probe.batch(probe.indices[:1], trainer.strategy.batch_to_device))
            except (InputError, UnsupportedModelError):
                raise
            except SampleFailure as failure:
                if isinstance(failure.__context__, InputError | UnsupportedModelError):
                    raise failure.__context__ from None
            except Exception:
                return  # one sample only: the probe counts and names it

    def _current(self) -> Explainer:
        """What explains the model as it is now; every process must call it."""
        assert self._explainer is not None  # on_fit_start ran
        model = self._explainer.model.module
        if not is_sharded(model):
            return self._explainer
        return Explainer(whole_copy(model), self.tokenizer, self._explainer.settings)

    def _explain(self, trainer: Trainer) -> dict[str, float]:
        # Datasets and collators may draw random numbers; the training's own sequence must not notice.
        with isolate_rng():
            probe = self._choose(trainer)
            chunks = probe.chunks(trainer.global_rank, trainer.world_size)
            mine = explain_each(self._current(), probe, chunks, trainer.strategy.batch_to_device)
        explanations, metrics, failures = gather(mine.explanations), gather(mine.metrics), gather(mine.failures)
        files = dict(gather(list(mine.files.items())))
        # Metric rows have the index in the dataset; the data may number its samples otherwise.
        values = sample_metrics(metrics)
        curves = perturbation_curves(metrics, {explained_key(row): row["probability"] for row in explanations})
        explanations = numbered([{**row, "metrics": values.get(explained_key(row), {})} for row in explanations])
        if failures and self.strict:
            first = failures[0]
            raise SampleFailure(
                f"sample {first['sample_id']}, method '{self.method}': {first['reason']} (strict: the training ends)"
            )
        try:
            self._shown = with_pictures(explanations[: self.num_shown], files)
            scalars = self._scalars(trainer, explanations, metrics)
            self._curves = curves
        except Exception as error:  # all processes have the same rows, and so the same error
            self._warn_once("scalars", f"the scalars could not be computed: {type(error).__name__}: {error}")
            scalars = {}
        prefix = f"val/explain/{self.method}"
        failed = len({row["sample_id"] for row in failures})
        scalars[f"{prefix}/failed"] = float(failed)
        if failed:
            first = failures[0]
            self._warn_once(
                "failures",
                f"{failed} of {len(probe.indices)} samples could not be explained and are left out; the first, sample "
                f"{first['sample_id']}: {first['reason']}. Later probes only count them, in {prefix}/failed.",
            )
        if self.folder is not None and trainer.is_global_zero and not _is_dry(trainer):
            self._write(self.folder, trainer, explanations, files)
        return scalars

    def _scalars(
        self, trainer: Trainer, explanations: list[dict[str, Any]], metrics: list[dict[str, Any]]
    ) -> dict[str, float]:
        profile = layer_shares(explanations)
        if profile:
            self._last.profiles[trainer.current_epoch] = profile
        scalars = probe_scalars(self.method, explanations, metrics, profile)
        if (moved := self._last.advance(explanations, trainer.current_epoch)) is not None:
            scalars[f"val/explain/{self.method}/drift"] = moved
        return scalars

    def _write(
        self, folder: Path, trainer: Trainer, explanations: list[dict[str, Any]], files: Mapping[str, bytes]
    ) -> None:
        name = f"epoch-{trainer.current_epoch:04d}-step-{trainer.global_step:07d}.parquet"
        metadata = {"label_names": self.label_names or [], "epoch": trainer.current_epoch}
        try:
            for place, data in files.items():
                if not (folder / place).exists():  # the samples are the same at every probe
                    (folder / place).parent.mkdir(parents=True, exist_ok=True)
                    atomic_write(folder / place, data)
            write_table(folder / name, explanations, EXPLANATION_SCHEMA, metadata)
        except OSError as error:
            self._warn_once("files", f"{folder / name} could not be written: {error}")

    def _warn_once(self, topic: str, message: str) -> None:
        if topic not in self._warned:
            self._warned.add(topic)
            rank_zero_warn(f"AttributionCallback: {message}")


def _is_dry(trainer: Trainer) -> bool:
    return bool(trainer.fast_dev_run)  # type: ignore[attr-defined]
