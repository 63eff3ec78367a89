"""Images in the place of texts: opening a model of images, reading pictures, and explaining them in batches."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

from calig.pipeline.errors import InputError
from calig.pipeline.explained import Explained

if TYPE_CHECKING:
    from calig.pipeline.explainer import ExplainSettings
    from calig.pipeline.opening import Opened

PROCESSOR_FILE = "preprocessor_config.json"
SUFFIXES = (".png", ".jpg", ".jpeg", ".gif", ".bmp", ".webp", ".tif", ".tiff", ".ppm", ".pgm", ".pbm")
"""Endings of image files."""


def takes_pictures(source: Any) -> bool:
    """Whether what is named or given explains images: looks only, loads nothing.

    Args:
        source: A path (see `calig.pipeline.opening.source_kind`) or a live model.
    """
    if not isinstance(source, (str, Path)):
        return getattr(source, "main_input_name", None) == "pixel_values"
    path = Path(source)
    folders = (path, path / "model", path.parent / "model", path.parent.parent / "model")
    folder = next((one for one in folders if (one / "config.json").is_file()), None)
    return folder is not None and (folder / PROCESSOR_FILE).is_file() and not (folder / "tokenizer.json").is_file()


def load_image_folder(path: Path, processor: Any = None) -> tuple[Any, Any]:
    """The classifier of a Hugging Face folder, and what makes its inputs of pictures.

    Args:
        path: The folder.
        processor: Stands in for the saved one.

    Raises:
        InputError: It holds no whole classifier of images, or a processor that does something unknown.
    """
    import torch
    from transformers import AutoModelForImageClassification

    from calig.pipeline.folders import lacking, loading

    processor = picture_processor(path if processor is None else processor)
    with loading(path, "an image classifier"):
        model, report = AutoModelForImageClassification.from_pretrained(
            path, dtype=torch.float32, local_files_only=True, output_loading_info=True
        )
    if lacks := lacking(report):
        raise InputError(
            f"'{path}' is not a whole classifier: {lacks}, so its decisions would be random. Fine-tune it first: "
            f"calig run data.modality=image model.name={path} ..."
        )
    return model, processor


def picture_processor(given: Any) -> Any:
    """Calig's own image processor: as it is, of a folder, or by the settings of one of transformers.

    Raises:
        InputError: It does something that is not known here.
    """
    from calig.datamodules.image_processor import ImageProcessor

    if isinstance(given, ImageProcessor):
        return given
    if isinstance(given, (str, Path)):
        return ImageProcessor.from_pretrained(str(given))
    if not hasattr(given, "to_dict"):
        raise InputError(f"an image model needs its image processor, got {type(given).__name__}.")
    return ImageProcessor.from_settings(dict(given.to_dict()), type(given).__name__)


def read_pictures(items: Sequence[Any]) -> list[Image.Image]:
    """The pictures of paths, or those that are given, in red, green and blue.

    Raises:
        InputError: There is none, or one cannot be read; names it.
    """
    from calig.datamodules.image_pixels import picture

    if isinstance(items, (str, Path)) or not len(items):
        raise InputError(f"images takes a list of paths or pictures with at least one, got {items!r}.")
    pictures = []
    for index, item in enumerate(items):
        if not isinstance(item, (str, Path, Image.Image)):
            raise InputError(f"images[{index}] is {type(item).__name__}; expected a path or a PIL image.")
        if isinstance(item, Image.Image):
            pictures.append(picture(item, f"images[{index}]"))
            continue
        if not Path(item).is_file():
            raise InputError(f"the image {item} does not exist.")
        pictures.append(picture(Path(item), str(item)))
    return pictures


def explain_pictures(
    opened: Opened, items: Sequence[Any], settings: ExplainSettings, batch_size: int
) -> Iterator[Explained]:
    """Explain in batches; every picture is read, and so checked, before the first one.

    Yields:
        The rows of a batch and the files that they refer to; `sample_id` is the position in `items`.
    """
    import torch

    from calig.pipeline.attribution import UnsupportedModelError
    from calig.pipeline.explainer import Explainer

    processor = opened.tokenizer
    found = read_pictures(items)
    try:
        explainer = Explainer(opened.model, processor, settings)
    except UnsupportedModelError as error:  # here the model is what a user gave
        raise InputError(str(error)) from error
    for start in range(0, len(found), batch_size):
        part = found[start : start + batch_size]
        pixels = processor.normalise(torch.stack([processor.pixels(one) for one in part]))
        numbers = torch.arange(start, start + len(part))
        yield explainer.explain({"pixel_values": pixels.to(explainer.model.device), "sample_id": numbers})


def image_files(path: Path) -> list[Path]:
    """An image file, or all that lie in a folder; none where the path names something else."""
    if path.is_dir():
        return sorted(file for file in path.iterdir() if file.suffix.lower() in SUFFIXES)
    return [path] if path.suffix.lower() in SUFFIXES else []
