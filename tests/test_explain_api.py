"""`explain` and `Explanation`: one path for a run, a folder, a checkpoint and a live model."""

import dataclasses
import shutil
import warnings

import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer, BertConfig, BertForSequenceClassification

from calig.datamodules.tokenization import train_wordpiece
from calig.pipeline import Explanation, explain, load_explanations
from calig.pipeline.compose import compose, save
from calig.pipeline.errors import InputError
from calig.pipeline.explaining import explain_batches, settings_of
from calig.pipeline.opening import open_source
from calig.pipeline.records import EXPLANATION_SCHEMA, write_table

TEXTS = ["the plot was not bad", "a good story, but a terrible room", "good"]


def make_folder(path, *, seed=0, layers=2, max_length=24):
    """A small random classifier as a Hugging Face folder with its tokenizer."""
    tokenizer = train_wordpiece([*TEXTS, "the cast and the light were nasty or fine"], 200, max_length)
    torch.manual_seed(seed)
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        num_hidden_layers=layers,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=32,
        initializer_range=0.3,
        pad_token_id=tokenizer.pad_token_id,
        id2label={0: "negative", 1: "positive"},
        label2id={"negative": 0, "positive": 1},
    )
    model = BertForSequenceClassification(config).eval()
    torch.nn.init.normal_(model.classifier.weight, std=0.5)
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return model, tokenizer


def make_run(path, **settings):
    """What `explain` needs of a run directory, without training one."""
    (path / "checkpoints").mkdir(parents=True)
    model, tokenizer = make_folder(path / "model", **settings)
    overrides = ["data.max_length=16", "explain.options.ca_lig.lam=0.3", "explain.steps=12"]
    save(compose([f"run.dir={path}", *overrides], check=False), path)
    state = {f"model.{key}": value for key, value in model.state_dict().items()}
    torch.save({"state_dict": state}, path / "checkpoints" / "best.ckpt")
    return model, tokenizer


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "a run = 1"
    make_run(folder)
    return folder


def same(one, two):
    assert one.tokens == two.tokens and one.target == two.target
    assert torch.allclose(torch.tensor(one.scores), torch.tensor(two.scores), atol=1e-5)


def test_all_four_sources_say_the_same(run_dir):
    options = {"steps": 12, "lam": 0.3}
    of_run = explain(run_dir, TEXTS)
    of_folder = explain(str(run_dir / "model"), TEXTS, **options)
    of_checkpoint = explain(run_dir / "checkpoints" / "best.ckpt", TEXTS)
    model = AutoModelForSequenceClassification.from_pretrained(run_dir / "model")
    tokenizer = AutoTokenizer.from_pretrained(run_dir / "model")
    of_live = explain(model, TEXTS, tokenizer=tokenizer, batch_size=1, **options)
    for others in (of_folder, of_checkpoint, of_live):
        for one, two in zip(of_run, others, strict=True):
            same(one, two)
    assert [explanation.sample_id for explanation in of_run] == [0, 1, 2]
    assert [explanation.text for explanation in of_run] == TEXTS


def test_a_run_brings_its_options_and_the_call_wins(run_dir):
    opened = open_source(run_dir)
    assert opened.max_length == 16
    settings = settings_of(opened, "ca_lig", "predicted", {"steps": 5})
    assert settings.methods["ca_lig"]["lam"] == 0.3 and settings.methods["ca_lig"]["steps"] == 5
    assert not settings.operators
    # What the run really explained with (a calibrated lam, say) stands above its configuration.
    write_table(
        run_dir / "explanations" / "part-00000-00000.parquet",
        [],
        EXPLANATION_SCHEMA,
        {"methods": {"ca_lig": {"lam": 0.8}}},
    )
    try:
        assert settings_of(open_source(run_dir), "ca_lig", "predicted", {}).methods["ca_lig"]["lam"] == 0.8
    finally:
        shutil.rmtree(run_dir / "explanations")
    plain = settings_of(open_source(run_dir / "model"), "ca_lig", "predicted", {})
    assert plain.methods["ca_lig"] == {"steps": "auto"}
    assert settings_of(opened, "attention_rollout", "positive", {}).target == 1


def test_targets_by_name_and_number(run_dir):
    by_name = explain(run_dir, TEXTS[:1], target="negative")[0]
    by_number = explain(run_dir, TEXTS[:1], target=0)[0]
    predicted = explain(run_dir, TEXTS[:1])[0]
    same(by_name, by_number)
    assert by_name.target_name == "negative" and predicted.target == predicted.prediction
    for target, word in (("neagtive", "negative"), (7, "2: negative, positive"), ("label", "labels"), (True, "True")):
        with pytest.raises(InputError, match=word):
            explain(run_dir, TEXTS[:1], target=target)


def test_what_is_too_long_is_cut_and_said(run_dir):
    long = " ".join(["good"] * 30)
    with pytest.warns(UserWarning, match="1 text was cut to the 16 tokens of this model: text 1 lost 16 of 32"):
        explanations = explain(run_dir, ["bad plot", long])
    assert len(explanations[1].tokens) == 16
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        explain(run_dir, ["bad plot"])


def test_pairs(run_dir):
    explanation = explain(run_dir, ["the plot"], text_pairs=["a good story"])[0]
    assert explanation.tokens.count("[SEP]") == 2 and explanation.text == "the plot a good story"
    with pytest.raises(InputError, match="one second text per text"):
        explain(run_dir, TEXTS, text_pairs=["one"])


def test_a_live_tokenizer_without_pad_token_stays_as_it_was(run_dir):
    tokenizer = AutoTokenizer.from_pretrained(run_dir / "model")
    tokenizer.pad_token = None
    tokenizer.eos_token = "[SEP]"
    model = AutoModelForSequenceClassification.from_pretrained(run_dir / "model")
    assert len(explain(model, TEXTS, tokenizer=tokenizer, steps=4)) == 3
    assert tokenizer.pad_token is None


def test_a_decoder_whose_config_names_no_pad_token(run_dir, tmp_path):
    from transformers import GPT2Config, GPT2ForSequenceClassification

    tokenizer = AutoTokenizer.from_pretrained(run_dir / "model")
    shape = {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 20, "num_labels": 2}
    GPT2ForSequenceClassification(GPT2Config(vocab_size=len(tokenizer), **shape)).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    together = explain(tmp_path, TEXTS, steps=4)
    for one, alone in zip(together, (explain(tmp_path, [text], steps=4)[0] for text in TEXTS), strict=True):
        same(one, alone)


@pytest.mark.parametrize(
    ("texts", "options", "words"),
    [
        ([], {}, "empty"),
        (["fine", "  "], {}, r"texts\[1\] is empty"),
        ("one text", {}, "list of strings"),
        ([3], {}, r"texts\[0\] is int"),
        (["\udcff"], {}, "Unicode"),
        (["a"], {"method": "ca_lik"}, "ca_lig"),
        (["a"], {"lamda": 1}, "lam"),
        (["a"], {"baseline": "grey"}, "pad"),
        (["a"], {"fusion": "columns"}, "column"),
        (["a"], {"steps": 1}, "at least 2"),
        (["a"], {"batch_size": 0}, "batch_size"),
    ],
)
def test_bad_input_is_named(run_dir, texts, options, words):
    with pytest.raises(InputError, match=words):
        explain(run_dir, texts, **options)


def test_sources_that_cannot_be_opened(run_dir, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "notes.md").write_text("...")
    lone = tmp_path / "lone.ckpt"
    shutil.copy(run_dir / "checkpoints" / "best.ckpt", lone)
    unfinished = tmp_path / "unfinished"
    unfinished.mkdir()
    shutil.copy(run_dir / "config.yaml", unfinished)
    mute = tmp_path / "mute"
    shutil.copytree(run_dir / "model", mute, ignore=shutil.ignore_patterns("tokenizer*", "vocab*"))
    headless = tmp_path / "headless"
    shutil.copytree(run_dir / "model", headless)
    AutoModelForSequenceClassification.from_pretrained(headless).base_model.save_pretrained(headless)
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text("{}")
    foreign = tmp_path / "foreign"
    make_run(foreign, layers=3)
    shutil.copy(run_dir / "checkpoints" / "best.ckpt", foreign / "checkpoints" / "best.ckpt")
    broken = foreign / "checkpoints" / "broken.ckpt"
    broken.write_bytes(b"nothing")
    cases = [
        (tmp_path / "nowhere", "does not exist"),
        (tmp_path / "empty", "neither config.yaml nor config.json"),
        (tmp_path / "notes.md", "does not end in .ckpt"),
        (lone, "no run of calig lies around it"),
        (unfinished, "no model yet"),
        (mute, "holds no tokenizer"),
        (headless, "classifier.weight"),
        (adapter, "merge"),
        (foreign / "checkpoints" / "best.ckpt", "another model"),
        (broken, "not a Lightning checkpoint"),
        (3, "got int"),
    ]
    for source, words in cases:
        with pytest.raises(InputError, match=words) as caught:
            explain(source, TEXTS)
        assert "model.checkpoint=" not in str(caught.value)
    model = AutoModelForSequenceClassification.from_pretrained(run_dir / "model")
    with pytest.raises(InputError, match="tokenizer"):
        explain(model, TEXTS)
    with pytest.raises(InputError, match="block"):
        explain(torch.nn.Linear(2, 2), TEXTS, tokenizer=AutoTokenizer.from_pretrained(run_dir / "model"))


def test_a_text_that_fails_is_named(run_dir):
    model = AutoModelForSequenceClassification.from_pretrained(run_dir / "model")
    with torch.no_grad():
        model.bert.embeddings.word_embeddings.weight[5:] = float("nan")
    tokenizer = AutoTokenizer.from_pretrained(run_dir / "model")
    with pytest.raises(RuntimeError, match="text [012] was not explained by 'ca_lig'"):
        explain(model, TEXTS, tokenizer=tokenizer, steps=4)


def test_position_offsets_of_roberta_count():
    from transformers import RobertaConfig, RobertaForSequenceClassification

    from calig.pipeline.opening import _positions

    config = RobertaConfig(
        vocab_size=30,
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
        intermediate_size=8,
        max_position_embeddings=20,
        pad_token_id=1,
    )
    assert _positions(RobertaForSequenceClassification(config)) == 18
    assert _positions(torch.nn.Linear(1, 1)) is None


def test_rows_become_explanations(run_dir, tmp_path):
    opened = open_source(run_dir)
    settings = settings_of(opened, "ca_lig", "predicted", {})
    rows = [row for part in explain_batches(opened, TEXTS, None, settings, 2) for row in part.explanations]
    metadata = {"label_names": opened.label_names}
    write_table(tmp_path / "explanations" / "part-00000-00000.parquet", rows, EXPLANATION_SCHEMA, metadata)
    loaded = load_explanations(tmp_path)
    for row in loaded:
        from_disk = Explanation.from_row(row, opened.label_names)
        same(from_disk, explain(run_dir, TEXTS)[row["sample_id"]])
        assert from_disk.layer_scores is not None and len(from_disk.layer_scores) == 2
        assert abs(sum(from_disk.layer_profile) - 1) < 1e-6


HAND = Explanation(
    tokens=("[CLS]", "not", "un", "##bel", "<b>", "\x1b[31m", "[SEP]"),
    scores=(9.0, 1.0, -0.5, -0.25, 0.0, 0.01, -9.0),
    word_ids=(None, 0, 1, 1, 2, 3, None),
    layer_scores=((0, 0.5, 0, 0, 0, 0, 0), (0, -1.0, 0, 0, 0.5, 0, 0)),
    method="ca_lig",
    prediction=1,
    target=0,
    probability=0.25,
    label=1,
    rationale=(0, 1, 0, 0, 0, 0, 0),
    completeness_gap=0.125,
    converged=False,
    label_names=("bad", "good"),
)


def test_words_and_profile():
    assert [(word.text, word.score) for word in HAND.top()] == [("not", 1.0)]
    assert [(word.text, word.score) for word in HAND.top(opposing=True)] == [("unbel", -0.75)]
    assert HAND.layer_profile == [0.25, 0.75]
    assert HAND.summary() == "bad 0.250 · predicted good · label good · ca_lig · completeness gap 12.5% · not converged"


def test_plain_text_has_signs_and_no_control_characters():
    text = str(HAND)
    assert "supports  not +1.00" in text and "opposes   unbel -0.75" in text
    assert "layers    ▃█  25 75 %" in text
    assert "\x1b" not in text
    assert repr(HAND).startswith("Explanation(0, 'bad 0.250")


def test_the_terminal_shows_colour_and_a_pipe_none():
    import io

    from rich.console import Console

    def drawn(**settings):
        stream = io.StringIO()
        Console(file=stream, width=80, **settings).print(HAND, soft_wrap=True)
        return stream.getvalue()

    assert "\x1b[" not in drawn()
    assert drawn().rstrip() == str(HAND)
    colour = drawn(force_terminal=True, color_system="truecolor")
    assert "48;2;33;102;172" in colour and "48;2;200;90;10" in colour
    assert "4;" in colour, "the rationale is underlined"
    without = drawn(force_terminal=True, no_color=True, color_system="truecolor")
    assert "38;2" not in without and "48;2" not in without and "\x1b[1m" in without


def test_html_is_escaped_and_self_contained():
    html = HAND._repr_html_()
    assert "&lt;b&gt;" in html and "<b>" not in html
    assert "http" not in html and "block 2: 75.0%" in html
    assert "underline" in html


def test_figures():
    figure = HAND.plot_layers()
    assert figure._repr_png_().startswith(b"\x89PNG")
    assert [label.get_text() for label in figure.axes[0].get_xticklabels()][1:4] == ["not", "un", "bel"]
    assert HAND.plot_profile().axes[0].patches
    flat = Explanation.from_row(
        {"tokens": ["a"], "scores": [0.0], "method": "random", "prediction": 0, "target": 0, "probability": 1.0}
    )
    assert flat.target_name == "class 0" and flat.layer_profile is None and str(flat)
    with pytest.raises(InputError, match="no layer scores"):
        flat.plot_layers()
    with pytest.raises(InputError, match="no layer scores"):
        flat.plot_profile()


def test_the_flow_of_words_through_the_blocks():
    axes = HAND.plot_flow().axes[0]
    drawn = [list(line.get_ydata()) for line in axes.lines]
    for word in (word for word in HAND.words if not word.special):
        assert [sum(layer[i] for i in word.positions) for layer in HAND.layer_scores] in drawn, word.text
    assert {text.get_text() for text in axes.texts} == {"not", "<b>"}, "what ends at zero has no name"
    with pytest.raises(InputError, match="no layer scores"):
        dataclasses.replace(HAND, layer_scores=None).plot_flow()


def test_labels_keep_their_order_and_their_distance():
    from calig.pipeline.render.lines import _apart

    heights = [0.0, 1.0, 1.01, 1.02, 5.0, -2.0]
    moved = _apart(heights, 0.5)
    assert moved == pytest.approx([0.0, 0.51, 1.01, 1.51, 5.0, -2.0]), "only the crowd gives way, to both sides"
    assert _apart([], 1.0) == []


def test_curves_are_measured_where_they_are_asked_for(tmp_path):
    model, tokenizer = make_folder(tmp_path)
    assert explain(tmp_path, TEXTS[:1])[0].curves is None
    with pytest.raises(InputError, match=r"explain\(\.\.\., curves=True\)"):
        explain(tmp_path, TEXTS[:1])[0].plot_curves()
    for explanation in explain(tmp_path, TEXTS, curves=True, method="input_x_gradient"):
        assert set(explanation.curves) == {"none", "reversed", "random"}
        ids = torch.tensor([tokenizer.convert_tokens_to_ids(explanation.tokens)])
        ranked = sorted(range(1, ids.shape[1] - 1), key=lambda i: -explanation.scores[i])
        for q, value in explanation.curves["none"]["removed"]:
            masked = ids.clone()
            masked[0, ranked[: -(-int(1000 * q) * len(ranked) // 1000)]] = tokenizer.mask_token_id
            with torch.no_grad():
                expected = model(masked).logits.softmax(-1)[0, explanation.target]
            assert value == pytest.approx(float(expected), abs=1e-5)
        axes = explanation.plot_curves().axes
        assert [one.get_title(loc="left") for one in axes] == [
            "most relevant words removed",
            "only the most relevant words kept",
        ]
        assert list(zip(*axes[0].lines[0].get_data(), strict=True)) == explanation.curves["none"]["removed"]
        assert [text.get_text() for text in axes[0].get_legend().get_texts()] == [
            "input_x_gradient",
            "random",
            "reversed",
        ]


@pytest.mark.slow
def test_a_checkpoint_of_a_run_that_has_not_finished(tmp_path):
    from test_cli import TINY

    from calig.pipeline.cli import main

    folder = tmp_path / "run"
    settings = ["stages=[fit]", "logger.wandb.mode=disabled", "probe.enabled=false"]
    assert main(["run", f"run.dir={folder}", *TINY, *settings]) == 0
    whole = explain(folder, TEXTS, steps=8)
    best = next((folder / "checkpoints").glob("best-*.ckpt"))
    with_model = explain(best, TEXTS, steps=8)
    shutil.rmtree(folder / "model")
    without_model = explain(best, TEXTS, steps=8)
    for one, two, three in zip(whole, with_model, without_model, strict=True):
        same(one, two)
        same(one, three)
