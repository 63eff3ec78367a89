"""Fresh weights from the top of a model down, and the trained ones back (Adebayo et al. 2018; METRICS 2).

Shapes: L block calls in a forward pass.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from calig.pipeline.attribution.model import ExplainableModel, UnsupportedModelError

_FLAG = "_is_hf_initialized"  # transformers leaves a tensor alone that has it


def parts_from_the_top(model: ExplainableModel, batch: Mapping[str, Any]) -> list[tuple[float, list[nn.Module]]]:
    """Find what is re-initialised in which step, from the order in which one forward pass calls the modules.

    The head is whatever has weights and is first called after the last block: pooler, final norm, classifier. A block
    that is called several times (ALBERT) goes once, with all its calls.

    Args:
        model: In an open session.
        batch: Any batch that the model's forward takes.

    Returns:
        (q, modules) per step: the share of the L block calls that has fresh weights after it, and what gets them.
        The first is the head with q = 0 where there is one, the last has q = 1.
    """
    blocks = dict.fromkeys(model.structure.blocks)
    inside = {module for block in blocks for module in block.modules()}
    order: list[nn.Module] = []

    def note(module: nn.Module, *_: Any) -> None:
        order.append(module)

    inputs = model.prepare(batch)
    read = inputs if inputs.windows is None else inputs.windows.inputs(inputs)
    one = read.select(torch.zeros(1, dtype=torch.long, device=model.device))
    with ExitStack() as stack:
        for module in model.module.modules():
            around = any(block in blocks for block in module.modules()) and module not in blocks
            own = any(True for _ in module.parameters(recurse=False))
            if module in blocks or (own and module not in inside and not around):
                stack.callback(module.register_forward_pre_hook(note).remove)
        with torch.no_grad():
            model.module(**one)
    calls = [module for module in order if module in blocks]
    last = max(i for i, module in enumerate(order) if module in blocks)
    before = {id(p) for module in (*order[:last], *blocks) for p in module.parameters()}
    head = [m for m in dict.fromkeys(order[last + 1 :]) if not any(id(p) in before for p in m.parameters())]
    steps: list[tuple[float, list[nn.Module]]] = [(0.0, head)] if head else []
    fresh: set[int] = set()
    for block in dict.fromkeys(reversed(calls)):
        weights = {id(parameter) for parameter in block.parameters()}
        if weights <= fresh:
            continue
        fresh |= weights
        # Blocks that share all their weights with others are fresh together with those.
        share = sum({id(p) for p in call.parameters()} <= fresh for call in calls) / len(calls)
        steps.append((share, [block]))
    return steps


@contextmanager
def weights_kept(modules: list[nn.Module]) -> Iterator[None]:
    """Put parameters and buffers back bit by bit on exit, whatever happened within, and the marks on them."""
    tensors: dict[int, Tensor] = {}
    for module in modules:
        tensors |= {id(tensor): tensor for tensor in (*module.parameters(), *module.buffers())}
    kept = [(tensor, tensor.detach().clone(), vars(tensor).pop(_FLAG, None)) for tensor in tensors.values()]
    try:
        yield
    finally:
        with torch.no_grad():
            for tensor, copy, flag in kept:
                tensor.copy_(copy)
                if flag is not None:
                    setattr(tensor, _FLAG, flag)


def initialise_anew(model: ExplainableModel, modules: list[nn.Module], *, seed: int, step: int) -> None:
    """Draw fresh weights the way the model's own class does before training; torch's generators are left as they were.

    Args:
        model: What the modules belong to; call it within `weights_kept`.
        modules: What gets fresh weights.
        seed: The run's seed.
        step: Tells the steps apart: the weights depend on seed and step alone.

    Raises:
        UnsupportedModelError: No weight changed, so the model's class does not say how they start.
    """
    owner: dict[nn.Module, PreTrainedModel] = {}
    for host in model.module.modules():  # the innermost comes last
        if isinstance(host, PreTrainedModel):
            owner |= dict.fromkeys(host.modules(), host)
    weights = {id(p): p for module in modules for p in module.parameters()}.values()
    before = [weight.detach().clone() for weight in weights]
    number = random.Random(f"randomisation/{seed}/{step}").getrandbits(63)
    devices = range(torch.cuda.device_count()) if model.device.type == "cuda" else ()
    with torch.no_grad(), torch.random.fork_rng(devices):
        # Not `torch.manual_seed`, which would seed devices that are not put back.
        torch.default_generator.manual_seed(number)
        if devices:
            torch.cuda.manual_seed_all(number)
        for part in modules:
            for module in reversed(list(part.modules())):  # children first: a parent may have the last word
                if module in owner:
                    owner[module]._init_weights(module)
                elif callable(reset := getattr(module, "reset_parameters", None)):
                    reset()
    if all(torch.equal(old, new) for old, new in zip(before, weights, strict=True)):
        names = ", ".join(dict.fromkeys(type(module).__name__ for module in modules))
        raise UnsupportedModelError(
            f"{names} of '{model.structure.family}' cannot be initialised anew: neither `_init_weights` nor "
            "`reset_parameters` changes a weight; take randomisation out of explain.metrics."
        )
