"""The attribution engine (METHODS.md): torch and transformers only.

Importing this package loads neither torch nor transformers; the names below are resolved on first use, so that the
command line can list methods and check options in milliseconds.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from calig.pipeline.attribution.methods import available_methods, method_options

if TYPE_CHECKING:
    from calig.pipeline.attribution.api import attribute
    from calig.pipeline.attribution.model import ExplainableModel, Inputs, UnsupportedModelError
    from calig.pipeline.attribution.objective import ClassLogit, Objective
    from calig.pipeline.attribution.objectives import Contrast, NextToken, Regression
    from calig.pipeline.attribution.result import Attribution

__all__ = [
    "Attribution",
    "ClassLogit",
    "Contrast",
    "ExplainableModel",
    "Inputs",
    "NextToken",
    "Objective",
    "Regression",
    "UnsupportedModelError",
    "attribute",
    "available_methods",
    "method_options",
]

_HOME = {
    "Attribution": "result",
    "ClassLogit": "objective",
    "Objective": "objective",
    "Contrast": "objectives",
    "NextToken": "objectives",
    "Regression": "objectives",
    "ExplainableModel": "model",
    "Inputs": "model",
    "UnsupportedModelError": "model",
    "attribute": "api",
}


def __getattr__(name: str) -> object:
    if name in _HOME:
        return getattr(importlib.import_module(f"calig.pipeline.attribution.{_HOME[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
