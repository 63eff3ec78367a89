"""The rules of AttnLRP as a changed backward pass: gradient times input then is layer-wise relevance propagation.

Source: Achtibat et al. 2024 (METHODS 5.5). Inside the context, forward values stay what they are (to rounding) and
gradients follow the rules: norms with their deviation held fixed, `act(x)` as `x` times a constant, half the gradient
to each factor of a product of two activations. Softmax and linear maps keep their ordinary gradient. The rules for
modules are here, those for the functions between them in `lrp_functions`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from calig.pipeline.attribution.attention import eager_function
from calig.pipeline.attribution.lrp_functions import FunctionRules, as_factor
from calig.pipeline.attribution.model import ExplainableModel, UnsupportedModelError
from calig.pipeline.attribution.within_block import attention_calls
from calig.pipeline.attribution.wrapping import replaced


@contextmanager
def lrp_rules(model: ExplainableModel) -> Iterator[None]:
    """Within the context, gradients through the model follow the rules of AttnLRP.

    Raises:
        UnsupportedModelError: The family does not use the attention interface, or has a norm of an unknown kind; in the
            backward pass, where activations are multiplied out of reach of the rules.
    """
    host = model.require_interface()
    with ExitStack() as stack:
        stack.enter_context(_frozen(model.module))
        for module in model.module.modules():
            forward = _rule_of(module, model.structure.family)
            if forward is not None:
                stack.enter_context(replaced(module, forward))
        stack.enter_context(attention_calls(host, _attend))
        stack.enter_context(FunctionRules(model.structure.family))
        yield


def _attend(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    # The eager function, whose products QK' and AV the rules see; a fused one hides them.
    return eager_function(module)(module, *args, **kwargs)


@contextmanager
def _frozen(module: nn.Module) -> Iterator[None]:
    """Within the context, no parameter requires a gradient: what does then depends on the input."""
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    try:
        for parameter in trained:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)


def _rule_of(module: nn.Module, family: str) -> Callable[..., Any] | None:
    """What a module's forward becomes, None for modules that keep theirs."""
    if next(module.children(), None) is not None:
        return None
    own = module.forward
    kind = type(module)
    if kind.__module__ == "transformers.activations" or (
        kind.__module__ == nn.GELU.__module__ and not isinstance(module, nn.Softmax | nn.MultiheadAttention | nn.GLU)
    ):

        def activate(given: Tensor) -> Tensor:
            with torch._C.DisableTorchFunction():  # its parts follow no rule of their own
                return as_factor(given, own(given))

        return activate
    if kind.__name__.endswith("Norm") and not isinstance(module, nn.LayerNorm):  # its function has a rule

        def normalise(*args: Any, **kwargs: Any) -> Any:
            # What takes more than the states is left to the rules for functions.
            return own(*args, **kwargs) if kwargs or len(args) != 1 else _normalised(own, args[0], kind, family)

        return normalise
    return None


def _normalised(own: Callable[[Tensor], Tensor], given: Tensor, kind: type, family: str) -> Tensor:
    """What a norm returns, with its statistic held fixed: `x`, or `x - mean(x)`, times a gain and one number a vector.

    How it is written is not looked at: gain and bias are read off at probes, the number is fitted to what it returned.

    Raises:
        UnsupportedModelError: It is neither of the two.
    """
    with torch.no_grad():
        probe = given.new_ones(1, *given.shape[1:])
        probe[..., 1::2] = -1
        probe -= probe.mean(-1, keepdim=True)  # none of its entries is 0
        # The second, with a mean that is not 0, tells the two kinds apart where no state does.
        rows = torch.cat([given, probe + 1, probe, -probe])
        returned = own(rows)
        above, below = returned[-2:-1], returned[-1:]
        gain, bias = (above - below) / (2 * probe), (above + below) / 2
    for centred in (False, True):

        def scaled(states: Tensor, centred: bool = centred) -> Tensor:
            return gain * (states - states.mean(-1, keepdim=True) if centred else states)

        with torch.no_grad():
            number, agrees = _fit(scaled(rows[:-2]), returned[:-2] - bias)
        if agrees:
            return scaled(given) * number[:-1] + bias
    raise UnsupportedModelError(
        f"the norm {kind.__name__} of '{family}' is of a kind that attn_lrp does not know: it does not divide a "
        "vector, with its mean taken off or not, by one number. Take another method (integrated_gradients, say)."
    )


def _fit(found: Tensor, wanted: Tensor) -> tuple[Tensor, bool]:
    """The number (..., 1) that takes each vector of `found` (..., D) nearest to `wanted`; whether all arrive there."""
    loose = max(1e-3, 8 * torch.finfo(wanted.dtype).eps)
    wide = torch.promote_types(found.dtype, torch.float32)  # squares overflow in 16 bits
    one, other = found.to(wide), wanted.to(wide)
    number = (one * other).sum(-1, keepdim=True) / one.square().sum(-1, keepdim=True).clamp_min(torch.finfo(wide).tiny)
    agrees = (number * one - other).abs().max() <= loose * other.abs().max()
    return number.to(found.dtype), bool(agrees)
