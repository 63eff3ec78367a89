"""`calig explain MODEL --next-token` as a user types it."""

import re

import pytest
from language_models import make_folder
from test_explain_api import make_run

from calig.pipeline import load_explanations
from calig.pipeline.cli import main
from calig.pipeline.records import EXPLANATION_SCHEMA, table_metadata

PROMPT = "the capital of France is"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "lm"
    make_folder(folder)
    return str(folder)


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "run"
    make_run(folder)
    return folder


def test_in_the_terminal(model, capsys):
    arguments = ["--next-token", "--text", PROMPT, "--target", " Paris", "--versus", " London", "--steps", "9"]
    assert main(["explain", model, *arguments]) == 0
    out = capsys.readouterr().out
    first, text, *rest = out.splitlines()
    assert first.startswith('next " Paris" ') and 'rather than " London"' in first and "\x1b" not in out
    assert text == PROMPT and rest[0].startswith(("supports  ", "opposes  ")) and rest[-1].startswith("layers")


def test_no_color_is_honoured(model, capsys, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm-256color")
    arguments = ["explain", model, "--next-token", "--text", PROMPT, "--steps", "4"]
    assert main(arguments) == 0
    coloured = capsys.readouterr().out
    monkeypatch.setenv("NO_COLOR", "1")
    assert main(arguments) == 0
    plain = capsys.readouterr().out
    colour = re.compile(r"\x1b\[[\d;]*[34]8;")
    assert colour.search(coloured) and not colour.search(plain)


def test_the_likeliest_tokens_and_a_place_in_the_middle(model, capsys):
    assert main(["explain", model, "--next-token", "--text", PROMPT, "--top", "3", "--steps", "4"]) == 0
    heads = [line for line in capsys.readouterr().out.splitlines() if line.startswith("next ")]
    assert len(heads) == 3 and [" · most likely " in head for head in heads] == [False, True, True]
    arguments = ["--next-token", "--text", PROMPT, "--position", "2", "--log-prob", "--steps", "4"]
    assert main(["explain", model, *arguments]) == 0
    assert capsys.readouterr().out.splitlines()[1] == "the capital of"


def test_a_page_escapes_what_stands_in_it(model, tmp_path, capsys):
    page = tmp_path / "page.html"
    arguments = ["--next-token", "--text", "good <script> film", "--html", str(page), "--steps", "4", "--target", "<"]
    assert main(["explain", model, *arguments]) == 0
    text = page.read_text()
    assert "&lt;" in text and "<script" not in text and "next &quot;&lt;&quot;" in text and "http" not in text
    assert f"page → {page}" in capsys.readouterr().out


def test_rows(model, tmp_path, capsys):
    (tmp_path / "prompts.txt").write_text(f"{PROMPT}\nthe capital of England is\n")
    arguments = ["--next-token", "--file", str(tmp_path / "prompts.txt"), "--out", str(tmp_path / "out")]
    assert main(["explain", model, *arguments, "--top", "2", "--steps", "4"]) == 0
    assert '4 next tokens explained by ca_lig · "' in capsys.readouterr().out
    rows = load_explanations(tmp_path / "out")
    assert set(rows.column_names) == set(EXPLANATION_SCHEMA.names)
    assert sorted(rows["sample_id"]) == [0, 0, 1, 1] and len({(r["sample_id"], r["target"]) for r in rows}) == 4
    metadata = table_metadata(next((tmp_path / "out" / "explanations").glob("part-*.parquet")))
    assert metadata["next_token"] == {"target": None, "versus": None, "top": 2, "position": -1, "log_prob": False}
    assert set(map(str, rows["target"])) <= set(metadata["token_names"])


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["{run}", "--next-token", "--text", "a"], ["run directory of a classifier", "without --next-token"]),
        (["{run}/model", "--next-token", "--text", "a"], ["BertForSequenceClassification", "without --next-token"]),
        (["{run}/checkpoints/best.ckpt", "--next-token", "--text", "a"], ["checkpoint of a classifier"]),
        (["{model}", "--text", "a"], ["not a whole classifier", "explained by --next-token"]),
        (["{run}", "--text", "a", "--versus", "b"], ["--versus belongs to --next-token"]),
        (["{run}", "--text", "a", "--top", "2", "--log-prob"], ["--top, --log-prob belongs to --next-token"]),
        (
            ["{model}", "--next-token", "--text", "a", "--target", "Parisian"],
            ['" Paris" + "i" + "an"'],
        ),
        (["{model}", "--next-token", "--text", "a", "--target", "id:x"], ["'id:x' is no token id"]),
        (["{model}", "--next-token", "--text", "a", "--target", " is", "--versus", " is"], ["are both"]),
        (["{model}", "--next-token", "--text", "a", "--top", "0"], ["top takes 1 or more"]),
        (["{model}", "--next-token", "--text", "a", "--top", "2", "--target", " is"], ["give either it, or target"]),
        (["{model}", "--next-token", "--text", "a", "--text-pair", "b"], ["--next-token takes one text at a time"]),
        (["{model}", "--next-token", "--text", "the film", "--position", "7"], ["position 7 does not exist"]),
        (["{model}", "--next-token", "--text", "the " * 60], ["the model takes 48"]),
        (["{model}", "--next-token"], ["--text", "--file"]),
    ],
)
def test_mistakes_give_one_message(model, run_dir, arguments, words, capsys):
    assert main(["explain", *(item.format(run=run_dir, model=model) for item in arguments)]) == 2
    captured = capsys.readouterr()
    lines = [line for line in captured.err.strip().splitlines() if not line.startswith("warning: ")]
    assert all(word in captured.err for word in words), captured.err
    assert len(lines) == 1 and "Traceback" not in captured.err and not captured.out


def test_help_says_how_tokens_are_written(capsys):
    with pytest.raises(SystemExit):
        main(["explain", "--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert "--next-token explain the next token" in text and "id:N" in text and '--target " Paris"' in text
