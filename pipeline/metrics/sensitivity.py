"""Does an explanation hold still while its input hardly moves? sensitivity_max (Yeh et al. 2019; METRICS 2).

Shapes: B examples, R draws, T positions, N content positions of one example, E width of the word embedding.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from calig.pipeline.attribution.api import attribute
from calig.pipeline.attribution.model import ExplainableModel, UnsupportedModelError
from calig.pipeline.attribution.noise import embedding_noise, embedding_width
from calig.pipeline.attribution.result import Attribution
from calig.pipeline.errors import InputError
from calig.pipeline.metrics.rows import MetricError, Row, make_row

DRAWS = 10
RADIUS = 0.02


def sensitivity_max(scores: Tensor, perturbed: Tensor, mask: Tensor) -> Tensor:
    """Compute the largest relative change of an explanation: `max_r |s_r - s| / |s|`; lower is better.

    Args:
        scores: (B, T) of the input.
        perturbed: (B, R, T) of the input with noise.
        mask: (B, T) bool, real positions; others are not looked at.

    Returns:
        (B,) float64, NaN where every score of the input is 0, so that nothing can be relative to it.

    Raises:
        InputError: The shapes do not fit.

    Example:
        >>> every = torch.ones(1, 2, dtype=torch.bool)
        >>> sensitivity_max(torch.tensor([[3.0, 4.0]]), torch.tensor([[[3.0, 4.5], [3.0, 3.0]]]), every)
        tensor([0.2000], dtype=torch.float64)
    """
    if scores.shape != mask.shape or perturbed.ndim != 3 or perturbed[:, 0].shape != scores.shape:
        raise InputError(
            f"scores {tuple(scores.shape)} and mask {tuple(mask.shape)} must be (B, T), perturbed "
            f"{tuple(perturbed.shape)} (B, R, T) with at least one draw."
        )
    kept = mask.bool()
    base = torch.where(kept, scores, 0.0).double()
    moved = torch.where(kept.unsqueeze(1), perturbed, 0.0).double()
    size = base.norm(dim=-1)
    change = (moved - base.unsqueeze(1)).norm(dim=-1).amax(dim=1)
    return torch.where(size > 0, change / size, torch.nan)


def draw_noise(
    count: int, width: int, *, seed: int, sample_id: int, draws: int = DRAWS, radius: float = RADIUS
) -> Tensor:
    """Draw noise uniformly from the L-infinity ball, from the seed and the sample id alone.

    Args:
        count: N content positions.
        width: E.
        seed: The run's seed.
        sample_id: The sample's id.
        draws: R.
        radius: Of the ball.

    Returns:
        (R, N, E) in [-radius, radius) on the CPU; the same in every batch, on every process and device.
    """
    own = random.Random(f"sensitivity/{seed}/{sample_id}").getrandbits(63)
    generator = torch.Generator().manual_seed(own)
    return (2 * torch.rand(draws, count, width, generator=generator) - 1) * radius


def sensitivity_rows(
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
    draws: int = DRAWS,
    radius: float = RADIUS,
) -> tuple[list[Row], list[MetricError]]:
    """Measure `sensitivity_max` of several methods on one batch: a row per sample and method.

    The value is None where all scores of the input are 0. There are no controls: a ranking that does not look at the
    input at all is perfectly stable, so the number only means something beside a faithfulness metric.

    Args:
        model: The model that is explained.
        batch: What was explained: `input_ids` (B, T) and what else the model's forward takes.
        scores: Method -> its (B, T) scores.
        target: (B,) the explained class; it stays, also where noise changes the prediction.
        special: (B, T) bool, special tokens.
        mask: (B, T) bool, real positions.
        sample_ids: B ids.
        options: Method -> the options that it ran with.
        seed: Of the noise.
        draws: R.
        radius: Of the L-infinity ball.

    Returns:
        The rows, and an error for each sample and method whose scores under noise are not finite.

    Raises:
        UnsupportedModelError: The model has no word embedding that runs.
    """
    rows: list[Row] = []
    errors: list[MetricError] = []
    for method, own in scores.items():
        perturbed = noisy_scores(
            model,
            batch,
            method,
            target=target,
            special=special,
            mask=mask,
            sample_ids=sample_ids,
            options=options.get(method, {}),
            seed=seed,
            draws=draws,
            radius=radius,
        )
        finite = perturbed.isfinite().flatten(1).all(dim=1).tolist()
        for sample_id, value, good in zip(
            sample_ids, sensitivity_max(own, perturbed, mask).tolist(), finite, strict=True
        ):
            if good:
                rows.append(make_row(sample_id, method, "none", "sensitivity_max", value if value == value else None))
            else:
                reason = "a score under the noise of sensitivity_max is not finite"
                errors.append(MetricError(reason, sample_id=sample_id, method=method))
    return rows, errors


def noisy_scores(
    model: ExplainableModel,
    batch: Mapping[str, Any],
    method: str,
    *,
    target: Tensor,
    special: Tensor,
    mask: Tensor,
    sample_ids: Sequence[int],
    options: Mapping[str, Any],
    seed: int = 0,
    draws: int = DRAWS,
    radius: float = RADIUS,
) -> Tensor:
    """Explain a batch again under noise on its word embeddings; of images, on the pixels that the model takes.

    Only content positions get noise: special tokens are the frame that a baseline keeps, too, and padding is nothing.
    As many rows are explained at once as the batch has, so the memory that it needs is that of the first explanation.

    Args:
        model: See `sensitivity_rows`, and so for the others.
        batch: (B, T) inputs.
        method: Name of the method.
        target: (B,).
        special: (B, T) bool.
        mask: (B, T) bool.
        sample_ids: B ids.
        options: Of the method.
        seed: Of the noise.
        draws: R.
        radius: Of the L-infinity ball.

    Returns:
        (B, R, T) scores.
    """
    size = len(sample_ids)
    content = mask & ~special
    if "input_ids" not in batch:
        return _with_noisy_pixels(
            model,
            batch,
            method,
            target=target,
            special=special,
            sample_ids=sample_ids,
            options=options,
            seed=seed,
            draws=draws,
            radius=radius,
        )
    width = embedding_width(model, batch["input_ids"])
    noise = [
        draw_noise(int(some.sum()), width, seed=seed, sample_id=sample_id, draws=draws, radius=radius)
        for some, sample_id in zip(content, sample_ids, strict=True)
    ]
    perturbed = []
    for part in torch.arange(size * draws).split(max(1, size)):
        rows, of_draw = part // draws, part % draws
        some = take_rows(batch, rows, size)
        added = torch.cat([noise[b][r] for b, r in zip(rows.tolist(), of_draw.tolist(), strict=True)])
        with model.session(), embedding_noise(model, some["input_ids"], content[rows], added) as numbered:
            again = attribute(
                model,
                some | {"input_ids": numbered},
                method,
                target=target[rows],
                special_tokens_mask=special[rows],
                **options,
            )
        assert isinstance(again, Attribution)  # one target per example
        perturbed.append(again.scores)
    return torch.cat(perturbed).view(size, draws, -1)


def _with_noisy_pixels(
    model: ExplainableModel,
    batch: Mapping[str, Any],
    method: str,
    *,
    target: Tensor,
    special: Tensor,
    sample_ids: Sequence[int],
    options: Mapping[str, Any],
    seed: int,
    draws: int,
    radius: float,
) -> Tensor:
    """See `noisy_scores`."""
    size = len(sample_ids)
    with model.session():
        key = model.prepare(batch).pixels
    if key is None:
        raise UnsupportedModelError("sensitivity_max puts noise on word embeddings or pixels; the batch has neither.")
    channels, height, width = batch[key].shape[1:]
    noise = [
        draw_noise(channels * height, width, seed=seed, sample_id=sample_id, draws=draws, radius=radius)
        for sample_id in sample_ids
    ]
    perturbed = []
    for part in torch.arange(size * draws).split(max(1, size)):
        rows = part // draws
        some = take_rows(batch, rows, size)
        pairs = zip(rows.tolist(), (part % draws).tolist(), strict=True)
        added = torch.stack([noise[b][r].view(channels, height, width) for b, r in pairs])
        noisy = some | {key: some[key] + added.to(some[key])}
        again = attribute(model, noisy, method, target=target[rows], special_tokens_mask=special[rows], **options)
        assert isinstance(again, Attribution)  # one target per example
        perturbed.append(again.scores)
    return torch.cat(perturbed).view(size, draws, -1)


def take_rows(batch: Mapping[str, Any], rows: Tensor, size: int) -> dict[str, Any]:
    """The rows (N,) of everything in a batch of `size` examples that has one per example."""
    return {
        key: value[rows.to(value.device)] if isinstance(value, Tensor) and value.ndim and len(value) == size else value
        for key, value in batch.items()
    }
