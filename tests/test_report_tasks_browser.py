"""Pairs, several labels and numbers on the report page, in a real browser."""

import pytest
from browser import in_browser, texts
from test_pairs import HOSTILE, NAMES, SCORES, SEGMENT, WORDS, sample

from calig.pipeline.render.decisions import Decision
from calig.pipeline.render.report import render_report
from calig.pipeline.render.rows import ProbeSample, ProbeState, ReportData

pytestmark = in_browser
LABELS = ("<joy>", "love", "fear")


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    several = [
        sample(7, decision=Decision(c, 1, 0.6 + c / 10, predictions=[1, 2], labels=[1, 2] if c == 1 else [2]))
        for c in (1, 2)
    ]
    number = sample(9, segment=None, decision=Decision(0, 0, None, value=2.5, label_value=3.0))
    state = ProbeState(0, 5, 0, 0.6, SCORES, Decision(2, 1, 0.4, predictions=[], labels=[2]))
    probe = ProbeSample(3, HOSTILE, WORDS, None, None, [state], SEGMENT)
    data = ReportData(
        "run",
        samples=[*several, number],
        primary_method="ca_lig",
        label_names=LABELS,
        segments=NAMES,
        probe=[probe],
        probe_method="ca_lig",
    )
    file = tmp_path_factory.mktemp("tasks") / "report.html"
    file.write_text(render_report(data), encoding="utf8")
    return file.as_uri()


def test_each_label_has_a_place_of_its_own(tab, address):
    tab.open(address)
    assert texts(tab, "#rows button") == [
        "✓right" + "love" + "0.70" + f"7  {' '.join(HOSTILE[i] for i in (1, 2, 4, 5))}",
        "✗wrong" + "fear" + "0.80" + f"7  {' '.join(HOSTILE[i] for i in (1, 2, 4, 5))}",
        "·" + "<joy>" + "2.50" + f"9  {' '.join(HOSTILE[i] for i in (1, 2, 4, 5))}",
    ]
    assert texts(tab, "#v-verdict") == ["✓ right · love 0.700 · predicted love, fear · labels love, fear"]
    tab.press("ArrowRight")
    assert texts(tab, "#v-verdict") == ["✗ wrong · fear 0.800 · predicted love, fear · labels fear"]
    assert tab.js("location.hash") == "#sample-7-2"
    tab.press("ArrowRight")
    assert texts(tab, "#v-verdict") == ["<joy> 2.500 · label 3.000"] and tab.js("location.hash") == "#sample-9"
    assert texts(tab, "#p-verdict") == ["epoch 0, step 5 · ✗ wrong · fear 0.400 · predicted none · labels fear"]
    tab.open(f"{address}?again#sample-7-2")
    assert texts(tab, "#v-verdict")[0].startswith("✗ wrong · fear")
    assert tab.errors == []


def test_the_texts_of_a_pair_stand_apart(tab, address):
    tab.open(f"{address}?pair#sample-7-1")
    for where in ("v-text", "p-text"):
        assert texts(tab, f"#{where} .segment") == list(NAMES)
        assert texts(tab, f"#{where} .word, #{where} .special") == HOSTILE
        top = [
            tab.js(f"document.querySelectorAll('#{where} .word')[{i}].getBoundingClientRect().top") for i in (0, 1, 2)
        ]
        assert top[0] == top[1] < top[2], "the second text begins on a line of its own"
    tab.open(f"{address}?single#sample-9")
    assert texts(tab, "#v-text .segment") == []
    assert tab.errors == [] and tab.js("document.querySelectorAll('#v-text script').length") == 0
