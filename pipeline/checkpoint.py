"""Lightning checkpoints: weights out of one, whatever it was saved from, and the one that a training goes on from."""

from __future__ import annotations

import zipfile
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from calig.pipeline.adapters import load_adapted
from calig.pipeline.attribution.wrapping import is_peft
from calig.pipeline.errors import InputError

ADAPTER_KEY = "calig_adapters"
"""Where a checkpoint keeps the settings of its LoRA adapters."""
LAST, PREVIOUS = "last.ckpt", "previous.ckpt"
"""The newest checkpoint of a training, and the one before."""


def load_checkpoint(model: nn.Module, path: str) -> None:
    """Load the weights of a Lightning checkpoint into a model, without running anything the file could hold.

    The checkpoint may come from another LightningModule (the model's attribute name does not matter), from a compiled
    model, or from one with LoRA adapters, which are merged if the model has none.

    Raises:
        InputError: The file does not exist, is no checkpoint, or holds other weights.
    """
    if Path(path).is_dir():
        raise InputError(_in_pieces(path))
    if not Path(path).is_file():
        raise InputError(f"model.checkpoint={path} does not exist; expected a .ckpt file or a Hugging Face folder.")
    try:
        content = _read(path)
        state = {key.replace("_orig_mod.", ""): value for key, value in content["state_dict"].items()}
    except Exception as error:
        hint = ""
        if "weights only" in str(error).lower():
            hint = (
                " It holds Python objects beside tensors, which are not loaded because they could run code. Save its "
                "weights alone: torch.save({'state_dict': ...}, FILE)."
            )
        raise InputError(f"model.checkpoint={path} is not a Lightning checkpoint: {first_line(error)}{hint}") from error

    def load(target: nn.Module) -> None:
        wanted = target.state_dict()
        _check_weights(path, wanted, weights := _below_prefix(path, state, wanted), family_of(model))
        target.load_state_dict(weights)

    adapters = content.get(ADAPTER_KEY)
    if adapters is not None and not is_peft(model):
        assert isinstance(model, PreTrainedModel)
        load_adapted(model, adapters, load)
    else:
        load(model)


def find_resumable(folder: Path, warn: Callable[[str], None]) -> tuple[Path, int] | None:
    """The newest checkpoint of a training that is whole.

    Args:
        folder: Where the checkpoints are.
        warn: Told of one that is damaged and passed over.

    Returns:
        The file and its optimiser steps; None if there is no checkpoint.

    Raises:
        InputError: There are checkpoints, and none can be read; one is in pieces.
    """
    if (folder / LAST).is_dir():
        raise InputError(_in_pieces(folder / LAST))
    found = [path for name in (LAST, PREVIOUS) if (path := folder / name).is_file()]
    for path in found:
        try:
            with zipfile.ZipFile(path) as file:  # torch stores checksums and does not look at them
                if (damaged := file.testzip()) is not None:
                    raise ValueError(f"{damaged} in it is not what was written")
            content = _read(path)
            missing = {"state_dict", "optimizer_states", "loops"} - content.keys()
            if missing:
                raise ValueError(f"it has no {', '.join(sorted(missing))}")
            return path, int(content["global_step"])
        except Exception as error:
            warn(f"{path} is damaged and passed over: {first_line(error)}")
    if found:
        raise InputError(
            f"no checkpoint in {folder} can be read. Delete {' and '.join(path.name for path in found)} there to train "
            "from the start, or start the run anew with run.overwrite=true."
        )
    return None


def family_of(model: nn.Module) -> str:
    """The name of a model's family in messages."""
    return str(getattr(getattr(model, "config", None), "model_type", type(model).__name__))


def _read(path: str | Path) -> dict[str, Any]:
    """What a checkpoint holds, on the CPU and without running anything; tensors are read when they are used.

    Checkpoints are replaced by renaming, which leaves a file that is open as it was. Those of torch before 1.6 are no
    zip files and must be read whole.
    """
    content: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    return content


def _in_pieces(path: str | Path) -> str:
    return (
        f"{path} is a folder; expected a .ckpt file. A strategy that shards parameters writes such folders: make one "
        "file of it with `python -m lightning.pytorch.utilities.consolidate_checkpoint FOLDER` and take its weights "
        "with model.checkpoint=FILE, or train with trainer.strategy=ddp."
    )


def _below_prefix(path: str, state: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The part of a LightningModule's state that is the model: below the attribute name that fits most keys."""
    counts: Counter[str] = Counter()
    for key in state:
        parts = key.split(".")
        for depth in range(len(parts)):
            if ".".join(parts[depth:]) in wanted:
                counts[".".join([*parts[:depth], ""]) if depth else ""] += 1
    best = [prefix for prefix, count in counts.items() if count == max(counts.values())]
    if len(best) > 1:
        raise InputError(
            f"model.checkpoint={path} holds {len(best)} models that fit: {', '.join(sorted(best))}. "
            "Save the weights of one alone: torch.save({'state_dict': ...}, FILE)."
        )
    prefix = best[0] if best else "model."
    return {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}


def _check_weights(path: str, wanted: Mapping[str, Tensor], found: Mapping[str, Tensor], family: str) -> None:
    missing = [key for key in wanted if key not in found]
    extra = [key for key in found if key not in wanted]
    other = [key for key in wanted if key in found and wanted[key].shape != found[key].shape]
    if not (missing or extra or other):
        return
    facts = [
        f"{len(keys)} {what} (first: {keys[0]})"
        for what, keys in (("missing", missing), ("unknown", extra), ("of another shape", other))
        if keys
    ]
    if other:
        shapes = [str(tuple(item[other[0]].shape)) for item in (found, wanted)]
        facts.append(f"{other[0]} is {shapes[0]} there and {shapes[1]} here")
    raise InputError(
        f"model.checkpoint={path} holds weights of another model than this '{family}': {', '.join(facts)}. "
        "Set model.name (or model.scratch) to the model that it was saved from, with as many classes."
    )


def first_line(error: Exception) -> str:
    """The first line of an error's message, else its class."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
