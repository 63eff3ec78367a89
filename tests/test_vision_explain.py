"""A run on images end to end: probe, explain, benchmark and report, broken off and continued, methods added."""

import json
import math
import shutil

import pytest
from PIL import Image
from test_vision_run import SCENES, TINY

from calig.pipeline import Explanation, explain, load_explanations
from calig.pipeline.cli import main
from calig.pipeline.loading import read_probes
from calig.pipeline.records import read_rows

OWN = [
    *[item for item in TINY if not item.startswith("probe.")],
    *SCENES,
    "stages=[fit,explain,benchmark,report]",
    "explain.methods=[ca_lig,input_x_gradient,random]",
    "explain.num_samples=6",
    "explain.batch_size=2",
    "explain.batches_per_shard=1",
    "explain.steps=4",
    "probe.num_samples=3",
    "probe.steps=4",
]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("vision") / "run"
    assert main(["run", f"run.dir={folder}", *OWN]) == 0
    return folder


def measured(folder):
    costs = ("seconds", "passes", "peak_memory")
    names = ("sample_id", "method", "control", "metric", "operator", "space", "q")
    rows = read_rows(folder / "metrics")
    return {tuple(row[name] for name in names): row["value"] for row in rows if row["metric"] not in costs}


def test_every_key_is_there_and_the_rows_have_their_pictures(finished):
    summary = json.loads((finished / "summary.json").read_text())
    assert all(math.isfinite(value) for value in summary.values() if isinstance(value, float))
    for metric in ("comprehensiveness", "comprehensiveness@delete", "positive_auc", "negative_auc@delete", "mask_iou"):
        key = f"explain/ca_lig/{metric}"
        assert summary[f"{key}/low"] <= summary[key] <= summary[f"{key}/high"], key
    for who in ("random", "centre", "ca_lig/reversed"):
        assert 0 <= summary[f"explain/{who}/mask_auprc"] <= 1
    assert {"val/explain/ca_lig/pointing_game", "val/explain/centre/mask_iou"} <= summary.keys()
    table = load_explanations(finished)
    assert len(table) == 6 * 3
    for row in table:
        assert row["grid"] == [4, 4] and len(row["scores"]) == 17
        picture, mask = (Image.open(finished / row[key]) for key in ("image_ref", "mask_ref"))
        assert picture.size == mask.size == (32, 32) and mask.getextrema() == (0, 255)
    assert len(list((finished / "images").iterdir())) == 12
    ((_, _, rows),) = read_probes(finished)
    assert all((finished / "probe" / row["image_ref"]).is_file() for row in rows)
    page = (finished / "report.html").read_text()
    assert "centre prior" in page and '"outline":["M' in page and '"probe":{"method":"ca_lig","samples":[{' in page
    assert (finished / "benchmark.csv").read_text().count("centre,centre,") >= 3


def test_the_picture_that_is_kept_is_what_the_model_saw(finished):
    row = next(iter(load_explanations(finished)))
    (again,) = explain(finished, [finished / row["image_ref"]], method=row["method"], steps=4)
    assert again.prediction == row["prediction"]
    assert again.scores == pytest.approx(row["scores"], abs=2e-3)
    kept = Explanation.from_row(row, folder=finished)
    assert kept.picture == again.picture and kept.mask is not None


def test_a_broken_run_explains_what_is_missing_and_comes_to_the_same(finished, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    before, names = measured(run), sorted(path.name for path in (run / "images").iterdir())
    shards = sorted((run / "manifest").glob("part-*.json"))
    assert len(shards) == 3
    lost = json.loads(shards[1].read_text())["files"]
    gone = next(name for name in lost if name.startswith("images/") and "mask" not in name)
    (run / gone).unlink()
    stages = json.loads((run / ".stages.json").read_text())
    stages["finished"] = [stage for stage in stages["finished"] if stage == "fit"]
    (run / ".stages.json").write_text(json.dumps(stages))
    assert main(["run", f"run.resume={run}"]) == 0
    assert sorted(path.name for path in (run / "images").iterdir()) == names
    after = measured(run)
    assert after.keys() == before.keys()
    assert all(after[key] == pytest.approx(before[key], abs=1e-4) for key in before)
    # Another method is added to samples whose pictures stand.
    stages = json.loads((run / ".stages.json").read_text())
    stages["finished"] = ["fit"]
    (run / ".stages.json").write_text(json.dumps(stages))
    assert main(["run", f"run.resume={run}", "explain.methods=[ca_lig,input_x_gradient,random,raw_attention]"]) == 0
    assert sorted(load_explanations(run)["method"]).count("raw_attention") == 6
    assert sorted(path.name for path in (run / "images").iterdir()) == names


def test_what_cannot_be_done_is_said_before_anything_starts(tmp_path, capsys):
    beit = ["model.scratch.type=beit", "explain.operator=drop"]
    assert main(["run", f"run.dir={tmp_path / 'run'}", *OWN, *beit]) == 2
    assert "'delete' does not work on this model" in capsys.readouterr().err
    assert main(["run", f"run.dir={tmp_path / 'run'}", *OWN, "explain.operator=cut"]) == 2
    assert "mask | delete | attention | blur | mean | drop" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
