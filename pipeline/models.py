"""Classifiers and tokenizers from the hub, a local folder, a checkpoint, or from scratch."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer, PreTrainedModel

from calig.pipeline.config import ModelConfig
from calig.pipeline.errors import InputError


def load_tokenizer(config: ModelConfig) -> Any:
    """The tokenizer of `model.name`; None where the model is made from scratch and trains its own.

    Raises:
        InputError: The folder or hub name holds no tokenizer.
    """
    if config.name is None:
        # A checkpoint folder of an earlier scratch model brings the tokenizer that its weights belong to.
        folder = Path(config.checkpoint) if config.checkpoint else None
        if folder is not None and folder.is_dir():
            return AutoTokenizer.from_pretrained(folder)
        return None
    try:
        return AutoTokenizer.from_pretrained(config.name, revision=config.revision or "main")
    except (OSError, ValueError) as error:
        raise _not_loaded(config.name, error) from error


def load_model(config: ModelConfig, label_names: Sequence[str], tokenizer: Any) -> PreTrainedModel:
    """The classifier, in float32, with as many outputs as there are label names.

    Args:
        config: The `model` section.
        label_names: Class names, kept in the model's config.
        tokenizer: Decides the vocabulary and the pad token of a model from scratch, and the pad token elsewhere.

    Raises:
        InputError: The model or the checkpoint cannot be loaded; the message names it.
    """
    labels: dict[str, Any] = {
        "num_labels": len(label_names),
        "id2label": dict(enumerate(label_names)),
        "label2id": {name: index for index, name in enumerate(label_names)},
    }
    folder = Path(config.checkpoint) if config.checkpoint and Path(config.checkpoint).is_dir() else None
    if folder is None and config.name is None:
        model = _from_scratch(config, labels, tokenizer)
    else:
        source = str(folder or config.name)
        try:
            model = AutoModelForSequenceClassification.from_pretrained(
                source,
                revision=config.revision or "main",
                dtype=torch.float32,
                ignore_mismatched_sizes=folder is None,
                **labels,
            )
        except (OSError, ValueError, RuntimeError) as error:
            raise _not_loaded(source, error) from error
    if model.config.pad_token_id is None:
        model.config.pad_token_id = tokenizer.pad_token_id
    if config.checkpoint and folder is None:
        load_checkpoint(model, config.checkpoint)
    return model


def load_checkpoint(model: PreTrainedModel, path: str) -> None:
    """Load the weights of a Lightning checkpoint into a model, without running anything the file could hold.

    Raises:
        InputError: The file does not exist, is no checkpoint, or holds other weights.
    """
    if not Path(path).is_file():
        raise InputError(f"model.checkpoint={path} does not exist; expected a .ckpt file or a Hugging Face folder.")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)["state_dict"]
    except Exception as error:
        raise InputError(f"model.checkpoint={path} is not a Lightning checkpoint: {_first_line(error)}") from error
    weights = {key.removeprefix("model."): value for key, value in state.items() if key.startswith("model.")}
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        raise InputError(
            f"model.checkpoint={path} holds weights of another model: {str(error).splitlines()[1].strip()}"
        ) from error


def _from_scratch(config: ModelConfig, labels: dict[str, Any], tokenizer: Any) -> PreTrainedModel:
    scratch = config.scratch
    if scratch.width % scratch.heads:
        raise InputError(
            f"model.scratch.width={scratch.width} is not a multiple of model.scratch.heads={scratch.heads}."
        )
    shape = {
        "vocab_size": len(tokenizer),
        "hidden_size": scratch.width,
        "num_hidden_layers": scratch.layers,
        "num_attention_heads": scratch.heads,
        "intermediate_size": scratch.intermediate or 4 * scratch.width,
        "max_position_embeddings": scratch.max_positions,
        "hidden_dropout_prob": scratch.dropout,
        "attention_probs_dropout_prob": scratch.dropout,
        "initializer_range": scratch.initializer_range,
    }
    special = {
        f"{name}_token_id": token
        for name in ("pad", "bos", "eos", "cls", "sep")
        if (token := getattr(tokenizer, f"{name}_token_id", None)) is not None
    }
    try:
        made = AutoConfig.for_model(scratch.type, **shape, **special, **labels)
        return AutoModelForSequenceClassification.from_config(made, dtype=torch.float32)
    except (ValueError, KeyError) as error:
        raise InputError(f"model.scratch.type={scratch.type} cannot be made: {_first_line(error)}") from error


def _not_loaded(source: str, error: Exception) -> InputError:
    return InputError(
        f"'{source}' could not be loaded: {_first_line(error)} "
        "Expected a local Hugging Face folder or a name on the hub (which needs the network, or a filled cache)."
    )


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
