"""ExplanationWriter: the explain stage as a predict stage that writes shards."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import BasePredictionWriter

from calig.pipeline.explainer import Explained, Explainer
from calig.pipeline.records import EXPLANATION_SCHEMA, METRIC_SCHEMA, append_lines, write_table


class ExplanationWriter(BasePredictionWriter):
    """Explains every batch of `Trainer.predict` and writes explanations, metrics and failures.

    Each process writes shards of its own, `part-<rank>-<number>.parquet`, whole or not at all; no collective is
    needed, so ranks may have different numbers of batches.

    Args:
        explainer: Computes the rows.
        folder: The run directory.
        metadata: Kept in every explanation shard (label names, method options).
        batches_per_shard: Batches between two shards: what a crash can lose.
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
        self._rows.extend(self.explainer.explain(batch))
        self._waiting += 1
        if self._waiting >= self.batches_per_shard:
            self._flush(trainer.global_rank)

    def on_predict_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write what is left."""
        self._flush(trainer.global_rank)

    def write_all(self, loader: Iterable[Mapping[str, Any]]) -> None:
        """Explain and write without a Trainer, on this process alone."""
        for batch in loader:
            self._rows.extend(self.explainer.explain(batch))
        self._flush(0)

    def _flush(self, rank: int) -> None:
        rows, self._rows, self._waiting = self._rows, Explained(), 0
        if rows.failures:
            append_lines(self.folder / "failures.jsonl", rows.failures)
        if not rows.explanations:
            return
        # Both under one name, metrics first: a sample counts as done once its explanations are there.
        folder = self.folder / "explanations"
        name = f"part-{rank:05d}-{len(list(folder.glob(f'part-{rank:05d}-*.parquet'))):05d}.parquet"
        if rows.metrics:
            write_table(self.folder / "metrics" / name, rows.metrics, METRIC_SCHEMA)
        write_table(folder / name, rows.explanations, EXPLANATION_SCHEMA, self.metadata)
