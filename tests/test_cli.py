"""The command line end to end on a tiny setting: what a user types, what they get, and what is left on disk."""

import csv
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch

from calig.pipeline import load_explanations
from calig.pipeline.cli import main
from calig.pipeline.records import read_rows

TINY = [
    "data.size.train=96",
    "data.size.val=24",
    "data.size.test=24",
    "model.scratch.layers=2",
    "model.scratch.width=16",
    "model.scratch.heads=2",
    "model.scratch.intermediate=32",
    "trainer.max_epochs=2",
    "trainer.enable_progress_bar=false",
    "probe.num_samples=4",
    "probe.steps=8",
    "explain.num_samples=10",
    "explain.batch_size=4",
]
METHODS = {
    "ca_lig",
    "integrated_gradients",
    "generic_attention",
    "attention_rollout",
    "input_x_gradient",
    "random",
}


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    """A whole run, made once."""
    folder = tmp_path_factory.mktemp("runs") / "tiny run = 1"  # a path that tools like to misread
    environment = dict(os.environ)
    code = main(["run", f"run.dir={folder}", *TINY])
    os.environ.clear()
    os.environ.update(environment)
    assert code == 0
    return folder


def test_a_run_leaves_what_the_house_says(run_dir):
    for name in ("config.yaml", "versions.json", "log.txt", "metrics.csv", "summary.json", "report.html"):
        assert (run_dir / name).stat().st_size > 0, name
    for name in ("checkpoints/last.ckpt", "model/model.safetensors", "model/config.json", "model/tokenizer.json"):
        assert (run_dir / name).exists(), name
    assert len(list((run_dir / "probe").glob("epoch-*.parquet"))) == 2
    assert not list(run_dir.rglob("*.tmp"))
    assert not (run_dir / "failures.jsonl").exists()
    assert "── done in" in (run_dir / "log.txt").read_text()


def test_explanations_follow_the_schema(run_dir):
    rows = list(read_rows(run_dir / "explanations"))
    assert len(rows) == 10 * len(METHODS)
    assert len({(row["sample_id"], row["method"]) for row in rows}) == len(rows)
    assert {row["method"] for row in rows} == METHODS
    for row in rows:
        size = len(row["tokens"])
        assert len(row["word_ids"]) == len(row["scores"]) == len(row["rationale"]) == size
        assert row["word_ids"][0] is None and row["word_ids"][-1] is None
        assert row["tokens"][0] == "[CLS]" and row["tokens"][-1] == "[SEP]"
        assert sum(row["rationale"]) >= 1
        layered = row["method"] in ("ca_lig", "generic_attention", "attention_rollout")
        assert (row["layer_scores"] is not None) == layered
        if layered:
            assert len(row["layer_scores"]) == 2
            assert row["layer_scores"][-1] == row["scores"]
        assert (row["completeness_gap"] is not None) == (row["method"] in ("ca_lig", "integrated_gradients"))
        assert row["target"] == row["prediction"] and 0.5 <= row["probability"] <= 1
    metadata = pq.read_schema(next((run_dir / "explanations").glob("*.parquet"))).metadata
    assert json.loads(metadata[b"label_names"]) == ["negative", "positive"]
    assert json.loads(metadata[b"schema_version"]) == 1


def test_rows_equal_what_attribute_says_of_the_saved_model(run_dir):
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    from calig.pipeline.attribution import attribute

    model = AutoModelForSequenceClassification.from_pretrained(run_dir / "model").eval()
    tokenizer = AutoTokenizer.from_pretrained(run_dir / "model")
    row = next(row for row in read_rows(run_dir / "explanations") if row["method"] == "ca_lig")
    ids = torch.tensor([tokenizer.convert_tokens_to_ids(row["tokens"])])
    result = attribute(
        model, {"input_ids": ids, "attention_mask": torch.ones_like(ids)}, tokenizer=tokenizer, steps="auto"
    )
    assert torch.allclose(result.scores[0], torch.tensor(row["scores"]), atol=1e-4)
    assert int(result.target) == row["target"] and int(result.steps_used) == row["steps_used"]


def test_metrics_have_every_sample_once_with_its_controls(run_dir):
    rows = list(read_rows(run_dir / "metrics"))
    keys = [tuple(row[key] for key in row if key != "value") for row in rows]
    assert len(set(keys)) == len(keys)
    comprehensiveness = [row for row in rows if row["metric"] == "comprehensiveness" and row["q"] is None]
    found = {(row["method"], row["control"]) for row in comprehensiveness}
    assert {("ca_lig", "none"), ("ca_lig", "reversed"), ("random", "random")} <= found
    assert {row["space"] for row in comprehensiveness} == {"probability", "logit"}
    assert {row["metric"] for row in rows} >= {"sufficiency", "token_f1", "auprc", "completeness_gap", "seconds"}


def test_summary_has_the_scalar_keys(run_dir):
    summary = json.loads((run_dir / "summary.json").read_text())
    for key in (
        "train/loss",
        "val/accuracy",
        "val/accuracy/best",
        "test/accuracy",
        "test/f1",
        "val/explain/ca_lig/completeness_gap",
        "val/explain/ca_lig/drift",
        "val/explain/random/comprehensiveness",
        "explain/ca_lig/token_f1",
        "explain/ca_lig/token_f1/low",
        "explain/ca_lig/token_f1/high",
        "explain/ca_lig/token_f1@absolute",
        "explain/ca_lig/comprehensiveness@mask.logit",
        "explain/ca_lig/reversed/comprehensiveness",
        "explain/random/comprehensiveness",
        "explain/ca_lig/completeness_gap_max",
        "explain/ca_lig/failed",
    ):
        assert isinstance(summary[key], float), key
    assert summary["explain/ca_lig/token_f1/low"] <= summary["explain/ca_lig/token_f1"]
    rows = [row["value"] for row in read_rows(run_dir / "metrics") if _is(row, "ca_lig", "sufficiency")]
    assert abs(summary["explain/ca_lig/sufficiency"] - sum(rows) / len(rows)) < 1e-9
    with (run_dir / "metrics.csv").open() as stream:
        logged = {key for row in csv.DictReader(stream) for key, value in row.items() if value}
    assert {"train/loss", "val/accuracy", "test/accuracy", "explain/ca_lig/token_f1/low"} <= logged


def _is(row, method, metric):
    mean = row["q"] is None and row["control"] == "none" and row["space"] in (None, "probability")
    return mean and (row["method"], row["metric"]) == (method, metric)


def test_load_explanations(run_dir):
    rows = load_explanations(run_dir)
    assert len(rows) == 60
    assert set(rows.unique("method")) == METHODS
    with pytest.raises(ValueError, match="holds no explanations"):
        load_explanations(run_dir / "model")


def test_report_is_made_again_from_the_directory_alone(run_dir, capsys):
    before = (run_dir / "report.html").read_text()
    (run_dir / "report.html").unlink()
    assert main(["report", str(run_dir)]) == 0
    assert (run_dir / "report.html").read_text() == before
    assert str(run_dir / "report.html") in capsys.readouterr().out
    assert "tiny" in before and "comprehensiveness" in before.lower()


def test_an_existing_directory_is_never_touched_unasked(run_dir, capsys):
    before = (run_dir / "summary.json").read_text()
    assert main(["run", f"run.dir={run_dir}", *TINY]) == 2
    error = capsys.readouterr().err
    assert "run.resume=" in error and "run.overwrite=true" in error and "Traceback" not in error
    assert (run_dir / "summary.json").read_text() == before


def test_resuming_a_finished_run_says_where_its_results_are(run_dir, capsys):
    assert main(["run", f"run.resume={run_dir}"]) == 0
    assert "report.html" in capsys.readouterr().out


def test_resuming_continues_with_the_stages_that_are_missing(tmp_path, capsys):
    folder = tmp_path / "run"
    assert main(["run", f"run.dir={folder}", *TINY, "stages=[fit]", "logger.wandb.mode=disabled"]) == 0
    weights = (folder / "model" / "model.safetensors").read_bytes()
    fitted = (folder / "metrics.csv").read_text().splitlines()
    assert main(["run", f"run.resume={folder}", "stages=[fit,test,explain]", "explain.methods=[random]"]) == 0
    assert (folder / "model" / "model.safetensors").read_bytes() == weights
    with (folder / "metrics.csv").open() as stream:
        rows = list(csv.DictReader(stream))
    assert sum(bool(row["train/loss"]) for row in rows) > 0, "the curves of the first session must survive"
    assert len(rows) >= len(fitted) - 1
    assert sum(bool(row.get("test/accuracy")) for row in rows) == 1
    assert main(["run", f"run.resume={tmp_path / 'nothing'}"]) == 2
    assert "nothing" in capsys.readouterr().err


def test_overwrite_replaces_a_run_and_nothing_else(tmp_path, capsys):
    precious = tmp_path / "thesis"
    precious.mkdir()
    (precious / "chapter.tex").write_text("...")
    assert main(["run", f"run.dir={precious}", "run.overwrite=true", *TINY]) == 2
    assert "is not a run directory" in capsys.readouterr().err
    assert (precious / "chapter.tex").exists()


def test_own_data_with_own_columns(tmp_path):
    rows = [
        {"review": f"{word} thing {i}", "stars": stars} for i in range(40) for word, stars in (("good", 5), ("bad", 1))
    ]
    with (tmp_path / "reviews.csv").open("w", newline="") as stream:
        writer = csv.DictWriter(stream, ["review", "stars"])
        writer.writeheader()
        writer.writerows(rows)
    folder = tmp_path / "run"
    arguments = [
        "data=files",
        f"data.path={tmp_path / 'reviews.csv'}",
        "data.columns.text=review",
        "data.columns.label=stars",
        "data.label_map={5: liked, 1: not liked}",
        "logger.wandb.mode=disabled",
        "explain.methods=[ca_lig]",
    ]
    settings = [item for item in TINY if not item.startswith("data.size")]
    assert main(["run", f"run.dir={folder}", *settings, *arguments]) == 0
    metadata = pq.read_schema(next((folder / "explanations").glob("*.parquet"))).metadata
    assert json.loads(metadata[b"label_names"]) == ["liked", "not liked"]
    assert all(row["rationale"] is None for row in read_rows(folder / "explanations"))
    assert not any(row["metric"] == "token_f1" for row in read_rows(folder / "metrics"))


def test_a_method_that_fails_is_kept_as_a_failure_and_the_run_ends_with_3(run_dir, tmp_path, capsys):
    # A family off the attention interface, with a vocabulary that fits: attention methods cannot work on it.
    import shutil

    from transformers import MPNetConfig, MPNetForSequenceClassification

    folder = tmp_path / "mpnet"
    shutil.copytree(run_dir / "model", folder)
    size = len(json.loads((folder / "tokenizer.json").read_text())["model"]["vocab"])
    config = MPNetConfig(
        vocab_size=size,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        pad_token_id=0,
    )
    MPNetForSequenceClassification(config).save_pretrained(folder)
    arguments = [f"model.name={folder}", "explain.methods=[input_x_gradient,attention_rollout]", "probe.enabled=false"]
    out = tmp_path / "run"
    assert main(["run", f"run.dir={out}", *TINY, *arguments, "logger.wandb.mode=disabled"]) == 3
    failures = [json.loads(line) for line in (out / "failures.jsonl").read_text().splitlines()]
    assert len(failures) == 10 and all("mpnet" in row["reason"] for row in failures)
    assert {row["method"] for row in read_rows(out / "explanations")} == {"input_x_gradient"}
    summary = json.loads((out / "summary.json").read_text())
    assert summary["explain/attention_rollout/failed"] == 10 and summary["explain/input_x_gradient/failed"] == 0
    strict = [f"run.dir={tmp_path / 'strict'}", "explain.strict=true"]
    assert main(["run", *TINY, *arguments, *strict, "logger.wandb.mode=disabled"]) == 1
    assert "explain.strict" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["run", "explain.stepz=3"], ["explain.stepz", "explain.steps"]),
        (["run", "experiment=quickstrat"], ["quickstrat", "quickstart"]),
        (["run", "trainer.max_epoch=3"], ["trainer.max_epoch", "trainer.max_epochs"]),
        (["run", "explain.methods=[ca_lik]"], ["ca_lik", "ca_lig"]),
        (["run", "explain.options.ca_lig.lamda=0.3"], ["lamda", "lam"]),
        (["run", "data=files", "data.path=nowhere.csv", "run.dir=unused"], ["nowhere.csv"]),
        (["config", "seed=abc"], ["seed", "abc"]),
        (["report", "no/such/run"], ["no/such/run"]),
    ],
)
def test_mistakes_give_one_message_and_exit_2(arguments, words, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert all(word in error for word in words), error
    assert "Traceback" not in error and len(error.strip().splitlines()) == 1


def test_bad_data_leaves_no_directory_that_blocks_the_next_try(tmp_path, capsys):
    arguments = ["run", f"run.dir={tmp_path / 'run'}", "data=files", f"data.path={tmp_path / 'nowhere.csv'}"]
    assert main(arguments) == 2
    assert main(arguments) == 2
    assert "run.overwrite" not in capsys.readouterr().err


def test_help_and_methods_answer_at_once_and_without_torch():
    for arguments in (["--help"], ["run", "--help"], ["methods"], ["--version"]):
        code = (
            "import sys\nfrom calig.pipeline.cli import main\n"
            f"try:\n    main({arguments!r})\nexcept SystemExit:\n    pass\n"
            "assert 'torch' not in sys.modules and 'lightning' not in sys.modules"
        )
        start = time.monotonic()
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        assert done.stdout.strip()
        assert time.monotonic() - start < 5  # a second on a quiet machine; torch alone would take more than this


def test_help_lists_groups_and_keys(capsys):
    with pytest.raises(SystemExit):
        main(["run", "--help"])
    text = capsys.readouterr().out
    assert "explain.tolerance=" in text and "experiment=" in text and "model=" in text


def test_config_prints_what_would_run(capsys):
    import yaml

    assert main(["config", "experiment=hatexplain", "model.lr=3e-5"]) == 0
    shown = yaml.safe_load(capsys.readouterr().out)
    assert shown["model"]["lr"] == 3e-5 and shown["data"]["label_map"]["offensive"] == "toxic"
    assert shown["run"]["dir"] == "runs/hatexplain"


def test_console_script_is_installed():
    script = Path(sys.executable).with_name("calig")
    done = subprocess.run([script, "--version"], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("calig ")
