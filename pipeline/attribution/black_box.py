"""Captum's black-box methods on the presence of tokens: they see the model through its outputs alone (METHODS 5.7).

An absent token has the baseline's embedding output. Shapes: T tokens, N content tokens of one example, P perturbations.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from calig.pipeline.attribution.inside import Ends
from calig.pipeline.attribution.model import ExplainableModel, Inputs
from calig.pipeline.attribution.objective import Objective
from calig.pipeline.errors import InputError

Explain = Callable[[Any, Callable[[Tensor], Tensor], Tensor, int], Tensor]
"""Of `captum.attr`, the objective of (P, N) presences, (1, N) ones and how many presences fit into a pass; (1, N)."""


def explain_presence(
    model: ExplainableModel, inputs: Inputs, objective: Objective, ends: Ends, explain: Explain, seed: int
) -> Tensor:
    """Explain every example by the presence of its content tokens.

    Args:
        model: In an open session.
        inputs: B examples.
        objective: What is explained.
        ends: With layer 0 kept.
        explain: The method.
        seed: Of its draws, which depend on this and the example's own input alone, and touch no global state.

    Returns:
        (B, T), 0 at special tokens and padding.

    Raises:
        InputError: Captum is not installed.
    """
    try:
        import captum.attr
    except ImportError as error:
        raise InputError(
            "this method runs through Captum: pip install -e '.[compare]' in the folder of calig."
        ) from error
    origin, end = ends.origin[0], ends.end[0]
    assert origin is not None and end is not None  # the caller kept them
    scores = torch.zeros(inputs.mask.shape, device=model.device)
    for row in range(len(inputs)):
        positions = inputs.content[row].nonzero().flatten()
        if not len(positions):
            continue

        def value(presence: Tensor, row: int = row, positions: Tensor = positions) -> Tensor:
            rows = torch.full((len(presence),), row, device=model.device)
            state = end[rows].clone()
            weight = presence.to(state)[..., None]
            state[:, positions] = origin[row, positions] + weight * (end[row, positions] - origin[row, positions])
            with torch.no_grad():
                return objective(model.trace(inputs.select(rows), state=state).output, rows)

        def in_passes(presence: Tensor) -> Tensor:
            places = torch.arange(len(presence), device=model.device)
            return torch.cat(model.budget.run(places, inputs.mask.shape[1], lambda part: value(presence[part])))

        ones = torch.ones(1, len(positions), device=model.device)
        devices = [model.device] if model.device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices):
            torch.random.default_generator.manual_seed(inputs.seed_of(row, seed))
            if devices:
                torch.cuda.manual_seed(inputs.seed_of(row, seed))
            found = explain(captum.attr, in_passes, ones, model.budget.rows(inputs.mask.shape[1]))
        scores[row, positions] = found.detach().reshape(-1).to(scores)
    return scores
