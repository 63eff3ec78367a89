"""Classifiers and masked autoencoders of images, by family: which class of transformers, and how it is made."""

from __future__ import annotations

from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForImageClassification,
    DeiTForImageClassification,
    PretrainedConfig,
    PreTrainedModel,
    ViTConfig,
    ViTForImageClassification,
    ViTMAEConfig,
    ViTMAEForPreTraining,
)

from calig.datamodules.image_processor import ImageProcessor
from calig.pipeline.checkpoint import first_line
from calig.pipeline.config import ModelConfig, PretrainConfig, ScratchConfig
from calig.pipeline.errors import InputError

CLASSIFIED_AS = {"vit_mae": "vit"}
"""Families without a classifier of their own -> the family whose classifier takes their weights.

The encoder of a masked autoencoder is a ViT, and its `ViTModel` would shuffle the patches and drop some of them.
"""
_CLASSES: dict[str, Any] = {
    "vit": ViTForImageClassification,
    # Two classes are registered; the other one has two heads and no loss.
    "deit": DeiTForImageClassification,
}
_SHARED = (
    *("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "hidden_act", "qkv_bias"),
    *("hidden_dropout_prob", "attention_probs_dropout_prob", "initializer_range", "layer_norm_eps"),
    *("image_size", "patch_size", "num_channels"),
)


def image_classifier(source: str, revision: str | None, labels: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """The class that loads the classifier of a folder or hub name, and the arguments that tell it the labels."""
    config = AutoConfig.from_pretrained(source, revision=revision or "main", trust_remote_code=False)
    own = config.model_type
    auto = _CLASSES.get(CLASSIFIED_AS.get(own, own), AutoModelForImageClassification)
    return auto, {"config": _as_vit(config, labels)} if own in CLASSIFIED_AS else labels


def image_classifier_from_scratch(
    scratch: ScratchConfig, labels: dict[str, Any], processor: ImageProcessor
) -> PreTrainedModel:
    """A random classifier of the shape that `model.scratch` gives.

    Raises:
        InputError: `model.scratch.type` is no family of images.
    """
    own = CLASSIFIED_AS.get(scratch.type, scratch.type)
    try:
        made = AutoConfig.for_model(own, **_shape(scratch, processor), **labels)
        auto = _CLASSES.get(own, AutoModelForImageClassification)
        model: PreTrainedModel = (
            auto._from_config(made) if own in _CLASSES else auto.from_config(made, dtype=torch.float32)
        )
        return model
    except (ValueError, KeyError) as error:
        raise InputError(
            f"model.scratch.type={scratch.type} cannot be made as a classifier of images: {first_line(error)} Take "
            "vit, deit, beit, dinov2 or vit_mae."
        ) from error


def load_autoencoder(config: ModelConfig, pretrain: PretrainConfig, processor: ImageProcessor) -> PreTrainedModel:
    """The masked autoencoder that the stage pretrain trains: that of `model.name`, else one from scratch.

    Raises:
        InputError: The model is no ViT-MAE, or cannot be loaded.
    """
    chosen: dict[str, Any] = {"mask_ratio": pretrain.mask_ratio, "norm_pix_loss": pretrain.norm_pix_loss}
    if config.name is None:
        if config.scratch.type != "vit_mae":
            raise InputError(
                f"the stage pretrain trains a masked autoencoder, and model.scratch.type={config.scratch.type} is "
                "none. Take model=mae_tiny (or model.scratch.type=vit_mae)."
            )
        decoder: dict[str, Any] = {
            "decoder_hidden_size": pretrain.decoder_width,
            "decoder_num_hidden_layers": pretrain.decoder_layers,
            "decoder_num_attention_heads": pretrain.decoder_heads,
            "decoder_intermediate_size": 4 * pretrain.decoder_width,
        }
        model: PreTrainedModel = ViTMAEForPreTraining(
            ViTMAEConfig(**_shape(config.scratch, processor), **decoder, **chosen)
        )
        return model
    try:
        own = AutoConfig.from_pretrained(config.name, revision=config.revision or "main").model_type
        if own != "vit_mae":
            raise InputError(
                f"the stage pretrain trains a masked autoencoder, and model.name={config.name} is a '{own}'. Name a "
                "ViT-MAE, or leave pretrain out."
            )
        model = ViTMAEForPreTraining.from_pretrained(
            config.name, revision=config.revision or "main", dtype=torch.float32, trust_remote_code=False, **chosen
        )
    except InputError:
        raise
    except Exception as error:  # whatever the readers of many formats raise
        raise InputError(f"'{config.name}' could not be loaded (model.name): {first_line(error)}") from error
    check_image_size(model, processor)
    return model


def image_size(config: PretrainedConfig) -> int:
    """The side of the square images that a model takes, by its configuration."""
    size = getattr(config, "image_size", 224)
    return int(size if isinstance(size, int) else size[0])


def check_image_size(model: PreTrainedModel, processor: ImageProcessor) -> None:
    """Try the model on one black image.

    Raises:
        InputError: It does not take images of the size that the processor makes.
    """
    height, width = processor.size
    training = model.training
    try:
        with torch.no_grad():
            model.eval()(torch.zeros(1, len(processor.mean), height, width))
    except (ValueError, RuntimeError) as error:
        raise InputError(
            f"the image processor makes images of {width} x {height} pixels, and the model "
            f"('{model.config.model_type}') does not take them: {first_line(error)} Its folder must hold the processor "
            "that it was trained with."
        ) from error
    finally:
        model.train(training)


def _shape(scratch: ScratchConfig, processor: ImageProcessor) -> dict[str, Any]:
    width = scratch.intermediate or 4 * scratch.width
    own: dict[str, dict[str, Any]] = {
        "dinov2": {"mlp_ratio": width // scratch.width},
        # BEiT knows where a patch stands by this alone.
        "beit": {"use_relative_position_bias": True},
    }
    return {
        "hidden_size": scratch.width,
        "num_hidden_layers": scratch.layers,
        "num_attention_heads": scratch.heads,
        "intermediate_size": width,
        "hidden_dropout_prob": scratch.dropout,
        "attention_probs_dropout_prob": scratch.dropout,
        "initializer_range": scratch.initializer_range,
        "image_size": processor.size[0],
        "patch_size": scratch.patch_size,
        "num_channels": len(processor.mean),
        **own.get(scratch.type, {}),
    }


def _as_vit(config: PretrainedConfig, labels: dict[str, Any]) -> ViTConfig:
    """The configuration of the classifier that takes the weights of a masked autoencoder's encoder."""
    return ViTConfig(**{name: getattr(config, name) for name in _SHARED}, **labels)
