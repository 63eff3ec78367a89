"""What goes wrong in a cluster has a defined end: what is kept, what is said, with which code."""

import json
import os
import time

import pytest
import torch
from conftest import make_bert
from distributed_worker import make_rows
from forked import run_worker
from test_explain_scale import SETTINGS, assert_same_results, copied, explain_line, whole  # noqa: F401  (a fixture)
from torch.utils.data import default_collate

from calig.callbacks.explanation_writer import explain_parts
from calig.datamodules.collate import TextCollator
from calig.pipeline import explainer as explainer_module
from calig.pipeline import manifest
from calig.pipeline.attribution import ExplainableModel
from calig.pipeline.cli import main
from calig.pipeline.explained import NON_FINITE_OUTPUT, SampleFailure
from calig.pipeline.explainer import Explainer, ExplainSettings


def small_explainer(**settings):
    methods = {"ca_lig": {"steps": 8}, "random": {}}
    return Explainer(make_bert(layers=2), None, ExplainSettings(methods, operators=("attention",), **settings))


def scores(rows):
    return {(row["sample_id"], row["method"]): torch.tensor(row["scores"]) for row in rows.explanations}


def assert_explained(found, expected, without=()):
    expected = {key: value for key, value in expected.items() if key[0] not in without}
    assert found.keys() == expected.keys()
    assert all(torch.allclose(found[key], expected[key], atol=1e-5) for key in expected)


def test_out_of_memory_halves_the_batch_and_the_results_stay(monkeypatch):
    batch = default_collate(make_rows(5))
    explainer = small_explainer()
    expected = explainer.explain(batch)
    attribute, sizes = explainer_module.attribute, []

    def with_little_memory(model, batch, *args, **kwargs):
        sizes.append(len(batch["input_ids"]))
        if sizes[-1] > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return attribute(model, batch, *args, **kwargs)

    monkeypatch.setattr(explainer_module, "attribute", with_little_memory)
    rows = explainer.explain(batch)
    assert max(sizes) == 5 and not rows.failures
    assert_explained(scores(rows), scores(expected))
    key = lambda row: [str(row[name]) for name in ("sample_id", "method", "control", "metric", "space")]
    numbers = [[key(row) for row in found.metrics if row["q"] is None] for found in (rows, expected)]
    assert sorted(numbers[0]) == sorted(numbers[1])


def test_a_sample_that_never_fits_into_memory_is_a_failure(monkeypatch):
    batch = default_collate(make_rows(5))
    logits = ExplainableModel.logits
    poison = batch["input_ids"][3]

    def without_room(self, inputs, *rows):
        if any(torch.equal(row, poison) for row in inputs.batch["input_ids"]):
            raise torch.OutOfMemoryError("CUDA out of memory")
        return logits(self, inputs, *rows)

    expected = scores(small_explainer().explain(batch))
    monkeypatch.setattr(ExplainableModel, "logits", without_room)
    rows = explain_parts(small_explainer(), batch)
    assert_explained(scores(rows), expected, without={3})
    assert {(row["sample_id"], row["method"]) for row in rows.failures} == {(3, "ca_lig"), (3, "random")}
    assert all("out of memory" in row["reason"] for row in rows.failures)


@pytest.mark.parametrize("error", [RuntimeError("an index is out of range"), KeyError("x")])
def test_a_sample_that_raises_is_found_and_the_others_are_explained(error, monkeypatch):
    batch = default_collate(make_rows(7))
    expected = scores(small_explainer().explain(batch))
    prepare = ExplainableModel.prepare

    def raising(self, batch, *args):
        if 4 in batch["sample_id"].tolist():
            raise error
        return prepare(self, batch, *args)

    monkeypatch.setattr(ExplainableModel, "prepare", raising)
    rows = explain_parts(small_explainer(), batch)
    assert_explained(scores(rows), expected, without={4})
    assert {row["sample_id"] for row in rows.failures} == {4}
    assert all(type(error).__name__ in row["reason"] for row in rows.failures)
    with pytest.raises(type(error)):
        explain_parts(small_explainer(strict=True), batch)


@pytest.mark.parametrize("broken", ["one", "all"])
def test_a_model_that_returns_nan(broken, whole, tmp_path, monkeypatch, capsys):  # noqa: F811
    settings, *_ = whole
    logits = ExplainableModel.logits
    seen = []

    def nan_for_some(self, inputs, *rows):
        result = logits(self, inputs, *rows)
        seen.append(inputs.batch["input_ids"][0])
        first = seen[0][: inputs.batch["input_ids"].shape[1]]
        for row, ids in enumerate(inputs.batch["input_ids"]):
            if broken == "all" or (len(first) == len(ids) and torch.equal(ids, first)):
                result = torch.cat([result[:row], torch.full_like(result[row : row + 1], torch.nan), result[row + 1 :]])
        return result

    monkeypatch.setattr(ExplainableModel, "logits", nan_for_some)
    folder = tmp_path / "run"
    code = main(explain_line(folder, 1, *settings))
    failures = [json.loads(line) for line in (folder / "failures.jsonl").read_text().splitlines()]
    assert {row["reason"] for row in failures} == {NON_FINITE_OUTPUT}
    if broken == "one":
        assert code == 3 and len(failures) == 2 and len({row["sample_id"] for row in failures}) == 1
        assert json.loads((folder / "summary.json").read_text())["explain/ca_lig/failed"] == 1
        return
    assert code == 1 and "none of 41 samples" in capsys.readouterr().err
    # Broken weights that are mended: what failed is tried again.
    monkeypatch.undo()
    assert main(explain_line(folder, 1, *settings)) == 0
    assert_same_results(folder, whole)


def test_a_full_disk_ends_the_stage_and_loses_nothing(whole, tmp_path):  # noqa: F811
    settings, *_ = whole
    folder = copied(whole, tmp_path)
    for path in sorted((folder / "manifest").iterdir())[5:]:
        path.unlink()
    settings = [item for item in settings if "batches_per_shard" not in item]
    # Small shards had room; the one that holds all that is left has not.
    run_worker("command_on_a_full_disk", 9_000, *explain_line(folder, 1, *settings, "explain.batches_per_shard=99"))
    assert len(manifest.take_up(folder).done) == 10
    assert not list(folder.rglob(".*.tmp"))
    log = " ".join((folder / "log.txt").read_text().split())
    assert "cannot be written: File too large" in log and f"run.resume={folder}" in log
    run_worker("command", *explain_line(folder, 1))
    assert_same_results(folder, whole)


def test_a_data_loader_worker_that_dies(whole, tmp_path, monkeypatch, capsys):  # noqa: F811
    settings, *_ = whole
    folder = tmp_path / "run"
    collate, calls = TextCollator.__call__, []

    def dying(self, rows):
        calls.append(rows)
        if torch.utils.data.get_worker_info() is not None and len(calls) > 6:
            # The worker runs ahead: it dies once something is written that the second run can go on from.
            for _ in range(600):
                if list((folder / "manifest").glob("*.json")):
                    os._exit(1)
                time.sleep(0.1)
        return collate(self, rows)

    monkeypatch.setattr(TextCollator, "__call__", dying)
    assert main(explain_line(folder, 1, *settings, "data.num_workers=1")) == 1
    assert "DataLoader worker" in capsys.readouterr().err
    monkeypatch.undo()
    assert list((folder / "manifest").glob("*.json"))
    assert main(explain_line(folder, 1, "data.num_workers=0")) == 0
    assert_same_results(folder, whole)


def test_metrics_csv_that_cannot_be_written_never_ends_a_run(tmp_path, monkeypatch, capsys):
    from lightning.pytorch.loggers import CSVLogger

    def full(self):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(CSVLogger, "save", full)
    settings = [*SETTINGS, "stages=[fit]", "probe.enabled=false"]
    assert main(["run", f"run.dir={tmp_path / 'run'}", *settings]) == 0
    shown = capsys.readouterr().out
    assert shown.count("metrics.csv failed and is left out from here") == 1 and "No space left" in shown


def test_strict_ends_the_stage(monkeypatch):
    monkeypatch.setattr(ExplainableModel, "logits", lambda self, inputs: torch.full((len(inputs), 3), torch.nan))
    with pytest.raises(SampleFailure, match="explain.strict"):
        explain_parts(small_explainer(strict=True), default_collate(make_rows(2)))
