"""All metrics through the explain stage: keys, controls, limits, processes, continued runs, failures, weights."""

import json
import math
import os
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import pytest
import torch
from conftest import make_batch, make_bert
from test_cli import TINY
from transformers import BertPreTrainedModel

from calig.pipeline.attribution import UnsupportedModelError
from calig.pipeline.cli import main
from calig.pipeline.compose import compose
from calig.pipeline.costs import COSTS
from calig.pipeline.explainer import Explainer, ExplainSettings
from calig.pipeline.limits import limited
from calig.pipeline.metrics.names import DEFAULT_METRICS, FAITHFULNESS_METRICS, METRICS
from calig.pipeline.records import read_rows
from calig.pipeline.stages.explain import rationale_length

CALIG = str(Path(sys.executable).with_name("calig"))
OWN = [
    "explain=thorough",
    "stages=[fit,explain,report]",
    "trainer.max_epochs=1",
    "probe.enabled=false",
    "logger.wandb.mode=disabled",
    "explain.methods=[ca_lig,attention_rollout,random]",
    "explain.num_samples=10",
    "explain.batch_size=4",
    "explain.steps=4",
    "explain.limits={infidelity: 3, sensitivity_max: 4, randomisation: 5, delete: 6}",
    "explain.limits.attention_rollout/randomisation=2",
]
ALL = [*OWN, *(item for item in TINY if item.split("=")[0] not in {own.split("=")[0] for own in OWN})]


def settings(*arguments):
    own = {item.split("=")[0] for item in arguments}
    return [*arguments, *(item for item in ALL if item.split("=")[0] not in own)]


def run(folder, *arguments):
    environment = dict(os.environ)
    code = main(["run", f"run.dir={folder}", *settings(*arguments)])
    os.environ.clear()
    os.environ.update(environment)
    return code


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "all"
    assert run(folder) == 0
    return folder


def metric_rows(folder):
    return list(read_rows(folder / "metrics"))


def keyed(rows):
    names = ("sample_id", "method", "control", "metric", "operator", "space", "q")
    found = {tuple(row[name] for name in names): row["value"] for row in rows if row["metric"] not in COSTS}
    assert len(found) == sum(row["metric"] not in COSTS for row in rows)  # each number once
    return found


def test_every_metric_has_its_keys_with_intervals_and_controls(finished):
    summary = json.loads((finished / "summary.json").read_text())
    assert all(math.isfinite(value) for value in summary.values() if isinstance(value, float))
    for metric in METRICS:
        name = metric
        perturbing = metric in FAITHFULNESS_METRICS
        for method in ("ca_lig", "attention_rollout"):
            key = f"explain/{method}/{name}"
            assert summary[f"{key}/low"] <= summary[key] <= summary[f"{key}/high"], key
        assert (f"explain/random/{name}" in summary) == perturbing, metric
        # Each of positive and negative AUC is the other's reversal, and infidelity reads no ranking.
        reversible = perturbing and metric not in ("positive_auc", "negative_auc", "infidelity")
        assert (f"explain/ca_lig/reversed/{name}" in summary) == reversible, metric
        for operator in ("delete", "attention"):
            other = f"explain/ca_lig/{name.replace('mask', operator) if '@' in name else f'{name}@{operator}'}"
            assert (other in summary) == perturbing, other
    for key in (
        "comprehensiveness@mask.logit",
        "token_f1",
        "auprc",
        "iou_f1",
        "token_f1@dataset",
        "special_share",
        "seconds",
        "passes",
    ):
        assert f"explain/ca_lig/{key}" in summary, key


def test_limits_choose_nested_samples_and_the_rest_is_measured_on_all(finished):
    ids = {row["sample_id"] for row in read_rows(finished / "explanations")}
    measured = defaultdict(set)
    for row in metric_rows(finished):
        measured[row["metric"], row["operator"]].add(row["sample_id"])
    assert measured["comprehensiveness", "mask"] == measured["deletion_auc", "attention"] == ids and len(ids) == 10
    counts = {
        ("infidelity", "mask"): 3,
        ("infidelity", "delete"): 3,
        ("sensitivity_max", None): 4,
        ("randomisation", None): 5,
        ("comprehensiveness", "delete"): 6,
    }
    assert {key: len(measured[key]) for key in counts} == counts
    for smaller, larger in zip(list(counts)[1:], list(counts)[2:]):
        assert measured[smaller] < measured[larger]
    of_method = defaultdict(set)
    for row in metric_rows(finished):
        if row["metric"] == "randomisation":
            of_method[row["method"]].add(row["sample_id"])
    assert len(of_method["attention_rollout"]) == 2 and len(of_method["ca_lig"]) == 5
    assert of_method["attention_rollout"] < of_method["ca_lig"]
    limits = {"infidelity": 3, "sensitivity_max": 4, "randomisation": 5}
    expected = limited(ids, limits, seed=0)
    assert expected == {name: measured[name, {"infidelity": "mask"}.get(name)] for name in limits}
    assert limited(sorted(ids, reverse=True), limits, seed=0) == expected != limited(ids, limits, seed=1)


def test_randomisation_has_a_step_for_the_head_and_each_block(finished):
    steps = defaultdict(dict)
    for row in metric_rows(finished):
        if row["metric"] == "randomisation":
            steps[row["method"], row["sample_id"]][row["q"]] = row["value"]
    assert len(steps) == 5 + 2
    for (method, _), values in steps.items():
        assert set(values) == {0.0, 0.5, 1.0, None} and values[None] == values[1.0]
        assert all(-1 <= value <= 1 for value in values.values())
        assert (values[0.0] == pytest.approx(1)) == (method == "attention_rollout")  # it does not see the head


def test_the_weights_that_the_run_saved_are_the_ones_that_it_explained(finished):
    """The stage ran on the live model: what it left behind equals what the fit stage had saved before it."""
    from safetensors.torch import load_file

    saved = load_file(finished / "model" / "model.safetensors")
    checkpoint = torch.load(next((finished / "checkpoints").glob("best-*.ckpt")), weights_only=False)["state_dict"]
    for name, value in saved.items():
        assert torch.equal(value, checkpoint[f"model.{name}"]), name


def test_the_terminal_names_few_samples_and_methods_that_do_not_fall(finished):
    log = (finished / "log.txt").read_text()
    assert log.count("fewer than 30 samples") == 1
    means = defaultdict(list)
    for row in metric_rows(finished):
        if row["metric"] == "randomisation" and row["q"] is None:
            means[row["method"]].append(row["value"])
    for method, values in means.items():
        assert (f"{method} keeps a rank correlation" in log) == (sum(values) / len(values) > 0.5)


def test_the_report_shows_them(finished):
    page = (finished / "report.html").read_text()
    for label in ("deletion AUC", "positive AUC", "infidelity", "max sensitivity", "kept when randomised"):
        assert label in page, label


def test_a_continued_run_measures_what_it_would_have_at_once(finished, tmp_path):
    import shutil

    folder = Path(shutil.copytree(finished, tmp_path / "run"))
    before = keyed(metric_rows(folder))
    parts = sorted((folder / "explanations").glob("*.parquet"))
    assert parts
    state = folder / "state.json"
    for path in [*parts, folder / "summary.json", *([state] if state.exists() else [])]:
        path.unlink()
    environment = dict(os.environ)
    # The stage starts over on the samples that lack explanations: all, with rows of metrics that lead nowhere.
    code = main(
        ["run", f"run.resume={folder}", "stages=[explain]", "explain.methods=[ca_lig,attention_rollout,random]"]
    )
    os.environ.clear()
    os.environ.update(environment)
    assert code == 0
    after = keyed(metric_rows(folder))
    assert before.keys() == after.keys()
    assert all(value == pytest.approx(after[key], abs=1e-6) for key, value in before.items())


def test_two_processes_measure_like_one(finished, tmp_path):
    """One process explained batches of 4, each of the two gets every other sample in batches of 3."""
    folder = tmp_path / "ddp"
    own = ["trainer=ddp_cpu", f"model.name={finished / 'model'}", "stages=[explain]", "explain.batch_size=3"]
    line = [CALIG, "run", f"run.dir={folder}", *settings(*own)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(line, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert len(list((folder / "metrics").glob("part-*.parquet"))) == 2
    one, two = keyed(metric_rows(finished)), keyed(metric_rows(folder))
    assert one.keys() == two.keys()
    assert all(value == pytest.approx(two[key], abs=2e-5) for key, value in one.items() if value is not None)


@pytest.mark.parametrize(
    ("argument", "words"),
    [
        ("explain.metrics=[infidelty]", ["explain.metrics", "infidelty", "Did you mean 'infidelity'?"]),
        ("explain.metrics=[token_f1]", ["token_f1", "always measured"]),
        ("explain.metrics=[infidelity,infidelity]", ["'infidelity' is listed 2 times"]),
        ("explain.metrics=infidelity", ["explain.metrics=[infidelity]"]),
        ("explain.limits.randomization=5", ["randomization", "Did you mean 'randomisation'?"]),
        (
            "explain.limits={ca_lig/infidelity: 5}",
            ["explain.limits.ca_lig/infidelity", "sensitivity_max, randomisation"],
        ),
        ("explain.limits={ca_lgi/randomisation: 5}", ["explain.limits.ca_lgi/randomisation", "Did you mean 'ca_lig'?"]),
        ("explain.limits.attention=0", ["explain.limits.attention", "int >= 1 | null", "0"]),
        ("explain.limits.infidelity=many", ["explain.limits.infidelity", "int | null", "many"]),
        ("explain.perturbation_target=lable", ["explain.perturbation_target", "Did you mean 'label'?"]),
    ],
)
def test_mistakes_in_the_settings_end_with_2_and_name_the_way_out(argument, words, capsys):
    assert main(["run", argument]) == 2
    error = capsys.readouterr().err
    assert all(word in error for word in words), error


def test_an_accuracy_of_the_label_needs_labels(finished, tmp_path, capsys):
    file = tmp_path / "texts.csv"
    file.write_text("text\nthe plot was good\nthe cast was bad\n")
    arguments = ["data=files", f"data.path={file}", f"model.name={finished / 'model'}", "stages=[explain]"]
    assert main(["run", f"run.dir={tmp_path / 'run'}", *arguments, "explain.perturbation_target=label"]) == 2
    assert "explain.perturbation_target=label needs labels" in capsys.readouterr().err


def test_the_defaults_are_the_cheap_ones_and_thorough_has_all():
    assert compose([], check=True).explain.metrics == list(DEFAULT_METRICS)
    assert compose(["explain=thorough"], check=True).explain.metrics == list(METRICS)
    assert compose(["explain.limits.infidelity=null"], check=True).explain.limits["infidelity"] is None


def test_the_mean_rationale_counts_words_once_and_those_that_truncation_cut_off():
    rows = [
        {"word_ids": [-1, 0, 0, 1, -1], "rationale": [-1, 1, 1, 0, -1], "rationale_missed": 2},  # one word and two cut
        {"word_ids": [-1, 0, 1, -1], "rationale": [-1, 1, 1, -1], "rationale_missed": 0},
        {"word_ids": [-1, 0, -1], "rationale": [-1, 0, -1], "rationale_missed": 0},  # empty: skipped
    ]
    assert rationale_length(rows) == 2.5
    assert rationale_length(rows[2:]) is None


def explain(settings, model=None):
    model = model or make_bert(layers=2)
    batch = make_batch((9, 6, 8, 5)) | {"sample_id": torch.tensor([11, 12, 13, 14])}
    return Explainer(model, None, settings).explain(batch)


def test_a_sample_that_fails_under_noise_is_missing_for_that_metric_of_that_method(monkeypatch):
    from calig.pipeline.metrics import sensitivity

    real = sensitivity.noisy_scores

    def broken(model, batch, method, **named):
        scores = real(model, batch, method, **named)
        if method == "attention_rollout":
            scores[named["sample_ids"].index(12)] = float("nan")
        return scores

    monkeypatch.setattr(sensitivity, "noisy_scores", broken)
    methods = {"input_x_gradient": {}, "attention_rollout": {}}
    settings = ExplainSettings(methods, operators=("attention",), metrics=["comprehensiveness", "sensitivity_max"])
    found = explain(settings)
    assert [(row["sample_id"], row["method"]) for row in found.failures] == [(12, "attention_rollout")]
    assert "sensitivity_max" in found.failures[0]["reason"]
    measured = {(row["sample_id"], row["method"]) for row in found.metrics if row["metric"] == "sensitivity_max"}
    assert measured == {(sample, method) for sample in (11, 12, 13, 14) for method in methods} - {
        (12, "attention_rollout")
    }
    others = {row["sample_id"] for row in found.metrics if row["metric"] == "comprehensiveness"}
    assert others == {11, 12, 13, 14}
    assert all(row["value"] is None or math.isfinite(row["value"]) for row in found.metrics)


@pytest.mark.parametrize("metric", ["sensitivity_max", "randomisation"])
@pytest.mark.parametrize(
    "error", [RuntimeError("singular"), UnsupportedModelError("not this one"), torch.OutOfMemoryError("no room")]
)
@pytest.mark.parametrize("samples", [{12}, {11, 12, 13, 14}])
def test_a_method_that_raises_when_it_explains_again_fails_alone(metric, error, samples, monkeypatch):
    """Everything else stands: the explanations, the other methods' numbers, and this method's other metrics."""
    from calig.pipeline.metrics import randomisation, sensitivity

    module, name = (sensitivity, "noisy_scores") if metric == "sensitivity_max" else (randomisation, "attribute")
    real = getattr(module, name)
    texts = make_batch((9, 6, 8, 5))["input_ids"].tolist()

    def raising(model, batch, method, **named):
        ids = named.get("sample_ids") or [11 + texts.index(row) for row in batch["input_ids"].tolist()]
        if method == "attcat" and samples & set(ids):
            raise error
        return real(model, batch, method, **named)

    methods = {"attcat": {}, "input_x_gradient": {}, "random": {}}
    settings = ExplainSettings(methods, operators=("attention",), metrics=["comprehensiveness", metric])
    expected = explain(settings)
    monkeypatch.setattr(module, name, raising)
    found = explain(settings)
    # What holds of a model holds for every sample: it is not looked for in each of them.
    failing = {11, 12, 13, 14} if isinstance(error, UnsupportedModelError) else samples
    assert {(row["sample_id"], row["method"]) for row in found.failures} == {(i, "attcat") for i in failing}
    assert all(metric in row["reason"] and str(error) in row["reason"] for row in found.failures)
    assert len(found.explanations) == len(expected.explanations) == 12

    def numbers(rows):
        names = ("sample_id", "method", "control", "metric", "space", "q")
        return {tuple(row[name] for name in names): row["value"] for row in rows.metrics if row["metric"] != "seconds"}

    before, after = numbers(expected), numbers(found)
    assert before.keys() - after.keys() == {
        key for key in before if key[:2] in {(i, "attcat") for i in failing} and key[3] == metric
    }
    assert all(after[key] == pytest.approx(before[key], abs=1e-5) for key in after)


def test_what_a_model_cannot_do_is_a_failure_of_every_method_and_the_rest_goes_on(monkeypatch):
    model = make_bert(layers=2)
    monkeypatch.setattr(BertPreTrainedModel, "_init_weights", lambda self, module: None)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    settings = ExplainSettings({"input_x_gradient": {}}, operators=(), metrics=["randomisation", "sensitivity_max"])
    found = explain(settings, model)
    assert {row["sample_id"] for row in found.failures} == {11, 12, 13, 14}
    assert all("cannot be initialised anew" in row["reason"] for row in found.failures)
    assert {row["metric"] for row in found.metrics} == {"sensitivity_max", "special_share", "seconds"}
    assert len(found.explanations) == 4
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_seconds_are_those_of_the_attribution_alone(monkeypatch):
    import time

    from calig.pipeline.metrics import sensitivity

    real = sensitivity.noisy_scores
    monkeypatch.setattr(sensitivity, "noisy_scores", lambda *a, **k: time.sleep(2) or real(*a, **k))
    found = explain(ExplainSettings({"input_x_gradient": {}}, operators=(), metrics=["sensitivity_max"]))
    assert all(row["value"] < 0.5 for row in found.metrics if row["metric"] == "seconds")
