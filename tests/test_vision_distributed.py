"""Images on two gloo processes through the command line: every sample and picture once, and the same numbers."""

import json
import os
import subprocess

import pytest
from test_distributed_run import CALIG
from test_vision_run import SCENES, TINY

from calig.pipeline.costs import COSTS
from calig.pipeline.records import read_rows


@pytest.mark.slow
def test_two_processes_explain_every_image_once_and_like_one(tmp_path):
    rows = {}
    for name in ("ddp_cpu", "cpu"):
        # The weights of both runs must agree, so neither trains.
        own = [
            f"trainer={name}",
            "stages=[fit,explain]",
            "model.lr=1e-12",
            "explain.num_samples=7",
            "probe.num_samples=3",
        ]
        own += ["explain.methods=[ca_lig,input_x_gradient,random]", "explain.steps=4", "probe.enabled=true"]
        kept = [item for item in TINY if item.split("=")[0] not in {one.split("=")[0] for one in own}]
        line = [CALIG, "run", f"run.dir={tmp_path / name}", *SCENES, *kept, *own]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(line, env=environment, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr[-3000:]
        found = list(read_rows(tmp_path / name / "explanations"))
        keys = [(row["sample_id"], row["method"]) for row in found]
        assert len(set(keys)) == len(keys) == 7 * 3
        rows[name] = {key: row["scores"] for key, row in zip(keys, found, strict=True)}
        assert len(list((tmp_path / name / "images").glob("*.png"))) == 14
        assert len(list((tmp_path / name / "probe" / "images").glob("*.png"))) == 6
    assert rows["cpu"].keys() == rows["ddp_cpu"].keys()
    for key, scores in rows["cpu"].items():
        assert all(abs(a - b) < 1e-5 for a, b in zip(scores, rows["ddp_cpu"][key], strict=True)), key
    for picture in (tmp_path / "cpu" / "images").iterdir():
        assert picture.read_bytes() == (tmp_path / "ddp_cpu" / "images" / picture.name).read_bytes()
    one, two = (json.loads((tmp_path / name / "summary.json").read_text()) for name in ("cpu", "ddp_cpu"))
    assert "explain/centre/mask_auprc" in one
    for key in one:
        if key.startswith(("explain/", "val/explain")) and "gap" not in key and not any(cost in key for cost in COSTS):
            # Of two pixels that interpolation makes almost equal, rounding may say which is ranked first.
            assert abs(one[key] - two[key]) < (5e-4 if "mask_" in key else 1e-5), key
