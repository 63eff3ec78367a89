"""The report of a finished run, in a real browser: what a reader moves must move, and nothing is loaded or logged."""

import dataclasses
import json

import pytest
from browser import in_browser, texts
from test_cli import TINY
from test_render import HOSTILE, _data, _sample

from calig.pipeline import Explanation
from calig.pipeline.cli import main
from calig.pipeline.records import read_rows
from calig.pipeline.render.report import render_report
from calig.pipeline.render.rows import ProbeSample, ProbeState
from calig.pipeline.render.tokens import token_html

pytestmark = in_browser


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("report") / "run"
    methods = "explain.methods=[ca_lig,generic_attention,input_x_gradient,random]"
    assert main(["run", f"run.dir={folder}", *TINY, methods, "logger.wandb.mode=disabled"]) == 0
    return folder


@pytest.fixture
def page(tab, run_dir):
    """The report of the run, opened afresh; at the end nothing may have been asked for or complained about."""
    tab.errors.clear()
    tab.requests.clear()
    address = (run_dir / "report.html").as_uri()
    tab.open(address)
    yield tab
    assert tab.errors == []
    assert tab.requests == [address], "the page itself, and nothing else"


def colours(page, selector):
    return page.js(
        f"[...document.querySelectorAll({json.dumps(selector)})].map((node) => getComputedStyle(node).backgroundColor)"
    )


def rows(run_dir, method):
    return {row["sample_id"]: row for row in read_rows(run_dir / "explanations") if row["method"] == method}


def shown_id(page):
    return int(page.js("document.querySelector('#v-title').textContent").split()[1])


def test_the_layer_slider_moves_the_colours_from_the_first_block_to_the_decision(page, run_dir):
    layers = page.js("Number(document.querySelector('#layer').max)") - 1
    assert layers == len(rows(run_dir, "ca_lig")[shown_id(page)]["layer_scores"]) == 2
    assert texts(page, "#layer-out") == ["showing the decision"]
    at_end = colours(page, "#v-text .word")
    page.click("#layer")  # the middle of the track
    page.press("Home")
    assert texts(page, "#layer-out") == [f"showing block 1 of {layers}"]
    at_start = colours(page, "#v-text .word")
    assert at_start != at_end and len(at_start) == len(at_end)
    page.press("ArrowRight")
    assert texts(page, "#layer-out") == [f"showing block 2 of {layers}"]
    page.press("End")
    assert colours(page, "#v-text .word") == at_end
    page.click("#play")
    page.wait("document.querySelector('#layer-out').textContent === 'showing the decision'")
    assert colours(page, "#v-text .word") == at_end


def test_hovering_shows_the_exact_score(page, run_dir):
    row = rows(run_dir, "ca_lig")[shown_id(page)]
    scores = {}
    for word, score in zip(row["word_ids"], row["scores"], strict=True):
        if word is not None:
            scores[word] = scores.get(word, 0.0) + score
    strongest = max(scores, key=lambda word: abs(scores[word]))
    page.js(f"document.querySelectorAll('#v-text .word')[{strongest}].id = 'strongest'")
    page.hover("#strongest")
    text = texts(page, "#v-readout")[0]
    number = text.split()[1].replace("−", "-")
    assert float(number) == pytest.approx(scores[strongest], rel=0.005), text
    assert "at the decision" in text


def test_filters_search_and_order(page, run_dir):
    explained = rows(run_dir, "ca_lig")
    wrong = {number for number, row in explained.items() if row["label"] != row["prediction"]}
    ids = "[...document.querySelectorAll('#rows button')].map((button) => Number(button.dataset.id))"
    listed = lambda: page.js(ids)
    assert listed() == sorted(explained)
    page.choose("#f-outcome", "wrong")
    assert set(listed()) == wrong and 0 < len(wrong) < len(explained)
    assert f"{len(wrong)} of {len(explained)}" in texts(page, "#count")[0]
    assert shown_id(page) in wrong
    page.choose("#f-outcome", "")
    page.choose("#f-class", "1")
    assert set(listed()) == {number for number, row in explained.items() if row["label"] == 1}
    page.choose("#f-class", "")
    page.choose("#f-sort", "p+")
    found = [round(explained[number]["probability"], 4) for number in listed()]
    assert found == sorted(found) and found[0] < found[-1]
    page.choose("#f-sort", "metric:token_f1")
    values = {
        row["sample_id"]: row["value"]
        for row in read_rows(run_dir / "metrics")
        if (row["method"], row["control"], row["metric"], row["q"]) == ("ca_lig", "none", "token_f1", None)
    }
    found = [values[number] for number in listed()]
    assert found == sorted(found, reverse=True)
    word = next(token for token in explained[max(explained)]["tokens"] if token.isalpha() and len(token) > 3)
    page.type("#f-text", word)
    having = {number for number, row in explained.items() if any(word in token for token in row["tokens"])}
    assert set(listed()) >= {max(explained)} and set(listed()) <= having
    page.type("#f-text", "no text holds this")
    assert listed() == [] and "No sample matches" in texts(page, "#count")[0]


def test_switching_the_method_repaints_the_text_and_says_what_it_has_not(page):
    assert texts(page, "#v-methods button") == ["ca_lig", "generic_attention", "input_x_gradient", "random"]
    first = colours(page, "#v-text .word")
    page.click("#v-methods button:nth-child(3)")
    assert texts(page, "#v-methods [aria-pressed=true]") == ["input_x_gradient"]
    assert colours(page, "#v-text .word") != first
    assert page.js("document.querySelector('#v-layers').hidden")
    assert "ca_lig, generic_attention" in texts(page, "#v-nolayers")[0]
    page.click("#v-methods button:nth-child(1)")
    assert colours(page, "#v-text .word") == first
    assert not page.js("document.querySelector('#v-layers').hidden")
    # Side by side, the same colours stand below.
    assert texts(page, "#v-compare b") == ["ca_lig", "generic_attention", "input_x_gradient", "random"]
    assert colours(page, "#v-compare > div:first-child .word") == first


def test_the_curves_end_where_the_metrics_say(page, run_dir):
    number = shown_id(page)
    whole = rows(run_dir, "ca_lig")[number]["probability"]
    wanted = {}
    for row in read_rows(run_dir / "metrics"):
        half = row["metric"] == "comprehensiveness" and row["space"] == "probability" and row["q"] == 0.5
        if half and row["sample_id"] == number:
            wanted[row["method"], row["control"]] = whole - row["value"]
    ends = [float(text) for text in texts(page, "#v-curves figure:first-child .key i")]
    expected = [wanted["ca_lig", "none"], wanted["random", "random"], wanted["ca_lig", "reversed"]]
    assert ends == pytest.approx(expected, abs=6e-4)
    assert texts(page, "#v-curves figcaption b") == ["Most relevant words removed", "Only the most relevant words kept"]


def test_the_epoch_slider_goes_through_the_training(page, run_dir):
    assert not page.js("document.querySelector('#learnt').hidden")
    assert page.js("Number(document.querySelector('#p-epoch').max)") == 1, "two probes"
    last, verdict = colours(page, "#p-text .word"), texts(page, "#p-verdict")[0]
    assert verdict.startswith("epoch 1, step ")
    page.click("#p-epoch")
    page.press("Home")
    assert texts(page, "#p-verdict")[0].startswith("epoch 0, step ")
    assert colours(page, "#p-text .word") != last
    assert len(texts(page, "#p-map svg text.on")) == 2, "the epoch, and what was decided then"
    page.choose("#p-sample", "2")
    assert len(texts(page, "#p-text .word")) == len(texts(page, "#p-map svg text[transform]")) - 2, "but [CLS], [SEP]"


def test_the_keyboard_alone_is_enough(page):
    first = shown_id(page)
    page.press("ArrowRight")
    assert shown_id(page) != first
    page.press("ArrowLeft")
    assert shown_id(page) == first
    page.press("Tab")
    assert texts(page, ":focus") == ["Skip to the samples"]
    page.press("Enter")
    page.wait("location.hash === '#samples'")
    reached = set()
    for _ in range(40):
        page.press("Tab")
        reached.add(page.js("document.activeElement.id || document.activeElement.closest('[id]')?.id"))
    assert {"f-text", "f-outcome", "f-class", "f-sort", "v-methods", "layer", "v-map", "unit-piece"} <= reached, reached


@pytest.mark.parametrize("width", [320, 390, 768, 1280])
def test_no_width_makes_the_page_scroll_sideways(page, width):
    page.resize(width, 844)
    page.js("document.querySelectorAll('details').forEach((node) => { node.open = true; })")
    assert page.js("document.documentElement.scrollWidth") <= width
    for selector in ("#v-text", "#filters", "#v-methods", "#v-curves"):
        assert page.js(f"document.querySelector('{selector}').getBoundingClientRect().right") <= width + 0.5, selector


def test_paper_shows_the_samples_and_no_controls(page):
    page.send("Emulation.setEmulatedMedia", media="print")
    try:
        visible = page.js(
            "Object.fromEntries(['#static', '#picker', '.slider', 'nav', '#v-text', '.metrics'].map((name) =>"
            "[name, document.querySelector(name).getBoundingClientRect().height > 0]))"
        )
        background = page.js("getComputedStyle(document.body).backgroundColor")
    finally:
        page.send("Emulation.setEmulatedMedia", media="")
    assert visible == {
        "#static": True,
        "#picker": False,
        ".slider": False,
        "nav": False,
        "#v-text": True,
        ".metrics": True,
    }
    assert background == "rgb(255, 255, 255)"


def hostile_page(tmp_path):
    tokens = ["[CLS]", *HOSTILE, "'\"`", "${1+1}", "[SEP]"]
    sample = _sample(tokens=tokens, methods=[HOSTILE[0], HOSTILE[2]])
    curves = {
        (name, control): {"removed": [(0, 1.0), (0.5, 0.2)]} for name in HOSTILE for control in ("none", "random")
    }
    state = ProbeState(0, 7, 1, 0.5, [0.1] * len(tokens))
    probe = ProbeSample(3, tokens, sample.word_ids, 1, None, [state, dataclasses.replace(state, epoch=1)])
    data = _data(
        title="".join(HOSTILE),
        samples=[dataclasses.replace(sample, curves=curves)],
        label_names=[HOSTILE[0], HOSTILE[3]],
        primary_method=HOSTILE[0],
        probe=[probe],
        probe_method=HOSTILE[2],
        curves_mean=curves,
    )
    file = tmp_path / "hostile.html"
    file.write_text(render_report(data), encoding="utf8")
    return file, tokens


def test_hostile_tokens_are_text_in_the_page(tab, tmp_path):
    tab.errors.clear()
    tab.requests.clear()
    file, tokens = hostile_page(tmp_path)
    tab.open(file.as_uri())
    tab.js("document.querySelectorAll('details').forEach((node) => { node.open = true; })")
    assert texts(tab, "#v-text span") == tokens == texts(tab, "#p-text span")
    assert texts(tab, "h1") == ["".join(HOSTILE)]
    assert texts(tab, "#v-methods button") == [HOSTILE[0], HOSTILE[2]]
    assert tab.js("document.querySelectorAll('img, iframe, script').length") == 2, "its data and its own script"
    assert tab.errors == [] and tab.requests == [file.as_uri()]


def test_hostile_tokens_are_text_in_a_notebook_and_in_a_dashboard(tab, tmp_path):
    """A notebook and W&B set the fragment into a page that runs scripts: there, too, it is text."""
    scores = [0.5] * len(HOSTILE)
    shown = {"label_names": (HOSTILE[3],), "layer_scores": (tuple(scores),) * 2}
    explanation = Explanation(tuple(HOSTILE), tuple(scores), HOSTILE[0], 0, 0, 0.5, **shown)
    for fragment in (explanation._repr_html_(), token_html(HOSTILE, scores, title=HOSTILE[0], legend=True)):
        file = tmp_path / "cell.html"
        file.write_text(f"<!DOCTYPE html><meta charset=utf-8><title>cell</title><body>{fragment}<p id=after>after</p>")
        tab.errors.clear()
        tab.requests.clear()
        tab.open(file.as_uri())
        assert texts(tab, "[dir=auto] span") == HOSTILE
        assert texts(tab, "#after") == ["after"], "nothing was left open"
        assert tab.js("document.querySelectorAll('img, script, style, iframe').length") == 0
        assert tab.errors == [] and tab.requests == [file.as_uri()]


ARABIC = ["[CLS]", "الفيلم", "كان", "رائعا", "،", "لكن", "النهاية", "مملة", "[SEP]"]
TEXTS = {
    "arabic": ARABIC,
    "amharic": ["[CLS]", "ሰላም", "ልዑል", "፣", "ጥሩ", "ፊልም", "ነው", "።", "[SEP]"],
    "japanese": ["[CLS]", *"この映画は本当に面白かった。", "[SEP]"],
    "emoji": ["[CLS]", "great", "👩‍👩‍👧‍👦", "❤️", "🇪🇹", "film", "😀", "[SEP]"],
    "long": ["[CLS]", *(f"word{i}" for i in range(509)), "x" * 300, "[SEP]"],
    "single": ["[CLS]", "good", "[SEP]"],
    "zero": ["[CLS]", "nothing", "matters", "[SEP]"],
    "specials": ["[CLS]", "[SEP]"],
}


@pytest.fixture(scope="module")
def scripts_page(tmp_path_factory):
    samples = [_sample(i, tokens, ["ca_lig", "random"], layers=12) for i, tokens in enumerate(TEXTS.values())]
    zero = list(TEXTS).index("zero")
    nothing = [0.0] * len(TEXTS["zero"])
    flat = [dataclasses.replace(row, scores=nothing, layer_scores=[nothing] * 12) for row in samples[zero].explanations]
    samples[zero] = dataclasses.replace(samples[zero], explanations=flat)
    states = [ProbeState(epoch, epoch, 1, 0.5, samples[0].explanations[0].scores) for epoch in range(3)]
    probe = [ProbeSample(0, ARABIC, samples[0].word_ids, 1, None, states)]
    file = tmp_path_factory.mktemp("scripts") / "scripts.html"
    file.write_text(render_report(_data(samples=samples, probe=probe, probe_method="ca_lig")), encoding="utf8")
    return file


@pytest.mark.parametrize("width", [390, 1280])
@pytest.mark.parametrize("name", TEXTS)
def test_every_script_and_length_is_laid_out_well(tab, scripts_page, name, width):
    tab.errors.clear()
    number = list(TEXTS).index(name)
    tab.open(f"{scripts_page.as_uri()}?{name}{width}#sample-{number}", width, 844)
    assert shown_id(tab) == number
    assert texts(tab, "#v-text span") == TEXTS[name]
    assert tab.js("document.documentElement.scrollWidth") <= width, "a long line must wrap or scroll in its own box"
    assert tab.js(
        """(() => {
            const box = document.querySelector('#v-text').getBoundingClientRect();
            return [...document.querySelectorAll('#v-text span')].every((node) => {
                const own = node.getBoundingClientRect();
                return own.left >= box.left - 1 && own.right <= box.right + 1;
            });
        })()"""
    )
    direction = tab.js("getComputedStyle(document.querySelector('#v-text')).direction")
    if name == "arabic":
        assert direction == "rtl"
        places = tab.js("[...document.querySelectorAll('#v-text .word')].map((node) => node.getBoundingClientRect().x)")
        assert places[0] > places[1], "the first word stands at the right"
        assert texts(tab, "#v-map text[transform]") == ARABIC
        columns = (
            "[...document.querySelectorAll('#v-map text[transform]')].map((node) => Number(node.getAttribute('x')))"
        )
        places = tab.js(columns)
        assert places == sorted(places, reverse=True), "and in the map, too"
        assert tab.js("getComputedStyle(document.querySelector('#p-text')).direction") == "rtl"
    else:
        assert direction == "ltr"
    tab.click("#layer")
    tab.press("Home")
    assert texts(tab, "#layer-out") == ["showing block 1 of 12"]
    if name in ("zero", "specials"):
        painted = {*colours(tab, "#v-text .word")}
        assert painted <= {"rgba(0, 0, 0, 0)"}, "no relevance, no colour"
        assert texts(tab, "#v-legend") == ["no word has any relevance here"]
    assert tab.errors == []


def test_a_document_of_3000_words_stays_in_its_box_and_its_map_puts_words_together(tab, tmp_path):
    words = ["[CLS]", *(f"word{i}" for i in range(3000)), "[SEP]"]
    sample = _sample(0, words, ["ca_lig", "random"], layers=6)
    file = tmp_path / "long.html"
    file.write_text(render_report(_data(samples=[sample])), encoding="utf8")
    tab.errors.clear()
    tab.open(file.as_uri(), 1280, 900)
    assert len(texts(tab, "#v-text span")) == 3002
    height, whole = tab.js(
        "[document.querySelector('#v-text').clientHeight, document.querySelector('#v-text').scrollHeight]"
    )
    assert height <= 420 and whole > 5 * height
    # 3,002 columns in groups of 13: no wider than the page, and as few shapes.
    assert tab.js("document.querySelectorAll('#v-map rect').length") <= 6 * 231 + 20
    assert tab.js("document.querySelector('#v-map').scrollWidth <= document.querySelector('#v-map').clientWidth + 1")
    first = texts(tab, "#v-map text[transform]")[0]
    assert first == "word0 … word11"
    # A column of the map brings its words into view, and says what they sum to.
    tab.js("document.querySelector('#v-map svg').scrollIntoView({ block: 'center' })")
    tab.hover("#v-map svg")
    text = texts(tab, "#v-readout")[0]
    start, end = text.split(" +")[0].split(" −")[0].split(" … ")
    place = int(start.removeprefix("word"))
    scores = sample.explanations[0].layer_scores
    block = int(text.split("block ")[1].split(",")[0]) - 1
    assert int(end.removeprefix("word")) - place == 12
    number = float(text.split()[3].replace("−", "-"))
    assert number == pytest.approx(sum(scores[block][place + 1 : place + 14]), abs=13 / 127)
    page_at = tab.js("window.scrollY")
    tab.click("#v-map svg")
    box = "document.querySelector('#v-text').getBoundingClientRect()"
    word = f"document.querySelectorAll('#v-text span')[{place + 1}].getBoundingClientRect()"
    assert tab.js(f"{word}.top > {box}.top && {word}.bottom < {box}.bottom")
    assert abs(tab.js("window.scrollY") - page_at) < 60, "the page stays where it was"
    assert tab.errors == []
