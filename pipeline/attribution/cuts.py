"""Whether a layer's state is all that the rest of the network sees: checked by running it, once per model.

A stack of blocks is found by its shape alone. If something is carried past the blocks (a residual added outside them, a
convolution on the embedding, a head that mixes all layers), the state between them does not decide the output, and
attributions at that layer would be wrong without a word.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from calig.pipeline.attribution.structure import candidates
from calig.pipeline.attribution.wrapping import UnsupportedModelError

if TYPE_CHECKING:
    from calig.pipeline.attribution.model import ExplainableModel


@torch.no_grad()
def require_cuts(
    model: ExplainableModel, batch: Mapping[str, Any], output: Any, states: Mapping[int, Tensor | None]
) -> None:
    """Put the states of another pass into a pass of x, and ask for that pass's output.

    Args:
        model: In an open session; it remembers which layers hold.
        batch: The forward's arguments for one example x.
        output: What the other pass (of the baseline x') returned for this example in its first row.
        states: The other pass's states per layer, (N, T, D) with this example in the first row.

    Raises:
        UnsupportedModelError: The output does not follow the state of some layer.
    """
    expected = [value[:1] for value in _values(output)]
    if not all(value.isfinite().all() for value in expected):
        return  # such an example says nothing; its own scores report it
    for layer, state in states.items():
        if layer in model.cuts or state is None:
            continue
        again = model.trace(batch, start=layer, state=state[:1])
        for wanted, found in zip(expected, _values(again.output), strict=True):
            if not _same(wanted, found[:1]):
                where = "enters block 1" if layer == 0 else f"leaves block {layer}"
                raise UnsupportedModelError(
                    f"what {where} of '{model.structure.family}' is not all that the rest of the network sees: with "
                    "the baseline's state put there, the output is not the baseline's. Blocks were taken to be the "
                    f"{len(model.structure.blocks)} {type(model.structure.blocks[0]).__name__}; if they are others, "
                    f"name them with `blocks=`. Containers in this model: {candidates(model.module)}."
                )
        model.cuts.add(layer)


def _values(output: Any) -> list[Tensor]:
    items: Sequence[Any]
    if isinstance(output, Mapping):
        items = list(output.values())
    elif isinstance(output, tuple | list):
        items = output
    else:
        items = [output, getattr(output, "logits", None)]
    return [item for item in items if isinstance(item, Tensor) and item.is_floating_point() and item.ndim > 0]


def _same(wanted: Tensor, found: Tensor) -> bool:
    # Wide enough for other kernels at another batch size, also in TF32; what is carried past changes far more.
    tolerance = 0.01 if wanted.element_size() >= 4 else 0.1
    scale = max(0.01, float(wanted.abs().max()))
    return wanted.shape == found.shape and bool((wanted - found).abs().max() <= tolerance * scale)
