"""A whole copy of a model whose parameters are spread over processes as DTensors (FSDP2, tensor parallelism).

Its own forward gathers parameters as it goes, so every process would have to run exactly as many passes as the others.
A plain copy can be explained by each process alone; it takes the memory of one whole model while it lives.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from calig.pipeline.errors import InputError


def is_sharded(model: nn.Module) -> bool:
    """Whether a process holds only pieces of some parameters."""
    return any(isinstance(parameter, DTensor) for parameter in model.parameters())


def whole_copy(model: Any) -> nn.Module:
    """Gather the parameters into a plain model of the same class; every process must call it.

    Args:
        model: A `PreTrainedModel`, live and sharded; it is not touched.

    Raises:
        InputError: No plain model can be made: it is of another kind, or its class makes other parameters of its
            config (adapters, say).
    """
    way_out = "Train without the callback, consolidate the checkpoint, and explain with strategy=ddp or on one device."
    plain = [cls for cls in type(model).__mro__ if issubclass(cls, PreTrainedModel) and not issubclass(cls, FSDPModule)]
    if not plain:
        raise InputError(
            f"the parameters of this {type(model).__name__} are sharded, and only a Hugging Face model can be put "
            f"together again. {way_out}"
        )
    with torch.inference_mode(False), torch.no_grad():
        with torch.device("meta"):
            made = plain[0](copy.deepcopy(model.config))
        places = dict(model.named_parameters(remove_duplicate=False))
        wanted = {name for name, _ in made.named_parameters(remove_duplicate=False)}
        if other := sorted(wanted ^ set(places)):
            raise InputError(
                f"the parameters are sharded, and {plain[0].__name__} makes others of its config than this model has "
                f"(first: {other[0]}), so it cannot be put together again. {way_out}"
            )
        for name, parameter in places.items():
            whole = parameter.full_tensor() if isinstance(parameter, DTensor) else parameter
            _place(made, name, nn.Parameter(whole.detach().clone(), requires_grad=parameter.requires_grad))
        for name, buffer in model.named_buffers():
            _place(made, name, buffer.full_tensor() if isinstance(buffer, DTensor) else buffer)
    tensors = [*made.named_parameters(), *made.named_buffers()]
    if left := sorted(name for name, tensor in tensors if tensor.is_meta):
        raise InputError(
            f"the parameters are sharded, and {plain[0].__name__} has buffers that this model does not (first: "
            f"{left[0]}), so it cannot be put together again. {way_out}"
        )
    return made.eval()


def _place(model: nn.Module, name: str, value: Tensor) -> None:
    *path, leaf = name.split(".")
    owner = model.get_submodule(".".join(path))
    if isinstance(value, nn.Parameter):
        owner._parameters[leaf] = value
    else:
        owner._buffers[leaf] = value
