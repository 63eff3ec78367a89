"""Does the model depend on what an explanation calls relevant? The metrics that perturb the input (METRICS 2).

Shapes: B examples, T positions, E examples that have evaluable positions, O operators, M rankings (the random control,
then each method and its reversal), S shares, D draws.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from itertools import product
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from calig.pipeline.attribution.windows import Windows
from calig.pipeline.errors import InputError, unknown
from calig.pipeline.metrics.curves import ACCURACY_GRID, GRID, deletion_auc, insertion_auc, perturbation_auc
from calig.pipeline.metrics.draws import DRAWS, infidelity, removal_draws
from calig.pipeline.metrics.names import DEFAULT_METRICS, FAITHFULNESS_METRICS, PERTURBATION_TARGETS
from calig.pipeline.metrics.operators import PerturbationTokens
from calig.pipeline.metrics.perturbation import TOKEN_BUDGET, Forward, Request
from calig.pipeline.metrics.ranking import count, random_rank, random_scores, rank, reverse
from calig.pipeline.metrics.readings import SPACES, Readings, Scale, read_requests
from calig.pipeline.metrics.rows import MetricError, Row, make_row

if TYPE_CHECKING:
    from calig.pipeline.metrics.patches import Perturber

BINS = (0.01, 0.05, 0.1, 0.2, 0.5)  # ERASER's
_IN_BOTH_SPACES = ("comprehensiveness", "sufficiency", "deletion_auc", "insertion_auc")
_WITHOUT_REVERSED = ("positive_auc", "negative_auc", "infidelity")
_OF_THE_KEPT = ("sufficiency", "insertion_auc")
_SHARES = {"deletion_auc": GRID, "insertion_auc": GRID, "positive_auc": ACCURACY_GRID, "negative_auc": ACCURACY_GRID}


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
    tokens: Perturber,
    metrics: Sequence[str] = DEFAULT_METRICS,
    bins: Sequence[float] = BINS,
    operators: Sequence[str] = ("mask",),
    spaces: Sequence[str] = SPACES,
    perturbation_target: str = "prediction",
    labels: Tensor | None = None,
    seed: int = 0,
    token_budget: int = TOKEN_BUDGET,
    scale: Scale = "softmax",
    threshold: float = 0.5,
    windows: Windows | None = None,
) -> list[Row]:
    """Measure several methods on one batch: rows per sample, method, control, metric, operator, space and share.

    A row with `q` set holds one point, the row with `q` None the number: the mean over the bins, or the area under the
    curve. An example without an evaluable position has one row with the value None in place of each number. Everything
    that is asked of the batch is one list of requests, so identical inputs run once.

    | metric | spaces | `q` | controls |
    |---|---|---|---|
    | `comprehensiveness`, `sufficiency` | ``spaces`` | ``bins`` | `none`, `reversed`, `random` |
    | `log_odds` (if ``spaces`` has it) | `probability` | ``bins`` | `none`, `reversed`, `random` |
    | `deletion_auc`, `insertion_auc` | ``spaces`` | 0, .1, ..., 1 | `none`, `reversed`, `random` |
    | `positive_auc`, `negative_auc` | None | 0, .1, ..., .9 | `none`, `random` |
    | `infidelity` | None | - | `none`, `random` |

    The control `random` is shared by all methods and stands once, as method `random`, control `random`.
    `positive_auc` and `negative_auc` remove in the method's order and in its exact reversal, so that each is the
    other's control `reversed`, which is not written twice; a random order serves both. Their rows with `q` are 1 where
    the prediction is still the reference and else 0; at q = 0 they hold the base accuracy. Infidelity reads the
    scores, not their ranking, and its scale b has either sign, so a reversal would say nothing; its control `random`
    has random scores. It is always in logits, whatever ``spaces`` says.

    Args:
        forward: (n, C) logits of a padded batch, see `perturbed_logits`.
        batch: (B, T) `input_ids`, `attention_mask` and perhaps `token_type_ids`; or `pixel_values` (B, C, H, W).
        scores: Method -> (B, T) scores; special tokens and padding are not looked at.
        target: (B,) the explained class, fixed for all perturbed inputs.
        special: (B, T) bool, special tokens.
        mask: (B, T) bool, real positions.
        sample_ids: B ids.
        tokens: The ids that perturbed texts are built with; of images a `PatchPerturbation`.
        metrics: Of `FAITHFULNESS_METRICS`.
        bins: Shares q, multiples of 0.001.
        operators: Of `mask`, `delete`, `attention`; of images `blur`, too.
        spaces: Of `probability`, `logit`.
        perturbation_target: What `positive_auc` and `negative_auc` compare the prediction with: the `prediction` for
            the whole input, or the `label`.
        labels: (B,) classes, for the perturbation target `label`; with `sigmoid` 1 where the explained label is given.
        seed: Of the random control and of the draws of infidelity.
        token_budget: See `perturbed_logits`.
        scale: What makes probabilities of logits: `softmax` over classes, or `sigmoid` of each label by itself; the
            prediction is then whether the explained label reaches the threshold.
        threshold: A probability, for `sigmoid`.
        windows: Of long documents, how they are read; see `perturbed_logits`.

    Raises:
        InputError: Metrics, shapes, bins, operators, spaces, targets or labels that do not fit.
        MetricError: A score or a value is not finite; names the sample and the method.
    """
    ids = [int(i) for i in torch.as_tensor(sample_ids).tolist()]
    metrics = list(dict.fromkeys(metrics))
    texts = isinstance(tokens, PerturbationTokens)
    _check(batch if texts else None, scores, target, special, mask, ids, bins, operators, spaces)
    _check_metrics(metrics, perturbation_target, labels, len(ids))
    for operator in operators:
        tokens.check(operator)
    named = list(_named(metrics, spaces))
    if without := [name for name in metrics if name not in {known for known, _ in named}]:
        raise InputError(f"{', '.join(without)} has no value in the spaces {list(spaces)}: add 'probability' to them.")
    evaluable = (mask.bool() & ~special.bool()).cpu()
    present = [b for b in range(len(ids)) if bool(evaluable[b].any())]
    labels = labels if perturbation_target == "label" else None
    if present:
        plan = _plan(scores, evaluable, present, ids, metrics, bins, operators, seed)
        readings = read_requests(
            forward,
            batch,
            plan.requests,
            target=target,
            labels=labels,
            tokens=tokens,
            special=special,
            mask=mask,
            token_budget=token_budget,
            windows=windows,
            compared=any(space != "logit" for name, space in named if name != "infidelity"),
            scale=scale,
            threshold=threshold,
        )
        reference = readings.predicted[: len(present)] if labels is None else labels.cpu()[present]

    rows: list[Row] = []
    absent = [b for b in range(len(ids)) if b not in present]
    for name, space in named:
        controls = ("none",) if name in _WITHOUT_REVERSED else ("none", "reversed")
        rankings = [("random", "random"), *product(scores, controls)]
        shares = () if name == "infidelity" else _SHARES.get(name, bins)
        table = _values(name, space, plan, readings, reference).tolist() if present else []
        for (o, operator), (m, (method, control)) in product(enumerate(operators), enumerate(rankings)):
            make = partial(make_row, method=method, control=control, metric=name, operator=operator, space=space)
            for b, of_example in zip(present, table, strict=True):
                rows += [
                    make(ids[b], value=value, q=q) for q, value in zip((*shares, None), of_example[o][m], strict=True)
                ]
            rows += [make(ids[b], value=None) for b in absent]
    return rows


def _named(metrics: Sequence[str], spaces: Sequence[str]) -> Iterator[tuple[str, str | None]]:
    """Yield each metric with the spaces it is measured in."""
    yield from ((name, space) for space in spaces for name in metrics if name in _IN_BOTH_SPACES)
    for name in metrics:
        if name == "log_odds" and "probability" in spaces:
            yield name, "probability"
        elif name in ("infidelity", "positive_auc", "negative_auc"):  # on one scale only
            yield name, None


class _Plan(NamedTuple):
    """What to run, and where each metric finds its points among the requests.

    Attributes:
        requests: The E whole inputs, then everything perturbed.
        points: Metric -> (E, O, M, S) requests.
        removed: E tensors (D, N), the draws of infidelity.
        scores: E tensors (1 + methods, N), the scores of the random control and of each method.
        drawn: (E, O, D) the requests of the draws.
    """

    requests: list[Request]
    points: dict[str, Tensor]
    removed: list[Tensor]
    scores: list[Tensor]
    drawn: Tensor


def _plan(
    scores: Mapping[str, Tensor],
    evaluable: Tensor,
    present: Sequence[int],
    ids: Sequence[int],
    metrics: Sequence[str],
    bins: Sequence[float],
    operators: Sequence[str],
    seed: int,
) -> _Plan:
    shares = {name: _SHARES.get(name, bins) for name in metrics if name != "infidelity"}
    width = evaluable.shape[1]
    requests = [Request(b, torch.ones_like(evaluable[b]), operators[0]) for b in present]
    columns: dict[str, list[list[int]]] = {name: [] for name in shares}
    starts: list[int] = []
    removed, scored, drawn = [], [], []
    for b in present:
        n = int(evaluable[b].sum())
        rankings = list(_ranked(scores, evaluable[b], b, ids[b], seed))
        counts = {(name in _OF_THE_KEPT, count(q, n)) for name in shares for q in shares[name]}
        column = {key: i for i, key in enumerate(sorted(counts))}  # methods ask for the same counts: once each
        for name in shares:
            columns[name].append([column[name in _OF_THE_KEPT, count(q, n)] for q in shares[name]])
        keeps = []
        for ranking in rankings:
            place = torch.full((width,), n).scatter_(0, ranking, torch.arange(n))
            keeps += [place < k if kept else place >= k for kept, k in column]
        for operator in operators:
            starts += [len(requests) + len(column) * m for m in range(len(rankings))]
            requests += [Request(b, keep, operator) for keep in keeps]
        if "infidelity" in metrics:
            removed.append(removal_draws(n, seed=seed, sample_id=ids[b]))
            by_chance = random_scores(rankings[0], width, seed=seed, sample_id=ids[b])
            of_methods = [by_chance, *(values[b].detach().cpu() for values in scores.values())]
            scored.append(torch.stack([values[evaluable[b]].double() for values in of_methods]))
            stays = torch.ones(DRAWS, width, dtype=torch.bool)
            stays[:, evaluable[b]] = ~removed[-1]
            for operator in operators:
                drawn.append(len(requests))
                requests += [Request(b, keep, operator) for keep in stays]
    first = torch.tensor(starts).view(len(present), len(operators), -1, 1)
    points = {name: first + torch.tensor(columns[name]).view(len(present), 1, 1, -1) for name in shares}
    draws = torch.tensor(drawn, dtype=torch.long).view(-1, len(operators), 1) + torch.arange(DRAWS)
    return _Plan(requests, points, removed, scored, draws)


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


def _values(name: str, space: str | None, plan: _Plan, readings: Readings, reference: Tensor) -> Tensor:
    """Compute one metric: (E, O, rankings of the metric, S + 1), the number last."""
    whole = readings[torch.arange(len(reference))]
    if name == "infidelity":
        drops = whole.logit.view(-1, 1, 1) - readings[plan.drawn].logit
        examples = zip(plan.removed, plan.scores, drops, strict=True)
        return torch.stack([torch.stack([infidelity(r, s, drop) for drop in of]) for r, s, of in examples]).unsqueeze(3)
    at = readings[plan.points[name]]
    if space is None:
        correct = at.correct(reference.view(-1, 1, 1, 1))
        # The random order stands first; behind it methods and their reversals take turns.
        first = 1 if name == "positive_auc" else 2
        points = torch.cat([correct[:, :, :1], correct[:, :, first::2]], 2)
        number = perturbation_auc(points)
    elif name in ("deletion_auc", "insertion_auc"):
        points = at.value(space)
        number = deletion_auc(points) if name == "deletion_auc" else insertion_auc(points)
    elif name == "log_odds":
        points = log_odds(whole.log_probability.view(-1, 1, 1), at.log_probability, per_bin=True)
        number = points.mean(-1)
    else:
        compute = comprehensiveness if name == "comprehensiveness" else sufficiency
        points = compute(whole.value(space).view(-1, 1, 1), at.value(space), per_bin=True)
        number = points.mean(-1)
    return torch.cat([points, number.unsqueeze(-1)], -1)


def _check_metrics(metrics: Sequence[str], perturbation_target: str, labels: Tensor | None, examples: int) -> None:
    if not metrics:
        raise InputError(f"metrics is empty: give at least one of {', '.join(FAITHFULNESS_METRICS)}.")
    for name in metrics:
        if name not in FAITHFULNESS_METRICS:
            raise unknown("faithfulness metric", name, FAITHFULNESS_METRICS)
    if perturbation_target not in PERTURBATION_TARGETS:
        raise unknown("perturbation target", perturbation_target, PERTURBATION_TARGETS)
    if perturbation_target == "label" and (labels is None or tuple(labels.shape) != (examples,)):
        given = "none" if labels is None else f"the shape {tuple(labels.shape)}"
        raise InputError(
            f"the perturbation target 'label' needs one label for each of the {examples} examples; given {given}. "
            "Give labels=..., or use 'prediction'."
        )


def _check(
    batch: Mapping[str, Tensor] | None,
    scores: Mapping[str, Tensor],
    target: Tensor,
    special: Tensor,
    mask: Tensor,
    ids: Sequence[int],
    bins: Sequence[float],
    operators: Sequence[str],
    spaces: Sequence[str],
) -> None:
    if batch is not None and "input_ids" not in batch:
        raise InputError(f"the batch lacks 'input_ids'. It has: {', '.join(batch) or 'nothing'}.")
    # Of images, what the engine said of the positions is all there is to compare with.
    shape, like = (special.shape, "special") if batch is None else (batch["input_ids"].shape, "input_ids")
    for name, tensor in {
        "special": special,
        "mask": mask,
        **{f"scores of '{m}'": s for m, s in scores.items()},
    }.items():
        if tensor.shape != shape:
            raise InputError(f"{name} has the shape {tuple(tensor.shape)}, expected {tuple(shape)} like {like}.")
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
