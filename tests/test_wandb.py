"""The offline W&B run of a whole run, read back: keys, tables, charts, media and artifacts are what was meant."""

import dataclasses
import json
import os
from pathlib import Path

import pytest
from PIL import Image
from test_cli import TINY
from wandb_records import read_offline_run

from calig.pipeline import load_explanations
from calig.pipeline.cli import main
from calig.pipeline.compose import compose, load
from calig.pipeline.config import ARTIFACTS
from calig.pipeline.console import Console
from calig.pipeline.loading import mean_curves, read_probes
from calig.pipeline.wandb_run import _FILES, add_summary, identity, log_artifacts

PREFIX = "val/explain/ca_lig"
SHOWN = 4


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dashboard") / "run"
    methods = "explain.methods=[ca_lig,input_x_gradient,random]"
    settings = ["logger.wandb.tags=[first, '2']", "logger.wandb.group=pair"]
    environment = dict(os.environ)
    code = main(["run", f"run.dir={folder}", *TINY, methods, *settings])
    os.environ.clear()
    os.environ.update(environment)
    assert code == 0
    return folder


@pytest.fixture(scope="module")
def run(run_dir):
    return read_offline_run(run_dir)


@pytest.fixture(scope="module")
def files(run_dir):
    return next((run_dir / "wandb").glob("offline-run-*")) / "files"


def logged(run, key):
    return [row[key] for row in run.history if key in row]


def table(run, files, key):
    """What the tables under a key hold, in the order of logging."""
    return [json.loads((files / path).read_text()) for path in logged(run, f"{key}/path")]


def test_it_says_what_the_run_is(run, run_dir):
    about = run.about
    assert (about.run_group, about.job_type, list(about.tags)) == ("pair", "train", ["first", "2"])
    assert about.display_name == load(run_dir, check=False).run.name
    config = dataclasses.asdict(load(run_dir, check=False))
    assert {key: run.config[key] for key in config} == config, "the resolved configuration, whole"
    assert run.config["versions"] == json.loads((run_dir / "versions.json").read_text())
    if (Path(__file__).parents[1] / ".git").exists():
        assert about.git.commit == run.config["versions"]["git_commit"] != ""


def test_scalars_have_the_keys_and_values_of_the_summary_file(run, run_dir):
    summary = json.loads((run_dir / "summary.json").read_text())
    keys = {key for row in run.history for key in row}
    assert {key for key in summary if not key.endswith("/best")} <= keys
    for key, value in summary.items():
        assert run.summary[key] == pytest.approx(value), key
    accuracies = logged(run, "val/accuracy")
    assert len(accuracies) == 2, "one per epoch"
    assert run.summary["val/accuracy/best"] == pytest.approx(max(accuracies))
    assert run.summary["val/accuracy"] == pytest.approx(accuracies[-1])
    assert run.summary["val/loss/best"] == pytest.approx(min(logged(run, "val/loss")))


def test_every_scalar_is_drawn_over_the_optimiser_step(run):
    by_glob = {metric.glob_name or metric.name: metric.step_metric for metric in run.defined}
    assert by_glob == {"trainer/global_step": "", "*": "trainer/global_step"}
    for row in run.history:
        own = [key for key in row if key.startswith(("train/", "val/", "test/", "explain/"))]
        assert not own or "trainer/global_step" in row, own


def test_the_samples_table_has_a_row_per_shown_sample_and_epoch(run, run_dir, files):
    # The history holds the plain cells; the artifact of a table, all of them with their media.
    tables = [found for kind, found in run.artifacts if kind == "run_table" and f"{PREFIX}/samples.table.json" in found]
    probes = read_probes(run_dir)
    assert [len(content["data"]) for content in table(run, files, f"{PREFIX}/samples")] == [SHOWN, SHOWN]
    assert len(tables) == len(probes) == 2
    for media, (epoch, _, rows) in zip(tables, probes, strict=True):
        content = json.loads(Path(media[f"{PREFIX}/samples.table.json"]).read_text())
        columns = content["columns"]
        assert columns[:7] == [
            *("epoch", "sample_id", "text", "label", "prediction", "probability", "completeness_gap")
        ]
        assert columns[-1] == "layers" and {"comprehensiveness", "sufficiency", "token_f1"} <= set(columns[7:-1])
        assert len(content["data"]) == SHOWN
        for line, row in zip(content["data"], rows, strict=True):
            cells = dict(zip(columns, line, strict=True))
            assert (cells["epoch"], cells["sample_id"]) == (epoch, row["sample_id"])
            names = ("negative", "positive")
            assert (cells["label"], cells["prediction"]) == (names[row["label"]], names[row["prediction"]])
            assert cells["probability"] == pytest.approx(row["probability"])
            assert cells["completeness_gap"] == pytest.approx(row["completeness_gap"])
            text = Path(media[cells["text"]["path"]]).read_text()
            assert all(token in text for token in row["tokens"] if token.isalpha())
            assert "<script" not in text and "http" not in text
            with Image.open(media[cells["layers"]["path"]]) as picture:
                assert picture.width > 300 and picture.height > 200
        for name in ("comprehensiveness", "sufficiency", "token_f1"):
            mean = sum(line[columns.index(name)] for line in content["data"]) / SHOWN
            means = [row[f"{PREFIX}/{name}"] for row in run.history if f"{PREFIX}/{name}" in row]
            assert any(mean == pytest.approx(value, abs=1e-6) for value in means), name


def lines(content):
    """The lines of a line series: name -> (x, y) points."""
    found = {}
    for cells in content["data"]:
        cells = dict(zip(content["columns"], cells, strict=True))
        found.setdefault(cells["lineKey"], []).append((cells["step"], cells["lineVal"]))
    return found


def test_the_charts_are_line_series_that_need_no_account(run, run_dir, files):
    keys = {f"{PREFIX}/{name}" for name in ("perturbation_removed", "perturbation_kept", "layer_profile_chart")}
    keys |= {"explain/perturbation_removed", "explain/perturbation_kept"}
    assert set(run.charts) == keys
    assert {chart["panel_config"]["panelDefId"] for chart in run.charts.values()} == {"wandb/lineseries/v0"}
    profiles = table(run, files, f"{PREFIX}/layer_profile_chart_table")
    assert [set(lines(one)) for one in profiles] == [{"epoch 0"}, {"epoch 0", "epoch 1"}]
    for epoch, points in lines(profiles[-1]).items():
        assert [x for x, _ in points] == [1, 2] and sum(y for _, y in points) == pytest.approx(1, abs=1e-5), epoch
    curves = mean_curves(run_dir)
    (content,) = table(run, files, "explain/perturbation_removed_table")
    found = lines(content)
    assert set(found) == {"ca_lig", "input_x_gradient", "random", "ca_lig reversed"}
    for name, key in (("ca_lig", ("ca_lig", "none")), ("random", ("random", "random"))):
        for point, expected in zip(found[name], curves[key]["removed"], strict=True):
            assert point == pytest.approx(expected)
    probe = lines(table(run, files, f"{PREFIX}/perturbation_kept_table")[0])
    assert set(probe) == {"ca_lig", "random", "ca_lig reversed"}


def test_the_artifacts_hold_the_explanations_the_model_and_the_report(run, run_dir):
    own = {kind: found for kind, found in run.artifacts if kind != "run_table"}
    assert set(ARTIFACTS) == set(_FILES) == set(own)
    explanations = own["explanations"]
    assert {Path(name).parent.name for name in explanations} == {"explanations", "metrics", "probe"}
    assert set(own["report"]) == {"report.html", "summary.json"}
    assert {"model/model.safetensors", "model/config.json", "model/tokenizer.json"} <= set(own["model"])
    for kind in ("explanations", "model"):
        for name, file in own[kind].items():
            assert Path(file) == (run_dir / name).resolve(), "referred to, not copied"
    copy = Path(own["report"]["report.html"])
    assert copy.read_bytes() == (run_dir / "report.html").read_bytes() and run_dir.resolve() in copy.parents
    assert len(load_explanations(run_dir)) == 30


def test_everything_lies_inside_the_run_directory_and_is_small(run, run_dir, files):
    paths = [
        path
        for key in (f"{PREFIX}/tokens", f"{PREFIX}/layers", f"{PREFIX}/layer_profile_image")
        for path in logged(run, f"{key}/path")
    ]
    assert len(paths) == 6 and all((files / path).stat().st_size > 0 for path in paths)
    size = sum(path.stat().st_size for path in (run_dir / "wandb").rglob("*") if path.is_file())
    assert size < 3_000_000, "two probes of four samples"


def test_the_run_ends_with_its_numbers_and_how_to_upload_it(run_dir):
    text = (run_dir / "log.txt").read_text()
    end = text[text.index("── done in") :]
    summary = json.loads((run_dir / "summary.json").read_text())
    lines = [line.split() for line in end.splitlines()]
    assert ["test", "accuracy", f"{100 * summary['test/accuracy']:.1f}", "%"] in lines
    own, random = (f"{summary[f'explain/{name}/token_f1']:.3f}" for name in ("ca_lig", "random"))
    assert ["ca_lig", "token", "F1", "↑", own, "random", random] in lines
    assert str(run_dir / "report.html") in end and f"wandb sync {run_dir / 'wandb'}/offline-run-*" in end


def test_a_service_that_fails_is_named_and_ends_nothing(tmp_path):
    class WandbLogger:
        @property
        def experiment(self):
            raise ConnectionError("no route")

    (tmp_path / "report.html").write_text("page")
    with Console(tmp_path / "log.txt") as console:
        log_artifacts([WandbLogger()], tmp_path, ["report", "model"], console)
        add_summary([WandbLogger(), object()], {"a": 1.0}, console)
    said = (tmp_path / "log.txt").read_text()
    assert "got no artifacts: ConnectionError: no route" in said and "got no summary: ConnectionError" in said


@pytest.mark.parametrize(("stages", "kind"), [("[test,explain]", "evaluate"), ("[fit]", "train")])
def test_the_kind_of_run_follows_from_its_stages(stages, kind, tmp_path):
    config = compose(["experiment=quickstart", f"stages={stages}"])
    assert identity(config, tmp_path) == {"group": None, "job_type": kind, "config": {}}
    named = compose(["experiment=quickstart", f"stages={stages}", "logger.wandb.job_type=ablation"])
    assert identity(named, tmp_path)["job_type"] == "ablation"


def test_the_group_may_come_from_the_environment(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_RUN_GROUP", "rates")
    assert identity(compose(["experiment=quickstart"]), tmp_path)["group"] == "rates"
    named = compose(["experiment=quickstart", "logger.wandb.group=mine"])
    assert identity(named, tmp_path)["group"] == "mine"
