"""calig: train, then explain, as Lightning stages.

Names are resolved on first use, so that importing a part does not load the whole.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from calig.pipeline.explaining import explain
    from calig.pipeline.explanation import Explanation
    from calig.pipeline.loading import load_explanations
    from calig.pipeline.run import run

__all__ = ["Explanation", "explain", "load_explanations", "run"]

_HOME = {"Explanation": "explanation", "explain": "explaining", "load_explanations": "loading", "run": "run"}


def __getattr__(name: str) -> object:
    if name in _HOME:
        return getattr(importlib.import_module(f"calig.pipeline.{_HOME[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
