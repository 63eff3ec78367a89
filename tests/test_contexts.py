"""The engine inside Lightning: {fit, validate, test, predict} x {one process, two gloo processes}."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import make_bert

from calig.pipeline.attribution import attribute

WORKER = Path(__file__).with_name("distributed_worker.py")


def run_worker(task, devices, folder):
    folder.mkdir(exist_ok=True)
    done = subprocess.run(
        [sys.executable, str(WORKER), task, str(devices), str(folder)], capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return folder


@pytest.mark.parametrize("devices", [1, 2])
def test_scores_are_the_same_in_every_loop(devices, tmp_path):
    sys.path.insert(0, str(WORKER.parent))
    from distributed_worker import make_rows
    from torch.utils.data import default_collate

    run_worker("contexts", devices, tmp_path / "out")
    batch = default_collate(make_rows(5))
    torch.manual_seed(0)
    reference = attribute(make_bert(layers=2), batch, "ca_lig", target="label").scores
    inference = {}
    for loop in ("fit", "validate", "test", "predict"):
        for index in range(5):
            found = json.loads((tmp_path / "out" / f"{loop}-{index}.json").read_text())
            assert torch.allclose(torch.tensor(found["scores"]), reference[index], atol=1e-5), (loop, index)
            inference.setdefault(loop, found["inference"])
            assert not found["grad"]
    # What makes this a test: the one-process loops do run under inference mode, fit and gloo do not.
    expected = devices == 1
    assert inference == {"fit": False, "validate": expected, "test": expected, "predict": expected}
