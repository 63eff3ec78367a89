"""Metrics of explanations: pure functions, the perturbation planner, statistics and thin torchmetrics classes.

Names are imported on first use (PEP 562), so importing the package loads neither torch nor torchmetrics.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from calig.pipeline.metrics.classes import CompletenessGap as CompletenessGap
    from calig.pipeline.metrics.classes import CompletenessGapMax as CompletenessGapMax
    from calig.pipeline.metrics.classes import Comprehensiveness as Comprehensiveness
    from calig.pipeline.metrics.classes import DeletionAUC as DeletionAUC
    from calig.pipeline.metrics.classes import Infidelity as Infidelity
    from calig.pipeline.metrics.classes import InsertionAUC as InsertionAUC
    from calig.pipeline.metrics.classes import LogOdds as LogOdds
    from calig.pipeline.metrics.classes import NegativeAUC as NegativeAUC
    from calig.pipeline.metrics.classes import PositiveAUC as PositiveAUC
    from calig.pipeline.metrics.classes import Randomisation as Randomisation
    from calig.pipeline.metrics.classes import SensitivityMax as SensitivityMax
    from calig.pipeline.metrics.classes import Sufficiency as Sufficiency
    from calig.pipeline.metrics.comparison import Difference as Difference
    from calig.pipeline.metrics.comparison import compare as compare
    from calig.pipeline.metrics.comparison import differences as differences
    from calig.pipeline.metrics.comparison import holm as holm
    from calig.pipeline.metrics.comparison import paired_permutation_test as paired_permutation_test
    from calig.pipeline.metrics.comparison import paired_permutation_tests as paired_permutation_tests
    from calig.pipeline.metrics.curves import deletion_auc as deletion_auc
    from calig.pipeline.metrics.curves import insertion_auc as insertion_auc
    from calig.pipeline.metrics.curves import perturbation_auc as perturbation_auc
    from calig.pipeline.metrics.draws import infidelity as infidelity
    from calig.pipeline.metrics.draws import removal_draws as removal_draws
    from calig.pipeline.metrics.dynamics import drift as drift
    from calig.pipeline.metrics.dynamics import layer_profile as layer_profile
    from calig.pipeline.metrics.dynamics import special_share as special_share
    from calig.pipeline.metrics.dynamics_classes import Drift as Drift
    from calig.pipeline.metrics.dynamics_classes import LayerProfile as LayerProfile
    from calig.pipeline.metrics.dynamics_classes import SpecialShare as SpecialShare
    from calig.pipeline.metrics.faithfulness import comprehensiveness as comprehensiveness
    from calig.pipeline.metrics.faithfulness import faithfulness_rows as faithfulness_rows
    from calig.pipeline.metrics.faithfulness import log_odds as log_odds
    from calig.pipeline.metrics.faithfulness import sufficiency as sufficiency
    from calig.pipeline.metrics.image_operators import perturb_image as perturb_image
    from calig.pipeline.metrics.localisation import centre_prior as centre_prior
    from calig.pipeline.metrics.localisation import mask_auprc as mask_auprc
    from calig.pipeline.metrics.localisation import mask_iou as mask_iou
    from calig.pipeline.metrics.localisation import pointing_game as pointing_game
    from calig.pipeline.metrics.names import FAITHFULNESS_METRICS as FAITHFULNESS_METRICS
    from calig.pipeline.metrics.operators import PerturbationTokens as PerturbationTokens
    from calig.pipeline.metrics.oracle import oracle_rank as oracle_rank
    from calig.pipeline.metrics.perturbation import Request as Request
    from calig.pipeline.metrics.perturbation import perturbed_logits as perturbed_logits
    from calig.pipeline.metrics.plausibility import average_precision as average_precision
    from calig.pipeline.metrics.plausibility import dataset_k as dataset_k
    from calig.pipeline.metrics.plausibility import iou_precision_recall as iou_precision_recall
    from calig.pipeline.metrics.plausibility import plausibility_rows as plausibility_rows
    from calig.pipeline.metrics.plausibility import token_f1 as token_f1
    from calig.pipeline.metrics.plausibility import token_iou as token_iou
    from calig.pipeline.metrics.plausibility import word_scores as word_scores
    from calig.pipeline.metrics.plausibility_classes import AUPRC as AUPRC
    from calig.pipeline.metrics.plausibility_classes import IoUF1 as IoUF1
    from calig.pipeline.metrics.plausibility_classes import MaskAUPRC as MaskAUPRC
    from calig.pipeline.metrics.plausibility_classes import MaskIoU as MaskIoU
    from calig.pipeline.metrics.plausibility_classes import PointingGame as PointingGame
    from calig.pipeline.metrics.plausibility_classes import TokenF1 as TokenF1
    from calig.pipeline.metrics.plausibility_classes import TokenIoU as TokenIoU
    from calig.pipeline.metrics.randomisation import is_flagged as is_flagged
    from calig.pipeline.metrics.randomisation import randomisation_rows as randomisation_rows
    from calig.pipeline.metrics.ranking import as_scores as as_scores
    from calig.pipeline.metrics.ranking import count as count
    from calig.pipeline.metrics.ranking import random_rank as random_rank
    from calig.pipeline.metrics.ranking import random_scores as random_scores
    from calig.pipeline.metrics.ranking import rank as rank
    from calig.pipeline.metrics.ranking import reverse as reverse
    from calig.pipeline.metrics.rows import MetricError as MetricError
    from calig.pipeline.metrics.rows import Row as Row
    from calig.pipeline.metrics.rows import metric_key as metric_key
    from calig.pipeline.metrics.sample_metric import SampleMetric as SampleMetric
    from calig.pipeline.metrics.sample_metric import SampleStates as SampleStates
    from calig.pipeline.metrics.sensitivity import sensitivity_max as sensitivity_max
    from calig.pipeline.metrics.sensitivity import sensitivity_rows as sensitivity_rows
    from calig.pipeline.metrics.spans import span_agreement as span_agreement
    from calig.pipeline.metrics.statistics import Summary as Summary
    from calig.pipeline.metrics.statistics import bootstrap_interval as bootstrap_interval
    from calig.pipeline.metrics.statistics import f1_of_means as f1_of_means
    from calig.pipeline.metrics.statistics import rank_correlation as rank_correlation
    from calig.pipeline.metrics.statistics import small_sample_warning as small_sample_warning
    from calig.pipeline.metrics.statistics import spearman as spearman
    from calig.pipeline.metrics.statistics import spearman_matrix as spearman_matrix
    from calig.pipeline.metrics.statistics import summarise as summarise

_NAMES_IN = {
    "classes": (
        "CompletenessGap",
        "CompletenessGapMax",
        "Comprehensiveness",
        "DeletionAUC",
        "Infidelity",
        "InsertionAUC",
        "LogOdds",
        "NegativeAUC",
        "PositiveAUC",
        "Randomisation",
        "SensitivityMax",
        "Sufficiency",
    ),
    "comparison": (
        "Difference",
        "compare",
        "differences",
        "holm",
        "paired_permutation_test",
        "paired_permutation_tests",
    ),
    "curves": ("deletion_auc", "insertion_auc", "perturbation_auc"),
    "draws": ("infidelity", "removal_draws"),
    "dynamics": ("drift", "layer_profile", "special_share"),
    "dynamics_classes": ("Drift", "LayerProfile", "SpecialShare"),
    "faithfulness": ("comprehensiveness", "faithfulness_rows", "log_odds", "sufficiency"),
    "image_operators": ("perturb_image",),
    "localisation": ("centre_prior", "mask_auprc", "mask_iou", "pointing_game"),
    "names": ("FAITHFULNESS_METRICS",),
    "operators": ("PerturbationTokens",),
    "oracle": ("oracle_rank",),
    "perturbation": ("Request", "perturbed_logits"),
    "plausibility": (
        "average_precision",
        "dataset_k",
        "iou_precision_recall",
        "plausibility_rows",
        "token_f1",
        "token_iou",
        "word_scores",
    ),
    "plausibility_classes": ("AUPRC", "IoUF1", "MaskAUPRC", "MaskIoU", "PointingGame", "TokenF1", "TokenIoU"),
    "randomisation": ("is_flagged", "randomisation_rows"),
    "ranking": ("as_scores", "count", "random_rank", "random_scores", "rank", "reverse"),
    "rows": ("MetricError", "Row", "metric_key"),
    "sample_metric": ("SampleMetric", "SampleStates"),
    "sensitivity": ("sensitivity_max", "sensitivity_rows"),
    "spans": ("span_agreement",),
    "statistics": (
        "Summary",
        "bootstrap_interval",
        "f1_of_means",
        "small_sample_warning",
        "rank_correlation",
        "spearman",
        "spearman_matrix",
        "summarise",
    ),
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
