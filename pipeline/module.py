"""The one LightningModule: a Hugging Face model for texts with its optimiser and what is measured of it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torchmetrics import MeanMetric, MetricCollection
from transformers import get_scheduler

from calig.pipeline.adapters import adapter_settings
from calig.pipeline.attribution.model import forward_inputs
from calig.pipeline.attribution.windows import windows_in
from calig.pipeline.attribution.wrapping import unwrap
from calig.pipeline.checkpoint import ADAPTER_KEY
from calig.pipeline.config import ModelConfig
from calig.pipeline.errors import InputError
from calig.pipeline.task_metrics import measured_pair, task_loss, task_metrics
from calig.pipeline.tasks import THRESHOLD, Task


@dataclass(frozen=True)
class OptimizerSettings:
    """AdamW with warm-up and decay.

    Attributes:
        lr: Peak learning rate.
        weight_decay: On matrices; biases and norms have none.
        warmup: Share of all steps over which the rate rises.
        schedule: Course of the rate after warm-up.
    """

    lr: float = 5e-5
    weight_decay: float = 0.01
    warmup: float = 0.1
    schedule: Literal["linear", "cosine", "constant"] = "linear"


_SCHEDULERS = {"linear": "linear", "cosine": "cosine", "constant": "constant_with_warmup"}


@dataclass(frozen=True)
class LossSettings:
    """Cross entropy beside the model's own.

    Attributes:
        class_weights: One per class; a batch's loss is the mean weighted by them. Of several labels per text, one per
            label, of its positives. None weighs all alike.
        label_smoothing: Share of the target that is spread over all classes.
    """

    class_weights: tuple[float, ...] | None = None
    label_smoothing: float = 0.0

    @property
    def is_plain(self) -> bool:
        """Whether this is the loss that the model computes itself."""
        return self.class_weights is None and not self.label_smoothing


def loss_settings(
    config: ModelConfig,
    label_names: Sequence[str],
    train_labels: Callable[[], Iterable[Any]],
    task: Task = "classification",
) -> LossSettings:
    """The loss that the `model` section asks for.

    Args:
        config: The section.
        label_names: The C class names.
        train_labels: The labels of the training split; asked only for `balanced`, whose weights are n / (C * count),
            so that they average 1 over the examples; of several labels per text the negatives over the positives.
        task: What the labels are.

    Raises:
        InputError: The weights are not C positive numbers, or a class has no example to be balanced by.
    """
    given, classes = config.class_weights, len(label_names)
    if task == "regression" and given is not None:
        raise InputError(f"model.class_weights={given}: a regression has no classes. Leave it out.")
    if given is None:
        return LossSettings(None, config.label_smoothing)
    if given == "balanced":
        labels = list(train_labels())
        several = task == "multi_label"
        counts = Counter(
            index
            for label in labels
            for index in ([i for i, value in enumerate(label) if value] if several else [int(label)])
        )
        absent = [name for index, name in enumerate(label_names) if not counts[index]]
        if absent:
            raise InputError(
                f"model.class_weights=balanced: the training split has no example of {', '.join(absent)}. "
                "Merge classes with data.label_map, or give the weights as a list."
            )
        if several:
            negatives = [len(labels) - counts[index] for index in range(classes)]
            # A label that every text has would weigh nothing.
            weights = [max(1, negative) / counts[index] for index, negative in enumerate(negatives)]
            return LossSettings(tuple(weights), config.label_smoothing)
        return LossSettings(
            tuple(counts.total() / (classes * counts[index]) for index in range(classes)), config.label_smoothing
        )
    if len(given) != classes:
        raise InputError(
            f"model.class_weights has {len(given)} values for {classes} classes. Give one for each of: "
            f"{', '.join(label_names)} (in this order), or balanced."
        )
    if not all(0 < float(weight) < float("inf") for weight in given):
        raise InputError(f"model.class_weights takes positive numbers, got {list(given)}.")
    return LossSettings(tuple(map(float, given)), config.label_smoothing)


class ClassificationModule(LightningModule):
    """Fine-tunes a model that reads a text: a classifier, one of several labels, or a regression.

    Logs `train/loss`, `val/loss` and what `task_metrics` lists (of a classifier `val/accuracy` and `val/f1`, the macro
    average), and the same for `test`.

    Args:
        model: Takes a batch's inputs and `labels`, returns `loss` and `logits` (B, C); plain, or as
            `calig.pipeline.models.prepare_training` returns it.
        label_names: The C class names.
        optimizer: Settings of the optimiser.
        loss: Settings of the loss, of training and evaluation alike; None takes the model's own.
        task: What the model is trained to say.
        threshold: The probability from which a label of several is predicted.
    """

    class_weights: Tensor | None

    def __init__(
        self,
        model: nn.Module,
        label_names: Sequence[str],
        optimizer: OptimizerSettings | None = None,
        loss: LossSettings | None = None,
        task: Task = "classification",
        threshold: float = THRESHOLD,
    ) -> None:
        super().__init__()
        self.model = model
        self.task = task
        self.loss_settings = loss or LossSettings()
        weights = self.loss_settings.class_weights
        # Moves with the module, but is a setting and no weight: checkpoints hold the model alone.
        self.register_buffer("class_weights", None if weights is None else torch.tensor(weights), persistent=False)
        self.label_names = list(label_names)
        self.optimizer_settings = optimizer or OptimizerSettings()
        metrics = task_metrics(task, len(self.label_names), threshold)
        self.val_metrics = metrics.clone(prefix="val/")
        self.test_metrics = metrics.clone(prefix="test/")
        # Lightning's own mean over processes divides the number of rows by that of processes, and rounds. A NaN stays.
        self.val_loss, self.test_loss = MeanMetric(nan_strategy="disable"), MeanMetric(nan_strategy="disable")

    def forward(self, batch: Mapping[str, Any]) -> Any:
        """Run the model on a batch, of texts or of long documents; `labels`, where present, make it return a loss."""
        if "windows" not in batch and "labels" in batch and self.loss_settings.is_plain:
            return self.model(**forward_inputs(self.model, batch), labels=batch["labels"])
        output = self._output(batch)
        if "labels" not in batch:
            return output
        output["loss"] = task_loss(
            self.task, output.logits, batch["labels"], self.class_weights, self.loss_settings.label_smoothing
        )
        return output

    def _output(self, batch: Mapping[str, Any]) -> Any:
        """What the model returns; of long documents its logits are pooled over their windows."""
        inputs = forward_inputs(self.model, batch)
        if "windows" not in batch:
            return self.model(**inputs)
        windows = windows_in(batch, batch["input_ids"], unwrap(self.model).config)
        assert windows is not None  # the batch has them
        output = self.model(**windows.batch(inputs))
        output["logits"] = windows.pool(output.logits)
        return output

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep what is needed to merge adapters without the run's configuration."""
        settings = adapter_settings(self.model)
        if settings is not None:
            checkpoint[ADAPTER_KEY] = settings

    def training_step(self, batch: Mapping[str, Any], batch_idx: int) -> Tensor:
        """Loss of a batch."""
        loss = self(batch).loss
        self.log("train/loss", loss, prog_bar=True, batch_size=len(batch["labels"]))
        return loss

    def validation_step(self, batch: Mapping[str, Any], batch_idx: int) -> None:
        """The loss and what the task measures."""
        self._evaluate(batch, "val", self.val_metrics, self.val_loss)

    def test_step(self, batch: Mapping[str, Any], batch_idx: int) -> None:
        """The loss and what the task measures."""
        self._evaluate(batch, "test", self.test_metrics, self.test_loss)

    def predict_step(self, batch: Mapping[str, Any], batch_idx: int, dataloader_idx: int = 0) -> None:
        """Nothing: the explain stage is a predict stage whose work ExplanationWriter does."""

    def _evaluate(self, batch: Mapping[str, Any], split: str, metrics: MetricCollection, mean: MeanMetric) -> None:
        output = self(batch)
        metrics.update(*measured_pair(self.task, output.logits, batch["labels"]))
        size = len(batch["labels"])
        mean.update(output.loss.expand(size))  # once per row: with "disable", torchmetrics ignores weights
        self.log(f"{split}/loss", mean, batch_size=size)
        self.log_dict(metrics, prog_bar=split == "val", batch_size=size)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """AdamW; the schedule moves with every step."""
        return make_optimizer(self, self.optimizer_settings)


def make_optimizer(module: LightningModule, settings: OptimizerSettings) -> OptimizerLRScheduler:
    """AdamW for what a module trains, and its schedule, which moves with every step."""
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim > 1], "weight_decay": settings.weight_decay},
        {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW([group for group in groups if group["params"]], lr=settings.lr)
    steps = int(module.trainer.estimated_stepping_batches)
    scheduler = get_scheduler(
        _SCHEDULERS[settings.schedule], optimizer, round(settings.warmup * steps), num_training_steps=steps
    )
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}
