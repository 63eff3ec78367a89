"""The one LightningModule: a Hugging Face classifier with its optimiser and its accuracy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor
from torchmetrics import MetricCollection
from torchmetrics.classification import MulticlassAccuracy, MulticlassF1Score
from transformers import PreTrainedModel, get_scheduler

from calig.pipeline.attribution.model import forward_inputs


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


class ClassificationModule(LightningModule):
    """Fine-tunes a sequence classifier.

    Logs `train/loss`, `val/loss`, `val/accuracy`, `val/f1` (macro), and the same for `test`.

    Args:
        model: Takes a batch's inputs and `labels`, returns `loss` and `logits` (B, C).
        label_names: The C class names.
        optimizer: Settings of the optimiser.
    """

    def __init__(
        self, model: PreTrainedModel, label_names: Sequence[str], optimizer: OptimizerSettings | None = None
    ) -> None:
        super().__init__()
        self.model = model
        self.label_names = list(label_names)
        self.optimizer_settings = optimizer or OptimizerSettings()
        classes = max(2, len(self.label_names))
        metrics = MetricCollection(
            {
                "accuracy": MulticlassAccuracy(classes, average="micro"),
                "f1": MulticlassF1Score(classes, average="macro"),
            }
        )
        self.val_metrics = metrics.clone(prefix="val/")
        self.test_metrics = metrics.clone(prefix="test/")

    def forward(self, batch: Mapping[str, Any]) -> Any:
        """Run the model on a batch; `labels`, where present, make it return a loss."""
        inputs = forward_inputs(self.model, batch)
        return self.model(**inputs, labels=batch["labels"]) if "labels" in batch else self.model(**inputs)

    def training_step(self, batch: Mapping[str, Any], batch_idx: int) -> Tensor:
        """Loss of a batch."""
        loss = self(batch).loss
        self.log("train/loss", loss, prog_bar=True, batch_size=len(batch["labels"]))
        return loss

    def validation_step(self, batch: Mapping[str, Any], batch_idx: int) -> None:
        """Loss, accuracy and F1."""
        self._evaluate(batch, "val", self.val_metrics)

    def test_step(self, batch: Mapping[str, Any], batch_idx: int) -> None:
        """Loss, accuracy and F1."""
        self._evaluate(batch, "test", self.test_metrics)

    def predict_step(self, batch: Mapping[str, Any], batch_idx: int, dataloader_idx: int = 0) -> None:
        """Nothing: the explain stage is a predict stage whose work ExplanationWriter does."""

    def _evaluate(self, batch: Mapping[str, Any], split: str, metrics: MetricCollection) -> None:
        output = self(batch)
        metrics.update(output.logits.float(), batch["labels"])
        size = len(batch["labels"])
        self.log(f"{split}/loss", output.loss, sync_dist=True, batch_size=size)
        self.log_dict(metrics, prog_bar=split == "val", batch_size=size)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """AdamW; the schedule moves with every step."""
        settings = self.optimizer_settings
        trained = [parameter for parameter in self.parameters() if parameter.requires_grad]
        groups = [
            {"params": [p for p in trained if p.ndim > 1], "weight_decay": settings.weight_decay},
            {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0},
        ]
        optimizer = torch.optim.AdamW([group for group in groups if group["params"]], lr=settings.lr)
        steps = int(self.trainer.estimated_stepping_batches)
        scheduler = get_scheduler(
            _SCHEDULERS[settings.schedule], optimizer, round(settings.warmup * steps), num_training_steps=steps
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}
