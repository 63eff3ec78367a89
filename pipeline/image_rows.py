"""What the rows of an image say, where those of a text have its tokens: patches, their grid, and the picture.

Shapes: B images, C channels, H x W pixels, T positions, N patches among them.
"""

from __future__ import annotations

import inspect
import io
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from calig.pipeline.attribution import ExplainableModel, Inputs
from calig.pipeline.attribution.pixels import normalisation, patch_grid
from calig.pipeline.metrics.patches import patch_size_of

FOLDER = "images"
MAX_SIDE = 256
"""Pixels of a stored picture's longer side, at most."""


@dataclass(frozen=True)
class ImageFacts:
    """What is known of a batch of images beside its attributions.

    Attributes:
        pixels: Key of the images in the batch.
        grid: Rows and columns of patches.
    """

    pixels: str
    grid: tuple[int, int]

    def columns(self, i: int, sample_id: int, special: Tensor, batch: Mapping[str, Any]) -> dict[str, Any]:
        """What an explanation's row has of image i: (T,) `special` says which positions are no patches."""
        masked = "object_mask" in batch and _known(batch["object_mask"][i])
        return {
            "tokens": patch_names(special, self.grid),
            "grid": list(self.grid),
            "image_ref": f"{FOLDER}/{sample_id}.png",
            "mask_ref": f"{FOLDER}/{sample_id}-mask.png" if masked else None,
        }

    def files(self, ids: Sequence[int], batch: Mapping[str, Any], processor: Any) -> dict[str, bytes]:
        """The files that rows refer to, by their place in a run directory."""
        found = {
            f"{FOLDER}/{number}.png": data
            for number, data in zip(ids, picture_files(batch[self.pixels], processor), strict=True)
        }
        if "object_mask" in batch:
            masks = zip(ids, batch["object_mask"].cpu(), strict=True)
            found |= {f"{FOLDER}/{number}-mask.png": _mask_file(mask) for number, mask in masks if _known(mask)}
        return found


def image_facts(model: ExplainableModel, inputs: Inputs) -> ImageFacts | None:
    """What is known of a prepared batch of images; None for texts.

    Raises:
        InputError: The patches have no grid.
    """
    if inputs.pixels is None:
        return None
    height, width = inputs.batch[inputs.pixels].shape[2:]
    grid = patch_grid(height, width, int(inputs.content[0].sum()), patch_size_of(model.structure.config))
    return ImageFacts(inputs.pixels, grid)


def takes_images(model: ExplainableModel) -> bool:
    """Whether a model's input is images, before any batch is seen."""
    main = getattr(model.structure.host, "main_input_name", None)
    return main == "pixel_values" or "pixel_values" in inspect.signature(model.module.forward).parameters


def patch_numbers(special: Tensor) -> Tensor:
    """(B, T) the number of each patch, row by row from 0, and -1 on (B, T) special positions."""
    return torch.where(special, -1, (~special).long().cumsum(1) - 1)


def patch_names(special: Tensor, grid: tuple[int, int]) -> list[str]:
    """T names: `r2c5` for the patch in row 2, column 5 (from 1), `[CLS]`, `[REG1]`, ... for the others.

    Args:
        special: (T,) true where a position is no patch.
        grid: Rows and columns.

    Example:
        >>> patch_names(torch.tensor([True, True, False, False]), (1, 2))
        ['[CLS]', '[REG1]', 'r1c1', 'r1c2']
    """
    names, registers, number = [], 0, 0
    for flag in special.tolist():
        if flag:
            names.append(f"[REG{registers}]" if registers else "[CLS]")
            registers += 1
        else:
            names.append(f"r{number // grid[1] + 1}c{number % grid[1] + 1}")
            number += 1
    return names


def with_pictures(rows: Sequence[Mapping[str, Any]], files: Mapping[str, bytes]) -> list[dict[str, Any]]:
    """Explanation rows with the content of the files that they refer to, as `picture` and `mask`."""
    return [
        {**row, "picture": files.get(row.get("image_ref") or ""), "mask": files.get(row.get("mask_ref") or "")}
        for row in rows
    ]


def picture_files(pixel_values: Tensor, processor: Any) -> Iterator[bytes]:
    """Yield each image of a batch as PNG, no side longer than `MAX_SIDE`.

    Args:
        pixel_values: (B, C, H, W) as the model takes them.
        processor: Knows the way back to colours: calig's by `pictures`, one of transformers by its mean and standard
            deviation. Without one, the values of each image are spread from black to white.
    """
    for shown in pictures(pixel_values, processor):
        height, width = shown.shape[:2]
        yield _png(Image.frombytes("RGB", (width, height), shown.contiguous().numpy().tobytes()), Image.Resampling.BOX)


def pictures(pixel_values: Tensor, processor: Any) -> Tensor:
    """(B, H, W, 3) uint8 of what the model takes; arguments as for `picture_files`."""
    values = pixel_values.detach().cpu().float()
    if hasattr(processor, "pictures"):
        return processor.pictures(values).cpu()
    mean, std, normalised = normalisation(processor)
    if normalised:
        values = values * _channels(std) + _channels(mean)
    elif mean is None:
        low, high = values.flatten(1).aminmax(dim=1)
        values = (values - low.view(-1, 1, 1, 1)) / (high - low).clamp_min(1e-12).view(-1, 1, 1, 1)
    if values.shape[1] != 3:
        values = values[:, :1].expand(-1, 3, -1, -1)
    return (255 * values).round().clamp(0, 255).byte().permute(0, 2, 3, 1)


def _channels(values: Any) -> Tensor:
    return torch.as_tensor(values, dtype=torch.float32).flatten().view(1, -1, 1, 1)


def _known(mask: Tensor) -> bool:
    """Whether anything is known of the object of an example."""
    return bool((mask >= 0).all())


def _mask_file(mask: Tensor) -> bytes:
    """PNG of an (H, W) mask, white on the object."""
    white = (255 * (mask > 0)).byte().contiguous()
    return _png(Image.frombytes("L", (mask.shape[1], mask.shape[0]), white.numpy().tobytes()), Image.Resampling.NEAREST)


def _png(picture: Image.Image, resample: Image.Resampling) -> bytes:
    scale = MAX_SIDE / max(picture.size)
    if scale < 1:
        picture = picture.resize(
            (max(1, round(picture.width * scale)), max(1, round(picture.height * scale))), resample
        )
    stream = io.BytesIO()
    picture.save(stream, "PNG")
    return stream.getvalue()
