"""How metrics are called and read: a label, the variant it is, and which direction is better."""

from __future__ import annotations

import math
from dataclasses import dataclass

# metric: (label, direction); +1 higher is better, -1 lower, 0 neither. The order is the order of the columns.
KNOWN = {
    "comprehensiveness": ("comprehensiveness", 1),
    "sufficiency": ("sufficiency", -1),
    "log_odds": ("log-odds", -1),
    "deletion_auc": ("deletion AUC", -1),
    "insertion_auc": ("insertion AUC", 1),
    "positive_auc": ("positive AUC", -1),
    "negative_auc": ("negative AUC", 1),
    "token_f1": ("token F1", 1),
    "auprc": ("AUPRC", 1),
    "iou_f1": ("IoU F1", 1),
    "token_iou": ("token IoU", 1),
    "pointing_game": ("pointing game", 1),
    "mask_auprc": ("mask AUPRC", 1),
    "mask_iou": ("mask IoU", 1),
    "infidelity": ("infidelity", -1),
    "sensitivity_max": ("max sensitivity", -1),
    # Near 0 is right, and a correlation may miss it on either side: no order between methods.
    "randomisation": ("kept when randomised", 0),
    "completeness_gap": ("completeness gap", -1),
    "completeness_gap_max": ("worst completeness gap", -1),
    "special_share": ("special-token share", 0),
}
ON_OUTPUT = "@mask.logit"
"""How the metrics of a regression, which has no probability, are spelt behind their names."""
SIGNIFICANT = 0.05
"""Adjusted p-values below it are called a difference."""
_PERCENT = {"completeness_gap", "completeness_gap_max", "special_share", "accuracy"}
_OPERATORS = {"mask", "delete", "attention", "blur"}
_ORDER = list(KNOWN)


@dataclass(frozen=True)
class Metric:
    """A metric name taken apart."""

    name: str
    base: str
    label: str
    variant: str
    """What stands behind ``@``, for reading: ``delete · logits``, ``absolute``; empty for the default."""
    direction: int

    @property
    def arrow(self) -> str:
        """``↑`` where higher is better, ``↓`` where lower is, else nothing."""
        return {1: "↑", -1: "↓"}.get(self.direction, "")

    @property
    def other_operator(self) -> bool:
        """Whether this is a known metric under another operator or on logits."""
        parts = self.variant.split(" · ")
        return "logits" in parts or bool(_OPERATORS & set(parts))

    @property
    def order(self) -> tuple[int, str, str]:
        """Sorting key: known metrics in their fixed order, then the others by name."""
        return (_ORDER.index(self.base) if self.base in KNOWN else len(_ORDER), self.base, self.variant)


def metric(name: str) -> Metric:
    """Take ``<metric>[@<operator>][.logit]`` apart; an unknown metric falls back to its name."""
    base, _, suffix = name.partition("@")
    if not suffix and base not in KNOWN and base.endswith(".logit"):
        base, suffix = base.removesuffix(".logit"), "logit"
    label, direction = KNOWN.get(base, (base.replace("_", " "), 0))
    variant = " · ".join("logits" if part == "logit" else part for part in suffix.split(".") if part)
    return Metric(name, base, label, variant, direction)


def comparable(n: int | None, most: int) -> bool:
    """Whether a mean over ``n`` samples may be called the best beside means over ``most`` of them."""
    return n is None or n >= 0.9 * most  # some samples may have failed; a method with a limit has far fewer


def p_value(p: float | None) -> str:
    """A p-value to read: ``p = 0.012``, ``p < 0.001``, nothing where there is none."""
    if p is None:
        return ""
    return "p < 0.001" if p < 0.001 else f"p = {p:.3f}"


def number(value: float | str | None, name: str = "") -> str:
    """A number to read: three decimals, per cent for shares (by the metric's ``name``), ``–`` where there is none."""
    if value is None or isinstance(value, str):
        return "–" if value is None else value
    value = float(value)
    if not math.isfinite(value):
        return "–"
    if metric(name.rpartition("/")[2]).base in _PERCENT:
        return f"{100 * value:.{1 if abs(value) >= 0.1 else 2}f} %"
    if value == 0 or 0.0005 <= abs(value) < 100:
        text = f"{value:.3f}"
    else:
        text = f"{value:.1e}" if abs(value) < 1 or abs(value) >= 1e6 else f"{value:,.1f}"
    return text.replace("-", "−", 1) if value < 0 else text
