"""What a configuration must satisfy where the modality matters: keys of texts, keys of images, the stage pretrain."""

from __future__ import annotations

from calig.pipeline.config import BUILT_IN, Config, DataConfig, show
from calig.pipeline.errors import InputError
from calig.pipeline.validate import Origins, where, wrong

IMAGE_TYPES = ("vit", "deit", "beit", "dinov2", "vit_mae")


def check_modality(config: Config, origins: Origins) -> None:
    """Check what holds for texts or images alone.

    Raises:
        InputError: A key belongs to the other modality, or a stage does.
    """
    data, scratch, defaults = config.data, config.model.scratch, DataConfig()
    images = data.modality == "image"
    for modality, name in BUILT_IN.items():
        if data.name == name and data.modality != modality:
            raise wrong("data.modality", data.modality, f"{modality}, which data.name={name} is", origins)
    for key in ("annotations", "on_corrupt", "augment"):
        if not images and getattr(data, key) != getattr(defaults, key):
            raise InputError(
                f"data.{key}={getattr(data, key)}{where(f'data.{key}', origins)} is for images: set "
                "data.modality=image."
            )
    for role in ("text", "text_pair", "rationale") if images else ("image", "mask", "boxes"):
        if (column := getattr(data.columns, role)) is not None:
            key = f"data.columns.{role}"
            raise InputError(
                f"{key}={column}{where(key, origins)} means nothing to data.modality={data.modality}. Drop it, or set "
                f"data.modality={'text' if images else 'image'}."
            )
    given = {"columns.mask": data.columns.mask, "columns.boxes": data.columns.boxes, "annotations": data.annotations}
    told = [f"data.{key}" for key, value in given.items() if value is not None]
    if len(told) > 1:
        raise InputError(f"{' and '.join(told)} all say where the deciding object is: keep one of them.")
    made = config.model.name is None and config.model.checkpoint is None
    if made and scratch.type in (("bert",) if images else IMAGE_TYPES):
        expected = f"a type for {data.modality}s, as data.modality={data.modality} says"
        hint = f"For example model={'vit_tiny' if images else 'tiny'}."
        raise wrong("model.scratch.type", scratch.type, expected, origins, hint)
    if images and config.model.name is None and scratch.image_size % scratch.patch_size:
        expected = f"a multiple of model.scratch.patch_size={scratch.patch_size}"
        raise wrong("model.scratch.image_size", scratch.image_size, expected, origins)
    if images and "concepts" in config.stages:
        raise InputError(f"stages={show(config.stages)}: concepts are sets of texts, and data.modality is image.")
    if "pretrain" in config.stages:
        _check_pretraining(config, origins)


def _check_pretraining(config: Config, origins: Origins) -> None:
    if config.data.modality != "image":
        raise InputError(
            f"stages={show(config.stages)}{where('stages', origins)}: pretrain is a masked autoencoder of images, and "
            "data.modality is text."
        )
    behind = config.stages[config.stages.index("pretrain") + 1 :]
    if others := [stage for stage in config.stages if stage not in behind and stage != "pretrain"]:
        raise InputError(f"stages={show(config.stages)}: pretrain comes first, before {', '.join(others)}.")
    if behind and "fit" not in behind:
        raise InputError(
            f"stages={show(config.stages)}: pretrain leaves an encoder without a head for {behind[0]}. Put fit between."
        )
    chosen = config.pretrain
    if chosen.decoder_width % chosen.decoder_heads:
        expected = f"a multiple of pretrain.decoder_heads={chosen.decoder_heads}"
        raise wrong("pretrain.decoder_width", chosen.decoder_width, expected, origins)
