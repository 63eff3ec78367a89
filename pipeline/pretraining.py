"""The LightningModule of the stage pretrain: a masked autoencoder of images.

Shapes: B images, N patches.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor
from torchmetrics import MeanMetric
from transformers import PreTrainedModel

from calig.pipeline.module import OptimizerSettings, make_optimizer


class PretrainingModule(LightningModule):
    """Trains a masked autoencoder (He et al. 2022): hidden patches are reconstructed from those that are seen.

    Logs `pretrain/loss`, and `pretrain/val/loss` with the same patches of every image hidden at every validation.

    Args:
        model: A `ViTMAEForPreTraining`.
        optimizer: Settings of the optimiser.
    """

    def __init__(self, model: PreTrainedModel, optimizer: OptimizerSettings) -> None:
        super().__init__()
        self.model = model
        self.optimizer_settings = optimizer
        self.val_loss = MeanMetric(nan_strategy="disable")

    def training_step(self, batch: Mapping[str, Any], batch_idx: int) -> Tensor:
        """Loss of a batch, with patches hidden at random."""
        pixels = batch["pixel_values"]
        loss: Tensor = self.model(pixels).loss
        self.log("pretrain/loss", loss, prog_bar=True, batch_size=len(pixels))
        return loss

    def validation_step(self, batch: Mapping[str, Any], batch_idx: int) -> None:
        """Loss of a batch, with patches hidden by the number of the example."""
        pixels = batch["pixel_values"]
        patches = self.model.config.image_size // self.model.config.patch_size
        noise = [
            torch.rand(patches**2, generator=torch.Generator().manual_seed(sample))
            for sample in batch["sample_id"].tolist()
        ]
        loss: Tensor = self.model(pixels, noise=torch.stack(noise).to(pixels)).loss
        self.val_loss.update(loss.expand(len(pixels)))
        self.log("pretrain/val/loss", self.val_loss, batch_size=len(pixels))

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """AdamW; the schedule moves with every step."""
        return make_optimizer(self, self.optimizer_settings)
