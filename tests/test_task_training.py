"""Training of every head: losses and metrics against naive ones, and whole runs from files to a report."""

import json
import math

import pytest
import torch
from test_data_sources import write_jsonl
from transformers import BertConfig, BertForSequenceClassification

from calig.callbacks.development import Development
from calig.pipeline import explain, load_explanations
from calig.pipeline.cli import main
from calig.pipeline.compose import compose
from calig.pipeline.config import ModelConfig
from calig.pipeline.errors import InputError
from calig.pipeline.module import ClassificationModule, LossSettings, loss_settings
from calig.pipeline.records import read_rows
from calig.pipeline.task_metrics import measured_pair, task_metrics
from calig.pipeline.tasks import PROBLEM_TYPES, task_of

TINY = [
    *("model=tiny", "model.scratch.layers=2", "model.scratch.width=16", "model.scratch.heads=2", "trainer=cpu"),
    *("model.scratch.intermediate=32", "trainer.max_epochs=1", "trainer.enable_progress_bar=false", "logger=none"),
    *("data=files", "data.max_length=24", "data.batch_size=16", "probe.num_samples=3", "probe.steps=4"),
    *("explain.num_samples=6", "explain.steps=6", "explain.methods=[ca_lig,generic_attention,random]"),
    "stages=[fit,test,explain,benchmark,report]",
]


def bert(outputs, task):
    torch.manual_seed(1)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    config = BertConfig(vocab_size=40, **sizes, num_labels=outputs, problem_type=PROBLEM_TYPES[task])
    return BertForSequenceClassification(config).eval()


def batch_of(labels):
    torch.manual_seed(2)
    ids = torch.randint(5, 40, (len(labels), 7))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


def test_the_loss_of_several_labels():
    labels = torch.tensor([[1.0, 0, 1], [0, 0, 0], [0, 1, 1], [1, 1, 1]])
    batch = batch_of(labels)
    module = ClassificationModule(bert(3, "multi_label"), ["a", "b", "c"], task="multi_label")
    output = module(batch)
    p = output.logits.sigmoid()
    naive = -(labels * p.log() + (1 - labels) * (1 - p).log()).mean()
    assert float(output.loss.detach()) == pytest.approx(float(naive.detach()), abs=1e-6)
    weighted = ClassificationModule(
        module.model, ["a", "b", "c"], loss=LossSettings((2.0, 1.0, 0.5)), task="multi_label"
    )
    heavy = torch.tensor([2.0, 1.0, 0.5])
    naive = -(heavy * labels * p.log() + (1 - labels) * (1 - p).log()).mean()
    assert float(weighted(batch).loss.detach()) == pytest.approx(float(naive.detach()), abs=1e-6)
    rows = labels.tolist()
    balanced = loss_settings(ModelConfig(class_weights="balanced"), ["a", "b", "c"], lambda: rows, "multi_label")
    assert balanced.class_weights == pytest.approx((2 / 2, 2 / 2, 1 / 3))


def test_the_loss_of_a_regression():
    labels = torch.tensor([0.5, -1.0, 3.0, 0.0])
    for size in (4, 1):
        batch = {key: value[:size] for key, value in batch_of(labels).items()}
        module = ClassificationModule(bert(1, "regression"), ["score"], task="regression")
        output = module(batch)
        naive = (
            sum((float(x) - float(y)) ** 2 for x, y in zip(output.logits[:, 0], batch["labels"], strict=True)) / size
        )
        assert float(output.loss) == pytest.approx(naive, rel=1e-5)
    with pytest.raises(InputError, match=r"class_weights=balanced: a regression has no classes"):
        loss_settings(ModelConfig(class_weights="balanced"), ["score"], list, "regression")


def test_metrics_of_several_labels_against_counting():
    torch.manual_seed(4)
    logits, labels = 3 * torch.randn(40, 3), (torch.rand(40, 3) < 0.4).float()
    for threshold in (0.5, 0.2):
        metrics = task_metrics("multi_label", 3, threshold)
        for part in torch.arange(40).split(7):
            metrics.update(*measured_pair("multi_label", logits[part], labels[part]))
        found = {name: float(value) for name, value in metrics.compute().items()}
        chosen = logits.sigmoid() >= threshold
        hits = (chosen & labels.bool()).sum(0).tolist()
        sizes = [int(a) + int(b) for a, b in zip(chosen.sum(0), labels.sum(0), strict=True)]
        each = [2 * hit / size for hit, size in zip(hits, sizes, strict=True)]
        assert found["f1"] == pytest.approx(sum(each) / 3, abs=1e-6)
        assert found["f1_micro"] == pytest.approx(2 * sum(hits) / sum(sizes), abs=1e-6)
        whole = [bool((a == b).all()) for a, b in zip(chosen, labels.bool(), strict=True)]
        assert found["accuracy"] == pytest.approx(sum(whole) / 40, abs=1e-6)
    one = task_metrics("multi_label", 1)
    one.update(*measured_pair("multi_label", torch.tensor([[2.0], [-1.0], [3.0]]), torch.tensor([[1.0], [0.0], [0.0]])))
    assert {name: round(float(value), 4) for name, value in one.compute().items()} == {
        **{"accuracy": 0.6667, "f1": 0.6667, "f1_micro": 0.6667}
    }


def test_metrics_of_a_regression_against_their_definitions():
    torch.manual_seed(5)
    labels = torch.randn(30)
    outputs = (0.5 * labels.exp() + 0.1 * torch.randn(30)).unsqueeze(1)
    metrics = task_metrics("regression", 1)
    for part in torch.arange(30).split(8):
        metrics.update(*measured_pair("regression", outputs[part], labels[part]))
    found = {name: float(value) for name, value in metrics.compute().items()}
    x, y = outputs[:, 0].tolist(), labels.tolist()

    def correlation(a, b):
        a, b = ([v - sum(c) / len(c) for v in c] for c in (a, b))
        return sum(p * q for p, q in zip(a, b, strict=True)) / math.sqrt(sum(p * p for p in a) * sum(q * q for q in b))

    ranks = [[sorted(c).index(v) for v in c] for c in (x, y)]
    assert found["pearson"] == pytest.approx(correlation(x, y), abs=1e-5)
    assert found["spearman"] == pytest.approx(correlation(*ranks), abs=1e-5)
    assert found["rmse"] == pytest.approx(
        math.sqrt(sum((p - q) ** 2 for p, q in zip(x, y, strict=True)) / 30), abs=1e-5
    )
    constant = task_metrics("regression", 1)
    constant.update(*measured_pair("regression", torch.ones(4, 1), torch.arange(4.0)))
    assert float(constant.compute()["pearson"]) == 0 == float(constant.compute()["spearman"])


# --- whole runs


@pytest.fixture(scope="module")
def several(tmp_path_factory):
    folder = tmp_path_factory.mktemp("several")
    words = {"joy": "glad", "fear": "afraid", "love": "dear"}
    rows = []
    for i in range(120):
        labels = [name for k, name in enumerate(words) if (i >> k) & 1]
        rows.append({"text": f"we saw the {' and '.join(words[n] for n in labels) or 'tree'} today", "labels": labels})
        rows[-1]["text"] += " here" * (i // 8)
    path = write_jsonl(folder / "sets.jsonl", rows)
    run = folder / "run"
    # Untrained outputs lie around 0.5: below it every label is predicted.
    assert (
        main(["run", *TINY, f"data.path={path}", "data.task=multi_label", "model.threshold=0.3", f"run.dir={run}"]) == 0
    )
    return run


@pytest.fixture(scope="module")
def number(tmp_path_factory):
    folder = tmp_path_factory.mktemp("number")
    rows = [
        {"text": f"a {'good ' * (i % 4)}{'bad ' * (i // 4 % 4)}film", "stars": i % 4 - i // 4 % 4} for i in range(96)
    ]
    path = write_jsonl(folder / "stars.jsonl", [row | {"text": f"{row['text']} {i}"} for i, row in enumerate(rows)])
    run = folder / "run"
    arguments = [f"data.path={path}", "data.task=regression", "data.columns.label=stars", f"run.dir={run}"]
    assert main(["run", *TINY, *arguments]) == 0
    return run


def test_a_run_with_several_labels(several):
    summary = json.loads((several / "summary.json").read_text())
    assert {"test/accuracy", "test/f1", "test/f1_micro", "val/f1_micro/best"} <= summary.keys()
    rows = list(load_explanations(several))
    keys = [(row["sample_id"], row["method"], row["target"]) for row in rows]
    assert len(set(keys)) == len(keys) and len({key[0] for key in keys}) == 6
    samples = {}
    for row in rows:
        samples.setdefault(row["sample_id"], []).append(row)
        assert row["label"] is None and row["value"] is None and 0 <= row["probability"] <= 1
        assert row["target"] in row["predictions"] or not row["predictions"]
        assert (row["probability"] >= 0.3) == (row["target"] in row["predictions"])
    assert any(len({row["target"] for row in own}) > 1 for own in samples.values())
    measured = list(read_rows(several / "metrics"))
    explained = {(row["sample_id"], row["target"]) for row in rows}
    assert {(row["sample_id"], row["target"]) for row in measured} == explained
    assert summary["explain/ca_lig/comprehensiveness"] == pytest.approx(
        mean_over_samples(measured, "comprehensiveness", "probability"), abs=1e-9
    )
    page = (several / "report.html").read_text()
    first = rows[0]
    assert f'"key":"{first["sample_id"]}-{first["target"]}"' in page and "micro F1" in page
    benchmark = (several / "benchmark.csv").read_text()
    assert "ca_lig,none,agreement" in benchmark and "steps_used" in benchmark


def mean_over_samples(rows, metric, space):
    values = {}
    for row in rows:
        if (row["method"], row["control"], row["metric"], row["space"], row["q"]) == (
            "ca_lig",
            "none",
            metric,
            space,
            None,
        ):
            values.setdefault(row["sample_id"], []).append(row["value"])
    return sum(sum(own) / len(own) for own in values.values()) / len(values)


def test_what_the_model_of_several_labels_says_of_a_text(several, capsys):
    found = explain(several, ["we saw the glad tree", "here"], steps=5)
    assert [one.sample_id for one in found] == sorted(one.sample_id for one in found) and len(found) > 2
    of_first = [one for one in found if one.sample_id == 0]
    order = [one.probability for one in of_first]
    assert order == sorted(order, reverse=True) and {one.target for one in of_first} == set(of_first[0].predictions)
    assert "predicted" in found[0].summary()
    one = explain(several, ["we saw the glad tree"], steps=5, target="love")
    assert len(one) == 1 and one[0].target_name == "love"
    capsys.readouterr()
    assert main(["explain", str(several), "--text", "we saw the glad tree", "--option", "steps=5"]) == 0
    assert "predicted" in capsys.readouterr().out
    # A continued run, and one that only explains, read the task and the threshold off the model.
    model = several / "model"
    config = json.loads((model / "config.json").read_text())
    assert config["problem_type"] == "multi_label_classification" and config["label_threshold"] == 0.3


def test_a_model_that_is_trained_tells_its_task(several, number, tmp_path):
    texts = write_jsonl(tmp_path / "new.jsonl", [{"text": "the glad tree"}, {"text": "a good film"}])
    for run, task in ((several, "multi_label"), (number, "regression")):
        out = tmp_path / task
        arguments = [item for item in TINY if not item.startswith("stages")]
        code = main(
            [
                *("run", *arguments, "stages=[explain,report]", f"data.path={texts}", f"run.dir={out}"),
                f"model.checkpoint={run / 'model'}",
            ]
        )
        assert code == 0
        rows = list(load_explanations(out))
        assert all((row["predictions"] is not None) == (task == "multi_label") for row in rows)
        assert all((row["value"] is not None) == (task == "regression") for row in rows)
        assert {row["sample_id"] for row in rows} == {0, 1}


def test_a_run_of_a_regression(number):
    summary = json.loads((number / "summary.json").read_text())
    assert {"test/pearson", "test/spearman", "test/rmse", "val/pearson/best"} <= summary.keys()
    assert "test/accuracy" not in summary
    rows = list(load_explanations(number))
    assert len(rows) == 18 and all(row["probability"] is None and row["target"] == 0 for row in rows)
    assert all(row["label_value"] in (-3, -2, -1, 0, 1, 2, 3) for row in rows)
    measured = list(read_rows(number / "metrics"))
    assert {row["space"] for row in measured if row["operator"]} == {"logit"} and all(
        row["target"] is None for row in measured
    )
    key = "explain/ca_lig/comprehensiveness@mask.logit"
    assert summary[key] == pytest.approx(mean_over_samples(measured, "comprehensiveness", "logit"), abs=1e-9)
    page = (number / "report.html").read_text()
    assert "Pearson r" in page and "RMSE" in page and f"stars {rows[0]['value']:.3f}" in page
    main = page[page.index('<table class="metrics">') :].split("</table>")[0]
    assert "comprehensiveness" in main and "sufficiency" in main, "no metric of a regression is one of probabilities"
    one = explain(number, ["a good film"], steps=5)[0]
    assert one.summary().startswith(f"stars {one.value:.3f} · ca_lig") and one.probability is None


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["data.columns.indicators=[a,b]"], r"data.columns.indicators: expected null with data.task=null"),
        (
            ["data.task=multi_label", "data.columns.indicators=[a]", "data.columns.label=b"],
            r"data.columns.label.*null beside",
        ),
        (["data.task=multi_label", "data.columns.indicators=[]"], r"data.columns.indicators: expected at least one"),
        (["data.task=multi_label", "data.columns.indicators=[a,a]"], r"another column than data.columns.indicators"),
        (
            ["data.task=multi_label", "model.label_smoothing=0.1"],
            r"model.label_smoothing: expected 0 with data.task=multi",
        ),
        (
            ["data.task=regression", "model.class_weights=balanced"],
            r"model.class_weights: expected null with data.task=reg",
        ),
        (["data.task=regression", "data.label_map={a: b}"], r"data.label_map: expected null with data.task=regression"),
        (["data.task=regresion"], r"data.task.*Did you mean 'regression'"),
        (["model.threshold=1"], r"model.threshold: expected float > 0 and < 1"),
        (
            ["data.name=controlled", "data.task=regression"],
            r"data.task: expected classification with",
        ),
    ],
)
def test_what_does_not_go_together(overrides, said):
    with pytest.raises(InputError, match=said):
        path = [] if "data.name=controlled" in overrides else ["data.path=x.csv"]
        compose(["model=tiny", "data=files", *path, *overrides], check=False)


def test_the_task_of_a_model():
    for task, outputs in (("classification", 3), ("multi_label", 3), ("multi_label", 1), ("regression", 1)):
        assert task_of(bert(outputs, task).config) == task
    assert task_of(BertConfig(num_labels=1)) == "regression" and task_of(BertConfig()) == "classification"


@pytest.mark.parametrize("kind", ["several", "number"])
def test_fusion_is_calibrated_on_every_head(kind, request, tmp_path):
    run = request.getfixturevalue(kind)
    path = run.parent / ("sets.jsonl" if kind == "several" else "stars.jsonl")
    column = [] if kind == "several" else ["data.columns.label=stars"]
    arguments = [item for item in TINY if not item.startswith(("stages", "explain.methods"))]
    splits = tmp_path / "splits"
    splits.mkdir()
    for split, part in (("val", slice(0, 10)), ("test", slice(10, 16))):
        write_jsonl(splits / f"{split}.jsonl", [json.loads(line) for line in path.read_text().split("\n")[part]])
    out = tmp_path / "run"
    code = main(
        [
            *("run", *arguments, *column, "stages=[calibrate,explain]", f"data.path={splits}", f"run.dir={out}"),
            *(f"model.checkpoint={run / 'model'}", "explain.options.ca_lig.lam=auto", "calibrate.grid=[0.2,0.8]"),
            "explain.methods=[ca_lig]",
        ]
    )
    assert code == 0
    found = json.loads((out / "calibration.json").read_text())
    assert found["chosen"]["lam"] in (0.2, 0.8) and found["num_samples"] == 10
    assert all(math.isfinite(point["score"]) for point in found["points"])


def test_the_probe_follows_each_label_of_a_sample(several):
    import pyarrow.parquet as pq

    rows = pq.read_table(next((several / "probe").glob("*.parquet"))).to_pylist()
    keys = [(row["sample_id"], row["target"]) for row in rows]
    assert len(set(keys)) == len(keys) and len({sample for sample, _ in keys}) == 3 < len(keys)
    first = Development()
    assert first.advance(rows, 0) is None
    second = Development.restore(json.loads(json.dumps(first.state())))
    assert second.advance(rows, 1) == pytest.approx(1.0), "the same explanations have not moved"
    others = [row for row in rows if row["target"] == rows[0]["target"]]
    assert second.advance(others, 2) == pytest.approx(1.0) and set(second.scores) == {
        (row["sample_id"], row["target"]) for row in others
    }
