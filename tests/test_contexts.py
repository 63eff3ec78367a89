"""The engine inside Lightning: {fit, validate, test, predict} x {one process, two gloo processes}."""

import json

import pytest
import torch
from conftest import make_bert
from distributed_worker import make_rows
from forked import run_worker
from torch.utils.data import default_collate

from calig.pipeline.attribution import attribute


@pytest.mark.parametrize("devices", [1, 2])
def test_scores_are_the_same_in_every_loop(devices, tmp_path):
    run_worker("contexts", devices, tmp_path)
    batch = default_collate(make_rows(5))
    torch.manual_seed(0)
    reference = attribute(make_bert(layers=2), batch, "ca_lig", target="label").scores
    inference = {}
    for loop in ("fit", "validate", "test", "predict"):
        for index in range(5):
            found = json.loads((tmp_path / f"{loop}-{index}.json").read_text())
            assert torch.allclose(torch.tensor(found["scores"]), reference[index], atol=1e-5), (loop, index)
            inference.setdefault(loop, found["inference"])
            assert not found["grad"]
    # What makes this a test: the one-process loops do run under inference mode, fit and gloo do not.
    expected = devices == 1
    assert inference == {"fit": False, "validate": expected, "test": expected, "predict": expected}
