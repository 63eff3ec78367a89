"""Sentence pairs: the two texts apart in every picture, whatever they contain; other heads in words."""

import json
import re

import pytest
from test_explain_api import make_folder, make_run

from calig.callbacks.media import probe_media
from calig.pipeline import Explanation, explain
from calig.pipeline.cli import main
from calig.pipeline.render.decisions import Decision
from calig.pipeline.render.report import render_report
from calig.pipeline.render.rows import ProbeSample, ProbeState, ReportData, Sample, SampleExplanation
from calig.pipeline.render.tokens import named_segments, split_segments, token_html, token_markdown, token_text

# [CLS] a <b> [SEP] not </script> [SEP]
HOSTILE = ["[CLS]", "a", "<b onload=x>", "[SEP]", "not", "</script><script>alert(1)</script>", "[SEP]"]
WORDS = [None, 0, 1, None, 2, 3, None]
SEGMENT = [None, 0, 0, None, 1, 1, None]
SCORES = [0.1, 0.5, -0.2, 0.0, -0.9, 0.3, 0.2]
NAMES = ("premise <i>", "hypothesis")


def texts(html):
    """The texts of the blocks of a fragment, without markup."""
    parts = re.split(r"<div|</div>", html)
    return [re.sub(r"<[^>]*>", "", part.partition(">")[2]).strip() for part in parts if "<span" in part]


def test_html_shows_the_two_texts_apart():
    html = token_html(HOSTILE, SCORES, word_ids=WORDS, segment=SEGMENT, segment_names=NAMES)
    assert texts(html) == [
        "[CLS] a &lt;b onload=x&gt; [SEP]",
        "not &lt;/script&gt;&lt;script&gt;alert(1)&lt;/script&gt; [SEP]",
    ]
    assert html.index("premise &lt;i&gt;") < html.index("onload") < html.index("hypothesis") < html.index("not</span>")
    assert "<script" not in html and "<i>" not in html and "<b " not in html
    # Both are tinted on one scale: that of the strongest word of either.
    alone = token_html(HOSTILE, SCORES, word_ids=WORDS)
    assert len(texts(alone)) == 1
    assert re.findall(r"background:[^;]*;border-radius", html) == re.findall(r"background:[^;]*;border-radius", alone)


def test_the_terminal_shows_them_on_lines_of_their_own():
    shown = token_text(HOSTILE, SCORES, word_ids=WORDS, segment=SEGMENT, segment_names=NAMES).plain.split("\n")
    assert shown[0].startswith("premise <i>  [CLS] a") and shown[1].startswith("hypothesis   not ")
    one = token_text(HOSTILE, SCORES, word_ids=WORDS).plain
    assert "\n" not in one and "premise" not in one
    paragraphs = token_markdown(HOSTILE, SCORES, word_ids=WORDS, segment=SEGMENT, segment_names=NAMES).split("\n\n")
    assert len(paragraphs) == 2 and paragraphs[1].startswith("hypothesis&#58; *not*")
    assert "<" not in "".join(paragraphs)


def test_a_first_text_alone_is_one_part():
    words = Explanation(tuple(HOSTILE), tuple(SCORES), "m", 0, 0, 0.5, word_ids=tuple(WORDS)).words
    assert split_segments(words, None) == [words] == split_segments(words, [None, 0, 0, None, 0, 0, None])
    first, second = split_segments(words, SEGMENT)
    assert [*first, *second] == words and second[0].text == "not"


def page_json(page):
    return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL).group(1))


def sample(number, *, segment=SEGMENT, decision=None, **more):
    rows = [SampleExplanation("ca_lig", SCORES)]
    return Sample(number, HOSTILE, WORDS, None, 0, 0.7, explanations=rows, segment=segment, decision=decision, **more)


def test_the_report_shows_them_apart():
    state = ProbeState(0, 5, 0, 0.6, SCORES)
    probe = ProbeSample(3, HOSTILE, WORDS, 0, None, [state], SEGMENT)
    data = ReportData("run", samples=[sample(3)], primary_method="ca_lig", segments=NAMES, probe=[probe])
    page = render_report(data)
    found = page_json(page)
    assert found["segments"] == list(NAMES)
    for units in (found["samples"][0]["units"], found["probe"]["samples"][0]["units"]):
        assert [bool(flags & 8) for _, flags, *_ in units] == [False] * 4 + [True, True, False]
    static = page[page.index('<div id="static">') : page.index("</section>", page.index('<div id="static">'))]
    assert static.count('class="segment"') == 2 and "premise &lt;i&gt;" in static
    assert "<script>alert" not in page and "<b onload" not in page
    plain = render_report(ReportData("run", samples=[sample(3, segment=None)], primary_method="ca_lig"))
    assert 'class="segment">' not in plain and not any(
        flags & 8 for _, flags, *_ in page_json(plain)["samples"][0]["units"]
    )


def test_the_report_tells_the_labels_of_a_sample_apart():
    decisions = [Decision(c, 1, 0.6 + c / 10, predictions=[1, 2], labels=[2]) for c in (1, 2)]
    rows = [sample(7, segment=None, decision=decision) for decision in decisions]
    number = sample(8, segment=None, decision=Decision(0, 0, None, value=2.5, label_value=3.0))
    names = ("<joy>", "love", "fear")
    page = render_report(ReportData("run", samples=[*rows, number], label_names=names, primary_method="ca_lig"))
    found = page_json(page)["samples"]
    assert [one["key"] for one in found] == ["7-1", "7-2", "8"] and [one["id"] for one in found] == [7, 7, 8]
    assert [one["prediction"] for one in found] == [1, 2, 0] and [one["p"] for one in found] == [0.7, 0.8, 2.5]
    assert [one["right"] for one in found] == [False, False, None]
    assert found[0]["said"] == "love 0.700 · predicted love, fear · labels fear"
    assert found[2]["said"] == "<joy> 2.500 · label 3.000"
    assert "&lt;joy&gt; 2.500 · label 3.000" in page and "<joy>" not in page


@pytest.mark.parametrize(
    ("decision", "right", "parts"),
    [
        (Decision(1, 1, 0.9, label=1), True, ["b 0.900", "label b"]),
        (Decision(0, 1, 0.1, label=0), False, ["a 0.100", "predicted b", "label a"]),
        (Decision(0, 0, 0.9), None, ["a 0.900"]),
        (Decision(1, 1, 0.9, predictions=[1], labels=[1]), True, ["b 0.900", "predicted b", "labels b"]),
        (Decision(1, 1, 0.4, predictions=[], labels=[]), True, ["b 0.400", "predicted none", "labels none"]),
        (Decision(1, 1, 0.9, predictions=[1, 0]), None, ["b 0.900", "predicted b, a"]),
        (Decision(0, 0, None, value=-1.5, label_value=2.0), None, ["a -1.500", "label 2.000"]),
        (Decision(4, 4, 0.5), None, ["class 4 0.500"]),
    ],
)
def test_decisions_in_words(decision, right, parts):
    assert decision.right is right and decision.parts(["a", "b"]) == parts
    assert decision.plain == (decision.predictions is None and decision.value is None)


def test_a_pair_is_explained_apart_from_the_command_line(tmp_path, capsys):
    make_folder(tmp_path / "model")
    pair = ["--text", "the plot was not bad", "--text-pair", "a good <b>story</b>"]
    page = tmp_path / "page.html"
    assert main(["explain", str(tmp_path / "model"), *pair, "--option", "steps=5", "--html", str(page)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].startswith("first   [CLS] the plot was not bad [SEP]") and lines[2].startswith("second  a good")
    html = page.read_text()
    assert html.index(">first<") < html.index("plot") < html.index(">second<") < html.index("good")
    assert "<b>story" not in html
    found = explain(str(tmp_path / "model"), ["not bad"], text_pairs=["good"], steps=5)[0]
    assert found.segment == (None, 0, 0, None, 1, None)
    assert explain(str(tmp_path / "model"), ["not bad"], steps=5)[0].segment is None


def test_the_texts_of_a_run_are_called_as_their_columns(tmp_path):
    make_run(tmp_path / "run")
    path = tmp_path / "run" / "config.yaml"
    config = path.read_text()
    assert "text: null" in config and "text_pair: null" in config
    path.write_text(config.replace("text: null", "text: premise").replace("text_pair: null", "text_pair: hypothesis"))
    found = explain(tmp_path / "run", ["not bad"], text_pairs=["good"], steps=5)[0]
    assert str(found).splitlines()[1].startswith("premise     [CLS] not bad")
    assert str(found).splitlines()[2].startswith("hypothesis  good")
    assert named_segments("0", "1") == ("first", "second") == named_segments(None, None)


def test_loggers_show_pairs_labels_and_numbers():
    row = {
        **{"tokens": HOSTILE, "scores": SCORES, "word_ids": WORDS, "rationale": None, "layer_scores": None},
        **{"completeness_gap": 0.1, "label": None, "prediction": 1, "target": 1, "probability": 0.75},
    }
    several = row | {"sample_id": 1, "predictions": [0, 1], "labels": [1], "segment": SEGMENT}
    number = row | {"sample_id": 2, "target": 0, "prediction": 0, "probability": None, "value": 1.5, "label_value": 2.0}
    one = row | {"sample_id": 3, "label": 0}
    media = probe_media("ca_lig", [several, number, one], {}, {}, ["<joy>", "love"], 4)
    columns, table = media["tables"]["val/explain/ca_lig/samples"]
    cells = [dict(zip(columns, line, strict=True)) for line in table]
    assert (cells[0]["label"], cells[0]["prediction"], cells[0]["probability"]) == ("love", "love of <joy>, love", 0.75)
    assert (cells[1]["label"], cells[1]["prediction"], cells[1]["probability"]) == (2.0, 1.5, None)
    assert (cells[2]["label"], cells[2]["prediction"], cells[2]["probability"]) == ("<joy>", "love", 0.75)
    html, markdown = media["html"]["val/explain/ca_lig/tokens"], media["texts"]["val/explain/ca_lig/tokens"]
    assert html.count(">second</div>") == 1 and "<script" not in html and "<joy>" not in html
    assert "#2 · &lt;joy&gt; 1.500 · label 2.000" in html and "#3 · love p=0.75 · label &lt;joy&gt;" in html
    assert "second&#58;" in markdown and "<" not in markdown
