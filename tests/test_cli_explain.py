"""`calig explain` as a user types it, and what ends a command early."""

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from signalled import signalled
from test_cli import TINY
from test_explain_api import TEXTS, make_folder, make_run

from calig.pipeline import cli, load_explanations
from calig.pipeline.cli import main
from calig.pipeline.records import EXPLANATION_SCHEMA, read_rows, table_metadata

CALIG = str(Path(sys.executable).with_name("calig"))


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "run"
    make_run(folder)
    return str(folder)


@pytest.fixture
def files(tmp_path):
    (tmp_path / "texts.csv").write_text('id,Text,second\n1,"good, but bad",the room\n2,not fine,the cast\n')
    (tmp_path / "texts.tsv").write_text("sentence\nthe plot was fine\n")
    (tmp_path / "texts.jsonl").write_text('{"review": "the plot"}\n{"review": "nasty"}\n')
    (tmp_path / "words.json").write_text('[{"tokens": ["the", "plot"]}]')
    (tmp_path / "texts.txt").write_bytes("\ufeffgood room\r\nbad light\r\n\r\n".encode())
    return tmp_path


def test_texts_into_a_pipe_have_signed_numbers_and_no_colour(run_dir, capsys):
    assert main(["explain", run_dir, "--text", TEXTS[0], "--text", TEXTS[1], "--steps", "8"]) == 0
    out = capsys.readouterr().out
    assert "\x1b" not in out
    for text in TEXTS[:2]:
        assert f"[CLS] {text} [SEP]" in out
    assert "ca_lig · completeness gap" in out and "supports" in out and "+" in out and "layers    " in out


def test_a_file_becomes_rows_that_load(run_dir, files, capsys):
    expected = {"texts.csv": 2, "texts.tsv": 1, "texts.jsonl": 2, "words.json": 1, "texts.txt": 2}
    for name, count in expected.items():
        out = files / "out" / name
        arguments = ["--file", str(files / name), "--out", str(out), "--method", "generic_attention"]
        assert main(["explain", run_dir, *arguments]) == 0
        assert f"{count} text" in capsys.readouterr().out
        rows = load_explanations(out)
        assert sorted(rows["sample_id"]) == list(range(count))
        assert set(rows.column_names) == set(EXPLANATION_SCHEMA.names)
        metadata = table_metadata(next((out / "explanations").glob("part-*.parquet")))
        assert metadata["label_names"] == ["negative", "positive"] and "generic_attention" in metadata["methods"]
        assert not list(out.rglob("*.tmp")) and not (out / "failures.jsonl").exists()


def test_named_columns_pairs_and_shards(run_dir, files, monkeypatch):
    monkeypatch.setattr("calig.pipeline.explain_command.BATCHES_PER_SHARD", 1)
    arguments = ["--file", str(files / "texts.csv"), "--text-column", "second", "--pair-column", "Text"]
    out = files / "pairs"
    (out).mkdir()  # an empty folder is free
    assert main(["explain", run_dir, *arguments, "--out", str(out), "--batch-size", "1", "--steps", "4"]) == 0
    assert len(list((out / "explanations").glob("part-*.parquet"))) == 2
    tokens = {row["sample_id"]: row["tokens"] for row in read_rows(out / "explanations")}
    assert tokens[0][1:3] == ["the", "room"] and tokens[0].count("[SEP]") == 2


def test_html_page(run_dir, tmp_path, capsys):
    page = tmp_path / "page.html"
    arguments = ["--text", "good <script>", "--html", str(page), "--option", "lam=0.2", "--option", "fusion=late"]
    assert main(["explain", run_dir, *arguments, "--target", "negative", "--steps", "4"]) == 0
    text = page.read_text()
    assert text.startswith("<!doctype html>") and "<script" not in text and "http" not in text
    assert f"page → {page}" in capsys.readouterr().out


def test_long_texts_warn_in_one_line(run_dir, capsys):
    assert main(["explain", run_dir, "--text", "good " * 40, "--steps", "4"]) == 0
    error = capsys.readouterr().err
    assert error == "warning: 1 text was cut to the 16 tokens of this model: text 0 lost 26 of 42\n"


def test_failed_texts_end_with_3(tmp_path, capsys):
    model, _ = make_folder(tmp_path / "model")
    with torch.no_grad():  # one word breaks the model
        tokenizer_file = json.loads((tmp_path / "model" / "tokenizer.json").read_text())
        model.bert.embeddings.word_embeddings.weight[tokenizer_file["model"]["vocab"]["nasty"]] = float("nan")
    model.save_pretrained(tmp_path / "model")
    (tmp_path / "texts.txt").write_text("good room\nnasty light\nbad plot\n")
    arguments = ["--file", str(tmp_path / "texts.txt"), "--out", str(tmp_path / "out"), "--steps", "4"]
    assert main(["explain", str(tmp_path / "model"), *arguments]) == 3
    captured = capsys.readouterr()
    assert "text 1 was not explained" in captured.err and "1 failed" in captured.out
    assert {row["sample_id"] for row in read_rows(tmp_path / "out" / "explanations")} == {0, 2}
    failures = [json.loads(line) for line in (tmp_path / "out" / "failures.jsonl").read_text().splitlines()]
    assert [row["sample_id"] for row in failures] == [1]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["{here}/nowhere", "--text", "a"], ["nowhere", "does not exist", "Hugging Face folder"]),
        (["{here}", "--text", "a"], ["neither config.yaml nor config.json"]),
        (["{run}"], ["--text", "--file", "neither"]),
        (["{run}", "--text", "a", "--file", "{here}/texts.txt", "--out", "{here}/new"], ["--text", "--file", "both"]),
        (["{run}", "--file", "{here}/texts.txt"], ["--out"]),
        (["{run}", "--file", "{here}/gone.csv", "--out", "{here}/new"], ["gone.csv", "does not exist"]),
        (["{run}", "--file", "{here}", "--out", "{here}/new"], ["is a folder"]),
        (["{run}", "--file", "{here}/page.pdf", "--out", "{here}/new"], [".pdf", ".txt", ".csv"]),
        (["{run}", "--file", "{here}/latin.txt", "--out", "{here}/new"], ["not UTF-8"]),
        (["{run}", "--file", "{here}/latin.csv", "--out", "{here}/new"], ["not UTF-8"]),
        (["{run}", "--file", "{here}/empty.txt", "--out", "{here}/new"], ["is empty"]),
        (["{run}", "--file", "{here}/gap.txt", "--out", "{here}/new"], ["line 2"]),
        (["{run}", "--file", "{here}/gap.csv", "--out", "{here}/new"], ["row 2"]),
        (["{run}", "--file", "{here}/other.csv", "--out", "{here}/new"], ["--text-column", "stars"]),
        (["{run}", "--file", "{here}/other.csv", "--text-column", "star", "--out", "{here}/new"], ["star", "stars"]),
        (["{run}", "--file", "{here}/texts.txt", "--out", "{here}"], ["not empty"]),
        (["{run}", "--file", "{here}/texts.txt", "--out", "{here}/texts.txt"], ["is a file"]),
        (["{run}", "--text", "a", "--html", "{here}"], ["--html", "folder"]),
        (["{run}", "--text", "a", "--html", "{here}/no/page.html"], ["--html", "does not exist"]),
        (["{run}", "--text", " ", "--out", "{here}/new"], ["empty"]),
        (["{run}", "--text", "a", "--text-pair", "b", "--text-pair", "c"], ["1 texts and 2"]),
        (["{run}", "--text", "a", "--method", "ca_lik"], ["ca_lik", "ca_lig"]),
        (["{run}", "--text", "a", "--option", "lamda=1"], ["lamda", "lam"]),
        (["{run}", "--text", "a", "--option", "lam"], ["key=value", "lam"]),
        (["{run}", "--text", "a", "--option", "steps=3", "--steps", "4"], ["steps", "twice"]),
        (["{run}", "--text", "a", "--option", "baseline=grey"], ["baseline", "grey", "pad"]),
        (["{run}", "--text", "a", "--option", "fusion=columns"], ["fusion", "columns", "column"]),
        (["{run}", "--text", "a", "--option", "lam=high"], ["lam", "number", "high"]),
        (["{run}", "--text", "a", "--steps", "1"], ["steps", "2"]),
        (["{run}", "--text", "a", "--steps", "many"], ["steps", "many"]),
        (["{run}", "--text", "a", "--method", "attention_rollout", "--steps", "9"], ["steps", "attention_rollout"]),
        (["{run}", "--text", "a", "--target", "neutral", "--out", "{here}/new"], ["neutral", "negative"]),
        (["{run}", "--text", "a", "--batch-size", "0"], ["--batch-size"]),
    ],
)
def test_mistakes_give_one_message_and_leave_nothing(run_dir, files, arguments, words, capsys):
    (files / "page.pdf").write_text("...")
    (files / "latin.txt").write_bytes("caf\xe9".encode("latin-1"))
    (files / "latin.csv").write_bytes("text\ncaf\xe9\n".encode("latin-1"))
    (files / "empty.txt").write_text("\n\n")
    (files / "gap.txt").write_text("good\n\nbad\n")
    (files / "gap.csv").write_text('text,n\ngood,1\n" ",2\n')
    (files / "other.csv").write_text("body,stars\ngood,5\n")
    before = sorted(files.rglob("*"))
    assert main(["explain", *(item.format(run=run_dir, here=files) for item in arguments)]) == 2
    captured = capsys.readouterr()
    assert all(word in captured.err for word in words), captured.err
    assert "Traceback" not in captured.err and len(captured.err.strip().splitlines()) == 1
    assert not captured.out and sorted(files.rglob("*")) == before


def test_no_write_permission(run_dir, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("calig.pipeline.explain_request.os.access", lambda *_: False)
    assert main(["explain", run_dir, "--text", "a", "--out", str(tmp_path / "deep" / "out")]) == 2
    assert "you may write to" in capsys.readouterr().err


def test_help_loads_no_torch():
    for arguments in (["explain", "--help"], ["compare", "--help"]):
        code = (
            "import sys\nfrom calig.pipeline.cli import main\n"
            f"try:\n    main({arguments!r})\nexcept SystemExit:\n    pass\n"
            "assert not {'torch', 'transformers', 'rich', 'omegaconf'} & set(sys.modules)"
        )
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        assert "examples" in done.stdout or "RUN_DIR" in done.stdout


@pytest.mark.parametrize(
    ("command", "cause", "code"),
    [("run", KeyboardInterrupt, 130), ("run", BrokenPipeError, 1), ("compare", BrokenPipeError, 0), ("run", None, 7)],
)
def test_exits_that_libraries_make_of_interrupts(command, cause, code, monkeypatch):
    """Lightning turns Ctrl+C into SystemExit(1), rich a broken pipe."""

    def action(options):
        if cause is None:
            raise SystemExit(7)
        try:
            raise cause
        except BaseException:
            raise SystemExit(1)  # noqa: B904

    monkeypatch.setattr(cli, f"_{command}", action)
    monkeypatch.setattr(cli.os, "dup2", lambda *_: None)
    before = signal.getsignal(signal.SIGTERM)
    assert main([command, *([] if command == "run" else ["a", "b"])]) == code
    assert signal.getsignal(signal.SIGTERM) == before


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_during_training_ends_with_its_code(tmp_path, number, code):
    settings = [item for item in TINY if "max_epochs" not in item]
    arguments = [f"run.dir={tmp_path / 'run'}", *settings, "trainer.max_epochs=2000", "probe.enabled=false"]
    line = [CALIG, "run", *arguments, "logger.wandb.mode=disabled"]
    ended, error = signalled(line, number, lambda: list((tmp_path / "run").glob("checkpoints/*")))
    assert ended == code, error
    assert "Traceback" not in error


def test_a_reader_that_goes_away_is_no_error():
    for arguments in (["methods"], ["run", "--help"]):
        process = subprocess.Popen([CALIG, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        process.stdout.close()
        assert process.stderr.read() == ""
        process.wait(60)
