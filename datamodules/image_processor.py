"""From pictures to what a model takes, and back: resize, crop, rescale, normalise.

Shapes: B images, C = 3 channels, H x W pixels as the model takes them.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from calig.datamodules.rows import gist
from calig.pipeline.errors import InputError

FILE = "preprocessor_config.json"
_UNDERSTOOD = {
    *("do_resize", "size", "resample", "do_center_crop", "crop_size", "do_rescale", "rescale_factor", "do_normalize"),
    *("image_mean", "image_std", "do_convert_rgb"),
}


@dataclass(frozen=True)
class ImageProcessor:
    """The image processor of a Hugging Face folder, by its settings: PIL and torch are all it needs.

    Attributes:
        settings: Those of ``preprocessor_config.json``, complete.
        size: (height, width) of what comes out.
        mean: Per channel, of pixels in [0, 1].
        std: Per channel, of pixels in [0, 1].
    """

    settings: dict[str, Any]
    size: tuple[int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]

    @classmethod
    def from_settings(cls, settings: dict[str, Any], source: str) -> ImageProcessor:
        """Read the settings as transformers spells them.

        Raises:
            InputError: They ask for something else than one size, three channels, and the steps that are known here.
        """

        def wrong(what: str) -> InputError:
            return InputError(
                f"the image processor of '{source}' ({settings.get('image_processor_type')}) {what}. Expected one that "
                "resizes, crops at the centre, rescales and normalises, as those of ViT, DeiT, BEiT, DINOv2 and MAE."
            )

        others = [key for key, value in settings.items() if key.startswith("do_") and value and key not in _UNDERSTOOD]
        if others:
            raise wrong(f"asks for {', '.join(others)}")
        size = settings["crop_size"] if settings.get("do_center_crop") else settings.get("size")
        if not (settings.get("do_resize") or settings.get("do_center_crop")):
            raise wrong("leaves images at the sizes that they have")
        if not isinstance(size, dict) or not {"height", "width"} <= size.keys():
            raise wrong(f"gives images no fixed size (size={settings.get('size')})")
        mean: tuple[float, ...] = (0.0,) * 3
        std: tuple[float, ...] = (1.0,) * 3
        if settings.get("do_normalize"):
            mean, std = (tuple(float(value) for value in settings[f"image_{name}"]) for name in ("mean", "std"))
        if len(mean) != 3 or len(std) != 3:
            raise wrong(f"normalises {len(mean)} channels; images are made to have three")
        return cls(settings, (int(size["height"]), int(size["width"])), mean, std)

    @classmethod
    def from_pretrained(cls, source: str, revision: str | None = None) -> ImageProcessor:
        """The processor of a local folder or a hub name.

        Raises:
            InputError: It has none, or one that does something else (see ``from_settings``).
        """
        from transformers import AutoImageProcessor
        from transformers.utils import logging

        verbosity = logging.get_verbosity()
        logging.set_verbosity_error()  # says that torchvision would be faster
        try:
            found = AutoImageProcessor.from_pretrained(source, revision=revision or "main", trust_remote_code=False)
        except Exception as error:  # whatever the readers of many formats raise
            raise InputError(
                f"'{source}' holds no image processor that can be read ({FILE}): {gist(error)} Save it beside the "
                "weights with processor.save_pretrained(FOLDER)."
            ) from error
        finally:
            logging.set_verbosity(verbosity)
        settings = {key: _plain(value) for key, value in found.to_dict().items()}
        return cls.from_settings(settings, source)

    @classmethod
    def plain(cls, size: int, mean: Sequence[float], std: Sequence[float]) -> ImageProcessor:
        """Resize to a square and normalise: what a model from scratch starts with."""
        settings = {
            "image_processor_type": "ViTImageProcessor",
            "do_resize": True,
            "size": {"height": size, "width": size},
            "resample": int(Image.Resampling.BILINEAR),
            "do_rescale": True,
            "rescale_factor": 1 / 255,
            "do_normalize": True,
            "image_mean": list(mean),
            "image_std": list(std),
            "do_convert_rgb": True,
        }
        return cls.from_settings(settings, "scratch")

    def save_pretrained(self, folder: str | Path) -> None:
        """Write ``preprocessor_config.json``, from which transformers makes the same processor."""
        text = json.dumps(self.settings, indent=2, sort_keys=True) + "\n"
        Path(folder, FILE).write_text(text, encoding="utf-8")

    @property
    def image_mean(self) -> list[float]:
        """As transformers calls it; the engine reads it."""
        return list(self.mean)

    @property
    def image_std(self) -> list[float]:
        """As transformers calls it; the engine reads it."""
        return list(self.std)

    @property
    def do_normalize(self) -> bool:
        """Whether black differs from 0; the engine reads it."""
        return bool(self.settings.get("do_normalize"))

    def pixels(self, image: Image.Image) -> Tensor:
        """(C, H, W) uint8 of an RGB picture of any size."""
        return to_tensor(self._framed(image, int(self.settings.get("resample", Image.Resampling.BILINEAR))))

    def mask(self, image: Image.Image) -> Tensor:
        """(H, W) uint8, 1 where the mask (grey, 0 or 255) of a picture is set, in the frame of ``pixels``."""
        framed = self._framed(image, Image.Resampling.NEAREST)
        return (to_tensor(framed)[0] > 0).byte()

    def normalise(self, pixels: Tensor) -> Tensor:
        """(B, C, H, W) float32, what the model's forward takes, of uint8 pixels of that shape."""
        values = pixels.float()
        if self.settings.get("do_rescale", True):
            values = values * float(self.settings.get("rescale_factor", 1 / 255))
        return (values - self._channels(self.mean, values)) / self._channels(self.std, values)

    def pictures(self, pixel_values: Tensor) -> Tensor:
        """(B, H, W, C) uint8, to be looked at: ``normalise`` undone; what lies outside of black and white is cut."""
        values = pixel_values.detach().float()
        values = values * self._channels(self.std, values) + self._channels(self.mean, values)
        if self.settings.get("do_rescale", True):
            values = values / float(self.settings.get("rescale_factor", 1 / 255))
        return values.round().clamp(0, 255).byte().permute(0, 2, 3, 1).contiguous()

    @staticmethod
    def _channels(values: Iterable[float], like: Tensor) -> Tensor:
        return torch.tensor(tuple(values), device=like.device)[:, None, None]

    def _framed(self, image: Image.Image, resample: int) -> Image.Image:
        settings = self.settings
        if settings.get("do_resize"):
            size = settings["size"]
            width, height = image.size
            if "shortest_edge" in size:
                short = int(size["shortest_edge"])
                # The longer side is cut off at the point, as transformers does it.
                shape = (
                    (int(short * width / height), short) if height <= width else (short, int(short * height / width))
                )
            else:
                shape = (int(size["width"]), int(size["height"]))
            image = image.resize(shape, resample)
        if settings.get("do_center_crop"):
            height, width = self.size
            left, top = (image.width - width) // 2, (image.height - height) // 2
            image = image.crop((left, top, left + width, top + height))  # black where the image is smaller
        return image


def to_tensor(image: Image.Image) -> Tensor:
    """(C, H, W) uint8 of a picture of 8 bits per channel."""
    data = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
    return data.view(image.height, image.width, -1).permute(2, 0, 1).contiguous()


def to_picture(pixels: Tensor) -> Image.Image:
    """The picture of (C, H, W) uint8 pixels, C = 3."""
    _, height, width = pixels.shape
    return Image.frombytes("RGB", (width, height), bytes(pixels.permute(1, 2, 0).flatten().tolist()))


def _plain(value: Any) -> Any:
    """A setting as JSON has it."""
    if isinstance(value, tuple):
        return list(value)
    return int(value) if isinstance(value, Image.Resampling) else value
