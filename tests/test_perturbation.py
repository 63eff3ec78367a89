"""Perturbation curves from metric rows, against what the model says of the perturbed inputs."""

import pytest
import torch
from conftest import make_batch, make_bert

from calig.pipeline.explainer import Explainer, ExplainSettings
from calig.pipeline.loading import read_probes
from calig.pipeline.perturbation import perturbation_curves
from calig.pipeline.records import EXPLANATION_SCHEMA, METRIC_SCHEMA, read_bins, write_table

BINS = (0.01, 0.05, 0.1, 0.2, 0.5)


@pytest.fixture(scope="module")
def explained():
    batch = make_batch((9, 12)) | {"sample_id": torch.tensor([3, 8])}
    model = make_bert(layers=2)
    settings = ExplainSettings({"input_x_gradient": {}}, operators=("attention",))
    return model, batch, Explainer(model, None, settings).explain(batch)


def probability(model, batch, row, hidden, target):
    """Without the positions in `hidden`, in a forward of its own."""
    mask = batch["attention_mask"][row].clone()
    mask[list(hidden)] = 0
    with torch.no_grad():
        logits = model(batch["input_ids"][row : row + 1], attention_mask=mask[None]).logits
    return float(logits.softmax(-1)[0, target])


def test_each_point_is_the_probability_of_the_perturbed_input(explained):
    model, batch, rows = explained
    for place, explanation in enumerate(rows.explanations):
        number, scores = explanation["sample_id"], explanation["scores"]
        words = range(1, len(scores) - 1)  # between [CLS] and [SEP]
        ranked = sorted(words, key=lambda i: (-scores[i], i))
        curves = perturbation_curves(rows.metrics, {number: explanation["probability"]})
        assert set(curves) == {("input_x_gradient", "none"), ("input_x_gradient", "reversed"), ("random", "random")}
        for control, order in (("none", ranked), ("reversed", ranked[::-1])):
            found = curves["input_x_gradient", control]
            assert [q for q, _ in found["removed"]] == [0.0, *BINS] and [q for q, _ in found["kept"]] == [*BINS]
            for kind, points in found.items():
                for q, value in points:
                    top = order[: -(-int(1000 * q) * len(words) // 1000)]
                    hidden = top if kind == "removed" else set(words) - set(top)
                    expected = probability(model, batch, place, hidden, explanation["target"])
                    assert value == pytest.approx(expected, abs=1e-5), (kind, control, q)


def test_of_several_samples_it_is_the_mean(explained):
    _, _, rows = explained
    whole = {row["sample_id"]: row["probability"] for row in rows.explanations}
    both = perturbation_curves(rows.metrics, whole)
    each = [perturbation_curves(rows.metrics, {number: p}) for number, p in whole.items()]
    for key, curves in both.items():
        for kind, points in curves.items():
            singles = [one[key][kind] for one in each]
            for i, (q, value) in enumerate(points):
                assert value == pytest.approx(sum(line[i][1] for line in singles) / 2, abs=1e-6), (key, kind, q)


def test_mask_goes_before_other_operators_and_what_is_missing_is_left_out():
    row = {
        "sample_id": 1,
        "method": "a",
        "control": "none",
        "metric": "comprehensiveness",
        "space": "probability",
        "q": 0.5,
    }
    rows = [{**row, "operator": "delete", "value": 0.1}, {**row, "operator": "mask", "value": 0.25}]
    assert perturbation_curves(rows, {1: 0.75})["a", "none"]["removed"] == [(0.0, 0.75), (0.5, 0.5)]
    assert perturbation_curves(rows[:1], {1: 0.5})["a", "none"]["removed"][1] == (0.5, 0.4)
    others = [{**row, "value": None}, {**row, "q": None}, {**row, "space": "logit"}, {**row, "metric": "log_odds"}]
    assert perturbation_curves([{"operator": "mask", "value": 0.1, **one} for one in others], {1: 0.5}) == {}
    assert perturbation_curves(rows, {2: 0.5}) == {}


def test_the_rows_are_read_back_from_a_folder(tmp_path, explained):
    rows = explained[2]
    write_table(tmp_path / "metrics=1" / "part-0.parquet", rows.metrics, METRIC_SCHEMA)
    read = list(read_bins(tmp_path / "metrics=1", ["comprehensiveness", "sufficiency"]))
    assert {row["metric"] for row in read} == {"comprehensiveness", "sufficiency"}
    assert all(row["q"] is not None and row["space"] == "probability" for row in read)
    whole = {row["sample_id"]: row["probability"] for row in rows.explanations}
    assert perturbation_curves(read, whole) == perturbation_curves(rows.metrics, whole)
    for name in ("epoch-0001-step-0000010", "epoch-0000-step-0000005"):
        write_table(tmp_path / "probe" / f"{name}.parquet", rows.explanations, EXPLANATION_SCHEMA)
    probes = read_probes(tmp_path)
    assert [(epoch, step, len(found)) for epoch, step, found in probes] == [(0, 5, 2), (1, 10, 2)]
    assert probes[0][2][0]["tokens"] == rows.explanations[0]["tokens"]
    assert read_probes(tmp_path / "nothing") == []
