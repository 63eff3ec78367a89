"""What AttributionCallback finds in a Trainer: the model, the first validation loader, and what it must refuse."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader
from transformers import PreTrainedModel

from calig.pipeline.attribution.wrapping import refuse_prompt_tuning
from calig.pipeline.errors import InputError

# ModelParallelStrategy (FSDP2, tensor parallelism) shards too, but its parameters can be gathered: see `sharded`.
_SHARDING = ("FSDPStrategy", "XLAFSDPStrategy", "DeepSpeedStrategy")


def check_strategy(strategy: Any) -> None:
    """Refuse strategies that leave a process with pieces of the parameters.

    Raises:
        InputError: Names the strategy and the way out.
    """
    names = [cls.__name__ for cls in type(strategy).__mro__]
    if refused := next((name for name in names if name in _SHARDING), None):
        raise InputError(
            f"AttributionCallback cannot explain under {refused}, which shards the parameters. Train without "
            "it, consolidate the checkpoint, and explain with strategy=ddp or on one device."
        )


def candidates(module: nn.Module) -> dict[str, nn.Module]:
    """The Hugging Face models inside a module that are not part of another, by name."""
    found = {name: part for name, part in module.named_modules() if isinstance(part, PreTrainedModel)}
    return {
        name: part
        for name, part in found.items()
        if not any(name != other and name.startswith(f"{other}.") for other in found)
    }


def find_model(module: nn.Module, choose: Callable[[Any], nn.Module] | None) -> nn.Module:
    """The model to explain inside a LightningModule.

    Args:
        module: The LightningModule.
        choose: Names the model; None takes the only `PreTrainedModel` that is not part of another, also inside a
            PEFT or a compiled model.

    Raises:
        InputError: There is none, or more than one (the candidates are listed), or `choose` gives no module.
        UnsupportedModelError: It sits in an adapter that adds positions to its input.
    """
    if choose is not None:
        chosen = choose(module)
        if not isinstance(chosen, nn.Module):
            raise InputError(f"AttributionCallback(model=...) gave {type(chosen).__name__}; expected an nn.Module.")
        return chosen
    found = candidates(module)
    if len(found) == 1:
        refuse_prompt_tuning(module)
        return next(iter(found.values()))
    listed = ", ".join(f"module.{name} ({type(part).__name__})" for name, part in found.items()) or "none"
    raise InputError(
        f"{type(module).__name__} holds {len(found)} Hugging Face models: {listed}. "
        "Name the one to explain: AttributionCallback(model=lambda module: module.<name>)."
    )


def half_precision(model: nn.Module) -> str | None:
    """The name of the parameters' type where it is too coarse for exact sums, else None."""
    types = {parameter.dtype for parameter in model.parameters() if parameter.is_floating_point()}
    coarse = types - {torch.float32, torch.float64}
    return str(next(iter(coarse))).removeprefix("torch.") if coarse else None


def first_loader(loaders: Any) -> DataLoader[Any]:
    """The first validation loader, from whatever collection of loaders a project uses.

    Raises:
        InputError: It is no `DataLoader`.
    """
    loader = loaders
    while not isinstance(loader, DataLoader):
        if isinstance(loader, Mapping) and loader:
            loader = next(iter(loader.values()))
        elif isinstance(loader, list | tuple) and loader and not isinstance(loader[0], torch.Tensor):
            loader = loader[0]
        else:
            raise InputError(
                f"AttributionCallback needs a torch DataLoader for validation, got {type(loaders).__name__}"
                + (f" of {type(loader).__name__}" if loader is not loaders else "")
                + ". Wrap the samples: DataLoader(dataset, batch_size, collate_fn=...)."
            )
    return loader
