"""Two processes that a launcher has started: a signal or an error on one of them ends both, and with one code."""

import json
import signal

import pytest
from forked import run_worker
from test_explain_scale import SAMPLES, assert_same_results, copied, explain_line, whole  # noqa: F401  (a fixture)

from calig.pipeline import manifest

EXPLAIN = "calig.pipeline.explainer:Explainer.explain"
CALIBRATE = ["calibrate.num_samples=9", "explain.options.ca_lig.lam=auto", "explain.methods=[ca_lig]"]


def together(folder, event, *arguments):
    """Run; returns the exit codes of both processes."""
    start = f"run.resume={folder}" if folder.exists() else f"run.dir={folder}"
    line = ["run", start, *arguments, "trainer.devices=2", "trainer.strategy=ddp"]
    run_worker("side_by_side", folder.parent, json.dumps(event), *line, timeout=120)
    return json.loads((folder.parent / "codes.json").read_text())


def term(at, call, rank):
    return {"at": at, "call": call, "rank": rank, "send": signal.SIGTERM}


@pytest.mark.parametrize("rank", [pytest.param(0, marks=pytest.mark.slow), 1])
def test_a_signal_to_either_process_ends_the_explain_stage_on_both(rank, whole, tmp_path):  # noqa: F811
    settings, *_ = whole
    folder = tmp_path / "run"
    settings = [item for item in settings if "batches_per_shard" not in item]
    assert together(folder, term(EXPLAIN, 4, rank), *settings) == [143, 143]
    done = manifest.take_up(folder).done
    assert 6 <= len(done) < SAMPLES, "what was explained is written, though no shard was full"
    assert together(folder, None) == [0, 0]
    assert_same_results(folder, whole)


def test_a_signal_to_a_process_that_is_done_or_has_nothing_to_do(whole, tmp_path):  # noqa: F811
    """One sample is left for two processes; the one without it does not come by a batch."""
    settings, *_ = whole
    folder = copied(whole, tmp_path)
    last = sorted((folder / "manifest").glob("*.json"))[-1]
    last.unlink()
    assert together(folder, term(EXPLAIN, 1, 0), *settings) == [143, 143]
    assert together(folder, None, *settings) == [0, 0]
    assert_same_results(folder, whole)


@pytest.mark.parametrize(
    ("stage", "at", "call", "rank"),
    [
        ("test", "calig.pipeline.module:ClassificationModule.test_step", 2, 1),
        ("calibrate", "calig.pipeline.calibrating:Calibrator._values", 1, 0),
        pytest.param("test", "calig.pipeline.module:ClassificationModule.test_step", 2, 0, marks=pytest.mark.slow),
        pytest.param("calibrate", "calig.pipeline.calibrating:Calibrator._values", 1, 1, marks=pytest.mark.slow),
        pytest.param("calibrate", "calig.pipeline.calibrating:Calibrator.add", 2, 0, marks=pytest.mark.slow),
        pytest.param("calibrate", "calig.pipeline.calibrating:Calibrator.add", 2, 1, marks=pytest.mark.slow),
    ],
)
def test_a_signal_to_either_process_ends_the_other_stages(stage, at, call, rank, whole, tmp_path):  # noqa: F811
    settings, *_ = whole
    stages = "stages=[test]" if stage == "test" else "stages=[calibrate,explain]"
    settings = [item for item in settings if not item.startswith(("stages", "explain.methods"))]
    settings += [stages, "data.eval_batch_size=4", *CALIBRATE]
    assert together(tmp_path / "run", term(at, call, rank), *settings) == [143, 143]
    assert together(tmp_path / "run", None) == [0, 0]


@pytest.mark.parametrize(
    "at",
    [
        "calig.pipeline.manifest:take_up",
        pytest.param("calig.pipeline.stages.explain:finish", marks=pytest.mark.slow),
    ],
)
def test_a_signal_or_an_error_in_the_work_of_the_first_process_ends_both(at, whole, tmp_path):  # noqa: F811
    settings, *_ = whole
    folder = copied(whole, tmp_path)
    assert together(folder, term(at, 1, 0), *settings) == [143, 143]
    assert together(folder, {"at": at, "call": 1, "rank": 0, "raise": "no such disk"}, *settings) == [1, 1]
    log = (folder / "log.txt").read_text()
    assert "no such disk" in log
    assert together(folder, None, *settings) == [0, 0]
    assert_same_results(folder, whole)


def test_bad_input_that_only_the_first_process_sees_is_exit_code_2_on_both(whole, tmp_path):  # noqa: F811
    settings, *_ = whole
    folder = copied(whole, tmp_path)
    (folder / "explanations" / "part-00000-00000.parquet").unlink()
    assert together(folder, None, *settings, "explain.target=1") == [2, 2]


def test_a_failed_sample_is_exit_code_3_on_both(whole, tmp_path):  # noqa: F811
    settings, *_ = whole
    folder = copied(whole, tmp_path)
    path = sorted((folder / "manifest").glob("*.json"))[0]
    content = json.loads(path.read_text())
    failure = {"sample_id": content["explained"][0]["samples"][0], "method": "random", "reason": "as a test"}
    path.write_text(json.dumps(content | {"failures": [failure]}))
    assert together(folder, None, *settings) == [3, 3]


def test_a_signal_behind_the_last_step_ends_the_run_with_its_training_done(whole, tmp_path):  # noqa: F811
    settings, *_ = whole
    settings = [item for item in settings if not item.startswith(("stages", "model.name"))]
    settings += ["stages=[fit,test]", "probe.enabled=false"]
    folder = tmp_path / "run"
    late = term("calig.pipeline.stages.fit:best_weights", 1, 0)
    assert together(folder, late, *settings) == [143, 143]
    assert (folder / "model" / "model.safetensors").exists()
    assert together(folder, None) == [0, 0]
    assert "test/accuracy" in json.loads((folder / "summary.json").read_text())


def test_each_process_calibrates_its_share_and_they_choose_like_one(whole, tmp_path):  # noqa: F811
    settings, *_ = whole
    settings = [item for item in settings if not item.startswith(("stages", "explain.methods"))]
    settings += ["stages=[calibrate,explain]", *CALIBRATE]
    found = {}
    for name in ("one", "two"):
        folder = tmp_path / name
        if name == "one":
            run_worker("command", *explain_line(folder, 1, *settings))
        else:
            # In batches of two, nine samples are five batches, and three for the first of two processes.
            add = "calig.pipeline.calibrating:Calibrator.add"
            event = {"at": add, "call": 4, "rank": 0, "raise": "this is more than its share"}
            assert together(folder, event, *settings) == [0, 0]
        found[name] = json.loads((folder / "calibration.json").read_text())
    one, two = found["one"], found["two"]
    assert one["num_samples"] == two["num_samples"] == 9 and one["chosen"] == two["chosen"]
    for a, b in zip(one["points"], two["points"], strict=True):
        assert a.keys() == b.keys() and all(a[key] == pytest.approx(b[key], abs=1e-6) for key in a)
