"""The report of a run of images: what the page holds, and what a reader moves in a real browser."""

import dataclasses
import json
import re

import pytest
from browser import in_browser, texts
from image_run import make_image_run
from PIL import Image, ImageDraw
from test_render_images import png, scene

from calig.pipeline.directory import RunDirectory
from calig.pipeline.records import read_rows
from calig.pipeline.render.image import outline_path
from calig.pipeline.render.report import MAX_BYTES, render_report
from calig.pipeline.stages.report import collect, write_report


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    folder = make_image_run(tmp_path_factory.mktemp("images") / "run")
    write_report(folder)
    return folder


@pytest.fixture
def page(tab, run_dir):
    """The report, opened afresh; at the end nothing may have been asked for or complained about."""
    tab.errors.clear()
    tab.requests.clear()
    address = (run_dir / "report.html").as_uri()
    tab.open(address)
    tab.wait("document.querySelector('#v-text canvas')?.width > 1")
    yield tab
    assert tab.errors == []
    assert [asked for asked in tab.requests if not asked.startswith("data:")] == [address]


def pixels(page, selector):
    """A checksum of what a canvas shows."""
    return page.js(
        f"(() => {{ const c = document.querySelector({json.dumps(selector)}); const d = c.getContext('2d')"
        ".getImageData(0, 0, c.width, c.height).data; let sum = 0;"
        "for (let i = 0; i < d.length; i++) sum = (sum * 31 + d[i]) | 0; return sum; })()"
    )


def row_of(run_dir, method, sample_id=20):
    return next(
        row for row in read_rows(run_dir / "explanations") if (row["method"], row["sample_id"]) == (method, sample_id)
    )


def test_the_page_is_one_small_file_with_static_pictures(run_dir):
    text = (run_dir / "report.html").read_text()
    assert len(text) < 500_000 and not re.search(r"(?:src|href)=\"https?:", text)
    static = text[text.index('<div id="static">') : text.index('<section id="learnt"')]
    assert static.count("<svg viewBox") == 12 and static.count("<title>r1c1:") == 6
    for word in ("Most relevant patches removed", "centre prior", "mask AUPRC", "Patch table"):
        assert word in text


def test_a_hundred_images_of_224_pixels_and_twelve_blocks_stay_below_the_limit(run_dir):
    data = collect(RunDirectory(run_dir))
    large = png(Image.effect_noise((224, 224), 50).convert("RGB"))
    first = data.samples[0]
    tokens, words = ["[CLS]", *["r1c1"] * 196], [None, *range(196)]
    scores = [i * 0.37 % 2 - 1 for i in range(197)]
    rows = [
        dataclasses.replace(row, method=f"method {k}", scores=scores, layer_scores=[scores] * 12)
        for k in range(7)
        for row in first.explanations[:1]
    ]
    image = dataclasses.replace(first.image, grid=(14, 14), picture=large)
    sample = dataclasses.replace(first, tokens=tokens, word_ids=words, explanations=rows, image=image)
    many = [dataclasses.replace(sample, sample_id=i) for i in range(100)]
    page = render_report(dataclasses.replace(data, samples=many, explained=100, probe=()))
    assert len(page.encode()) < MAX_BYTES and "First" not in page
    shown = json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', page)[1])
    assert len(shown["samples"]) == 100 and len(shown["layerMethods"]) == 3


def test_an_outline_encloses_the_mask():
    mask = Image.new("L", (128, 96))
    ImageDraw.Draw(mask).rectangle((32, 16, 63, 47), fill=255)
    path, width, height = outline_path(png(mask))
    assert (width, height) == (64, 48)
    assert path == "M16 8H32M16 24H32M16 8V24M32 8V24"
    full, *size = outline_path(png(Image.new("L", (3, 2), 255)))
    assert full == "M0 0H3M0 2H3M0 0V2M3 0V2" and size == [3, 2]
    _, ring = scene()
    assert len(outline_path(ring)[0]) < 1500


@in_browser
def test_the_layer_slider_and_the_strip_move_the_map(page, run_dir):
    layers = len(row_of(run_dir, "ca_lig")["layer_scores"])
    assert texts(page, "#v-map .strip button span") == [*(f"block {i + 1}" for i in range(layers)), "decision"]
    at_end = pixels(page, "#v-text canvas")
    page.click("#layer")
    page.press("Home")
    assert texts(page, "#layer-out") == [f"showing block 1 of {layers}"]
    first = pixels(page, "#v-text canvas")
    assert first != at_end
    page.click("#v-map .strip button:nth-child(2)")
    assert texts(page, "#layer-out") == [f"showing block 2 of {layers}"]
    assert pixels(page, "#v-text canvas") not in (first, at_end)
    page.click("#v-map .strip button:last-child")
    assert pixels(page, "#v-text canvas") == at_end and texts(page, "#layer-out") == ["showing the decision"]


@in_browser
def test_pointing_and_arrow_keys_show_the_exact_score_of_a_patch(page, run_dir):
    row = row_of(run_dir, "ca_lig")
    scores = [score for score, word in zip(row["scores"], row["word_ids"], strict=True) if word is not None]

    def said():
        text = texts(page, "#v-readout")[0]
        place = re.match(r"row (\d), column (\d) ([+−][\d.e−-]+) at the decision", text)
        assert place, text
        number = (int(place[1]) - 1) * 8 + int(place[2]) - 1
        assert float(place[3].replace("−", "-")) == pytest.approx(scores[number], rel=0.006), text
        return number

    page.hover("#v-text .image")
    middle = said()
    assert middle in (27, 28, 35, 36)
    page.js("document.querySelector('#v-text .image').focus()")
    page.press("ArrowRight")
    assert said() == middle + 1
    page.press("ArrowDown")
    assert said() == middle + 9
    assert texts(page, "#v-title") == ["Sample 20"], "the arrow keys stay inside the map"
    assert page.js("document.querySelector('#v-text .cell').hidden") is False


@in_browser
def test_the_map_is_what_the_scores_say(page, run_dir):
    """Colours of the middles of two patches, computed here from the scores and the picture."""
    row = row_of(run_dir, "ca_lig")
    scores = [score for score, word in zip(row["scores"], row["word_ids"], strict=True) if word is not None]
    picture = Image.open(run_dir / row["image_ref"])
    page.click("#outline")
    scale = max(map(abs, scores))
    for number in (0, 7, 56, 63):
        x, y = number % 8, number // 8
        found = page.js(
            "[...document.querySelector('#v-text canvas').getContext('2d')"
            f".getImageData({45 * x + 22}, {45 * y + 22}, 1, 1).data]"
        )
        red, green, blue = picture.getpixel((8 * x + 4, 8 * y + 4))
        grey = 0.6 * (0.299 * red + 0.587 * green + 0.114 * blue) + 0.4 * 255
        alpha = 0.85 * abs(scores[number]) / scale
        for channel, colour in enumerate((33, 102, 172) if scores[number] > 0 else (200, 90, 10)):
            assert found[channel] == pytest.approx(grey * (1 - alpha) + colour * alpha, abs=14), number


@in_browser
def test_views_methods_and_samples_change_the_picture(page):
    seen = {pixels(page, "#v-text canvas")}
    for step in ("#how-smooth", "#how-picture", "#v-methods button:nth-child(3)", "#how-patches", "#outline", "#next"):
        page.click(step)
        now = pixels(page, "#v-text canvas")
        if step != "#v-methods button:nth-child(3)":  # the picture alone is of no method
            assert now not in seen, step
        seen.add(now)
    assert texts(page, "#v-title") == ["Sample 21"]
    assert page.js("document.querySelector('#outline').hidden"), "nobody has outlined the object of this one"
    assert texts(page, "#v-compare b") == ["the picture", "ca_lig", "generic_attention", "input_x_gradient", "random"]
    assert page.js("[...document.querySelectorAll('#units, #hows')].map((node) => getComputedStyle(node).display)") == [
        *("none", "flex")
    ]
    page.type("#f-text", "24")
    assert texts(page, "#count")[0].startswith("1 of 6")


@in_browser
def test_the_training_is_shown_map_by_map(page):
    strip = "#p-map .strip button"
    assert texts(page, f"{strip} span") == ["epoch 0", "epoch 1"]
    late = pixels(page, "#p-text canvas")
    page.click(f"{strip}:first-child")
    assert "epoch 0, step 40" in texts(page, "#p-verdict")[0]
    assert pixels(page, "#p-text canvas") != late


@in_browser
@pytest.mark.parametrize("width", [1280, 390, 320])
def test_nothing_is_wider_than_the_window(page, width):
    page.resize(width, 844)
    page.js("document.querySelectorAll('details').forEach((node) => { node.open = true; })")
    assert page.js("document.documentElement.scrollWidth") <= width
    assert page.js("document.querySelector('#v-text canvas').getBoundingClientRect().width") <= width - 20
