"""Pictures of images: overlays to the pixel, strips, outlines, notebooks and the terminal."""

import io
import re
from html.parser import HTMLParser

import pytest
import torch
from PIL import Image, ImageDraw

from calig.pipeline import Explanation
from calig.pipeline.attribution.pixels import to_pixels
from calig.pipeline.errors import InputError
from calig.pipeline.render.color import IMAGE_STRENGTH, LIGHT, OPPOSES, SUPPORTS
from calig.pipeline.render.image import (
    data_uri,
    grid_text,
    image_html,
    layer_strip,
    opened,
    outlined,
    overlay,
    thumbnail,
)

GRID = (3, 4)
SCORES = [0.5, -1.0, 0.0, 0.25, 0.0, 0.0, 1.0, -0.5, 0.1, -0.1, 0.0, 0.75]


def png(picture):
    stream = io.BytesIO()
    picture.save(stream, "PNG")
    return stream.getvalue()


def scene(width=64, height=48):
    """A disc on stripes, and its mask."""
    picture = Image.new("RGB", (width, height), (120, 150, 110))
    draw = ImageDraw.Draw(picture)
    for x in range(0, width, 8):
        draw.line((x, 0, x, height), fill=(90, 120, 90), width=3)
    place = (width // 2, height // 4, width // 2 + height // 3, height // 4 + height // 3)
    draw.ellipse(place, fill=(210, 60, 50))
    mask = Image.new("L", (width, height))
    ImageDraw.Draw(mask).ellipse(place, fill=255)
    return png(picture), png(mask)


def row(**more):
    picture, mask = scene()
    return {
        "sample_id": 4,
        "tokens": ["[CLS]", *(f"r{i // 4 + 1}c{i % 4 + 1}" for i in range(12))],
        "word_ids": [None, *range(12)],
        "scores": [9.0, *SCORES],
        "layer_scores": [[0.0, *SCORES], [0.0, *SCORES[::-1]]],
        "label": 1,
        "prediction": 1,
        "target": 1,
        "probability": 0.9,
        "method": "ca_lig",
        "grid": [3, 4],
        "picture": picture,
        "mask": mask,
    } | more


@pytest.mark.parametrize("how", ["nearest", "bilinear"])
def test_an_overlay_is_the_sum_of_grey_and_colour_at_every_pixel(how):
    picture = Image.new("RGB", (40, 30), (100, 100, 100))
    shown = overlay(picture, SCORES, GRID, how=how, side=40)
    assert shown.size == (40, 30)
    maps = to_pixels(torch.tensor(SCORES), GRID, (30, 40), how)
    grey = 100 + LIGHT * 155
    for y, x in [(0, 0), (4, 13), (14, 25), (15, 35), (29, 39), (22, 5), (9, 30)]:
        value = float(maps[y, x])
        both = [IMAGE_STRENGTH * max(0.0, sign * value) for sign in (1, -1)]
        for channel in range(3):
            wanted = grey
            for strength, color in zip(both, (SUPPORTS, OPPOSES), strict=True):
                wanted = (1 - strength) * wanted + strength * color[channel]
            assert shown.getpixel((x, y))[channel] == pytest.approx(wanted, abs=2.5), (y, x, value)


def test_scale_outline_and_sizes():
    half = overlay(None, [1.0], (1, 1), scale=2.0, side=10).getpixel((5, 5))
    full = overlay(None, [1.0], (1, 1), side=10).getpixel((5, 5))
    assert full[0] < half[0] and overlay(None, [0.0], (1, 1), side=10).getpixel((5, 5))[0] > half[0]
    picture, mask = scene()
    plain, marked = opened(picture), outlined(picture, mask)
    changed = {(x, y) for x in range(64) for y in range(48) if plain.getpixel((x, y)) != marked.getpixel((x, y))}
    inside = {(x, y) for x in range(64) for y in range(48) if opened(mask).getpixel((x, y))[0]}
    assert changed and not changed & inside  # the object itself stays as it is
    assert all(any((x + a, y + b) in inside for a in range(-2, 3) for b in range(-2, 3)) for x, y in changed)
    assert overlay(picture, SCORES, GRID, side=20).size == (64, 48) and overlay(picture, SCORES, GRID).size == (
        240,
        180,
    )
    with pytest.raises(InputError, match="12 scores are no grid of 4 x 4"):
        overlay(picture, SCORES, (4, 4))


class Parsed(HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.titles, self.tags, self._in = [], [], None
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self._in = tag

    def handle_data(self, data):
        if self._in == "title":
            self.titles.append(data)


def test_the_notebook_shows_picture_map_numbers_and_loads_nothing():
    explanation = Explanation.from_row(row(), ["cat", "<dog>"])
    text = explanation._repr_html_()
    parsed = Parsed(text)
    assert parsed.titles == [
        f"{word.text}: {score:+.4g}" for word, score in zip(explanation.words[1:], SCORES, strict=True)
    ]
    sources = [attrs["href"] for tag, attrs in parsed.tags if tag == "image"]
    assert len(sources) == 2 and all(source.startswith("data:image/") for source in sources)
    assert "&lt;dog&gt; 0.900" in text and "<dog>" not in text and "supports" in text and "<script" not in text
    assert not re.search(r"https?://", text)
    bare = Explanation.from_row(row(picture=None, mask=None))._repr_html_()
    assert "<image" not in bare and len(Parsed(bare).titles) == 12
    assert len(text) < 60_000


def test_layers_are_a_strip_and_other_plots_speak_of_patches():
    explanation = Explanation.from_row(row(curves={"none": {"removed": [(0.0, 1.0), (0.5, 0.2)]}}))
    figure = explanation.plot_layers()
    assert [axes.get_title() for axes in figure.axes] == ["block 1", "block 2", "decision"]
    assert figure._repr_png_().startswith(b"\x89PNG")
    assert explanation.plot_curves().axes[0].get_title(loc="left").endswith("patches removed")
    assert explanation.plot_flow() is not None and explanation.text == "3 x 4 patches"
    assert [word.text for word in explanation.top(2)] == ["r2c3", "r3c4"]
    many = layer_strip(None, [SCORES] * 13, GRID, SCORES, "thirteen blocks")
    assert many.width > many.height / 2
    with pytest.raises(InputError, match="layer_scores is empty"):
        layer_strip(None, [], GRID)


def test_the_terminal_shows_signs_without_colours_too():
    text = grid_text(SCORES, GRID)
    assert text.plain == "+  -- ·  +  \n·  ·  ++ -  \n+  -  ·  ++ "
    assert "++" in str(Explanation.from_row(row())) and "r2c3 +1.00" in str(Explanation.from_row(row()))
    lines = grid_text([0.0] * 4, (2, 2)).plain
    assert lines == "·  ·  \n·  ·  "


def test_thumbnails_are_small_and_tiny_pictures_stay_as_they_are():
    tiny, _ = scene(32, 24)
    assert thumbnail(tiny, 160) == data_uri(tiny)
    large = png(Image.effect_noise((500, 300), 60).convert("RGB"))
    shown = thumbnail(large, 160)
    assert shown.startswith("data:image/jpeg;base64,") and len(shown) < 25_000 < len(large)


def test_files_are_found_in_the_folder_that_is_named(tmp_path):
    picture, _ = scene()
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "4.png").write_bytes(picture)
    kept = row(picture=None, mask=None, image_ref="images/4.png", mask_ref="images/4-mask.png")
    found = Explanation.from_row(kept, folder=tmp_path)
    assert found.picture == picture and found.mask is None
    assert Explanation.from_row(kept).picture is None
    assert image_html(None, SCORES, GRID, names=["x"] * 12).count("<rect") == 12 + 3
