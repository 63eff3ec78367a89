"""The Lightning data module of all image sources.

Shapes: B examples, C = 3 channels, H x W pixels as the model takes them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_only
from rich.console import Console
from rich.progress import track
from torch import Tensor
from torch.utils.data import Dataset

from calig.datamodules.base import ClassificationData, Encoded
from calig.datamodules.image_augment import Augment, augment
from calig.datamodules.image_masks import draw_mask
from calig.datamodules.image_pixels import CorruptImage, picture
from calig.datamodules.image_processor import ImageProcessor
from calig.datamodules.image_sources import IMAGES, ImageExample
from calig.datamodules.sources import load_corpus
from calig.pipeline.errors import InputError

KEPT = 2**30
"""Bytes of pixels that are kept in memory; what needs more is read from its files at every epoch."""
MEASURED = 2000
"""Training images that mean and standard deviation are measured on."""
QUICK = 4000
_NAMED = 3


@dataclass(frozen=True)
class ImageCollator:
    """Stack and normalise what an ``ImageDataset`` gives; plain and picklable, so workers can have it.

    The result holds ``pixel_values`` (B, C, H, W) float32, what the model's forward takes; ``sample_id`` (B,) int64;
    ``labels`` (B,) int64 where all examples have one; ``object_mask`` (B, H, W) int64 where any has one: 1 on the
    deciding object, 0 elsewhere, -1 where it is not known for that example.

    Attributes:
        processor: Normalises.
    """

    processor: ImageProcessor

    def __call__(self, examples: Sequence[Encoded]) -> dict[str, Tensor]:
        """Stack."""
        batch = {
            "pixel_values": self.processor.normalise(torch.stack([example["pixels"] for example in examples])),
            "sample_id": torch.tensor([example["sample_id"] for example in examples]),
        }
        if all("labels" in example for example in examples):
            batch["labels"] = torch.tensor([example["labels"] for example in examples])
        if any(example["mask"] is not None for example in examples):
            unknown = torch.full(self.processor.size, -1)
            masks = [unknown if example["mask"] is None else example["mask"].long() for example in examples]
            batch["object_mask"] = torch.stack(masks)
        return batch


class ImageDataset(Dataset[Encoded]):
    """The images of one split, in row order.

    An item holds what its row does (``sample_id``, ``labels`` where there is one), ``pixels`` (C, H, W) uint8 and
    ``mask`` (H, W) uint8 or None, in the frame that the model sees. It is asked for by its row, or by (epoch, row):
    then it is augmented.

    Args:
        examples: Where the images are.
        processor: Frames them.
        how: How they are augmented.
        seed: Of the augmentation.
    """

    def __init__(
        self, examples: Sequence[ImageExample], processor: ImageProcessor, how: Augment = "none", seed: int = 0
    ) -> None:
        self.examples = list(examples)
        self.processor = processor
        self.how = how
        self.seed = seed
        self.rows: list[Encoded] = [_row(example) for example in self.examples]
        self._kept: list[tuple[Tensor, Tensor | None]] | None = None

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int | tuple[int, int]) -> Encoded:
        epoch, row = index if isinstance(index, tuple) else (None, index)
        pixels, mask = self._load(self.examples[row]) if self._kept is None else self._kept[row]
        if epoch is not None:
            pixels, *masks = augment(pixels, mask, self.how, self.seed, epoch, row)
            mask = masks[0] if masks else None
        return self.rows[row] | {"pixels": pixels, "mask": mask}

    def read(self, title: str, *, keep: bool, skip: bool) -> list[CorruptImage]:
        """Read every image once.

        Args:
            title: Of the progress bar.
            keep: Keep the pixels in memory.
            skip: Leave out what cannot be read; else the first such image raises.

        Returns:
            What was left out.
        """
        with ThreadPoolExecutor(torch.get_num_threads()) as pool:  # decoders let other threads work
            found = list(_shown(pool.map(self._tried, self.examples), title, len(self.examples)))
        corrupt = [item for item in found if isinstance(item, CorruptImage)]
        if corrupt and not skip:
            raise corrupt[0]
        whole = [place for place, item in enumerate(found) if not isinstance(item, CorruptImage)]
        self.examples = [self.examples[place] for place in whole]
        self.rows = [_row(example) for example in self.examples]
        if keep:
            self._kept = [item for item in found if not isinstance(item, CorruptImage)]
        return corrupt

    def _tried(self, example: ImageExample) -> tuple[Tensor, Tensor | None] | CorruptImage:
        try:
            return self._load(example)
        except CorruptImage as error:
            return error

    def _load(self, example: ImageExample) -> tuple[Tensor, Tensor | None]:
        image = picture(example.image, example.place)
        mask = None if example.mask is None else draw_mask(example.mask, image.size, example.place)
        return self.processor.pixels(image), None if mask is None else self.processor.mask(mask)


class ImageDataModule(ClassificationData[ImageDataset]):
    """Image classification data: read once in ``setup``, loaded in batches (see ``ImageCollator``).

    Args:
        config: The ``data`` part of the configuration.
        processor: Of the model; None: images are resized to a square and normalised by mean and standard deviation of
            the training images.
        image_size: The side of that square.
        seed: Decides cut splits, limits, generated scenes, the training order and the augmentation.
        label_names: As for texts (see ``ClassificationData``).
        require_labels: False where images are only explained.
        split: Which split the rows of a single file are, where nothing is trained.
    """

    kind = IMAGES

    def __init__(
        self,
        config: Any,
        processor: ImageProcessor | None = None,
        image_size: int = 32,
        seed: int = 0,
        label_names: Sequence[str] | None = None,
        require_labels: bool = True,
        split: str = "test",
    ) -> None:
        super().__init__(config, seed, label_names, require_labels, split)
        self.image_size = image_size
        self._processor = processor
        self._corrupt: list[CorruptImage] = []

    @property
    def processor(self) -> ImageProcessor:
        """The processor that was given, or made in ``setup``."""
        self._check_set_up()
        assert self._processor is not None
        return self._processor

    @property
    def collator(self) -> ImageCollator:
        """What makes a batch of examples."""
        return ImageCollator(self.processor)

    def setup(self, stage: str | None = None) -> None:
        """Find all images and read them; further calls find it done.

        Where all together are small they are kept in memory. Else they are read again when they are needed, and only
        ``data.on_corrupt=skip`` looks at each of them beforehand.

        Raises:
            InputError: The configuration or the data is wrong; see ``load_corpus`` and ``picture``.
        """
        if self._datasets:
            return
        corpus = load_corpus(self.config, self.seed, self._use, IMAGES)
        skip = getattr(self.config, "on_corrupt", "raise") == "skip"
        processor = self._processor or self._measured(corpus.splits.get("train"), skip)
        height, width = processor.size
        keep = 4 * height * width * sum(map(len, corpus.splits.values())) <= KEPT
        datasets, corrupt = {}, []
        for split, examples in corpus.splits.items():
            how: Augment = getattr(self.config, "augment", "none") if split == "train" else "none"
            datasets[split] = dataset = ImageDataset(examples, processor, how, self.seed)
            if keep or skip:
                corrupt += dataset.read(f"reading {split}", keep=keep, skip=skip)
            if not len(dataset):
                raise InputError(f"no image of the {split} split can be read; the first: {corrupt[-1]}")
        self._label_names, self._notes = corpus.label_names, corpus.notes
        self._processor, self._corrupt = processor, corrupt
        # Set last: an error above leaves the module as it was.
        self._datasets = datasets

    def _measured(self, examples: Sequence[ImageExample] | None, skip: bool) -> ImageProcessor:
        """Resizing to the square, and the mean and standard deviation of the training images."""
        if examples is None:
            raise InputError(
                "there is no training split to measure the mean colour on, and no model that brings an image "
                "processor: set model.name or model.checkpoint to the folder of the model that is to be explained."
            )
        generator = torch.Generator().manual_seed(self.seed)
        chosen = torch.randperm(len(examples), generator=generator)[:MEASURED].sort().values.tolist()
        dataset = ImageDataset(
            [examples[place] for place in chosen], ImageProcessor.plain(self.image_size, [0.0] * 3, [1.0] * 3)
        )
        corrupt = dataset.read("measuring", keep=True, skip=skip)
        if not len(dataset):
            raise InputError(f"no image of the train split can be read; the first: {corrupt[0]}")
        total, squares, count = torch.zeros(3, dtype=torch.double), torch.zeros(3, dtype=torch.double), 0
        for row in range(len(dataset)):
            values = dataset[row]["pixels"].double() / 255
            total += values.sum((1, 2))
            squares += values.square().sum((1, 2))
            count += values[0].numel()
        mean = total / count
        std = (squares / count - mean**2).clamp_min(0).sqrt()
        # Images of one colour have nothing to be divided by.
        std = torch.where(std < 1e-3, torch.ones_like(std), std)
        rounded = ([round(float(value), 4) for value in values] for values in (mean, std))
        return ImageProcessor.plain(self.image_size, *rounded)

    def _facts(self) -> list[str]:
        height, width = self.processor.size
        facts = [f"{width} x {height} pixels"]
        examples = [example for dataset in self._datasets.values() for example in dataset.examples]
        masked = sum(example.mask is not None for example in examples)
        if masked:
            facts.append(f"{masked:,} images with mask")
        if self._corrupt:
            first = "; ".join(str(error).partition(" Mend or")[0] for error in self._corrupt[:_NAMED])
            more = "; ..." if len(self._corrupt) > _NAMED else ""
            facts.append(f"{len(self._corrupt):,} unreadable images left out ({first}{more})")
        return facts

    @property
    def _changes_by_epoch(self) -> bool:
        return self.dataset("train").how != "none"


def _row(example: ImageExample) -> Encoded:
    label = {} if example.label is None else {"labels": example.label}
    return {"sample_id": example.sample_id, **label}


def _shown(items: Iterator[Any], title: str, total: int) -> Iterator[Any]:
    console = Console(stderr=True)
    silent = total <= QUICK or not console.is_terminal or bool(getattr(rank_zero_only, "rank", None))
    yield from track(items, title, total=total, console=console, transient=True, disable=silent)
