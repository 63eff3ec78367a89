"""Two gloo processes through the command line: stopped within an epoch, continued, and evaluated exactly."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from test_resume_fit import SETTINGS, logged, weights

BIN = Path(sys.executable).parent
WORKER = Path(__file__).with_name("stop_at_batch.py")
OWN = ["trainer=ddp_cpu", "data.batch_size=8", "data.size.test=23", "data.size.val=23"]
pytestmark = pytest.mark.slow


def call(line, **environment):
    done = subprocess.run(
        [str(part) for part in line],
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
        timeout=300,
    )
    return done.returncode, done.stdout + done.stderr


@pytest.fixture(scope="module")
def settings():
    own = {item.partition("=")[0] for item in OWN}
    return [*(item for item in SETTINGS if item.partition("=")[0] not in own), *OWN]


@pytest.fixture(scope="module")
def whole(tmp_path_factory, settings):
    folder = tmp_path_factory.mktemp("whole") / "run"
    code, output = call([BIN / "calig", "run", f"run.dir={folder}", *settings])
    assert code == 0, output[-3000:]
    return folder


@pytest.mark.parametrize("rank", [0, 1])
def test_a_signal_to_either_process_stops_both_and_the_run_goes_on_exactly(whole, settings, tmp_path, rank):
    folder = tmp_path / "run"
    line = [sys.executable, WORKER, rank, 4, int(signal.SIGTERM), "run", f"run.dir={folder}", *settings]
    code, output = call(line)
    assert code == 143, output[-3000:]
    assert f"go on with run.resume={folder}" in output
    code, output = call([BIN / "calig", "run", f"run.resume={folder}"])
    assert code == 0, output[-3000:]
    assert weights(folder) == weights(whole)
    assert logged(folder) == logged(whole)


def test_other_processes_cannot_go_on_within_an_epoch(settings, tmp_path):
    folder = tmp_path / "run"
    line = [sys.executable, WORKER, 0, 4, int(signal.SIGTERM), "run", f"run.dir={folder}", *settings]
    assert call(line)[0] == 143
    code, output = call([BIN / "calig", "run", f"run.resume={folder}", "trainer.devices=1"])
    assert code == 2 and "processes=2 (now 1)" in output


def test_torchrun_evaluates_an_uneven_split_like_one_process(whole, settings, tmp_path):
    """23 rows on two processes: torch's own sampler would count one of them twice."""
    test = ["stages=[test]", f"model.checkpoint={whole / 'model'}", "data.eval_batch_size=4"]
    keep = [item for item in settings if item.partition("=")[0] not in ("stages", "trainer")]
    one, two = tmp_path / "one", tmp_path / "two"
    code, output = call([BIN / "calig", "run", f"run.dir={one}", *keep, *test, "trainer=cpu"])
    assert code == 0, output[-3000:]
    torchrun = [BIN / "torchrun", "--standalone", "--nproc-per-node", 2, BIN / "calig"]
    code, output = call([*torchrun, "run", f"run.dir={two}", *keep, *test, "trainer=ddp_cpu"])
    assert code == 0, output[-3000:]
    found = [json.loads((folder / "summary.json").read_text()) for folder in (one, two)]
    assert found[0]["test/accuracy"] == found[1]["test/accuracy"] and found[0]["test/f1"] == found[1]["test/f1"]
    assert abs(found[0]["test/loss"] - found[1]["test/loss"]) < 1e-6
