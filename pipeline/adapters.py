"""LoRA adapters through PEFT, an optional dependency: put on, merged, and read from a folder."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from calig.pipeline.attribution.wrapping import is_peft
from calig.pipeline.config import AdapterConfig
from calig.pipeline.errors import InputError

ADAPTER_FILE = "adapter_config.json"


def is_adapter_folder(path: str | Path) -> bool:
    """Whether a folder holds a PEFT adapter instead of a whole model."""
    return (Path(path) / ADAPTER_FILE).is_file()


def base_name(folder: str | Path) -> str:
    """The hub name or folder of the model that an adapter belongs to.

    Raises:
        InputError: The adapter does not say it, or is of a kind that cannot be merged.
    """
    path = Path(folder) / ADAPTER_FILE
    try:
        settings = json.loads(path.read_text(encoding="utf8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read: {error}") from error
    # PEFT imports the module that `megatron_core` names: a file of settings must not choose code.
    if settings.get("megatron_config"):
        raise InputError(f"{path} asks for Megatron layers, which calig does not load. Merge the adapter elsewhere.")
    if not settings.get("base_model_name_or_path"):
        raise InputError(
            f"{path} does not name its base model (base_model_name_or_path). Write it there, or merge the adapter "
            "with PEFT's merge_and_unload() and save the whole model."
        )
    return str(settings["base_model_name_or_path"])


def add_adapters(model: PreTrainedModel, config: AdapterConfig) -> nn.Module:
    """Put LoRA adapters into a model, in place; only they and the head stay trainable.

    Args:
        model: A classifier.
        config: The `model.peft` section, with `r` set.

    Returns:
        The PEFT model around it.

    Raises:
        InputError: PEFT is not installed, or a target module does not exist.
    """
    peft = _peft("model.peft.r")
    from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as KNOWN

    assert config.r is not None
    # The head is new in most cases: all of it is trained, not only the layer that PEFT knows by name.
    head = [
        name
        for name, part in model.named_children()
        if name != model.base_model_prefix and any(True for _ in part.parameters())
    ]
    settings = peft.LoraConfig(
        # PEFT's class for text classifiers hands `input_ids` on, which a classifier of images does not take.
        task_type="SEQ_CLS" if model.main_input_name == "input_ids" else None,
        r=config.r,
        lora_alpha=2 * config.r if config.alpha is None else config.alpha,
        lora_dropout=config.dropout,
        target_modules=config.target_modules or (None if model.config.model_type in KNOWN else "all-linear"),
        modules_to_save=head,
    )
    try:
        with _no_deprecations():
            return peft.get_peft_model(model, settings)
    except ValueError as error:
        linear = sorted({name.split(".")[-1] for name, part in model.named_modules() if isinstance(part, nn.Linear)})
        raise InputError(
            f"model.peft.target_modules={config.target_modules} does not fit '{model.config.model_type}': "
            f"{str(error).splitlines()[0]} Linear layers: {', '.join(linear)}."
        ) from error


def merge_adapters(model: nn.Module) -> nn.Module:
    """Add the adapters to the weights and return the plain model, all of it trainable; itself if there are none."""
    if not is_peft(model):
        return model
    plain: nn.Module = model.merge_and_unload()  # type: ignore[operator]
    return plain.requires_grad_(True)


def adapter_settings(model: nn.Module) -> dict[str, Any] | None:
    """The settings of a model's LoRA adapters as plain values, for a checkpoint; None where there are none."""
    if not is_peft(model):
        return None
    config = next(iter(model.peft_config.values()))  # type: ignore[operator]
    return {
        "r": config.r,
        "alpha": float(config.lora_alpha),
        "dropout": config.lora_dropout,
        "target_modules": sorted(config.target_modules),
    }


def load_adapted(model: PreTrainedModel, settings: Mapping[str, Any], load: Callable[[nn.Module], None]) -> None:
    """Load weights that hold LoRA adapters into a plain model, in place: put on, loaded, merged.

    Args:
        model: The plain model.
        settings: As `adapter_settings` gave them.
        load: Loads the weights into the PEFT model that it is given.
    """
    wrapped = add_adapters(model, AdapterConfig(**settings))
    load(wrapped)
    merge_adapters(wrapped)


def load_adapter_folder(model: PreTrainedModel, folder: str, *, keep_head: bool) -> PreTrainedModel:
    """Merge the adapter of a folder into its base model.

    Args:
        model: The base model.
        folder: Holds `adapter_config.json` and the weights.
        keep_head: Raise if the adapter's head has another number of classes; else the fresh one stays.

    Raises:
        InputError: PEFT is not installed, or the adapter belongs to another model.
    """
    peft = _peft(folder)
    try:
        config = peft.PeftConfig.from_pretrained(folder)
        if config.is_prompt_learning:
            raise InputError(
                f"'{folder}' is a prompt adapter ({config.peft_type.value}), which cannot be merged; "
                "calig takes adapters inside the blocks, such as LoRA."
            )
        with _no_deprecations():
            wrapped = peft.PeftModel.from_pretrained(
                model, folder, config=config, ignore_mismatched_sizes=not keep_head, torch_device="cpu"
            )
    except InputError:
        raise
    except Exception as error:  # whatever PEFT and the readers of its files raise for a folder that does not fit
        first = str(error).strip().splitlines()
        raise InputError(
            f"the adapter in '{folder}' could not be loaded into its base model: "
            f"{' '.join(line.strip() for line in first[:2]) or type(error).__name__}"
        ) from error
    return merge_adapters(wrapped)  # type: ignore[return-value]


@contextmanager
def _no_deprecations() -> Iterator[None]:
    # What PEFT calls by an old name in transformers is not the user's concern.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        yield


def _peft(what: str) -> Any:
    try:
        import peft
    except ImportError as error:
        raise InputError(f"{what} needs the package peft: pip install -e '.[peft]' in the folder of calig.") from error
    return peft
