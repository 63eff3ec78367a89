"""TakeSignals: a run of any number of processes ends together when one of them gets a signal."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from calig.callbacks.collectives import end_if_asked, is_end_near
from calig.pipeline.signals import StopSignals


class TakeSignals(Callback):
    """Takes the signals from Lightning, and ends a test or predict stage behind the batch that one came in.

    Processes have different numbers of batches, and none waits for another between them. So whoever gets a signal
    tells the others, and every process comes to the same decision exactly once: before its next batch, or where it has
    none left, which is before the first thing that all of them do together.

    A training is ended by `ExactResume`.

    Args:
        signals: Who is asked.
    """

    def __init__(self, signals: StopSignals) -> None:
        self.signals = signals
        self._decided = False

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """A stage begins, and nothing is decided yet."""
        self._decided = False

    def on_sanity_check_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take the signals; Lightning has taken them just before."""
        self.signals.install()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The same, where there was no sanity check."""
        self.signals.install()

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The same for `Trainer.validate`."""
        self.signals.install()

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The same for `Trainer.test`."""
        self.signals.install()

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The same for `Trainer.predict`."""
        self.signals.install()

    def on_test_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """End if asked."""
        self._decide_if_told()

    def on_test_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """End if asked, behind the last batch: what comes next is the reduction of the metrics."""
        if batch_idx + 1 == trainer.num_test_batches[dataloader_idx]:
            self._decide()

    def on_predict_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """End if asked."""
        self._decide_if_told()

    def on_predict_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """End if asked, before other callbacks exchange what they have found."""
        self._decide()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """End if asked: a process without a batch comes by here alone."""
        if stage == "predict":
            self._decide()

    def _decide_if_told(self) -> None:
        if is_end_near(self.signals):
            self._decide()

    def _decide(self) -> None:
        if not self._decided:
            self._decided = True
            end_if_asked(self.signals)
