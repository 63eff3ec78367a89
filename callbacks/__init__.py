"""Lightning callbacks: explanations during training and in the explain stage."""

from __future__ import annotations

from calig.callbacks.attribution_callback import AttributionCallback
from calig.callbacks.explanation_writer import ExplanationWriter

__all__ = ["AttributionCallback", "ExplanationWriter"]
