"""Recording attention maps, and hiding positions from attention, through the attention interface of transformers.

The functions registered here wrap the family's own eager function, so that scale, soft cap, windows, repeated key-value
heads and position biases stay the model's business. They are registered together with a mask function: without one,
transformers passes no mask and causality is lost without a word.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import eager_mask

from calig.pipeline.attribution.wrapping import UnsupportedModelError
from calig.pipeline.errors import InputError

RECORDER = "calig_recorder"
_maps: ContextVar[list[Tensor] | None] = ContextVar("calig_attention_maps", default=None)
_kept: ContextVar[Tensor | None] = ContextVar("calig_kept_keys", default=None)


def _attend(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Any:
    mask = args[0] if args else kwargs.pop("attention_mask", None)
    output, weights = eager_function(module)(module, query, key, value, _finite(_hide(mask, key)), *args[1:], **kwargs)
    maps = _maps.get()
    if maps is not None:
        maps.append(weights)
    return output, weights


def _hide(mask: Tensor | None, key: Tensor) -> Tensor | None:
    """An additive mask that also hides the keys (N, H, T, D) outside the positions kept by `hidden_keys`."""
    keep = _kept.get()
    if keep is None:
        return mask
    if (key.shape[0], key.shape[-2]) != keep.shape:
        raise InputError(
            f"hidden_keys got a mask of shape {tuple(keep.shape)}; the pass has {key.shape[0]} rows of {key.shape[-2]} "
            "positions."
        )
    hidden = torch.zeros_like(keep, dtype=key.dtype, device=key.device)
    hidden = hidden.masked_fill(~keep.to(key.device), _lowest(key.dtype))[:, None, None]
    return hidden if mask is None else mask + hidden


def _finite(mask: Tensor | None) -> Tensor | None:
    # Two masks on one entry overflow, and the eager softmax runs in float32, where the minimum of float64 does too: a
    # row in which no key is left would not be a number. Nobody reads such a row, but zero times NaN is NaN.
    if mask is None or not mask.is_floating_point():
        return mask
    return mask.clamp_min(_lowest(mask.dtype))


def _lowest(dtype: torch.dtype) -> float:
    return max(torch.finfo(dtype).min, torch.finfo(torch.float32).min)


def eager_function(module: nn.Module) -> Any:
    """The eager attention function of an attention module's family."""
    # A user's subclass lives in another file than the family's eager function: look along the ancestors.
    for cls in type(module).__mro__:
        function = getattr(sys.modules.get(cls.__module__), "eager_attention_forward", None)
        if function is not None:
            return function
    raise UnsupportedModelError(
        f"the attention of {type(module).__name__} cannot be opened: there is no `eager_attention_forward` beside it."
    )


AttentionInterface.register(RECORDER, _attend)
AttentionMaskInterface.register(RECORDER, eager_mask)


def uses_attention_interface(model: PreTrainedModel | None) -> bool:
    """Whether the recorder can be switched on in this model: tried, verified, and undone."""
    if model is None:
        return False
    try:
        with implementation(model):
            return model.config._attn_implementation == RECORDER
    except (ValueError, ImportError):
        return False


@contextmanager
def implementation(model: PreTrainedModel, name: str = RECORDER) -> Iterator[None]:
    """Within the context the model attends through a registered function; afterwards every part of it as before."""
    configs = {
        id(part.config): (part.config, part.config._attn_implementation)
        for part in model.modules()
        if isinstance(part, PreTrainedModel)
    }
    try:
        model.set_attn_implementation(name)
        yield
    finally:
        model.set_attn_implementation(configs[id(model.config)][1] or "eager")
        # Towers inside a model may run on implementations of their own.
        for config, previous in configs.values():
            if config._attn_implementation != previous and previous is not None:
                config._attn_implementation = previous


@contextmanager
def recorded_attention(model: PreTrainedModel) -> Iterator[list[Tensor]]:
    """Within the context, every attention call of the model appends its (B, H, T, T) probabilities to the list.

    They come in call order, are in the graph of the output, and are exactly what multiplies the values. The model's
    own implementation is back afterwards, also after an exception.
    """
    maps: list[Tensor] = []
    token = _maps.set(maps)
    try:
        with implementation(model):
            yield maps
    finally:
        _maps.reset(token)


@contextmanager
def hidden_keys(model: PreTrainedModel, keep: Tensor) -> Iterator[None]:
    """Within the context, no query of any block sees the positions outside `keep` (METHODS 0: tokens hidden as keys).

    For a head that reads positions that are kept, this is what removing the others behind the embedding would give.
    A head that averages all positions still averages the hidden ones.

    Args:
        model: The Hugging Face model that attends; it must use the attention interface.
        keep: (N, T) true on the positions that stay visible; passes in the context have N rows of T positions.

    Raises:
        UnsupportedModelError: The family does not use the attention interface.
        InputError: A pass of another shape than `keep`.
    """
    if not uses_attention_interface(model):
        raise UnsupportedModelError(
            f"'{model.config.model_type}' does not use the attention interface of transformers, so no positions can be "
            "hidden from its attention."
        )
    token = _kept.set(keep.bool())
    try:
        with implementation(model):
            yield
    finally:
        _kept.reset(token)
