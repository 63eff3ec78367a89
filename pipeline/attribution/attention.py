"""Recording attention maps through the attention interface of transformers.

The recorder wraps the family's own eager function, so that scale, soft cap, windows, repeated key-value heads and
position biases stay the model's business. It is registered together with a mask function: without one, transformers
passes no mask and causality is lost without a word.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import eager_mask

RECORDER = "calig_recorder"
_maps: ContextVar[list[Tensor] | None] = ContextVar("calig_attention_maps", default=None)


def _record(module: nn.Module, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
    output, weights = eager_function(module)(module, *args, **kwargs)
    maps = _maps.get()
    if maps is not None:
        maps.append(weights)
    return output, weights


def eager_function(module: nn.Module) -> Any:
    """The eager attention function of an attention module's family."""
    # A user's subclass lives in another file than the family's eager function: look along the ancestors.
    for cls in type(module).__mro__:
        function = getattr(sys.modules.get(cls.__module__), "eager_attention_forward", None)
        if function is not None:
            return function
    raise AttributeError(f"no eager_attention_forward beside {type(module).__name__}")


AttentionInterface.register(RECORDER, _record)
AttentionMaskInterface.register(RECORDER, eager_mask)


def uses_attention_interface(model: PreTrainedModel | None) -> bool:
    """Whether the recorder can be switched on in this model: tried, verified, and undone."""
    if model is None:
        return False
    previous = model.config._attn_implementation
    try:
        model.set_attn_implementation(RECORDER)
        return model.config._attn_implementation == RECORDER
    except (ValueError, ImportError):
        return False
    finally:
        model.set_attn_implementation(previous or "eager")


@contextmanager
def recorded_attention(model: PreTrainedModel) -> Iterator[list[Tensor]]:
    """Within the context, every attention call of the model appends its (B, H, T, T) probabilities to the list.

    They come in call order, are in the graph of the output, and are exactly what multiplies the values. The model's
    own implementation is back afterwards, also after an exception.
    """
    previous = model.config._attn_implementation
    maps: list[Tensor] = []
    token = _maps.set(maps)
    try:
        model.set_attn_implementation(RECORDER)
        yield maps
    finally:
        _maps.reset(token)
        model.set_attn_implementation(previous or "eager")
