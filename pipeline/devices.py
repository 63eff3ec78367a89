"""Whether the machine has what `trainer.*` asks for, before any work is done."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from calig.pipeline.errors import InputError

_ARGUMENTS = ("accelerator", "devices", "num_nodes", "strategy", "precision")


def require_devices(trainer: Mapping[str, Any]) -> None:
    """Check that a Trainer can be made of the device arguments.

    Lightning itself decides, on a Trainer that is thrown away: its rules for accelerators, device lists, strategies
    and precisions change with its versions.

    Args:
        trainer: The `trainer` section.

    Raises:
        InputError: A device, a strategy or a precision is not to be had here.
    """
    from lightning.pytorch import Trainer
    from lightning.pytorch.utilities.exceptions import MisconfigurationException

    asked = {name: trainer[name] for name in _ARGUMENTS if name in trainer}
    if not asked:
        return
    # The real Trainer says the same things again.
    talk = logging.getLogger("lightning.pytorch.utilities.rank_zero")
    level = talk.level
    talk.setLevel(logging.ERROR)
    try:
        Trainer(**asked, logger=False, enable_checkpointing=False, enable_progress_bar=False)
    except (MisconfigurationException, ValueError, RuntimeError, ImportError) as error:
        given = " ".join(f"trainer.{name}={value}" for name, value in asked.items())
        raise InputError(
            f"{given} cannot be had on this machine: {str(error).strip().splitlines()[0].rstrip('.')}. "
            "trainer.accelerator=auto trainer.devices=auto takes what is there."
        ) from error
    finally:
        talk.setLevel(level)
