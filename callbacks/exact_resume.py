"""ExactResume: checkpoints from which a training goes on as if it had never stopped."""

from __future__ import annotations

import os
import random
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.plugins import TorchCheckpointIO
from lightning.pytorch.utilities import rank_zero_warn

from calig.callbacks.collectives import gather
from calig.pipeline.checkpoint import LAST, PREVIOUS
from calig.pipeline.signals import Stopped, StopSignals

SAVE = 1
"""A checkpoint is due, and nothing else is asked (see `calig.pipeline.signals`)."""


class ExactResume(Checkpoint):
    """Writes `last.ckpt` at the end of every epoch, now and then within one, and when a signal asks for the end.

    Beside what Lightning keeps, a checkpoint holds the random states of all processes, the scalars that callbacks judge
    by, and whether the training was about to stop; the data module keeps the place in the training order. Within an
    epoch a checkpoint is written only where nothing but the next batch follows: not while gradients accumulate, and not
    before a validation. The checkpoint before stays as `previous.ckpt`.

    A signal is answered at the next such place on all processes at once, so a step is never cut short, and what it
    logs is logged.

    Args:
        folder: Where to.
        signals: Who is asked.
        every_n_steps: Optimiser steps between two checkpoints within an epoch; None: by time alone.
        every_n_minutes: Minutes between two checkpoints; None: by steps alone.
    """

    def __init__(
        self,
        folder: str | Path,
        signals: StopSignals,
        *,
        every_n_steps: int | None = None,
        every_n_minutes: float | None = None,
    ) -> None:
        super().__init__()
        self.folder = Path(folder)
        self.signals = signals
        self.every_n_steps = every_n_steps
        self.every_n_minutes = every_n_minutes
        self._state: dict[str, Any] = {}
        self._restored: dict[str, Any] = {}
        self._saved_at = 0.0
        self._late = False
        self._ending = 0

    def state_dict(self) -> dict[str, Any]:
        """Random states by rank, the callbacks' scalars, and whether the training was about to stop."""
        return self._state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep the states until the first batch is near."""
        self._restored = state_dict

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Put the random states back: whatever was drawn while the training was set up is undone."""
        if not _has_places(trainer):
            rank_zero_warn(
                f"every {trainer.accumulate_grad_batches} batches, where an optimiser step ends, a validation follows "
                f"(it does every {trainer.val_check_batch:g}), so a training that is stopped within an epoch goes on "
                "from the epoch's beginning. Set trainer.val_check_interval to more batches than "
                "trainer.accumulate_grad_batches, or to no divisor of them."
            )
        self._saved_at, self._late, self._ending = time.monotonic(), False, 0
        restored, self._restored = self._restored, {}
        if states := restored.get("random"):
            set_random_state(states[trainer.global_rank % len(states)], trainer.strategy.root_device)
        trainer.callback_metrics.update(restored.get("callback_metrics", {}))
        trainer.should_stop = trainer.should_stop or restored.get("should_stop", False)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """End, now that the step before is logged."""
        self.end_if_asked()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save where it is due or asked for."""
        if not _only_a_batch_follows(trainer, batch_idx):
            return
        asked = self._agree(trainer)
        if asked:
            self._save(trainer)
        if asked > SAVE:
            self._ending = asked

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save; the callbacks that judge an epoch have run."""
        if trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        if trainer.global_step < trainer.max_steps:
            # Where steps are counted, Lightning takes such a checkpoint for one within the epoch and ends it twice.
            self._late = True
            return
        asked = self._agree(trainer)
        self._save(trainer)
        if asked > SAVE:
            self._ending = asked

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Look for a signal that came behind the last step; save where the end of the epoch was not."""
        asked = self._agree(trainer)
        if asked > SAVE:
            if self._late:
                self._save(trainer)
            self._ending = asked

    def end_if_asked(self) -> None:
        """End the run if a checkpoint was written because a signal asked for the end.

        Raises:
            Stopped: On all processes at the same place.
        """
        if self._ending:
            raise Stopped(self._ending)

    def _agree(self, trainer: Trainer) -> int:
        """What the processes are asked to do: a signal may have reached one of them, and clocks differ."""
        asked = max(self.signals.asked, SAVE if self._is_due(trainer) else 0)
        if trainer.world_size == 1:
            return asked
        mine = torch.tensor(asked, device=trainer.strategy.root_device)
        return int(trainer.strategy.reduce(mine, reduce_op="max"))

    def _is_due(self, trainer: Trainer) -> bool:
        if self._late or (self.every_n_steps is not None and trainer.global_step % self.every_n_steps == 0):
            return True
        return self.every_n_minutes is not None and time.monotonic() - self._saved_at >= 60 * self.every_n_minutes

    def _save(self, trainer: Trainer) -> None:
        states = gather([random_state(trainer.strategy.root_device)])
        scalars = {key: value.detach().cpu() for key, value in trainer.callback_metrics.items()}
        self._state = {"random": states, "callback_metrics": scalars, "should_stop": bool(trainer.should_stop)}
        last = self.folder / LAST
        if trainer.is_global_zero and last.is_file():
            _keep(last, self.folder / PREVIOUS)
        trainer.save_checkpoint(last)
        self._saved_at, self._late = time.monotonic(), False


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes a checkpoint whole or not at all: temporary name in the same folder, fsync, rename.

    A checkpoint that cannot be written, for want of space, does not end a training: there is one warning, and the
    checkpoint before stays.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        """Write a checkpoint."""
        path = Path(path)
        temporary = path.with_name(f".{path.name}.tmp")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            # By its name: torch's writer ends the process if Ctrl+C closes a stream of Python's under it.
            torch.save(checkpoint, temporary)
            with temporary.open("rb+") as stream:
                os.fsync(stream.fileno())
            temporary.replace(path)
        except (OSError, RuntimeError) as error:
            rank_zero_warn(f"{path} could not be written, and the training goes on without it: {error}")
        finally:
            temporary.unlink(missing_ok=True)


def random_state(device: torch.device) -> dict[str, Any]:
    """The states of the generators that a training step may draw from, as plain values and tensors."""
    version, words, gauss = random.getstate()
    state: dict[str, Any] = {"python": [version, list(words), gauss], "torch": torch.get_rng_state()}
    if device.type != "cpu":
        state["device"] = torch.get_device_module(device).get_rng_state()
    # Only where something else uses it.
    if (numpy := sys.modules.get("numpy")) is not None:
        kind, keys, *rest = numpy.random.get_state()
        state["numpy"] = [kind, keys.tolist(), *rest]
    return state


def set_random_state(state: Mapping[str, Any], device: torch.device) -> None:
    """Put back what `random_state` gave."""
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words), gauss))
    torch.set_rng_state(state["torch"])
    if device.type != "cpu" and "device" in state:
        torch.get_device_module(device).set_rng_state(state["device"])
    if (numpy := sys.modules.get("numpy")) is not None and "numpy" in state:
        numpy.random.set_state(tuple(state["numpy"]))


def _only_a_batch_follows(trainer: Trainer, batch_idx: int) -> bool:
    """Whether the next thing the training does is a batch, with gradients that start from zero."""
    done = batch_idx + 1
    if trainer.fast_dev_run or trainer.is_last_batch or trainer.should_stop:  # type: ignore[attr-defined]
        return False
    if done % trainer.accumulate_grad_batches:
        return False
    between = trainer.val_check_batch
    if between is None or between == float("inf") or not trainer.enable_validation:
        return True
    counted = done if trainer.check_val_every_n_epoch is not None else trainer.fit_loop.total_batch_idx + 1
    return bool(counted % between)


def _has_places(trainer: Trainer) -> bool:
    """Whether `_only_a_batch_follows` can hold anywhere: behind every step there may be a validation."""
    between = trainer.val_check_batch
    if between is None or between == float("inf") or not trainer.enable_validation:
        return True
    return between >= trainer.num_training_batches or bool(trainer.accumulate_grad_batches % between)


def _keep(path: Path, name: Path) -> None:
    """Give a file a second name, so that there is a whole one while the first is replaced."""
    temporary = name.with_name(f".{name.name}.tmp")
    temporary.unlink(missing_ok=True)
    try:
        os.link(path, temporary)
    except OSError:  # a file system without hard links
        path.replace(name)
    else:
        temporary.replace(name)
