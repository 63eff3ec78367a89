"""AttributionCallback: explains a fixed set of validation samples while a model trains."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor, nn
from torch.utils.data import DataLoader

from calig.callbacks.media import Html, MediaLog
from calig.callbacks.probe import Probe, find_model, gather
from calig.pipeline.errors import InputError
from calig.pipeline.explainer import (
    Explained,
    Explainer,
    ExplainSettings,
    perturbation_tokens,
    scalar_key,
    settings_for,
)
from calig.pipeline.loading import rationale_by_word
from calig.pipeline.metrics import drift, layer_profile, summarise
from calig.pipeline.records import EXPLANATION_SCHEMA, write_table
from calig.pipeline.render.figures import layer_heatmap
from calig.pipeline.render.figures import layer_profile as layer_profile_image
from calig.pipeline.render.tokens import token_html

_REFUSED = ("FSDPStrategy", "DeepSpeedStrategy")


class AttributionCallback(Callback):
    """Explains a fixed, seeded set of validation samples every n epochs and logs how the explanations develop.

    Scalars appear as `val/explain/<method>/<metric>` in `trainer.callback_metrics` before ModelCheckpoint and
    EarlyStopping look: completeness gap, comprehensiveness and sufficiency beside the controls `random` and
    `reversed`, plausibility where the data has rationales, special-token share, layer profile, and drift against the
    previous probe. Media (signed token highlighting, layers x tokens heatmaps, the layer profile) go to every logger
    that can show them. Training is not touched: weights end bit-identical with and without the callback.

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
        tokenizer: Shows tokens as text and names special tokens; without it tokens are shown as ids.
        label_names: Class names for display.
        folder: Where to write `epoch-*.parquet`; None writes no files.
        num_shown: Samples that are logged as pictures.
        batch_size: Samples per attribution batch.
        seed: Chooses the samples and the random control.

    Raises:
        InputError: In `setup`, for an unknown method or option, a strategy that shards parameters, no validation
            loader, or no model to explain; the message names the way out.

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
        self._explainer: Explainer | None = None
        self._probe: Probe | None = None
        self._shown: list[dict[str, Any]] = []
        self._profile: list[float] = []
        self._media: MediaLog | None = None
        self._previous: dict[int, list[float]] = {}

    @property
    def state_key(self) -> str:
        """Tells several probes of one Trainer apart."""
        return self._generate_state_key(method=self.method, seed=self.seed, num_samples=self.num_samples)

    def state_dict(self) -> dict[str, Any]:
        """The last probe's scores, which the drift is measured against; plain values only."""
        return {"ids": list(self._previous), "scores": list(self._previous.values())}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take the scores of the last probe up again."""
        self._previous = dict(zip(state_dict.get("ids", []), state_dict.get("scores", []), strict=True))

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Check everything once: the strategy, the model, the method, the operator."""
        names = {cls.__name__ for cls in type(trainer.strategy).__mro__}
        if refused := names & set(_REFUSED):
            raise InputError(
                f"AttributionCallback cannot explain under {refused.pop()}, which shards the parameters. Train without "
                "it, consolidate the checkpoint, and explain with strategy=ddp or on one device."
            )
        if self._explainer is None:
            model = find_model(pl_module, self.model)
            operator = self.operator
            if operator is None:
                operator = "attention" if perturbation_tokens(model, self.tokenizer).mask_id is None else "mask"
            settings = ExplainSettings(self.methods, target=self.target, operators=(operator,), seed=self.seed)
            self._explainer = Explainer(model, self.tokenizer, settings)
        self._media = MediaLog(trainer.loggers)

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Explain and log the scalars; here they are in time for ModelCheckpoint and EarlyStopping."""
        self._shown = []
        if not self._should_skip(trainer):
            scalars = self._explain(trainer)
            # Every process holds the same numbers; the reduction only states it.
            pl_module.log_dict(scalars, sync_dist=trainer.world_size > 1)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log the pictures."""
        if self._shown and self._media is not None and trainer.is_global_zero:
            self._log_media(trainer)

    def _should_skip(self, trainer: Trainer) -> bool:
        if trainer.sanity_checking:
            return True
        return trainer.state.fn == "fit" and (trainer.current_epoch + 1) % self.every_n_epochs != 0

    def _explain(self, trainer: Trainer) -> dict[str, float]:
        explainer = self._explainer
        assert explainer is not None  # setup ran
        if self._probe is None:
            self._probe = Probe.choose(_first_loader(trainer), self.num_samples, self.seed, self.batch_size)
        mine = Explained()
        # Datasets and collators may draw random numbers; the training's own sequence must not notice.
        with isolate_rng():
            for batch in self._probe.batches(trainer.global_rank, trainer.world_size):
                mine.extend(explainer.explain(batch))
        rows = {row["sample_id"]: row for row in gather(mine.explanations)}
        explanations = [rows[key] for key in sorted(rows)]
        metrics, failures = gather(mine.metrics), gather(mine.failures)
        scalars = self._scalars(explanations, metrics, len(failures))
        self._previous = {row["sample_id"]: row["scores"] for row in explanations}
        self._shown = explanations[: self.num_shown]
        if self.folder is not None and trainer.is_global_zero:
            name = f"epoch-{trainer.current_epoch:04d}-step-{trainer.global_step:07d}.parquet"
            metadata = {"label_names": self.label_names or [], "epoch": trainer.current_epoch}
            write_table(self.folder / name, explanations, EXPLANATION_SCHEMA, metadata)
        if failures:
            rank_zero_info(f"AttributionCallback: {len(failures)} samples failed, the first: {failures[0]['reason']}")
        return scalars

    def _scalars(
        self, explanations: list[dict[str, Any]], metrics: list[dict[str, Any]], failed: int
    ) -> dict[str, float]:
        prefix = f"val/explain/{self.method}"
        scalars: dict[str, float] = {f"{prefix}/failed": float(failed)}
        for (method, control, metric), summary in summarise(metrics, resamples=1).items():
            if summary.mean is not None:
                scalars[scalar_key("val/explain", method, control, metric)] = summary.mean
        gaps = [row["completeness_gap"] for row in explanations if row["completeness_gap"] is not None]
        if gaps:
            scalars[f"{prefix}/completeness_gap_max"] = max(gaps)
        moved = [
            value
            for row in explanations
            if (value := self._drift(row)) is not None and value == value  # NaN: nothing to correlate
        ]
        if moved:
            scalars[f"{prefix}/drift"] = sum(moved) / len(moved)
        layered = [torch.tensor(row["layer_scores"]) for row in explanations if row["layer_scores"] is not None]
        if layered:
            shares = [layer_profile(one[None], torch.ones(1, one.shape[1], dtype=torch.bool))[0] for one in layered]
            self._profile = torch.stack(shares).mean(dim=0).tolist()
            for layer, share in enumerate(self._profile, start=1):
                scalars[f"{prefix}/layer_profile/{layer:02d}"] = share
        return scalars

    def _drift(self, row: dict[str, Any]) -> float | None:
        before = self._previous.get(row["sample_id"])
        if before is None or len(before) != len(row["scores"]):
            return None
        content = torch.tensor([word is not None for word in row["word_ids"]])
        return float(drift(_row(row["scores"]), _row(before), content[None])[0])

    def _log_media(self, trainer: Trainer) -> None:
        assert self._media is not None
        prefix = f"val/explain/{self.method}"
        html: list[str] = []
        table: list[list[Any]] = []
        for row in self._shown:
            title = f"#{row['sample_id']} · {self._name(row['target'])} p={row['probability']:.2f}"
            if row["label"] is not None:
                title += f" · label {self._name(row['label'])}"
            marks = rationale_by_word(row)
            text = token_html(row["tokens"], row["scores"], rationale=marks, title=title, word_ids=row["word_ids"])
            html.append(text)
            heatmap = layer_heatmap(row["tokens"], row["layer_scores"]) if row["layer_scores"] is not None else None
            label = None if row["label"] is None else self._name(row["label"])
            table.append(
                [
                    trainer.current_epoch,
                    row["sample_id"],
                    Html(text),
                    label,
                    self._name(row["prediction"]),
                    row["probability"],
                    row["completeness_gap"],
                    heatmap,
                ]
            )
        columns = ["epoch", "sample_id", "text", "label", "prediction", "probability", "completeness_gap", "layers"]
        images = {}
        if table[0][-1] is not None:
            images[f"{prefix}/layers"] = table[0][-1]
        if self._profile:
            images[f"{prefix}/layer_profile_image"] = layer_profile_image(self._profile)
        self._media.log(
            trainer.global_step,
            html={f"{prefix}/tokens": "\n".join(html)},
            images=images,
            tables={f"{prefix}/samples": (columns, table)},
        )

    def _name(self, index: int) -> str:
        names = self.label_names
        return names[index] if names and index < len(names) else str(index)


def _row(scores: list[float]) -> Tensor:
    return torch.tensor(scores)[None]


def _first_loader(trainer: Trainer) -> DataLoader[Any]:
    loaders = trainer.val_dataloaders
    loader = loaders[0] if isinstance(loaders, list | tuple) else loaders
    if isinstance(loader, Mapping):
        loader = next(iter(loader.values()))
    if not isinstance(loader, DataLoader):
        raise InputError(f"AttributionCallback needs a validation DataLoader, got {type(loader).__name__}.")
    return loader
