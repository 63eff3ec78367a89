"""Does an explanation depend on what the model learned? Cumulative randomisation (Adebayo et al. 2018; METRICS 2).

Shapes: B examples, S steps (the head, then the blocks from the top), T positions.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from calig.pipeline.attribution.api import attribute
from calig.pipeline.attribution.model import ExplainableModel
from calig.pipeline.attribution.reset import initialise_anew, parts_from_the_top, weights_kept
from calig.pipeline.attribution.result import Attribution
from calig.pipeline.metrics.rows import MetricError, Row, make_row
from calig.pipeline.metrics.statistics import rank_correlation

KEPT_TOO_MUCH = 0.5
"""A method whose ranking keeps a mean correlation above this with every block randomised is flagged."""


def is_flagged(mean: float | None) -> bool:
    """Whether a method does not fall: its mean over samples with every block randomised is farther than 0.5 from 0."""
    return mean is not None and abs(mean) > KEPT_TOO_MUCH


def randomisation_rows(
    model: ExplainableModel,
    batch: Mapping[str, Any],
    scores: Mapping[str, Tensor],
    *,
    target: Tensor,
    special: Tensor,
    mask: Tensor,
    sample_ids: Sequence[int],
    options: Mapping[str, Mapping[str, Any]],
    seed: int = 0,
) -> tuple[list[Row], list[MetricError]]:
    """Measure `randomisation` of several methods on one batch: a row per sample, method and step, and one without q.

    `q` is the share of the blocks that have fresh weights: 0 for the head alone, 1 for the head and all blocks. The
    row without q repeats the last step: what a method keeps of its ranking when the model knows nothing any more. (The
    mean over the steps would depend on the number of blocks.) There are no controls: a ranking that does not look at
    the model keeps 1. Values are None where the correlation is undefined.

    Args:
        model: The model that is explained; its weights are back, bit for bit, on return and after an exception.
        batch: What was explained: `input_ids` (B, T) and what else the model's forward takes.
        scores: Method -> its (B, T) scores.
        target: (B,) the explained class, which stays.
        special: (B, T) bool, special tokens.
        mask: (B, T) bool, real positions.
        sample_ids: B ids.
        options: Method -> the options that it ran with.
        seed: Of the weights.

    Returns:
        The rows, and an error for each sample and method whose scores with fresh weights are not finite.

    Raises:
        UnsupportedModelError: The model's class does not say how its weights start.
    """
    values: dict[str, list[Tensor]] = {method: [] for method in scores}
    broken: dict[str, Tensor] = {method: torch.zeros(len(sample_ids), dtype=torch.bool) for method in scores}
    with model.session():
        steps = parts_from_the_top(model, batch)
        with weights_kept([module for _, modules in steps for module in modules]):
            # Cumulative, and the same weights for every batch of a run.
            for number, (_, modules) in enumerate(steps):
                initialise_anew(model, modules, seed=seed, step=number)
                for method, own in scores.items():
                    own_options = options.get(method, {})
                    again = attribute(
                        model, dict(batch), method, target=target, special_tokens_mask=special, **own_options
                    )
                    assert isinstance(again, Attribution)  # one target per example
                    broken[method] = broken[method] | again.non_finite()
                    values[method].append(rank_correlation(own, again.scores, mask & ~special))
    rows: list[Row] = []
    errors: list[MetricError] = []
    for method in scores:
        table = torch.stack(values[method], dim=1).tolist()
        for sample_id, of_sample, bad in zip(sample_ids, table, broken[method].tolist(), strict=True):
            if bad:
                reason = "a score is not finite with the fresh weights of randomisation"
                errors.append(MetricError(reason, sample_id=sample_id, method=method))
                continue
            shares: list[float | None] = [share for share, _ in steps]
            for share, value in zip([*shares, None], [*of_sample, of_sample[-1]], strict=True):
                defined = value if value == value else None
                rows.append(make_row(sample_id, method, "none", "randomisation", defined, q=share))
    return rows, errors
