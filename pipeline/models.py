"""Classifiers and tokenizers from the hub, a local folder, an adapter, a checkpoint, or from scratch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.utils import logging

from calig.datamodules.image_processor import FILE as PROCESSOR_FILE
from calig.datamodules.image_processor import ImageProcessor
from calig.datamodules.tokenization import longest_input
from calig.pipeline.adapters import (
    add_adapters,
    base_name,
    is_adapter_folder,
    load_adapter_folder,
    merge_adapters,
)
from calig.pipeline.attribution.wrapping import is_peft, unwrap
from calig.pipeline.checkpoint import first_line, load_checkpoint
from calig.pipeline.config import AdapterConfig, ModelConfig
from calig.pipeline.errors import InputError
from calig.pipeline.image_models import (
    CLASSIFIED_AS,
    check_image_size,
    image_classifier,
    image_classifier_from_scratch,
)
from calig.pipeline.tasks import PROBLEM_TYPES, Task

__all__ = [
    "class_names",
    "finish_training",
    "load_checkpoint",
    "load_model",
    "load_processor",
    "load_tokenizer",
    "prepare_training",
]

_TEXT_CLASSIFIER: Any = AutoModelForSequenceClassification
_NO_HEAD = {"keep_head": False, "need_head": False}
_SPECIAL = ("pad", "bos", "eos", "cls", "sep")
# What some families call the width inside the feed-forward part, and dropout.
_OTHER_NAMES = {
    **dict.fromkeys(("n_inner", "ffn_dim", "hidden_dim"), "intermediate_size"),
    **dict.fromkeys(
        ("dropout", "hidden_dropout", "attention_dropout", "resid_pdrop", "embd_pdrop", "attn_pdrop"),
        "hidden_dropout_prob",
    ),
}
_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.txt",
    "vocab.json",
    "tokenizer.model",
    "spiece.model",
    "sentencepiece.bpe.model",
    "tekken.json",
)


def load_tokenizer(config: ModelConfig) -> Any:
    """The tokenizer of the model; None where the model is made from scratch and trains its own.

    A checkpoint folder that has a tokenizer brings the one that its weights belong to.

    Raises:
        InputError: The folder or hub name holds no tokenizer.
    """
    folder = _folder(config.checkpoint)
    if folder is not None and (config.name is None or any((folder / name).exists() for name in _TOKENIZER_FILES)):
        return _tokenizer(str(folder), "model.checkpoint", None)
    if config.name is None:
        return None
    if is_adapter_folder(config.name) and not any((Path(config.name) / name).exists() for name in _TOKENIZER_FILES):
        return _tokenizer(base_name(config.name), f"the base model of the adapter {config.name}", None)
    return _tokenizer(config.name, "model.name", config.revision)


def load_processor(config: ModelConfig) -> ImageProcessor | None:
    """The image processor of the model; None where there is none: from scratch, or of a local folder without one.

    Raises:
        InputError: It does something that is not supported, or the hub name holds none.
    """
    folder = _folder(config.checkpoint)
    sources = [str(folder)] if folder is not None else []
    sources += [config.name] if config.name is not None else []
    for source in sources:
        if not Path(source).is_dir() or (Path(source) / PROCESSOR_FILE).exists():
            return ImageProcessor.from_pretrained(source, config.revision if source == config.name else None)
    return None


def load_model(
    config: ModelConfig,
    label_names: Sequence[str],
    tokenizer: Any,
    *,
    need_head: bool = False,
    processor: ImageProcessor | None = None,
    task: Task = "classification",
) -> PreTrainedModel:
    """The model, in float32, with as many outputs as there are label names.

    `model.checkpoint` wins over `model.name`, which wins over `model.scratch`; an adapter folder is merged into its
    base model. What only concerns training is added by `prepare_training`.

    Args:
        config: The `model` section.
        label_names: Class names (the one of a regression is that of the number), kept in the model's config.
        tokenizer: Decides the vocabulary and the pad token of a model from scratch, and the pad token elsewhere.
        need_head: Raise if the classification head would be a fresh one: for runs that do not train.
        processor: Of a classifier of images, whose size it decides where the model is made from scratch.
        task: What the outputs mean; kept in the model's config, with `model.threshold` where there are labels.

    Raises:
        InputError: The model or the checkpoint cannot be loaded; the message names it.
    """
    if task == "classification" and len(label_names) < 2:
        raise InputError(
            f"a classifier needs two classes, got {list(label_names)}. One output is data.task=regression, or "
            "data.task=multi_label with one label."
        )
    labels: dict[str, Any] = {
        "num_labels": len(label_names),
        "id2label": dict(enumerate(label_names)),
        "label2id": {name: index for index, name in enumerate(label_names)},
        # A folder may carry that of another task; the loss of a model is chosen by it.
        "problem_type": PROBLEM_TYPES[task],
    }
    folder = _folder(config.checkpoint)
    if folder is not None:
        _check_same_architecture(config, folder)
        fits = {"keep_head": True, "need_head": need_head}
        model = _pretrained(str(folder), "model.checkpoint", None, labels, images=processor is not None, **fits)
    elif config.name is not None:
        # The head of another task makes room for a fresh one, unless nothing would train it.
        trained = need_head and not config.checkpoint
        fits = {"keep_head": trained, "need_head": trained}
        model = _pretrained(config.name, "model.name", config.revision, labels, images=processor is not None, **fits)
    elif processor is not None:
        model = image_classifier_from_scratch(config.scratch, labels, processor)
    else:
        model = _from_scratch(config, labels, tokenizer)
    if task == "multi_label" and config.threshold is not None:
        model.config.label_threshold = config.threshold
    if processor is not None:
        check_image_size(model, processor)
    elif model.config.pad_token_id is None:
        model.config.pad_token_id = tokenizer.pad_token_id
    if config.checkpoint and folder is None:
        load_checkpoint(model, config.checkpoint)
    return model


def saved_config(config: ModelConfig) -> PretrainedConfig | None:
    """The Hugging Face configuration that a pretrained model brings (class names, longest input); None from scratch.

    Raises:
        InputError: The folder or hub name holds none.
    """
    folder = _folder(config.checkpoint)
    source = str(folder) if folder is not None else config.name
    if source is None:
        return None
    if is_adapter_folder(source):
        source = base_name(source)
    revision = config.revision if folder is None else None
    try:
        return AutoConfig.from_pretrained(source, revision=revision or "main")
    except (OSError, ValueError) as error:
        raise _not_loaded(source, "model.name" if folder is None else "model.checkpoint", error) from error


def class_names(config: PretrainedConfig) -> list[str]:
    """The class names of a fine-tuned model, in the order of their indices."""
    names: dict[Any, str] = config.id2label or {}
    return [names[index] for index in sorted(names)]


def prepare_training(model: PreTrainedModel, config: ModelConfig) -> nn.Module:
    """Put on what only training needs: dropout, adapters, gradient checkpointing, compilation.

    `finish_training` takes it off.

    Returns:
        The model, or the PEFT model around it.

    Raises:
        InputError: PEFT is missing, a target module does not exist, or the family cannot checkpoint.
    """
    for item in fields(config.peft):
        value = getattr(config.peft, item.name)
        if config.peft.r is None and value != getattr(AdapterConfig(), item.name):
            raise InputError(f"model.peft.{item.name}={value} needs model.peft.r, the rank, which turns adapters on.")
    if config.gradient_checkpointing:
        _checkpoint_blocks(model)
    prepared = model if config.peft.r is None else add_adapters(model, config.peft)
    if config.compile:
        # In place, so that checkpoints hold the same keys as without it.
        prepared.compile()
    # What is loaded is in evaluation mode, and Lightning trains a model in the mode that it finds.
    return prepared.train()


def finish_training(model: nn.Module) -> PreTrainedModel:
    """The plain model that training leaves: adapters merged, nothing checkpointed or compiled."""
    model._compiled_call_impl = None
    plain = merge_adapters(unwrap(model) if not is_peft(model) else model)
    assert isinstance(plain, PreTrainedModel)
    for part in plain.modules():
        if vars(part).get("gradient_checkpointing") is True:
            part.gradient_checkpointing = False  # type: ignore[assignment]
    return plain


def _folder(checkpoint: str | None) -> Path | None:
    # A sharded checkpoint is a folder too, but not one of Hugging Face's; `load_checkpoint` says so.
    folder = Path(checkpoint) if checkpoint and Path(checkpoint).is_dir() else None
    return None if folder is None or (folder / ".metadata").exists() else folder


def _tokenizer(source: str, key: str, revision: str | None) -> Any:
    _check_revision(source, key, revision)
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, revision=revision or "main", trust_remote_code=False)
    except Exception as error:  # whatever the readers of many formats raise
        if Path(source).is_dir() and not any((Path(source) / name).exists() for name in _TOKENIZER_FILES):
            raise _no_tokenizer(source, key) from error
        raise _not_loaded(source, key, error) from error
    # Without files, transformers makes an empty tokenizer of the family, for which every word is unknown.
    if set(tokenizer.get_vocab().values()) <= set(tokenizer.all_special_ids):
        raise _no_tokenizer(source, key)
    return tokenizer


def _pretrained(
    source: str,
    key: str,
    revision: str | None,
    labels: dict[str, Any],
    *,
    keep_head: bool,
    need_head: bool,
    images: bool = False,
) -> PreTrainedModel:
    _check_revision(source, key, revision)
    if is_adapter_folder(source):
        # The base brings no head; the adapter does.
        inner = _pretrained(
            base_name(source), f"the base model of {key}={source}", None, labels, images=images, **_NO_HEAD
        )
        return load_adapter_folder(inner, source, keep_head=keep_head)
    verbosity = logging.get_verbosity()
    if images:  # else it lists the decoder of an autoencoder, weight by weight; what is missing is judged below
        logging.set_verbosity_error()
    try:
        # Never the code that a folder or a hub page brings along; pickled weights are read as weights only.
        auto, more = image_classifier(source, revision, labels) if images else (_TEXT_CLASSIFIER, labels)
        model, report = auto.from_pretrained(
            source,
            revision=revision or "main",
            dtype=torch.float32,
            trust_remote_code=False,
            ignore_mismatched_sizes=not keep_head,
            output_loading_info=True,
            **more,
        )
    except Exception as error:  # whatever the readers of many formats raise
        raise _not_loaded(source, key, error) from error
    finally:
        logging.set_verbosity(verbosity)
    missing = set(report["missing_keys"])
    body = [name for name, _ in model.named_parameters() if name.startswith(f"{model.base_model_prefix}.")]
    if len(missing.intersection(body)) > len(body) / 2:
        raise InputError(
            f"{key}={source} holds weights of another model: {len(missing)} weights of this "
            f"'{model.config.model_type}' are not in it (first: {min(missing)})."
        )
    fresh = sorted(name for name in missing if not name.startswith(f"{model.base_model_prefix}."))
    if need_head and fresh:
        raise InputError(
            f"{key}={source} has no trained classification head ({', '.join(fresh)} would be random). Train it first "
            "(stages: fit), or name a fine-tuned classifier."
        )
    return model


def _check_same_architecture(config: ModelConfig, folder: Path) -> None:
    """Refuse a checkpoint folder of another family than `model.name`, where both are at hand."""
    if config.name is None or is_adapter_folder(config.name) or is_adapter_folder(folder):
        return
    try:
        own, other = (
            AutoConfig.from_pretrained(source, local_files_only=True, trust_remote_code=False).model_type
            for source in (folder, config.name)
        )
    except Exception:  # a broken folder gets its own message when it is loaded; a name need not be in the cache
        return
    if CLASSIFIED_AS.get(own, own) != CLASSIFIED_AS.get(other, other):
        raise InputError(
            f"model.checkpoint={folder} is a '{own}', model.name={config.name} a '{other}'. The folder says all about "
            "the model: set model.name=null, or give a checkpoint of the same architecture."
        )


def _check_revision(source: str, key: str, revision: str | None) -> None:
    if revision is not None and Path(source).is_dir():
        raise InputError(
            f"model.revision={revision} means nothing for {key}={source}, a local folder. Leave it out, or give the "
            "hub name."
        )


def _checkpoint_blocks(model: PreTrainedModel) -> None:
    # transformers renamed it; both take the same. The reentrant form needs inputs with gradients, which frozen
    # embeddings in front of adapters do not have.
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    try:
        enable({"use_reentrant": False})
    except ValueError as error:
        raise InputError(f"model.gradient_checkpointing=true: {first_line(error)}") from error


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
    # Also those that the tokenizer lacks: the ids that a family is born with name words of another vocabulary.
    special = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id", None) for name in _SPECIAL}
    try:
        blank = AutoConfig.for_model(scratch.type)
        own = {name: shape[key] for name, key in _OTHER_NAMES.items() if hasattr(blank, name)}
        if hasattr(blank, "num_key_value_heads"):
            own |= {"num_key_value_heads": scratch.heads, "head_dim": scratch.width // scratch.heads}
        made = AutoConfig.for_model(scratch.type, **shape, **own, **special, **labels)
        # Some families count positions from behind the pad id: what they take is to be what was asked for.
        longest = longest_input(made)
        if longest is not None and longest < scratch.max_positions:
            made.max_position_embeddings += scratch.max_positions - longest
        return AutoModelForSequenceClassification.from_config(made, dtype=torch.float32)
    except (ValueError, KeyError) as error:
        raise InputError(f"model.scratch.type={scratch.type} cannot be made: {first_line(error)}") from error


def _not_loaded(source: str, key: str, error: Exception) -> InputError:
    if Path(source).is_file():
        return InputError(f"{key}={source} is a file. A Lightning checkpoint goes to model.checkpoint={source}.")
    kind = "is a local folder but no model that can be read" if Path(source).is_dir() else "is no local folder"
    return InputError(
        f"'{source}' could not be loaded ({key}): it {kind}. {first_line(error)} "
        "Expected a local Hugging Face folder or a name on the hub (which needs the network, or a filled cache)."
    )


def _no_tokenizer(source: str, key: str) -> InputError:
    return InputError(
        f"'{source}' ({key}) holds no tokenizer (looked for {', '.join(_TOKENIZER_FILES[:4])}, ...). Save it beside "
        "the weights with tokenizer.save_pretrained(FOLDER)."
    )
