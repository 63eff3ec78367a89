"""Small picture files that tests of images share."""

import io
from types import SimpleNamespace

import torch
from test_data_sources import settings

from calig.datamodules.image_processor import to_picture


def noise(width=12, height=10, seed=0):
    """An RGB picture of random pixels."""
    generator = torch.Generator().manual_seed(seed)
    return to_picture(torch.randint(0, 256, (3, height, width), dtype=torch.uint8, generator=generator))


def encoded(image, kind="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def image_columns(**named):
    roles = dict.fromkeys(("text", "text_pair", "label", "rationale", "image", "mask", "boxes"))
    return SimpleNamespace(**{**roles, **named})


def image_settings(**overrides):
    more = {"annotations": None, "on_corrupt": "raise", "augment": "none", "columns": image_columns()}
    return settings(**{**more, **overrides})


def class_folders(root, counts, *, splits=("train",), kind="png"):
    """`<split>/<class>/<i>.png` of random pixels; `counts` maps a class to its number of images."""
    seed = 0
    for split in splits:
        for label, count in counts.items():
            folder = root / split / label
            folder.mkdir(parents=True)
            for i in range(count):
                (folder / f"{i}.{kind}").write_bytes(encoded(noise(seed=(seed := seed + 1))))
    return str(root)
