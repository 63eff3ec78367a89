"""The rules of AttnLRP as a changed backward pass: gradient times input then is layer-wise relevance propagation.

Source: Achtibat et al. 2024 (METHODS 5.5). Inside the context, forward values stay what they are (to rounding) and
gradients follow the rules: norms with their deviation held fixed, `act(x)` as `x` times a constant, half the gradient
to each factor of a product of two activations. Softmax and linear maps keep their ordinary gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from calig.pipeline.attribution.attention import eager_function
from calig.pipeline.attribution.model import ExplainableModel, UnsupportedModelError
from calig.pipeline.attribution.within_block import attention_calls
from calig.pipeline.attribution.wrapping import replaced


@contextmanager
def lrp_rules(model: ExplainableModel) -> Iterator[None]:
    """Within the context, gradients through the model follow the rules of AttnLRP.

    Raises:
        UnsupportedModelError: The family does not use the attention interface, or has a norm of an unknown kind.
    """
    host = model.require_interface()
    with ExitStack() as stack:
        for module in model.module.modules():
            forward = _rule_of(module, model.structure.family)
            if forward is not None:
                stack.enter_context(replaced(module, forward))
            product = _linear_behind_gate(module)
            if product is not None:
                stack.callback(product.register_forward_pre_hook(_halve_input).remove)
        stack.enter_context(attention_calls(host, _attend))
        stack.enter_context(_FunctionRules())
        yield


def _attend(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Any:
    # Two products of activations: Q K' and A V. A passes its half on to Q and K, which halve it again.
    shares = (_share(query, 0.25), _share(key, 0.25), _share(value, 0.5))
    return eager_function(module)(module, *shares, *args, **kwargs)


def _share(value: Tensor, share: float) -> Tensor:
    """The value, with a share of its gradient."""
    return share * value + ((1 - share) * value).detach()


def _halve_input(_module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    return (_share(args[0], 0.5), *args[1:])


def _as_factor(given: Tensor, returned: Tensor) -> Tensor:
    """`x * (act(x) / x)` with the quotient held fixed; an entry that is 0 carries no relevance."""
    present = given != 0
    return given * torch.where(present, returned / torch.where(present, given, 1.0), 0.0).detach() + torch.where(
        present, 0.0, returned.detach()
    )


def _layer_norm(
    given: Tensor, shape: Any, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5
) -> Tensor:
    """`torch.nn.functional.layer_norm` with the deviation held fixed and the mean in the graph."""
    axes = tuple(range(-len(shape), 0))
    centred = given - given.mean(axes, keepdim=True)
    deviation = (centred.square().mean(axes, keepdim=True) + eps).sqrt().detach()
    scaled = centred / deviation
    scaled = scaled if weight is None else scaled * weight
    return scaled if bias is None else scaled + bias


_ACTIVATIONS = {
    torch.tanh,
    Tensor.tanh,
    functional.tanh,
    functional.gelu,
    functional.silu,
    functional.relu,
    torch.relu,
    Tensor.relu,
    torch.sigmoid,
    functional.sigmoid,
}


class _FunctionRules(TorchFunctionMode):
    """The rules where a model calls functions instead of modules (the tanh of RoBERTa's head, say)."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is functional.layer_norm:
            return _layer_norm(*args, **kwargs)
        returned = func(*args, **kwargs)
        return _as_factor(args[0], returned) if func in _ACTIVATIONS else returned


def _rule_of(module: nn.Module, family: str) -> Callable[..., Any] | None:
    """What a module's forward becomes, None for modules that keep theirs."""
    if next(module.children(), None) is not None:
        return None
    own = module.forward
    kind = type(module)
    if kind.__module__ == "transformers.activations" or (
        kind.__module__ == nn.GELU.__module__ and not isinstance(module, nn.Softmax | nn.MultiheadAttention)
    ):

        def activate(given: Tensor) -> Tensor:
            with torch._C.DisableTorchFunction():  # its parts follow no rule of their own
                return _as_factor(given, own(given))

        return activate
    if kind.__name__.endswith("RMSNorm"):
        epsilon = getattr(module, "variance_epsilon", getattr(module, "eps", None)) or 0.0

        def norm(given: Tensor) -> Tensor:
            returned = own(given)
            scaled = given / (given.square().mean(-1, keepdim=True) + epsilon).sqrt().detach()
            gain = own(torch.ones_like(given[:1, :1])).detach() * (1 + epsilon) ** 0.5
            loose = max(1e-3, 8 * torch.finfo(returned.dtype).eps)
            if not torch.allclose(scaled * gain, returned, rtol=loose, atol=loose):
                raise UnsupportedModelError(
                    f"the norm {kind.__name__} of '{family}' is of a kind that attn_lrp does not know."
                )
            return scaled * gain

        return norm
    return None


def _linear_behind_gate(module: nn.Module) -> nn.Module | None:
    """The linear map that takes in `act(gate) * up`, None where a module has no such product.

    The ways to write one that are in use: gate and up apart (`gate_proj` and `up_proj`, T5's `wi_0` and `wi_1`) or as
    the halves of one map (Phi-3's `gate_up_proj`, ModernBERT's `Wi` of double width).
    """
    for first, second in (("gate_proj", "down_proj"), ("gate_up_proj", "down_proj"), ("wi_1", "wo"), ("Wi", "Wo")):
        into, out = getattr(module, first, None), getattr(module, second, None)
        if isinstance(into, nn.Linear) and isinstance(out, nn.Linear):
            fused = into.out_features == 2 * out.in_features
            return out if fused or first in ("gate_proj", "wi_1") else None
    return None
