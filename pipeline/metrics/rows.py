"""One row of the metrics table (`metrics/part-*.parquet`), the spelling of metric names, and the room's error."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, TypedDict


class MetricError(ValueError):
    """A metric cannot be computed for one sample: not finite, or seen twice with different values.

    Attributes:
        sample_id: The sample.
        method: The attribution method, or None where only the sample is known.
        reason: What is wrong, without the names.
    """

    def __init__(self, reason: str, *, sample_id: int, method: str | None = None) -> None:
        self.sample_id, self.method, self.reason = sample_id, method, reason
        of = f", method '{method}'" if method is not None else ""
        super().__init__(f"sample {sample_id}{of}: {reason}")


class Row(TypedDict):
    """One value of one metric for one sample.

    `value` is None where the metric is undefined for the sample (skipped and counted, never NaN). `q` is the bin (a
    share of the positions, or of the words), None for a number without bins and for the mean over them. `operator` and
    `space` are None where nothing is perturbed; `space` also where a metric is defined on one scale only (an accuracy,
    infidelity on logits).
    """

    sample_id: int
    method: str
    control: str
    metric: str
    operator: str | None
    space: str | None
    q: float | None
    value: float | None


def make_row(
    sample_id: int,
    method: str,
    control: str,
    metric: str,
    value: float | None,
    *,
    operator: str | None = None,
    space: str | None = None,
    q: float | None = None,
) -> Row:
    """Build a row.

    Raises:
        MetricError: ``value`` is NaN or infinite; names the sample and the method.

    Example:
        >>> make_row(7, "ca_lig", "none", "token_f1", float("nan"))
        Traceback (most recent call last):
        calig.pipeline.metrics.rows.MetricError: sample 7, method 'ca_lig': token_f1 (control 'none') is nan
    """
    row = Row(
        sample_id=sample_id,
        method=method,
        control=control,
        metric=metric,
        operator=operator,
        space=space,
        q=q,
        value=value,
    )
    if value is not None and not math.isfinite(value):
        reason = f"{metric_key(row)} (control '{control}') is {value}"
        raise MetricError(reason, sample_id=sample_id, method=method)
    return row


def metric_key(row: Mapping[str, Any]) -> str:
    """Spell a row's metric as loggers and tables do: `<metric>[@<operator>[.logit]]`.

    Unsuffixed are the operator `mask` on probabilities, and metrics that perturb nothing.

    Example:
        >>> metric_key({"metric": "sufficiency", "operator": "mask", "space": "probability"})
        'sufficiency'
        >>> metric_key({"metric": "sufficiency", "operator": "delete", "space": "logit"})
        'sufficiency@delete.logit'
    """
    operator, logit = row["operator"], row["space"] == "logit"
    if operator is None or (operator == "mask" and not logit):
        return row["metric"]
    return f"{row['metric']}@{operator}{'.logit' if logit else ''}"
