"""`calig compare`: two runs side by side, with something in common or nothing."""

import json

import pytest
from test_explain_api import TEXTS, make_run

from calig.pipeline.cli import main
from calig.pipeline.compare import compare_runs
from calig.pipeline.compose import compose, save
from calig.pipeline.errors import InputError
from calig.pipeline.records import EXPLANATION_SCHEMA, write_table


def row(sample_id, scores, *, method="ca_lig", tokens=None, target=0):
    size = len(scores)
    return {
        "sample_id": sample_id,
        "tokens": tokens or ["[CLS]", *(f"w{i}" for i in range(size - 1))],
        "word_ids": [None, *range(size - 1)],
        "scores": scores,
        "prediction": target,
        "target": target,
        "probability": 0.5,
        "method": method,
    }


def make(folder, rows, summary=None, overrides=()):
    folder.mkdir()
    save(compose([f"run.dir={folder}", *overrides], check=False), folder)
    if summary is not None:
        (folder / "summary.json").write_text(json.dumps(summary))
    if rows:
        write_table(folder / "explanations" / "part-00000-00000.parquet", rows, EXPLANATION_SCHEMA)
    return folder


@pytest.fixture
def runs(tmp_path):
    a = make(
        tmp_path / "a",
        [
            row(0, [99.0, 1.0, 2.0, 3.0]),
            row(1, [0.0, 1.0, 2.0, 3.0], target=1),
            row(2, [0.0, 1.0, 2.0]),
            row(3, [0.0, 1.0, 1.0]),
            row(0, [0.0, 1.0], method="random"),
        ],
        {"test/accuracy": 0.9, "explain/ca_lig/token_f1": 0.5, "explain/ca_lig/token_f1/low": 0.4, "val/loss": 1.0},
        ["model.lr=1e-4"],
    )
    b = make(
        tmp_path / "b",
        [
            row(0, [-99.0, 10.0, 20.0, 30.0]),
            row(1, [0.0, 3.0, 2.0, 1.0]),
            row(2, [0.0, 1.0, 2.0], tokens=["[CLS]", "other", "words"]),
            row(3, [0.0, 5.0, 1.0]),
            row(9, [0.0, 1.0, 2.0]),
        ],
        {"test/accuracy": 0.95, "explain/ca_lig/token_f1": 0.5, "test/f1": 0.9},
        ["model.lr=2e-4", "data.max_length=64"],
    )
    return a, b


def test_what_is_compared(runs):
    found = compare_runs(*runs)
    assert found.config == [("model.lr", 1e-4, 2e-4), ("data.max_length", 128, 64)]
    assert ("test/accuracy", 0.9, 0.95) in found.metrics and ("test/f1", None, 0.9) in found.metrics
    assert found.samples == (4, 5) and found.common_ids == 4
    (agreement,) = found.agreement
    assert agreement.method == "ca_lig" and agreement.common == 3
    # Special tokens do not count (sample 0); sample 1 explains another class; sample 3 has no ranking in A.
    assert agreement.spearman == pytest.approx(0.0) and agreement.undefined == 1
    assert agreement.same_target == 2 and agreement.spearman_same == pytest.approx(1.0)


def test_what_is_printed(runs, capsys):
    assert main(["compare", *map(str, runs)]) == 0
    out = capsys.readouterr().out
    assert "model.lr" in out and "run.dir" not in out
    assert "+0.0500" in out and "only in B: test/f1" in out
    assert "token_f1/low" not in out
    assert "4 samples in A, 5 in B, 4 sample ids in both" in out and "\x1b" not in out
    assert main(["compare", "--all", *map(str, runs)]) == 0
    assert "token_f1/low" in capsys.readouterr().out


def test_nothing_in_common_is_said(tmp_path, capsys):
    a = make(tmp_path / "a", [row(0, [0.0, 1.0])], {"test/accuracy": 0.9})
    b = make(tmp_path / "b", [row(5, [0.0, 1.0], method="random")])
    assert main(["compare", str(a), str(b)]) == 0
    out = capsys.readouterr().out
    assert "the same in both" in out and "none in common" in out
    assert "0 sample ids in both" in out and "no method in common (A: ca_lig; B: random)" in out
    c = make(tmp_path / "c", [row(0, [0.0, 1.0], tokens=["x", "y"])])
    assert main(["compare", str(a), str(c)]) == 0
    assert "no sample has the same tokens" in capsys.readouterr().out
    d = make(tmp_path / "d", [])
    assert main(["compare", str(a), str(d)]) == 0
    assert "B: none" in capsys.readouterr().out


def test_what_explain_wrote_can_be_compared(tmp_path, capsys):
    outs = []
    for seed in (0, 1):
        make_run(tmp_path / f"run{seed}", seed=seed)
        outs.append(str(tmp_path / f"out{seed}"))
        texts = [item for text in TEXTS[:2] for item in ("--text", text)]
        assert main(["explain", str(tmp_path / f"run{seed}"), *texts, "--out", outs[-1], "--steps", "4"]) == 0
    capsys.readouterr()
    assert main(["compare", *outs]) == 0
    out = capsys.readouterr().out
    assert "source" in out and "run1" in out and "methods." not in out
    assert main(["compare", outs[0], str(tmp_path / "run0")]) == 0
    assert "not known of both" in capsys.readouterr().out
    assert compare_runs(*outs).agreement[0].common == 2


def test_what_is_no_run(tmp_path, runs, capsys):
    for other, words in ((tmp_path / "nowhere", "does not exist"), (tmp_path, "neither config.yaml nor explanations")):
        with pytest.raises(InputError, match=words):
            compare_runs(runs[0], other)
        assert main(["compare", str(runs[0]), str(other)]) == 2
        error = capsys.readouterr().err
        assert words in error and len(error.strip().splitlines()) == 1
