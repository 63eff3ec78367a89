"""The whole line on two gloo processes through the command line, and what a broken-off run leaves."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from signalled import signalled
from test_cli import TINY

from calig.pipeline.costs import COSTS
from calig.pipeline.records import read_rows, table_metadata

CALIG = str(Path(sys.executable).with_name("calig"))


def command(folder, *arguments):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    own = {item.split("=")[0] for item in arguments}
    settings = [item for item in TINY if item.split("=")[0] not in own]
    return [CALIG, "run", f"run.dir={folder}", *settings, *arguments], environment


@pytest.mark.slow
def test_two_processes_explain_every_sample_once_and_like_one(tmp_path):
    rows = {}
    for name in ("ddp_cpu", "cpu"):
        # The weights of both runs must agree, so neither trains.
        arguments = [f"trainer={name}", "model.lr=1e-12", "explain.num_samples=9", "logger.wandb.mode=disabled"]
        line, environment = command(tmp_path / name, *arguments)
        done = subprocess.run(line, env=environment, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr[-3000:]
        found = list(read_rows(tmp_path / name / "explanations"))
        keys = [(row["sample_id"], row["method"]) for row in found]
        assert len(set(keys)) == len(keys) == 9 * 6
        rows[name] = {key: row["scores"] for key, row in zip(keys, found, strict=True)}
    assert len(list((tmp_path / "ddp_cpu" / "explanations").glob("part-*.parquet"))) == 2
    assert rows["cpu"].keys() == rows["ddp_cpu"].keys()
    for key, scores in rows["cpu"].items():
        assert all(abs(a - b) < 1e-5 for a, b in zip(scores, rows["ddp_cpu"][key], strict=True)), key
    one, two = (json.loads((tmp_path / name / "summary.json").read_text()) for name in ("cpu", "ddp_cpu"))
    for key in one:
        if key.startswith("explain/") and not any(cost in key for cost in COSTS):
            # A gap is one sample's rounding, which depends on the batch that it is computed in.
            assert abs(one[key] - two[key]) < (1e-5 if "gap" in key else 1e-6), key


@pytest.mark.slow
@pytest.mark.parametrize(("sent", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interrupted_run_ends_with_its_code_and_can_be_continued(tmp_path, sent, code):
    folder = tmp_path / "run"
    last = folder / "checkpoints" / "last.ckpt"
    line, environment = command(folder, "trainer.max_epochs=120", "logger.wandb.mode=disabled", "probe.enabled=false")
    ended, error = signalled(line, sent, last.exists)
    assert ended == code, error[-2000:]
    assert last.exists()
    again = [CALIG, "run", f"run.resume={folder}", "stages=[fit,test]"]
    done = subprocess.run(again, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "test/accuracy" in json.loads((folder / "summary.json").read_text())


@pytest.mark.slow
def test_two_processes_choose_like_one(tmp_path):
    found = {}
    for name in ("ddp_cpu", "cpu"):
        arguments = [f"trainer={name}", "model.lr=1e-12", "logger.wandb.mode=disabled", "explain.methods=[ca_lig]"]
        arguments += ["explain.options.ca_lig.lam=per_layer", "calibrate.num_samples=9", "probe.enabled=false"]
        line, environment = command(tmp_path / name, *arguments)
        done = subprocess.run(line, env=environment, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr[-3000:]
        found[name] = json.loads((tmp_path / name / "calibration.json").read_text())
        shard = next((tmp_path / name / "explanations").glob("part-*.parquet"))
        assert table_metadata(shard)["methods"]["ca_lig"]["lam"] == found[name]["chosen"]["lam"]
    one, two = found["cpu"], found["ddp_cpu"]
    assert one["num_samples"] == two["num_samples"] == 9 and one["chosen"] == two["chosen"]
    for a, b in zip(one["points"], two["points"], strict=True):
        assert a.keys() == b.keys() and all(a[key] == pytest.approx(b[key], abs=1e-6) for key in a)
