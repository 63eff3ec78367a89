"""The best ranking there is: the control `oracle`, by trying every subset of at most 8 tokens.

Shapes: B examples, T positions, N evaluable positions of one example.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from calig.pipeline.errors import InputError, unknown
from calig.pipeline.metrics.curves import ACCURACY_GRID, GRID, trapezoid_weights
from calig.pipeline.metrics.faithfulness import BINS
from calig.pipeline.metrics.names import FAITHFULNESS_METRICS
from calig.pipeline.metrics.operators import PerturbationTokens
from calig.pipeline.metrics.perturbation import TOKEN_BUDGET, Forward, Request
from calig.pipeline.metrics.ranking import count
from calig.pipeline.metrics.readings import SPACES, Readings, read_requests

LIMIT = 8
_RANKED = tuple(name for name in FAITHFULNESS_METRICS if name != "infidelity")


def oracle_rank(
    forward: Forward,
    batch: Mapping[str, Tensor],
    *,
    metric: str,
    target: Tensor,
    special: Tensor,
    mask: Tensor,
    tokens: PerturbationTokens,
    bins: Sequence[float] = BINS,
    operator: str = "mask",
    space: str = "probability",
    labels: Tensor | None = None,
    token_budget: int = TOKEN_BUDGET,
) -> list[Tensor]:
    """Find the ranking that a metric rates best, for every example of a batch; no explanation can beat it.

    All 2^N subsets run once. Every ranking metric is a sum over k of a function of the top k alone, so the best order
    follows by dynamic programming over subsets (Held and Karp 1962) instead of N! orders. Positions that the metric
    does not tell apart stand in the order of the text.

    Args:
        forward: See `perturbed_logits`.
        batch: (B, T) `input_ids`, `attention_mask` and perhaps `token_type_ids`.
        metric: Of `FAITHFULNESS_METRICS`, but for `infidelity`, which reads scores and not a ranking.
        target: (B,) the explained class.
        special: (B, T) bool, special tokens.
        mask: (B, T) bool, real positions.
        tokens: The ids that perturbed texts are built with.
        bins: Shares q of `comprehensiveness`, `sufficiency` and `log_odds`.
        operator: How tokens go.
        space: `probability` or `logit`, for the metrics that have both.
        labels: (B,) classes that `positive_auc` and `negative_auc` count as correct; None: the prediction.
        token_budget: See `perturbed_logits`.

    Returns:
        B rankings, each (N,) int64 positions, best first; `as_scores` makes scores of them.

    Raises:
        InputError: More than 8 evaluable positions; an unknown or unranked metric, operator or space; targets, labels
            or bins that do not fit.

    Example:
        >>> batch = {"input_ids": torch.tensor([[5, 9, 7]]), "attention_mask": torch.ones(1, 3, dtype=torch.long)}
        >>> oracle_rank(
        ...     lambda x: (x["input_ids"] * x["attention_mask"]).sum(1, keepdim=True).float(),
        ...     batch,
        ...     metric="deletion_auc",
        ...     target=torch.tensor([0]),
        ...     special=torch.zeros(1, 3).bool(),
        ...     mask=torch.ones(1, 3).bool(),
        ...     tokens=PerturbationTokens(pad_id=0, mask_id=1),
        ...     space="logit",
        ... )
        [tensor([1, 2, 0])]
    """
    evaluable = (mask.bool() & ~special.bool()).cpu()
    _check(metric, space, evaluable, bins)
    positions = [row.nonzero().squeeze(1) for row in evaluable]
    requests = []
    for b, of_example in enumerate(positions):
        n = len(of_example)
        goes = (torch.arange(2**n).unsqueeze(1) >> torch.arange(n)) & 1  # subset -> which positions it holds
        stays = torch.ones(2**n, evaluable.shape[1], dtype=torch.bool)
        stays[:, of_example] = goes == 0
        requests += [Request(b, keep, operator) for keep in stays]
    readings = read_requests(
        forward,
        batch,
        requests,
        target=target,
        labels=labels,
        tokens=tokens,
        special=special,
        mask=mask,
        token_budget=token_budget,
    )
    rankings, start = [], 0
    for b, of_example in enumerate(positions):
        without = readings[torch.arange(start, start + 2 ** len(of_example))]
        start += 2 ** len(of_example)
        reference = without.predicted[0] if labels is None else labels.cpu()[b]
        order = _best_order(_gains(metric, without, reference, space, bins).tolist(), len(of_example))
        rankings.append(of_example[torch.tensor(order, dtype=torch.long)])
    return rankings


def _gains(metric: str, without: Readings, reference: Tensor, space: str, bins: Sequence[float]) -> Tensor:
    """Compute (2^N,) what each subset adds to the metric as the top k of a ranking; higher is always better."""
    n = len(without.logit).bit_length() - 1
    if metric in ("positive_auc", "negative_auc"):
        values, shares, weights = without.correct(reference), ACCURACY_GRID, trapezoid_weights(len(ACCURACY_GRID))
    elif metric in ("deletion_auc", "insertion_auc"):
        values, shares, weights = without.value(space), GRID, trapezoid_weights(len(GRID))
    else:
        values = without.log_probability if metric == "log_odds" else without.value(space)
        shares, weights = tuple(bins), [1.0] * len(bins)
    of_count = torch.zeros(n + 1, dtype=torch.double)
    for q, weight in zip(shares, weights, strict=True):
        # Negative perturbation removes what stands last: all but the top n - k.
        of_count[n - count(q, n) if metric == "negative_auc" else count(q, n)] += weight
    only_it_stays = metric in ("sufficiency", "insertion_auc", "negative_auc")
    values = values.flip(0) if only_it_stays else -values  # flipped: the complement of the subset goes
    sizes = torch.tensor([subset.bit_count() for subset in range(2**n)])
    return of_count[sizes] * values


def _best_order(gains: Sequence[float], n: int) -> list[int]:
    """Order n elements so that the sum of the gains of all prefixes is largest."""
    best, last = [gains[0]], [-1]
    for subset in range(1, 2**n):
        before = [(best[subset ^ (1 << i)], i) for i in range(n) if subset >> i & 1]
        value, element = max(before)  # of equal ones the later stands last
        best.append(gains[subset] + value)
        last.append(element)
    order, subset = [], 2**n - 1
    while subset:
        order.append(last[subset])
        subset ^= 1 << last[subset]
    return order[::-1]


def _check(metric: str, space: str, evaluable: Tensor, bins: Sequence[float]) -> None:
    if metric not in _RANKED:
        raise unknown("metric of a ranking", metric, _RANKED)
    if space not in SPACES:
        raise unknown("space", space, SPACES)
    if not bins:
        raise InputError("bins is empty: give at least one share.")
    sizes = evaluable.sum(1)
    if bool((sizes > LIMIT).any()):
        b = int(sizes.argmax())
        raise InputError(
            f"example {b} has {int(sizes[b])} evaluable positions; the oracle tries all subsets of at most {LIMIT}. "
            "Give shorter examples."
        )
