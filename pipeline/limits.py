"""Which samples an expensive metric, operator or method is used on."""

from __future__ import annotations

import random
from collections.abc import Iterable, Mapping


def limited(ids: Iterable[int], limits: Mapping[str, int | None], seed: int) -> dict[str, frozenset[int]]:
    """Choose the samples that each metric, operator or method with a limit is used on.

    The choice depends on the set of ids and the seed alone: not on batches, processes, or what is done already. A
    smaller limit chooses among the samples of a larger one, so that metrics can be compared sample by sample.

    Args:
        ids: Of all samples that are explained.
        limits: Name -> number of samples; None is no limit.
        seed: The run's seed.

    Example:
        >>> chosen = limited(range(9), {"infidelity": 3, "randomisation": 2, "attention": None}, seed=0)
        >>> {name: len(some) for name, some in chosen.items()}, chosen["randomisation"] < chosen["infidelity"]
        ({'infidelity': 3, 'randomisation': 2}, True)
    """
    order = sorted(set(ids))
    random.Random(f"limits/{seed}").shuffle(order)
    return {name: frozenset(order[:count]) for name, count in limits.items() if count is not None}
