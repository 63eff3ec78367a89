"""What is left to explain, found out where the processes of a run know each other."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from lightning import LightningDataModule
from torch.utils.data import DataLoader

from calig.callbacks.collectives import from_first
from calig.datamodules.text import Encoded
from calig.pipeline.signals import StopSignals


class RemainingSamples(LightningDataModule):
    """The samples that have no explanation yet, shared out exactly: none twice, and a process may have none.

    A cluster starts its processes side by side, and before `Trainer.predict` none knows of the others. So what is done
    is looked up in here: by one process, because the look-up deletes unfinished files, and for all of them.

    Args:
        look_up: Gives what is done, as `loader` takes it; called on the first process alone.
        loader: Makes the loader of a share, of (done, rank, world size).
        signals: Taken from Lightning, before the look-up, which takes a while that the others wait, and behind it.

    Raises:
        InputError: The look-up raised one; on all processes.
    """

    def __init__(
        self,
        look_up: Callable[[], Any],
        loader: Callable[[Any, int, int], DataLoader[Encoded]],
        signals: StopSignals,
    ) -> None:
        super().__init__()
        self._signals = signals
        self._look_up = look_up
        self._loader = loader
        self.allow_zero_length_dataloader_with_multiple_devices = True
        self._done: Any = None

    def setup(self, stage: str) -> None:
        """Look up what is done: here, because an error inside the loader's hook leaves torch's loaders patched."""
        self._signals.install()
        self._done = from_first(self._look_up)

    def predict_dataloader(self) -> DataLoader[Encoded]:
        """The share of this process."""
        assert self.trainer is not None  # it calls this
        self._signals.install()  # once more: Lightning has set its own behind `setup`
        return self._loader(self._done, self.trainer.global_rank, self.trainer.world_size)
