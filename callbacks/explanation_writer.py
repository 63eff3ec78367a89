"""ExplanationWriter: the explain stage as a predict stage that writes shards."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import BasePredictionWriter

from calig.pipeline.explained import Explained
from calig.pipeline.explainer import Explainer
from calig.pipeline.manifest import next_number, write_shard
from calig.pipeline.metrics.sensitivity import take_rows
from calig.pipeline.signals import Stopped


class ExplanationWriter(BasePredictionWriter):
    """Explains every batch of `Trainer.predict` and writes explanations, metrics and failures.

    Each process writes shards of its own, `part-<rank>-<number>`, whole or not at all (`calig.pipeline.manifest`); no
    collective is needed, so ranks may have different numbers of batches.

    Args:
        explainer: Computes the rows.
        folder: The run directory.
        metadata: Kept in every explanation shard (label names, method options).
        batches_per_shard: Batches between two shards: what a crash can lose, and what a process holds in memory.
    """

    def __init__(
        self, explainer: Explainer, folder: str | Path, metadata: Mapping[str, Any], *, batches_per_shard: int = 20
    ) -> None:
        super().__init__(write_interval="batch")
        self.explainer = explainer
        self.folder = Path(folder)
        self.metadata = dict(metadata)
        self.batches_per_shard = batches_per_shard
        self._rows = Explained()
        self._waiting = 0
        self._number: int | None = None

    def write_on_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        prediction: Any,
        batch_indices: Sequence[int] | None,
        batch: Mapping[str, Any],
        batch_idx: int,
        dataloader_idx: int,
    ) -> None:
        """Explain the batch; write when a shard is full."""
        self._rows.extend(explain_parts(self.explainer, batch))
        self._waiting += 1
        if self._waiting >= self.batches_per_shard:
            self._flush(trainer.global_rank)

    def on_predict_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write what is left."""
        self._flush(trainer.global_rank)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Write what is there when a signal ends the stage, which it does between two batches."""
        if isinstance(exception, Stopped):
            with contextlib.suppress(OSError):  # no room: these samples are explained again
                self._flush(trainer.global_rank)

    def _flush(self, rank: int) -> None:
        rows, self._rows, self._waiting = self._rows, Explained(), 0
        if not rows.explanations and not rows.failures:
            return
        if self._number is None:
            self._number = next_number(self.folder, rank)
        write_shard(self.folder, f"part-{rank:05d}-{self._number:05d}", rows, self.metadata)
        self._number += 1


def explain_parts(explainer: Explainer, batch: Mapping[str, Any]) -> Explained:
    """Explain a batch; what raises is halved until the samples that it comes from stand alone, and those are failures.

    Raises:
        Exception: Whatever it was, with `strict`.
    """
    try:
        return explainer.explain(batch)
    except Exception as error:
        if explainer.settings.strict:
            raise
        reason = f"{type(error).__name__}: {error}"
    ids, rows = batch["sample_id"], Explained()
    if len(ids) > 1:
        for half in torch.arange(len(ids)).tensor_split(2):
            rows.extend(explain_parts(explainer, take_rows(batch, half, len(ids))))
        return rows
    sample_id = int(ids[0])
    for name in explainer.settings.wanted(explainer.settings.methods, sample_id):
        rows.fail([sample_id], name, reason)
    return rows
