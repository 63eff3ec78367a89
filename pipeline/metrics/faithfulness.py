"""Does the model depend on what an explanation calls relevant? Comprehensiveness, sufficiency, log-odds (METRICS 2).

Shapes: B examples, T positions, C classes, E examples that have evaluable positions, O operators, M rankings (the
random control, then each method and its reversal), K bins.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from itertools import product

import torch
from torch import Tensor

from calig.pipeline.errors import InputError, unknown
from calig.pipeline.metrics.operators import PerturbationTokens
from calig.pipeline.metrics.perturbation import TOKEN_BUDGET, Forward, Request, perturbed_logits
from calig.pipeline.metrics.ranking import count, random_rank, rank, reverse
from calig.pipeline.metrics.rows import MetricError, Row, make_row

BINS = (0.01, 0.05, 0.1, 0.2, 0.5)  # ERASER's
SPACES = ("probability", "logit")


def comprehensiveness(full: Tensor, removed: Tensor, *, per_bin: bool = False) -> Tensor:
    """Compute ERASER's comprehensiveness: `p(x) - p(x without the top k(q))`, mean over the bins; higher is better.

    Args:
        full: (...) probability (or logit) of the explained class for the whole input.
        removed: (..., K) the same without the top k(q), one column per bin.
        per_bin: Return every bin instead of their mean.

    Returns:
        (...) the mean over the bins, or (..., K).

    Example:
        >>> comprehensiveness(torch.tensor([0.9]), torch.tensor([[0.8, 0.4]]))
        tensor([0.3000])
    """
    drop = full.unsqueeze(-1) - removed
    return drop if per_bin else drop.mean(-1)


def sufficiency(full: Tensor, kept: Tensor, *, per_bin: bool = False) -> Tensor:
    """Compute ERASER's sufficiency: `p(x) - p(the top k(q) only)`, mean over the bins; lower is better.

    Args:
        full: (...) probability (or logit) of the explained class for the whole input.
        kept: (..., K) the same with only the top k(q) kept, one column per bin.
        per_bin: Return every bin instead of their mean.

    Returns:
        (...) the mean over the bins, or (..., K).

    Example:
        >>> sufficiency(torch.tensor([0.9]), torch.tensor([[0.5, 0.9]]))
        tensor([0.2000])
    """
    return comprehensiveness(full, kept, per_bin=per_bin)


def log_odds(full: Tensor, removed: Tensor, *, per_bin: bool = False) -> Tensor:
    """Compute `log p(x without the top k(q)) - log p(x)`, mean over the bins; more negative is better.

    Args:
        full: (...) log-probability (`log_softmax`) of the explained class for the whole input.
        removed: (..., K) the same without the top k(q), one column per bin.
        per_bin: Return every bin instead of their mean.

    Returns:
        (...) the mean over the bins, or (..., K).

    Example:
        >>> log_odds(torch.tensor([-0.5]), torch.tensor([[-1.0, -2.0]]))
        tensor([-1.])
    """
    return -comprehensiveness(full, removed, per_bin=per_bin)


def faithfulness_rows(
    forward: Forward,
    batch: Mapping[str, Tensor],
    scores: Mapping[str, Tensor],
    *,
    target: Tensor,
    special: Tensor,
    mask: Tensor,
    sample_ids: Sequence[int],
    tokens: PerturbationTokens,
    bins: Sequence[float] = BINS,
    operators: Sequence[str] = ("mask",),
    spaces: Sequence[str] = SPACES,
    seed: int = 0,
    token_budget: int = TOKEN_BUDGET,
) -> list[Row]:
    """Measure several methods on one batch: rows per sample, method, control, metric, operator, space and bin.

    Metrics are `comprehensiveness` and `sufficiency` in every space, and `log_odds` with the space `probability`. A
    row with `q` set holds one bin, the row with `q` None their mean. Each method comes with the control `reversed`;
    the control `random` is shared by all and stands once, as method `random`, control `random`. An example without an
    evaluable position has one row with the value None in place of each mean.

    Args:
        forward: (n, C) logits of a padded batch, see `perturbed_logits`.
        batch: (B, T) `input_ids`, `attention_mask` and perhaps `token_type_ids`.
        scores: Method -> (B, T) scores; special tokens and padding are not looked at.
        target: (B,) the explained class, fixed for all perturbed inputs.
        special: (B, T) bool, special tokens.
        mask: (B, T) bool, real positions.
        sample_ids: B ids.
        tokens: The ids that perturbed texts are built with.
        bins: Shares q, multiples of 0.001.
        operators: Of `mask`, `delete`, `attention`.
        spaces: Of `probability`, `logit`.
        seed: Of the random control.
        token_budget: See `perturbed_logits`.

    Raises:
        InputError: Shapes, bins, operators, spaces or targets that do not fit.
        MetricError: A score or a value is not finite; names the sample and the method.
    """
    ids = [int(i) for i in torch.as_tensor(sample_ids).tolist()]
    _check(batch, scores, target, special, mask, ids, bins, operators, spaces)
    for operator in operators:
        tokens.check(operator)
    evaluable = (mask.bool() & ~special.bool()).cpu()
    present = [b for b in range(len(ids)) if bool(evaluable[b].any())]
    rankings = [("random", "random"), *((method, control) for method in scores for control in ("none", "reversed"))]

    requests = [Request(b, torch.ones_like(evaluable[b]), operators[0]) for b in present]
    for b in present:
        ranked = _ranked(scores, evaluable[b], b, ids[b], seed)
        kept = [keep for ranking in ranked for keep in keeps(ranking, bins, evaluable[b])]
        requests += [Request(b, keep, operator) for operator in operators for keep in kept]
    values: dict[tuple[str, str], Tensor] = {}
    if present:
        logits = perturbed_logits(
            forward, batch, requests, tokens=tokens, special=special, mask=mask, token_budget=token_budget
        ).double()
        full, perturbed = logits[: len(present)], logits[len(present) :]
        shape = (len(present), len(operators), len(rankings), 2, len(bins), logits.shape[1])
        values = _values(full, perturbed.view(shape), target.cpu()[present], spaces)

    rows: list[Row] = []
    absent = [b for b in range(len(ids)) if b not in present]
    named = [(name, space) for space in spaces for name in ("comprehensiveness", "sufficiency")]
    named += [("log_odds", "probability")] * ("probability" in spaces)
    for name, space in named:
        table = values[name, space].tolist() if present else []
        for (o, operator), (m, (method, control)) in product(enumerate(operators), enumerate(rankings)):
            make = partial(make_row, method=method, control=control, metric=name, operator=operator, space=space)
            for b, of_example in zip(present, table, strict=True):
                rows += [
                    make(ids[b], value=value, q=q) for q, value in zip((*bins, None), of_example[o][m], strict=True)
                ]
            rows += [make(ids[b], value=None) for b in absent]
    return rows


def _ranked(
    scores: Mapping[str, Tensor], evaluable: Tensor, example: int, sample_id: int, seed: int
) -> Iterator[Tensor]:
    """Yield the M rankings of one example: random, then each method and its reversal."""
    yield random_rank(evaluable, seed=seed, sample_id=sample_id)
    for method, values in scores.items():
        row = values[example].detach().cpu()
        if not bool(row[evaluable].isfinite().all()):
            position = int((evaluable & ~row.isfinite()).nonzero()[0])
            reason = f"the score at position {position} is {row[position].item()}"
            raise MetricError(reason, sample_id=sample_id, method=method)
        ranking = rank(row, evaluable)
        yield ranking
        yield reverse(ranking)


def keeps(ranking: Tensor, bins: Sequence[float], evaluable: Tensor) -> Iterator[Tensor]:
    """Yield what stays of one example: without the top k(q) for every bin, then the top k(q) only for every bin."""
    tops = []
    for q in bins:
        top = torch.zeros_like(evaluable)
        top[ranking[: count(q, len(ranking))]] = True
        tops.append(top)
    yield from (~top for top in tops)
    yield from tops


def _values(full: Tensor, perturbed: Tensor, target: Tensor, spaces: Sequence[str]) -> dict[tuple[str, str], Tensor]:
    """Compute all metrics from logits (E, C) and (E, O, M, 2, K, C): (metric, space) -> (E, O, M, K + 1), mean last."""
    if bool(((target < 0) | (target >= full.shape[1])).any()):
        raise InputError(f"targets {target.tolist()} must be classes from 0 to {full.shape[1] - 1}.")

    def of_target(values_full: Tensor, values_perturbed: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        index = target.view(-1, 1, 1, 1, 1, 1).expand(*values_perturbed.shape[:-1], 1)
        chosen = values_perturbed.gather(-1, index).squeeze(-1)
        return values_full.gather(1, target.unsqueeze(1)).view(-1, 1, 1), chosen[:, :, :, 0], chosen[:, :, :, 1]

    values: dict[tuple[str, str], Tensor] = {}
    for space in spaces:
        transform = {"probability": lambda logits: logits.softmax(-1), "logit": lambda logits: logits}[space]
        whole, removed, kept = of_target(transform(full), transform(perturbed))
        values["comprehensiveness", space] = comprehensiveness(whole, removed, per_bin=True)
        values["sufficiency", space] = sufficiency(whole, kept, per_bin=True)
    if "probability" in spaces:
        whole, removed, _ = of_target(full.log_softmax(-1), perturbed.log_softmax(-1))
        values["log_odds", "probability"] = log_odds(whole, removed, per_bin=True)
    return {key: torch.cat([value, value.mean(-1, keepdim=True)], -1) for key, value in values.items()}


def _check(
    batch: Mapping[str, Tensor],
    scores: Mapping[str, Tensor],
    target: Tensor,
    special: Tensor,
    mask: Tensor,
    ids: Sequence[int],
    bins: Sequence[float],
    operators: Sequence[str],
    spaces: Sequence[str],
) -> None:
    if "input_ids" not in batch:
        raise InputError(f"the batch lacks 'input_ids'. It has: {', '.join(batch) or 'nothing'}.")
    shape = batch["input_ids"].shape
    for name, tensor in {
        "special": special,
        "mask": mask,
        **{f"scores of '{m}'": s for m, s in scores.items()},
    }.items():
        if tensor.shape != shape:
            raise InputError(f"{name} has the shape {tuple(tensor.shape)}, expected {tuple(shape)} like input_ids.")
    if target.shape != shape[:1] or len(ids) != shape[0]:
        raise InputError(
            f"target {tuple(target.shape)} and {len(ids)} sample ids do not fit a batch of {shape[0]} examples."
        )
    if not bins or not operators:
        raise InputError(f"bins {list(bins)} and operators {list(operators)}: give at least one of each.")
    for q in bins:
        count(q, 1)
    for space in spaces:
        if space not in SPACES:
            raise unknown("space", space, SPACES)
