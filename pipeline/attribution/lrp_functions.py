"""The rules of AttnLRP for the functions that a model calls: layer norm, activations, products and quotients.

What depends on the input is what requires a gradient: parameters are frozen while these rules hold (`lrp.lrp_rules`).
No family is named: a rule goes by the function called and by which of its arguments depend on the input.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from calig.pipeline.attribution.wrapping import UnsupportedModelError

ACTIVATIONS = {
    *(torch.tanh, Tensor.tanh, functional.tanh, torch.sigmoid, Tensor.sigmoid, functional.sigmoid),
    *(torch.relu, Tensor.relu, functional.relu, functional.relu6, functional.leaky_relu, functional.elu),
    *(functional.gelu, functional.silu, functional.mish, functional.hardswish, functional.softplus),
    *(torch.square, Tensor.square, torch.pow, Tensor.pow, torch.clamp, Tensor.clamp),
    *(functional.rms_norm, functional.normalize),  # `x / deviation * weight` is a factor times `x` as well
}
PRODUCTS = {torch.mul, torch.multiply, Tensor.mul, Tensor.multiply, Tensor.mul_, Tensor.multiply_}
MATRIX_PRODUCTS = {torch.matmul, Tensor.matmul, torch.bmm, Tensor.bmm, torch.mm, Tensor.mm, torch.einsum}
QUOTIENTS = {
    *(torch.div, torch.divide, torch.true_divide, Tensor.div, Tensor.divide, Tensor.true_divide),
    *(Tensor.div_, Tensor.divide_, Tensor.true_divide_),
}
CLOSED = {
    *(functional.scaled_dot_product_attention, functional.multi_head_attention_forward, functional.bilinear),
    *(torch.addcmul, Tensor.addcmul, Tensor.addcmul_, torch.baddbmm, Tensor.baddbmm, torch.cdist),
}
"""Functions with a product inside that these rules do not reach."""


class FunctionRules(TorchFunctionMode):
    """Within the context, gradients through the functions that a model calls follow the rules.

    Args:
        family: Names the model in messages.
    """

    def __init__(self, family: str) -> None:
        super().__init__()
        self.family = family

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Call the function under its rule; functions without one, or of constants, as they are."""
        kwargs = kwargs or {}
        factors = _dependent([*args, *kwargs.values()])
        if not factors:
            return func(*args, **kwargs)
        if func is functional.layer_norm:
            return _layer_norm(*args, **kwargs)
        if func is functional.glu:
            return _gated(*args, **kwargs)
        if func in ACTIVATIONS and args and args[0] is factors[0]:
            return as_factor(args[0], func(*args, **kwargs))
        if len(factors) > 1:
            if func in PRODUCTS:
                return _product(func, *factors)
            if func in MATRIX_PRODUCTS:
                return share(func(*args, **kwargs), 1 / len(factors))
            if func in QUOTIENTS:
                others = {name: value for name, value in kwargs.items() if not isinstance(value, Tensor)}
                return func(factors[0], factors[1].detach(), **others)
            if func in CLOSED:
                return self._refuse_gradient(func, func(*args, **kwargs))
        return func(*args, **kwargs)

    def _refuse_gradient(self, func: Any, returned: Any) -> Any:
        # Only once relevance flows there: a model may pool its states beside what the objective reads.
        def refuse(_gradient: Tensor) -> None:
            raise UnsupportedModelError(
                f"'{self.family}' multiplies activations inside {func.__name__}, where attn_lrp cannot share their "
                "relevance out; take another method (integrated_gradients, say)."
            )

        for value in _dependent([returned]):
            value.register_hook(refuse)
        return returned


def share(value: Tensor, part: float) -> Tensor:
    """The value, with a part of its gradient."""
    return part * value + ((1 - part) * value).detach()


def as_factor(given: Tensor, returned: Tensor) -> Tensor:
    """`x * (act(x) / x)` with the quotient held fixed; an entry that is 0 carries no relevance."""
    present = given != 0
    return given * torch.where(present, returned / torch.where(present, given, 1.0), 0.0).detach() + torch.where(
        present, 0.0, returned.detach()
    )


def _dependent(values: Any) -> list[Tensor]:
    """The tensors among arguments that depend on the input."""
    found = []
    for value in values:
        if isinstance(value, Tensor):
            found += [value] if value.requires_grad else []
        elif isinstance(value, tuple | list):
            found += _dependent(value)
    return found


def _product(func: Any, one: Tensor, other: Tensor) -> Tensor:
    """Half the gradient to each factor; none to one that is spread over the other, a number for a whole vector.

    Such a number is what a router weighs an expert with, or the deviation of a norm. It is held fixed like the latter:
    half the relevance would end in the router's softmax, and experts that are all alike would be explained unlike the
    one that they are. (The authors' own code for mixtures of experts does give the router half.)
    """
    size = torch.broadcast_shapes(one.shape, other.shape).numel()
    if one.numel() < size == other.numel():
        return func(one.detach(), other)
    if other.numel() < size == one.numel():
        return func(one, other.detach())
    returned = func(one, other)
    if returned is one:  # in place: others may hold the tensor
        return returned.mul_(0.5).add_(returned.detach())
    return share(returned, 0.5)


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


def _gated(given: Tensor, dim: int = -1) -> Tensor:
    """`torch.nn.functional.glu`: its gate is an activation, its product one of two activations."""
    value, gate = given.chunk(2, dim)
    return share(value * as_factor(gate, gate.sigmoid()), 0.5)
