import dataclasses
import io
import math
import random
import re
import subprocess
import sys

import numpy as np
import pytest
from rich.console import Console

from calig.pipeline.errors import InputError
from calig.pipeline.render.color import OPPOSES, SUPPORTS, abs_scale, css_tint, rgb, unit
from calig.pipeline.render.curves import curve_panels, perturbation_panels
from calig.pipeline.render.figures import layer_heatmap, layer_profile
from calig.pipeline.render.labels import metric, number
from calig.pipeline.render.leaderboard import leaderboards
from calig.pipeline.render.packing import pack_scores, script_json, unpack_scores
from calig.pipeline.render.pieces import merge_pieces
from calig.pipeline.render.report import MetricRow, ReportData, Sample, SampleExplanation, render_report
from calig.pipeline.render.rows import ProbeSample, ProbeState
from calig.pipeline.render.tokens import token_html, token_markdown, token_text

HOSTILE = ["<script>alert(1)</script>", "</script>", "</style>", '"><img src=x onerror=alert(2)>', "{{ 7*7 }}", "<!--"]
AMHARIC, ARABIC, JAPANESE, EMOJI = "ሰላም", "مرحبا", "映画", "😀"


def _sample(sample_id=0, tokens=("[CLS]", "play", "##ing", "well", "[SEP]"), methods=("ca_lig",), layers=2, **changes):
    generator = random.Random(sample_id)
    word_ids, word = [], -1
    for token in tokens:
        word += not token.startswith("##") and token not in ("[CLS]", "[SEP]")
        word_ids.append(None if token in ("[CLS]", "[SEP]") else word)

    def scores():
        return [generator.gauss(0, 1) for _ in tokens]

    rows = [
        SampleExplanation(m, scores(), [scores() for _ in range(layers)] or None, 0.01, True, {"sufficiency": 0.1})
        for m in methods
    ]
    sample = Sample(sample_id, list(tokens), word_ids, 1, 1, 0.9, None, rows)
    return dataclasses.replace(sample, **changes)


def _data(**changes):
    metrics = [
        MetricRow("ca_lig", "comprehensiveness", 0.7, 0.6, 0.8),
        MetricRow("ca_lig", "sufficiency", 0.5),
        MetricRow("other", "comprehensiveness", 0.3),
        MetricRow("other", "sufficiency", 0.4),
        MetricRow("random", "comprehensiveness", 0.36, control="random"),
        MetricRow("ca_lig", "comprehensiveness", 0.1, control="reversed"),
        MetricRow("ca_lig", "comprehensiveness@delete.logit", 2.5),
    ]
    data = ReportData(
        title="a run",
        summary={"test/accuracy": 0.912, "note": None},
        config_yaml="seed: 1",
        versions={"calig": "0.1.0"},
        curves={"train/loss": [(0, 1.0), (10, 0.5)], "val/loss": [(10, 0.6)]},
        metrics=metrics,
        samples=[_sample(i) for i in range(3)],
        label_names=["bad", "good"],
        primary_method="ca_lig",
    )
    return dataclasses.replace(data, **changes)


# colour


def test_sign_decides_the_hue_and_size_the_strength():
    assert rgb(1.0) == SUPPORTS
    assert rgb(-1.0) == OPPOSES
    assert rgb(0.0) == (255, 255, 255)
    assert css_tint(0.5).startswith("rgba({},{},{},".format(*SUPPORTS))
    assert css_tint(-0.5).startswith("rgba({},{},{},".format(*OPPOSES))
    assert css_tint(0.0) == "transparent"
    assert float(css_tint(0.9).split(",")[3][:-1]) > float(css_tint(0.3).split(",")[3][:-1])
    assert abs_scale([0.0, math.nan]) == 1.0
    assert unit(-9.0, 3.0) == -1.0
    assert unit(math.nan, 1.0) == 0.0


def _luminance(color):
    linear = [c / 255 / 12.92 if c <= 10 else ((c / 255 + 0.055) / 1.055) ** 2.4 for c in color]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize(("paper", "ink"), [((253, 253, 251), (29, 32, 36)), ((21, 23, 26), (230, 230, 227))])
@pytest.mark.parametrize("hue", [SUPPORTS, OPPOSES])
def test_text_on_the_strongest_tint_stays_readable(paper, ink, hue):
    mixed = [0.7 * c + 0.3 * p for c, p in zip(hue, paper, strict=True)]
    light, dark = sorted((_luminance(mixed), _luminance(ink)), reverse=True)
    assert (light + 0.05) / (dark + 0.05) >= 4.5


def test_the_two_ends_stay_apart_for_red_green_colour_blindness():
    # Viénot, Brettel, Mollon 1999: what a deuteranope sees of a linear RGB colour.
    simulate = np.array([[0.29275, 0.70725, 0.0], [0.29275, 0.70725, 0.0], [-0.02234, 0.02234, 1.0]])
    ends = [simulate @ ((np.array(color) / 255) ** 2.2) for color in (SUPPORTS, OPPOSES)]
    assert np.abs(ends[0] - ends[1]).max() > 0.3


# pieces


@pytest.mark.parametrize(
    ("tokens", "word_ids", "words"),
    [
        (["[CLS]", "play", "##ing", ",", "[SEP]"], [None, 0, 0, 1, None], ["[CLS]", "playing", ",", "[SEP]"]),
        (["▁the", "▁film", "s", "."], [0, 1, 1, 2], ["the", "films", "."]),
        (["▁the", "▁film"], [0, 0], ["the", "film"]),
        (["the", "Ġfilm", "s"], [0, 1, 1], ["the", "films"]),
        (["Ġcaf", "Ã©"], [0, 0], ["café"]),
        (["Ġ", "áĪ", "°", "áĪ", "ĭ", "áĪ", "Ŀ"], [0] * 7, [AMHARIC]),
        (["▁", "<0xF0>", "<0x9F>", "<0x98>", "<0x80>"], [0] * 5, [EMOJI]),
    ],
)
def test_pieces_join_into_words(tokens, word_ids, words):
    assert [word.text for word in merge_pieces(tokens, [1.0] * len(tokens), word_ids)] == words


def test_a_word_scores_the_sum_of_its_pieces():
    words = merge_pieces(["[CLS]", "play", "##ing", "well"], [9.0, 0.5, -0.2, 1.0], [None, 0, 0, 1])
    assert [word.score for word in words] == pytest.approx([9.0, 0.3, 1.0])
    assert [word.special for word in words] == [True, False, False]
    assert words[1].positions == (1, 2)


def test_blanks_stand_where_the_text_had_them():
    def text(tokens, word_ids=None):
        return "".join(" " * word.space + word.text for word in merge_pieces(tokens, None, word_ids))

    assert text(["good", ",", "real", "##ly", "!"]) == "good, really!"
    assert text(["▁good", ",", "▁no"]) == "good, no"
    assert text(list(JAPANESE)) == JAPANESE


def test_lengths_that_differ_are_an_error_that_says_both():
    with pytest.raises(InputError, match=r"scores has 1 entries for 2 tokens"):
        merge_pieces(["a", "b"], [1.0])


# tokens


def test_hostile_tokens_are_text_in_the_fragment():
    html = token_html(HOSTILE, [1.0] * len(HOSTILE), title="<script>x</script>", legend=True)
    assert "<script" not in html and "<img" not in html and "</style" not in html
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in html
    assert set(re.findall(r"<(\w+)", html)) == {"div", "span"}


def test_fragment_shows_sign_score_and_rationale():
    html = token_html(["[CLS]", "good", "bad"], [5.0, 2.0, -2.0], word_ids=[None, 0, 1], rationale=[0, 1, 1, 1])
    cls, good, bad = re.findall(r"<span.*?</span>", html)
    assert "rgba" not in cls and "GrayText" in cls
    assert css_tint(1.0) in good and "underline" not in good  # full colour: the special token is not on the scale
    assert css_tint(-1.0) in bad and "underline" in bad and 'title="-2 · human rationale"' in bad


def test_a_special_token_does_not_decide_the_direction_of_the_text():
    html = token_html(["[CLS]", ARABIC], [0.0, 1.0], word_ids=[None, 0], title="Latin")
    assert '<div dir="auto"><span dir="ltr" style="font-size' in html


def test_markdown_marks_the_strong_words_and_escapes_the_rest():
    tokens = ["[CLS]", "good", "so", "bad", "*a*", "<b>", "[x](y)"]
    text = token_markdown(tokens, [9, 1.0, 0.1, -0.5, 0, 0, 0.25], word_ids=[None, *range(6)])
    assert text.startswith("&#91;CLS&#93; **good** (+1) so *bad* (-0.5) &#42;a&#42; &#60;b&#62;")
    assert not set("<>[]`_") & set(text)
    assert token_markdown([], []) == ""


def test_fixed_scale_and_zero_scores():
    assert css_tint(0.5) in token_html(["a"], [1.0], scale=2.0)
    assert "rgba" not in token_html(["a", "b"], [0.0, 0.0])
    flat = token_html(["[CLS]", "b"], [2.0, 0.0], word_ids=[None, 0], legend=True)
    assert "no word has any relevance" in flat and "supports" not in flat
    assert "<span" not in token_html([], [])


def test_terminal_text_keeps_the_sign_without_colours(monkeypatch):
    text = token_text(["good", "bad", EMOJI], [1.0, -1.0, 0.0], legend=True)
    assert text.plain.startswith(f"good bad {EMOJI}")
    styles = {text.plain[span.start : span.end]: str(span.style) for span in text.spans}
    assert "italic" in styles["bad"] and "italic" not in styles["good"]
    monkeypatch.setenv("NO_COLOR", "1")
    buffer = io.StringIO()
    Console(file=buffer, force_terminal=True).print(text)
    assert not re.search(r"\x1b\[[0-9;]*[34]8;", buffer.getvalue())


# figures


def test_heatmap_is_a_readable_image_in_any_script():
    tokens = [AMHARIC, ARABIC, "$x_", "$", "##ing", EMOJI] + ["word"] * 34
    scores = np.random.default_rng(0).normal(size=(12, 40))
    image = layer_heatmap(tokens, scores.tolist(), title="$5 <b>")
    assert 800 < image.width < 3000 and 300 < image.height < 1500
    assert len(image.getcolors(1 << 20)) > 50


def test_heatmap_colours_follow_the_sign():
    def mean(value):
        return np.asarray(layer_heatmap(["a"] * 4, [[value] * 4] * 2))[:, :, [0, 2]].reshape(-1, 2).mean(0)

    assert mean(1.0)[1] > mean(1.0)[0]  # blue
    assert mean(-1.0)[0] > mean(-1.0)[1]  # orange


def test_heatmap_survives_zeros_and_not_a_number_and_refuses_ragged_rows():
    layer_heatmap(["a"], [[0.0]], per_layer=True)
    layer_heatmap(["a", "b"], [[math.nan, 1.0]])
    for bad in ([], [[1.0]], [[1.0, 2.0], [1.0]]):
        with pytest.raises(InputError, match="2 tokens"):
            layer_heatmap(["a", "b"], bad)


def test_profile_is_a_picture():
    for profile in ([0.2, 0.8], {"epoch 0": [0.5, 0.5], "$1_": [0.1, 0.9]}):
        image = layer_profile(profile, "title")
        assert image.width > 300 and len(image.getcolors(1 << 20)) > 5
    with pytest.raises(InputError, match="empty"):
        layer_profile([])


# numbers and tables


def test_metric_names_are_taken_apart():
    assert (metric("sufficiency").arrow, metric("token_f1@absolute").arrow, metric("special_share").arrow) == (
        "↓",
        "↑",
        "",
    )
    assert metric("comprehensiveness@delete.logit").variant == "delete · logits"
    assert metric("comprehensiveness@delete.logit").other_operator and not metric("auprc@absolute").other_operator
    assert metric("comprehensiveness.logit").base == "comprehensiveness"
    assert metric("my_own").label == "my own"


def test_numbers_read_well():
    assert [number(x) for x in (0.5, -0.25, 0, 2e-5, 12345.6, None, math.nan, "x")] == [
        *("0.500", "−0.250", "0.000", "2.0e-05", "12,345.6", "–", "–", "x")
    ]
    assert number(0.9123, "test/accuracy") == "91.2 %"


def test_leaderboard_marks_the_best_and_what_is_no_better_than_random():
    main, other = leaderboards(_data().metrics, "ca_lig")
    assert [column.name for column in main.columns] == ["comprehensiveness", "sufficiency"]
    ours, theirs = main.methods
    assert ours.primary and ours.cells[0].best and not ours.cells[0].weak and ours.cells[0].interval == "0.600 to 0.800"
    assert theirs.cells[1].best and theirs.cells[0].weak  # sufficiency: lower is better
    assert [line.name for line in main.controls] == ["random", "ca_lig reversed"]
    assert not any(cell.best for line in main.controls for cell in line.cells if cell)
    assert [column.name for column in other.columns] == ["comprehensiveness@delete.logit"]


def test_curves_share_a_panel_and_skip_what_is_not_finite():
    panels = curve_panels(
        {"train/loss": [(0, 1.0), (1, math.nan), (2, 0.5)], "val/loss": [(2, 0.6)], "x": [], "y": [(0, 1)]}
    )
    assert [panel.title for panel in panels] == ["loss", "y"]
    assert [line.name for line in panels[0].series] == ["train", "val"]
    assert "nan" not in panels[0].svg
    long = curve_panels({"a": [(i, i * i) for i in range(10_000)]})[0].svg
    assert len(long) < 10_000


def test_perturbation_panels_show_the_primary_method_and_its_controls():
    line = {"removed": [(0.0, 0.9), (0.5, 0.25)], "kept": [(0.01, 0.5), (0.5, 0.875)]}
    curves = {("a", "none"): line, ("b", "none"): line, ("a", "reversed"): line, ("random", "random"): line}
    panels = perturbation_panels(curves, "a")
    assert [panel.title for panel in panels] == ["Most relevant words removed", "Only the most relevant words kept"]
    assert [one.name for one in panels[0].series] == ["a", "random", "a reversed"]
    assert [one.last for one in panels[1].series] == ["0.875"] * 3
    assert ">0%<" in panels[0].svg and ">50%<" in panels[0].svg and ">1%<" in panels[1].svg
    assert perturbation_panels(curves, "c") == [] == perturbation_panels({}, "a")


# packing


@pytest.mark.parametrize(("wide", "steps"), [(False, 254), (True, 65534)])
def test_round_trip_error_is_at_most_half_a_step(wide, steps):
    generator = random.Random(0)
    scores = [300.0, *(generator.gauss(0, 1) for _ in range(200)), math.nan, -50.0]
    special = [True, *[False] * 201, True]
    packed = pack_scores(scores, special, wide=wide)
    back = unpack_scores(packed, special)
    largest = max(abs(score) for score in scores[1:201])
    for score, value, flag in zip(scores, back, special, strict=True):
        bound = (300.0 if flag else largest) / steps * 1.01
        assert abs(value - (score if math.isfinite(score) else 0.0)) <= bound
    assert max(back, key=abs) == pytest.approx(300.0)


def test_json_cannot_leave_its_script_element():
    text = script_json({"a": [*HOSTILE, "\ud800", "\u2028"]})
    assert not set("<>&") & set(text)
    text.encode("utf-8")


# the page


def test_hostile_text_is_text_everywhere():
    sample = _sample(tokens=["[CLS]", *HOSTILE, "[SEP]"], methods=["<script>alert(1)</script>"])
    bad = HOSTILE[0] + HOSTILE[1]
    page = render_report(
        _data(
            title=bad,
            summary={bad: bad, "test/accuracy": 0.5},
            config_yaml=bad,
            versions={bad: bad},
            curves={f"{bad}/loss": [(0, 1), (1, 2)]},
            metrics=[MetricRow(bad, bad, 0.5), MetricRow(bad, f"auprc@{bad}", 0.5)],
            samples=[sample],
            label_names=[bad, bad],
            primary_method=bad,
            failures=[{"sample_id": 1, "method": bad, "reason": bad}],
        )
    )
    assert "<script>alert" not in page and "<img" not in page and "onerror=alert(2)>" not in page
    assert page.count("<script") == page.count("</script>") == 2
    assert page.count("</style>") == 1
    assert "{{ 7*7 }}" in page


def test_page_loads_nothing():
    page = render_report(_data())
    assert not re.search(r"\ssrc\s*=", page)
    assert all(target.startswith("#") for target in re.findall(r"href\s*=\s*[\"']([^\"']*)", page))
    assert not re.search(r"@import|url\(|fetch\(|XMLHttpRequest|<link|<iframe", page)
    assert re.findall(r"https?://[^\"]*", page) == ["http://www.w3.org/2000/svg"]  # the name space, not a request
    assert "default-src 'none'" in page


def test_page_says_the_main_things_without_its_script():
    page = render_report(_data(samples=[_sample(0, explanations=[_unconverged()])], failures=[{"sample_id": 9}]))
    body = page[: page.index('<script type="application/json"')]
    for text in ("91.2 %", "0.700", "0.600 to 0.800", "<polyline", "playing", "not converged", "1 failed", "seed: 1"):
        assert text in body
    assert "rgba({},{},{}".format(*SUPPORTS) in body and "rgba({},{},{}".format(*OPPOSES) in body


def _unconverged():
    return SampleExplanation("ca_lig", [0.1, 0.5, 0.5, -1.0, 0.0], None, 0.4, False)


def test_empty_inputs_give_a_page_that_says_so():
    page = render_report(ReportData("nothing"))
    for text in (
        "No learning curves",
        "No metrics",
        "No samples",
        "No configuration",
        "No versions",
        "summary is empty",
    ):
        assert text in page


def test_odd_samples_do_not_break_the_page():
    samples = [
        _sample(0, explanations=[]),
        _sample(1, tokens=[], explanations=[]),
        _sample(2, tokens=["[CLS]", "[SEP]"]),
        _sample(3, label=None, prediction=7, probability=math.nan),
        _sample(4, explanations=[SampleExplanation("ca_lig", [0.0] * 5)]),
    ]
    page = render_report(_data(samples=samples, curves={"loss": [(0, math.nan)]}))
    assert "class 7" in page
    state = ProbeState(2, 9, 0, 0.5, [0.1])
    with pytest.raises(InputError, match=r"sample 6, epoch 2: rows of \[1\] scores for 2 tokens"):
        render_report(_data(probe=[ProbeSample(6, ["a", "b"], [0, 1], None, None, [state])]))
    with pytest.raises(InputError, match=r"sample 5, method 'x': rows of \[1\] scores for 5 tokens"):
        render_report(_data(samples=[_sample(5, explanations=[SampleExplanation("x", [1.0])])]))


def test_other_scripts_survive():
    page = render_report(_data(samples=[_sample(tokens=["[CLS]", AMHARIC, ARABIC, JAPANESE, EMOJI, "[SEP]"])]))
    for text in (AMHARIC, ARABIC, JAPANESE, EMOJI):
        assert page.count(text) >= 2  # in the markup and in the data


def test_a_hundred_samples_stay_under_five_megabytes():
    tokens = ["[CLS]", *["explanation"] * 38, "[SEP]"]
    methods = [f"method_{i}" for i in range(8)]
    samples = [_sample(i, tokens, methods, layers=12) for i in range(100)]
    page = render_report(_data(samples=samples, primary_method="method_5"))
    assert len(page.encode()) < 1_000_000
    assert '"layerMethods":["method_5","method_0","method_1"]' in page


def test_a_hundred_long_texts_with_everything_stay_under_five_megabytes():
    """512 tokens, eight methods, twelve blocks, curves and the history of 24 probe samples: scores stay exact."""
    tokens = ["[CLS]", *["explanation"] * 510, "[SEP]"]
    methods = [f"method_{i}" for i in range(8)]
    line = [(q, 0.12345) for q in (0.0, 0.01, 0.05, 0.1, 0.2, 0.5)]
    curves = {
        (name, control): {"removed": line, "kept": line[1:]} for name in methods for control in ("none", "reversed")
    }
    scores = [random.Random(0).gauss(0, 1) for _ in tokens]
    rows = [SampleExplanation(name, scores, [scores] * 12) for name in methods]
    samples = [_sample(i, tokens, [], explanations=rows, curves=curves) for i in range(100)]
    states = [ProbeState(epoch, 10 * epoch, 1, 0.5, scores) for epoch in range(10)]
    probe = [ProbeSample(i, tokens, samples[0].word_ids, 1, None, states) for i in range(24)]
    page = render_report(_data(samples=samples, primary_method="method_0", probe=probe))
    assert len(page.encode()) < 5_000_000
    assert '"id":99' in page and len(re.findall(r'"scores":\["[^"]{1368}"', page)) == 100 * 8 + 24 * 10


def test_a_page_over_its_budget_drops_maps_then_samples_and_says_so(caplog):
    samples = [_sample(i, ["[CLS]", *["word"] * 200], ["a", "b", "c"], layers=6) for i in range(20)]
    data = _data(samples=samples, primary_method="b")
    whole = len(render_report(data).encode())
    fewer_maps = render_report(data, max_bytes=whole - 1)
    assert '"layerMethods":["b","a"]' in fewer_maps
    small = render_report(data, max_bytes=300_000)
    assert len(small.encode()) <= 300_000
    assert '"layerMethods":[]' in small and "of 20 samples" in small
    assert "of 20 samples and the layer maps of 0 of 3 methods" in caplog.text


def test_render_needs_no_torch_and_no_logger():
    code = (
        "import sys, calig.pipeline.render.report, calig.pipeline.render.figures; "
        "print([m for m in ('torch', 'lightning', 'wandb', 'omegaconf', 'matplotlib.pyplot') if m in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
