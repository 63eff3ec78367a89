"""Rows of the metrics of object masks: pointing game, mask AUPRC, mask IoU, and their controls (METRICS 3, images).

Shapes: B examples, T positions, N patches among them, H x W pixels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from calig.pipeline.attribution.pixels import to_pixels
from calig.pipeline.errors import InputError
from calig.pipeline.metrics.localisation import centre_prior, mask_auprc, mask_iou, pointing_game
from calig.pipeline.metrics.ranking import random_rank, random_scores
from calig.pipeline.metrics.rows import MetricError, Row, make_row

METRICS_OF_MASKS = {"pointing_game": pointing_game, "mask_auprc": mask_auprc, "mask_iou": mask_iou}
CENTRE = "centre"


def localisation_rows(
    scores: Mapping[str, Tensor],
    object_mask: Tensor,
    *,
    special: Tensor,
    grid: tuple[int, int],
    sample_ids: Sequence[int],
    seed: int = 0,
) -> list[Row]:
    """Measure several methods on one batch against object masks: a row per sample, method, control and metric.

    Scores of patches become maps of the mask's size by bilinear interpolation, as in Chefer et al. 2021. Each method
    comes with the control `reversed` (the negated map). The controls `random` (random scores) and `centre`
    (`centre_prior`, which knows nothing but that objects are in the middle) stand once, as methods of that name.
    Examples whose mask is unknown or empty have rows with the value None, and so has mask_auprc where the object is
    everything.

    Args:
        scores: Method -> (B, T) scores.
        object_mask: (B, H, W) 1 on the object, 0 beside it, -1 where nothing is known of the example.
        special: (B, T) bool, positions that are no patches.
        grid: Rows and columns of the patches.
        sample_ids: B ids.
        seed: Of the random control.

    Raises:
        InputError: Shapes that do not fit.
        MetricError: A score is not finite; names the sample and the method.
    """
    ids = [int(i) for i in torch.as_tensor(sample_ids).tolist()]
    sizes = {"object_mask": len(object_mask), **{f"scores of '{name}'": len(own) for name, own in scores.items()}}
    for name, size in sizes.items():
        if size != len(ids):
            raise InputError(f"{name} has {size} examples, but there are {len(ids)} sample ids.")
    if object_mask.dim() != 3:
        raise InputError(f"object_mask has the shape {tuple(object_mask.shape)}, expected (B, H, W).")
    content, masks = ~special.cpu().bool(), object_mask.cpu()
    height, width = (int(side) for side in masks.shape[1:])
    prior = centre_prior(height, width)
    rows: list[Row] = []
    for b, sample_id in enumerate(ids):
        known = bool((masks[b] >= 0).all()) and bool((masks[b] > 0).any())
        by_chance = random_scores(
            random_rank(content[b], seed=seed, sample_id=sample_id), content.shape[1], seed=seed, sample_id=sample_id
        )
        maps: list[tuple[str, str, Tensor | None]] = [("random", "random", by_chance), (CENTRE, CENTRE, None)]
        for method, values in scores.items():
            own = values[b].detach().cpu().float()
            if not bool(own[content[b]].isfinite().all()):
                raise MetricError("the score of a patch is not finite", sample_id=sample_id, method=method)
            maps += [(method, "none", own), (method, "reversed", -own)]
        for method, control, signed in maps:
            heat = prior if signed is None else to_pixels(signed[content[b]], grid, (height, width))
            for metric, measure in METRICS_OF_MASKS.items():
                undefined = not known or (metric == "mask_auprc" and bool((masks[b] > 0).all()))
                value = None if undefined else measure(heat, masks[b])
                rows.append(make_row(sample_id, method, control, metric, value))
    return rows
