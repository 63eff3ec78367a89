"""Metrics of explanations: pure functions, the perturbation planner, statistics and thin torchmetrics classes.

Names are imported on first use (PEP 562), so importing the package loads neither torch nor torchmetrics.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from calig.pipeline.metrics.classes import AUPRC as AUPRC
    from calig.pipeline.metrics.classes import Comprehensiveness as Comprehensiveness
    from calig.pipeline.metrics.classes import LogOdds as LogOdds
    from calig.pipeline.metrics.classes import SampleMetric as SampleMetric
    from calig.pipeline.metrics.classes import Sufficiency as Sufficiency
    from calig.pipeline.metrics.classes import TokenF1 as TokenF1
    from calig.pipeline.metrics.dynamics import drift as drift
    from calig.pipeline.metrics.dynamics import layer_profile as layer_profile
    from calig.pipeline.metrics.dynamics import special_share as special_share
    from calig.pipeline.metrics.faithfulness import comprehensiveness as comprehensiveness
    from calig.pipeline.metrics.faithfulness import faithfulness_rows as faithfulness_rows
    from calig.pipeline.metrics.faithfulness import log_odds as log_odds
    from calig.pipeline.metrics.faithfulness import sufficiency as sufficiency
    from calig.pipeline.metrics.operators import PerturbationTokens as PerturbationTokens
    from calig.pipeline.metrics.perturbation import Request as Request
    from calig.pipeline.metrics.perturbation import perturbed_logits as perturbed_logits
    from calig.pipeline.metrics.plausibility import average_precision as average_precision
    from calig.pipeline.metrics.plausibility import plausibility_rows as plausibility_rows
    from calig.pipeline.metrics.plausibility import token_f1 as token_f1
    from calig.pipeline.metrics.plausibility import word_scores as word_scores
    from calig.pipeline.metrics.ranking import count as count
    from calig.pipeline.metrics.ranking import random_rank as random_rank
    from calig.pipeline.metrics.ranking import rank as rank
    from calig.pipeline.metrics.ranking import reverse as reverse
    from calig.pipeline.metrics.rows import MetricError as MetricError
    from calig.pipeline.metrics.rows import Row as Row
    from calig.pipeline.metrics.rows import metric_key as metric_key
    from calig.pipeline.metrics.statistics import Summary as Summary
    from calig.pipeline.metrics.statistics import bootstrap_interval as bootstrap_interval
    from calig.pipeline.metrics.statistics import spearman as spearman
    from calig.pipeline.metrics.statistics import summarise as summarise

_NAMES_IN = {
    "classes": ("AUPRC", "Comprehensiveness", "LogOdds", "SampleMetric", "Sufficiency", "TokenF1"),
    "dynamics": ("drift", "layer_profile", "special_share"),
    "faithfulness": ("comprehensiveness", "faithfulness_rows", "log_odds", "sufficiency"),
    "operators": ("PerturbationTokens",),
    "perturbation": ("Request", "perturbed_logits"),
    "plausibility": ("average_precision", "plausibility_rows", "token_f1", "word_scores"),
    "ranking": ("count", "random_rank", "rank", "reverse"),
    "rows": ("MetricError", "Row", "metric_key"),
    "statistics": ("Summary", "bootstrap_interval", "spearman", "summarise"),
}
_HOME = {name: module for module, names in _NAMES_IN.items() for name in names}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module '{__name__}' has no attribute '{name}'")
    value = getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME})
