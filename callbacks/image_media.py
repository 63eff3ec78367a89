"""The pictures of a probe of images: overlays, layer strips, and a table of both."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from PIL import Image

from calig.pipeline.render.image import contact_sheet, layer_strip, opened, outlined, overlay

COLUMNS = ("epoch", "sample_id", "input", "overlay", "label", "prediction", "probability", "completeness_gap")


class Masked(NamedTuple):
    """A table cell: a picture, and its object in white, which W&B can show and hide."""

    picture: Image.Image
    mask: Image.Image


def image_rows_media(
    rows: Sequence[Mapping[str, Any]], metrics: Sequence[str], epoch: int, name: Callable[[int | None], str | None]
) -> tuple[dict[str, Image.Image], tuple[tuple[str, ...], list[list[Any]]]]:
    """What a probe shows of its images.

    Args:
        rows: Explanations with `picture`, at least one.
        metrics: Columns of the table.
        epoch: For the table.
        name: Names a class.

    Returns:
        Images by key: `overlay`, all inputs beside their maps, and `layers`, the strip of the first; and the table.
    """
    table: list[list[Any]] = []
    pairs: list[Image.Image] = []
    for row in rows:
        grid = (row["grid"][0], row["grid"][1])
        content = [place for place, number in enumerate(row["word_ids"]) if number is not None]
        scores = [row["scores"][place] for place in content]
        picture, mask = opened(row["picture"]), row["mask"]
        shown = overlay(picture, scores, grid, mask=mask)
        pairs += [outlined(picture.resize(shown.size), mask) if mask else picture.resize(shown.size), shown]
        strip = None
        if row["layer_scores"] is not None:
            maps = [[layer[place] for place in content] for layer in row["layer_scores"]]
            strip = layer_strip(picture, maps, grid, scores, mask=mask)
        cell = picture if mask is None else Masked(picture, opened(mask).resize(picture.size).convert("L"))
        facts = [name(row["label"]), name(row["prediction"]), row["probability"], row["completeness_gap"]]
        values = [row.get("metrics", {}).get(key) for key in metrics]
        table.append([epoch, row["sample_id"], cell, shown, *facts, *values, strip])
    images = {"overlay": contact_sheet(pairs, columns=4)}
    if table[0][-1] is not None:
        images["layers"] = table[0][-1]
    return images, ((*COLUMNS, *metrics, "layers"), table)
