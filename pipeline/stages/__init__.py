"""The stages of a run, each a module with a function `run_stage(context)`."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

from calig.pipeline.config import KNOWN_STAGES
from calig.pipeline.errors import unknown

__all__ = ["stage_function"]


def stage_function(name: str) -> Callable[[Any], None]:
    """The function that runs a stage.

    Raises:
        InputError: There is no stage of that name.
    """
    if name not in KNOWN_STAGES:
        raise unknown("stage", name, KNOWN_STAGES)
    return importlib.import_module(f"calig.pipeline.stages.{name}").run_stage
