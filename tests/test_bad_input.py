"""The mistakes of a newcomer, through the command line: one message that names the thing, nothing left behind."""

import json
import shutil

import pytest
import torch
from test_cli import TINY

from calig.pipeline.cli import main

SETTINGS = [item for item in TINY if not item.startswith("data.size")] + ["logger.wandb.mode=disabled"]
GOOD = "text,label\n" + "".join(
    f"a {word} thing {i},{label}\n" for i in range(20) for word, label in (("good", 1), ("bad", 0))
)


@pytest.fixture
def run(tmp_path, capsys, monkeypatch):
    """Run the command with a file of the given content; returns the exit code, the message, and the run directory."""
    monkeypatch.chdir(tmp_path)

    def call(*arguments, content=GOOD, name="data.csv", files=None):
        for file, text in (files or {name: content}).items():
            (tmp_path / file).parent.mkdir(exist_ok=True, parents=True)
            (tmp_path / file).write_bytes(text if isinstance(text, bytes) else text.encode())
        path = name if files is None else "data"
        settings = ["run.dir=out", "data=files", f"data.path={path}", *SETTINGS]
        own = {item.split("=")[0] for item in arguments}
        code = main(["run", *(item for item in settings if item.split("=")[0] not in own), *arguments])
        return code, capsys.readouterr().err, tmp_path / "out"

    return call


def pair(train, test):
    return {"data/train.csv": train, "data/test.csv": test}


TOKENS = '{"tokens": ["a", "b"], "label": "x", "rationale": %s}\n{"tokens": ["c"], "label": "y", "rationale": [0]}\n'
CASES = {
    "empty file": ({"content": ""}, ["data.csv", "empty"]),
    "empty split": ({"files": pair(GOOD, "text,label\n")}, ["test.csv"]),
    "label column absent": (
        {"content": GOOD.replace("label", "stars"), "arguments": ["data.columns.label=label"]},
        ["label", "stars"],
    ),
    "a label in test that train never had": ({"files": pair(GOOD, "text,label\nodd,7\n")}, ["7", "test"]),
    "one class only": ({"content": "text,label\na,1\nb,1\nc,1\n"}, ["1"]),
    "texts longer than the model": ({"arguments": ["data.max_length=4000"]}, ["data.max_length", "4000"]),
    "empty text": ({"content": GOOD + ",1\n"}, ["data.csv", "row 41"]),
    "non-UTF-8": ({"content": GOOD.encode() + b"caf\xe9,1\n"}, ["data.csv", "UTF-8"]),
    "ragged CSV": ({"content": GOOD + "one,two,three\n"}, ["data.csv", "3"]),
    "a rationale whose length does not match": ({"content": TOKENS % "[1]", "name": "d.jsonl"}, ["rationale", "2"]),
    "out-of-range spans": ({"content": TOKENS % "[[0, 9]]", "name": "d.jsonl"}, ["d.jsonl", "9"]),
    "overlapping spans": ({"content": TOKENS % "[[0, 2], [1, 2]]", "name": "d.jsonl"}, ["overlap"]),
    "duplicate column names": ({"content": "text,text,label\na,b,1\n"}, ["text"]),
    "a model name that is neither folder nor reachable": ({"arguments": ["model.name=no/where"]}, ["no/where"]),
    "a method": ({"arguments": ["explain.methods=[ca_lige]"]}, ["ca_lige", "ca_lig"]),
    "a fusion": ({"arguments": ["explain.options.ca_lig.fusion=sum"]}, ["fusion", "sum", "column"]),
    "a baseline": ({"arguments": ["explain.options.ca_lig.baseline=grey"]}, ["baseline", "grey", "pad"]),
    "lam=auto with gated": ({"arguments": ["explain.options.ca_lig={lam: auto, fusion: gated}"]}, ["lam", "auto"]),
    "steps": ({"arguments": ["explain.steps=1"]}, ["explain.steps", "1"]),
    "a device that is not there": ({"arguments": ["trainer.accelerator=tpu"]}, ["trainer.accelerator=tpu"]),
    "a target": ({"arguments": ["explain.target=5"]}, ["explain.target=5"]),
    "class weights": ({"arguments": ["model.class_weights=[1,2,3]"]}, ["model.class_weights", "3"]),
}


@pytest.mark.parametrize("case", CASES)
def test_mistakes_name_the_thing_and_leave_nothing(case, run):
    settings, words = CASES[case]
    code, message, folder = run(
        *settings.get("arguments", ()), **{k: v for k, v in settings.items() if k != "arguments"}
    )
    assert code == 2, message
    assert "Traceback" not in message
    assert all(word in message for word in words), message
    assert len([line for line in message.splitlines() if line.startswith("calig: ")]) == 1, message
    assert not folder.exists()


def test_a_missing_file(run):
    code, message, folder = run("data.path=nowhere.csv")
    assert code == 2 and "nowhere.csv" in message and not folder.exists()


def test_a_directory_that_cannot_be_written(run, tmp_path):
    (tmp_path / "file").write_text("")
    code, message, _ = run("run.dir=file/inside")
    assert code == 2 and "file/inside" in message and "cannot be written" in message


def test_a_folder_without_tokenizer_and_a_checkpoint_of_another_architecture(run, tmp_path):
    assert run("stages=[fit]")[0] == 0
    shutil.move(tmp_path / "out", tmp_path / "first")
    bare = shutil.copytree(tmp_path / "first" / "model", tmp_path / "bare")
    for file in bare.glob("tokenizer*"):
        file.unlink()
    code, message, folder = run(f"model.name={bare}")
    assert code == 2 and "bare" in message and "tokenizer" in message and not folder.exists()
    checkpoint = tmp_path / "first" / "checkpoints" / "last.ckpt"
    code, message, folder = run(f"model.checkpoint={checkpoint}", "model.scratch.width=32")
    assert code == 2 and "last.ckpt" in message and not folder.exists()


def test_a_replaced_run_is_back_after_a_mistake(run, tmp_path):
    assert run("stages=[fit]")[0] == 0
    kept = (tmp_path / "out" / "summary.json").read_text()
    code, _, folder = run("run.overwrite=true", "data.path=nowhere.csv")
    assert code == 2 and (folder / "summary.json").read_text() == kept
    assert not list(tmp_path.glob(".out*"))
    assert run("run.overwrite=true", "stages=[test]", "model.checkpoint=out/model")[0] == 2, "it reads what it replaces"
    assert (folder / "summary.json").read_text() == kept


def test_a_head_that_returns_nan_names_the_sample_and_fails(run, tmp_path):
    from transformers import AutoModelForSequenceClassification

    assert run("stages=[fit]")[0] == 0
    shutil.move(tmp_path / "out", tmp_path / "first")
    folder = tmp_path / "first" / "model"
    model = AutoModelForSequenceClassification.from_pretrained(folder)
    torch.nn.init.constant_(model.classifier.weight, float("nan"))
    model.save_pretrained(folder)
    code, message, out = run(f"model.checkpoint={folder}", "stages=[explain]")
    assert code == 1 and "not finite" in message and "sample_id" in message
    failures = [json.loads(line) for line in (out / "failures.jsonl").read_text().splitlines()]
    assert {row["method"] for row in failures} >= {"ca_lig", "random"}


def test_a_training_that_diverges_says_so(run):
    code, message, out = run("model.lr=1e30", "trainer.gradient_clip_val=null", "probe.enabled=false", "stages=[fit]")
    assert code == 1 and "diverged" in message and "model.lr" in message
    assert not (out / "model").exists()
