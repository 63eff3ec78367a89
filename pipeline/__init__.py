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
    from calig.pipeline.next_token import NextTokenExplanation, explain_next_token
    from calig.pipeline.run import run

__all__ = ["Explanation", "NextTokenExplanation", "explain", "explain_next_token", "load_explanations", "run"]

_HOME = {
    "Explanation": "explanation",
    "NextTokenExplanation": "next_token",
    "explain": "explaining",
    "explain_next_token": "next_token",
    "load_explanations": "loading",
    "run": "run",
}


def __getattr__(name: str) -> object:
    if name in _HOME:
        return getattr(importlib.import_module(f"calig.pipeline.{_HOME[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
