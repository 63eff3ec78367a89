"""What people put around a model, taken off or suspended while the engine works, and back afterwards.

Wrappers that only forward to the model (DistributedDataParallel, `torch.compile(model)`, a PEFT model) are looked
through. What acts inside it (compiled parts, gradient checkpointing, fused encoder layers) is switched off for the
length of a session: a compiled block knows nothing of the hooks that the engine sets, a checkpointed one runs twice,
and torch's own encoder hands nested tensors to its fused layers.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from calig.pipeline.errors import InputError


class UnsupportedModelError(InputError):
    """The engine cannot work on this model; the message says what was looked for and what does work."""


def unwrap(model: nn.Module) -> nn.Module:
    """The model inside its wrappers, itself where there are none: a live part of what was given, not a copy."""
    while (inner := _inner(model)) is not None:
        model = inner
    return model


def refuse_prompt_tuning(model: nn.Module) -> None:
    """Refuse adapters that put positions in front of the input.

    Raises:
        UnsupportedModelError: A PEFT model inside `model` learns a prompt, a prefix or the like.
    """
    for module in model.modules():
        for name, config in getattr(module, "peft_config", {}).items() if is_peft(module) else ():
            if config.is_prompt_learning:
                raise UnsupportedModelError(
                    f"the PEFT adapter '{name}' ({getattr(config.peft_type, 'value', config.peft_type)}) puts virtual "
                    "tokens in front of the input, to which no token of the text corresponds. Adapters inside the "
                    "blocks can be explained: LoRA, IA3 and the like."
                )


def is_peft(module: nn.Module) -> bool:
    """Whether a module is a PEFT model, without importing peft (which nobody can have used without importing it)."""
    peft: Any = sys.modules.get("peft")
    return peft is not None and isinstance(module, (peft.PeftModel, peft.PeftMixedModel))


@contextmanager
def suspended(model: nn.Module) -> Iterator[None]:
    """Within the context, nothing inside the model runs compiled, checkpointed or fused; then all is as before."""
    checkpointed = [module for module in model.modules() if vars(module).get("gradient_checkpointing") is True]
    with ExitStack() as stack:
        # The stance covers every way to compile: a module, a part in place, a function inside. Graphs stay cached, so
        # that training does not compile anew. Without dynamo in the process, nothing has been compiled.
        if "torch._dynamo.eval_frame" in sys.modules:
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        stack.enter_context(_without_fast_path())
        try:
            for module in checkpointed:
                module.gradient_checkpointing = False  # type: ignore[assignment]
            yield
        finally:
            for module in checkpointed:
                module.gradient_checkpointing = True  # type: ignore[assignment]


class _FastPath:
    """Torch's switch is one for all threads: the first that turns it off and the last that is done turn it."""

    lock = threading.Lock()
    users = 0
    before = True


@contextmanager
def _without_fast_path() -> Iterator[None]:
    with _FastPath.lock:
        if _FastPath.users == 0:
            _FastPath.before = torch.backends.mha.get_fastpath_enabled()
            torch.backends.mha.set_fastpath_enabled(False)
        _FastPath.users += 1
    try:
        yield
    finally:
        with _FastPath.lock:
            _FastPath.users -= 1
            if _FastPath.users == 0:
                torch.backends.mha.set_fastpath_enabled(_FastPath.before)


def _inner(model: nn.Module) -> nn.Module | None:
    if isinstance(model, (nn.parallel.DistributedDataParallel, nn.DataParallel)):
        return model.module
    if (compiled := vars(model).get("_modules", {}).get("_orig_mod")) is not None:
        return compiled
    return model.get_base_model() if is_peft(model) else None  # type: ignore[operator]


@contextmanager
def replaced(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Within the context, a module's forward is another function."""
    previous = module.__dict__.get("forward")
    module.forward = forward
    try:
        yield
    finally:
        if previous is None:
            del module.__dict__["forward"]
        else:
            module.__dict__["forward"] = previous
