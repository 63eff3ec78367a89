"""Is the sensitivity to a concept more than that to random examples? The tests of METHODS 4.2.

Shapes: K sets, n examples of a set, N inputs, L blocks, D width, V vectors.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from calig.pipeline.attribution.concepts import activation_vectors
from calig.pipeline.concept_rows import LEVEL, ConceptRow
from calig.pipeline.errors import InputError
from calig.pipeline.metrics.welch import welch_test


def chosen_layers(layers: Sequence[int] | None, depth: int) -> list[int]:
    """The layers to test; None stands for all of `0..depth-1`.

    Raises:
        InputError: One of them is not a layer in front of a block.
    """
    if layers is None:
        return list(range(depth))
    for layer in layers:
        if not 0 <= layer < depth:
            raise InputError(
                f"concepts.layers={list(layers)} names layer {layer}; the model has {depth} blocks, so layers 0 (the "
                f"embedding output) to {depth - 1} have a block behind them."
            )
    return sorted(layers)


def concept_rows(
    concepts: Mapping[str, Tensor],
    random: Tensor,
    gradients: Tensor,
    classes: Mapping[str, Tensor],
    *,
    layers: Sequence[int],
    seed: int = 0,
) -> list[ConceptRow]:
    """Test every concept at every layer for every class.

    A concept has one vector for each random set k: its draw k against that set. What it is compared with are the
    vectors between all pairs of random sets, each in both directions: which of the two is called the concept is
    arbitrary, and with either alone the mean of their shares would be a matter of chance.

    Args:
        concepts: Name -> (K, n, L, D) pooled states of its K draws.
        random: (K, n, L, D) of the random sets.
        gradients: (N, L, D) attention-weighted gradients of the inputs, see `weighted_gradients`.
        classes: Name -> (N,) true on the inputs that are predicted as it.
        layers: Layers to test; p-values are multiplied by their number (Bonferroni).
        seed: Of the cuts into fitted and held-out examples.

    Returns:
        Rows by concept, class and layer; classes without inputs have none.
    """
    first, second = zip(*itertools.combinations(range(len(random)), 2), strict=True)
    found: dict[tuple[str, str, int], ConceptRow] = {}
    for layer in layers:
        null = activation_vectors(random[list(first), :, layer], random[list(second), :, layer], seed=seed).vectors
        both_ways = torch.cat([null, -null])
        for concept, draws in concepts.items():
            vectors, accuracy = activation_vectors(draws[:, :, layer], random[:, :, layer], seed=seed)
            for name, chosen in classes.items():
                if not chosen.any():
                    continue
                own = gradients[chosen, layer].double() @ vectors.T
                other = gradients[chosen, layer].double() @ both_ways.T
                shares, random_shares = _positive_shares(own), _positive_shares(other)
                t, _, p = welch_test(shares, random_shares)
                corrected = min(1.0, p * len(layers))
                found[concept, name, layer] = ConceptRow(
                    concept,
                    layer,
                    name,
                    share=sum(shares) / len(shares),
                    sensitivity=float(own.mean()),
                    random_share=sum(random_shares) / len(random_shares),
                    t=t,
                    p=p,
                    p_bonferroni=corrected,
                    significant=corrected < LEVEL,
                    cav_accuracy=float(accuracy.mean()),
                    inputs=int(chosen.sum()),
                )
    return [
        found[concept, name, layer]
        for concept in concepts
        for name in classes
        for layer in layers
        if (concept, name, layer) in found
    ]


def _positive_shares(sensitivity: Tensor) -> list[float]:
    """V shares of the inputs with S > 0, from (N, V)."""
    return (sensitivity > 0).double().mean(dim=0).tolist()
