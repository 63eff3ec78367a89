"""AttributionCallback on two gloo processes: the numbers of one process, and no trace in the training."""

import json

import pytest
import torch
from conftest import make_bert
from forked import run_worker

from calig.callbacks.sharded import whole_copy
from calig.pipeline.errors import InputError

KINDS = {
    "plain": {},
    "accumulate": {"accumulate_grad_batches": 2},
    "mid-epoch": {"accumulate_grad_batches": 2, "val_check_interval": 1},
    "unused parameters": {"strategy": "ddp_fork_find_unused_parameters_true"},
    "static graph": {"static_graph": True},
    "bf16": {"precision": "bf16-mixed"},
    "fsdp2": {"strategy": "fsdp2"},
}


@pytest.mark.parametrize("kind", KINDS)
def test_weights_end_bit_identical_with_and_without_it(kind, tmp_path):
    run_worker("observed", tmp_path, json.dumps(KINDS[kind]))
    plain, watched = (torch.load(tmp_path / f"{name}.pt", weights_only=True) for name in ("plain", "watched"))
    assert any(not torch.equal(plain[key], value) for key, value in torch.load(tmp_path / "start.pt").items())
    for key, value in plain.items():
        assert torch.equal(value, watched[key]), key
    scalars = json.loads((tmp_path / "scalars.json").read_text())
    assert scalars["val/explain/ca_lig/failed"] == 0 and "val/explain/ca_lig/completeness_gap" in scalars


@pytest.mark.parametrize("kind", ["mid-epoch", "unused parameters", "static graph", "bf16", "fsdp2"])
def test_scalars_are_those_of_one_process(kind, tmp_path):
    found = []
    for devices in (1, 2):
        folder = tmp_path / str(devices)
        folder.mkdir()
        own = KINDS[kind]
        if devices == 1:
            own = {key: value for key, value in own.items() if key not in ("strategy", "static_graph")}
        run_worker("callback", devices, folder, json.dumps(own))
        found.append(json.loads((folder / "scalars-1-0.json").read_text()))
    one, two = found
    assert one.keys() == two.keys()
    for key in one:
        if key.startswith("val/explain/") and not key.endswith("seconds"):
            assert abs(one[key] - two[key]) < 1e-5, key


def test_a_sample_that_fails_on_one_process(tmp_path):
    """Both learn of it; without `strict` the training goes on, with it both end."""
    run_worker("failing_sample", tmp_path, False)
    scalars = json.loads((tmp_path / "scalars-1-1.json").read_text())
    assert scalars["val/explain/ca_lig/failed"] == 1
    with pytest.raises(AssertionError, match=r"SampleFailure: sample \d, method 'ca_lig': ValueError: no such token"):
        run_worker("failing_sample", tmp_path, True)


def test_a_whole_copy_is_whole_or_refused():
    model = make_bert(layers=1)
    copied = whole_copy(model)
    ids = torch.tensor([[1, 7, 9, 2]])
    assert torch.equal(copied(ids).logits, model.eval()(ids).logits)
    del model.bert.embeddings._buffers["position_ids"]  # its class makes one, of which nothing is known then
    with pytest.raises(InputError, match=r"first: bert.embeddings.position_ids.*Train without the callback"):
        whole_copy(model)
