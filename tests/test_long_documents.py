"""Long documents through the pipeline: trained, measured, calibrated, written and explained again as wholes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import make_bert
from test_documents import LENGTHS, PLACES, make_documents, one_window
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from calig.pipeline import explain, load_explanations
from calig.pipeline.attribution import attribute
from calig.pipeline.attribution.windows import windows_in
from calig.pipeline.calibrating import CalibrationSettings, Calibrator, Candidate
from calig.pipeline.cli import main
from calig.pipeline.explainer import Explainer, ExplainSettings
from calig.pipeline.metrics import PerturbationTokens, Request, faithfulness_rows, perturbed_logits
from calig.pipeline.module import ClassificationModule, LossSettings
from calig.pipeline.records import read_rows

TOKENS = PerturbationTokens(pad_id=0, mask_id=3, empty_id=1)


class Tokenizer:
    """What an explainer asks of one."""

    pad_token_id, mask_token_id, cls_token_id, sep_token_id = 0, 3, 1, 2
    all_special_ids = (0, 1, 2)

    def convert_ids_to_tokens(self, ids):
        return [f"t{number}" for number in ids]


def labelled(documents):
    return documents | {"labels": torch.tensor([0, 2, 1]), "sample_id": torch.tensor([7, 8, 9])}


def with_pooling(model, pooling):
    model.config.calig_windows = {"length": 10, "overlap": 4, "pooling": pooling, "limit": None}
    return model


def perturbed_by_hand(model, documents, row, keep, operator, pooling):
    """Each window is perturbed for itself, as short texts are; the logits are pooled."""
    logits = []
    for place in PLACES[row]:
        one = one_window(documents, row, place)
        stays = keep[list(place)] | (one["special_tokens_mask"][0] == 1)
        ids, mask = one["input_ids"], one["attention_mask"].clone()
        if operator == "delete":
            ids, mask = ids[:, stays], mask[:, stays]
        elif operator == "mask":
            ids = torch.where(stays, ids, 3)
        else:
            mask = mask * stays
        with torch.no_grad():
            logits.append(model(input_ids=ids, attention_mask=mask).logits[0])
    stacked = torch.stack(logits)
    return stacked.mean(0) if pooling == "mean" else stacked.amax(0)


@pytest.mark.parametrize("pooling", ["mean", "max"])
@pytest.mark.parametrize("operator", ["mask", "delete", "attention"])
def test_what_is_removed_goes_from_every_window_that_holds_it(bert, operator, pooling):
    documents = make_documents()
    generator = torch.Generator().manual_seed(1)
    keeps = torch.rand(12, 20, generator=generator) < 0.6
    keeps[0], keeps[1] = True, False
    requests = [Request(i % 3, keep, operator) for i, keep in enumerate(keeps)]
    found = perturbed_logits(
        lambda batch: bert(**batch).logits,
        {key: documents[key] for key in ("input_ids", "attention_mask")},
        requests,
        tokens=TOKENS,
        special=documents["special_tokens_mask"].bool(),
        mask=documents["attention_mask"].bool(),
        windows=windows_in(documents, documents["input_ids"], None, pooling),
    )
    for request, logits in zip(requests, found, strict=True):
        expected = perturbed_by_hand(bert, documents, request.example, request.keep, operator, pooling)
        torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("pooling", ["mean", "max"])
@pytest.mark.parametrize("loss", [None, LossSettings((1.0, 2.0, 0.5), 0.1)])
def test_the_module_trains_on_the_pooled_logits(pooling, loss):
    model = with_pooling(make_bert(), pooling)
    documents = labelled(make_documents())
    module = ClassificationModule(model, ["a", "b", "c"], loss=loss).eval()
    output = module(documents)
    rows = []
    for row, of in enumerate(PLACES):
        own = torch.cat([
            model(input_ids=one["input_ids"], attention_mask=one["attention_mask"]).logits
            for place in of for one in [one_window(documents, row, place)]
        ])  # fmt: skip
        rows.append(own.mean(0) if pooling == "mean" else own.amax(0))
    torch.testing.assert_close(output.logits, torch.stack(rows), atol=1e-5, rtol=1e-4)
    given = {} if loss is None else {"weight": torch.tensor(loss.class_weights), "label_smoothing": 0.1}
    expected = torch.nn.functional.cross_entropy(torch.stack(rows), documents["labels"], **given)
    torch.testing.assert_close(output.loss, expected, atol=1e-5, rtol=1e-4)
    found = torch.autograd.grad(output.loss, model.classifier.weight)[0]
    torch.testing.assert_close(found, torch.autograd.grad(expected, model.classifier.weight)[0], atol=1e-5, rtol=1e-3)
    assert "loss" not in module({key: value for key, value in documents.items() if key != "labels"})


def test_a_document_of_one_window_trains_as_a_short_text():
    plain = {key: value[1:2, :9] for key, value in make_documents().items() if key != "windows"}
    plain["labels"] = torch.tensor([2])
    module = ClassificationModule(make_bert(), ["a", "b", "c"]).eval()
    windowed = module(plain | {"windows": torch.arange(9)[None, None]})
    torch.testing.assert_close(windowed.loss, module(plain).loss, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(windowed.logits, module(plain).logits, atol=1e-6, rtol=1e-5)


METHODS = {"ca_lig": {"steps": 9}, "integrated_gradients": {"steps": 9}, "attention_rollout": {}, "random": {}}


def explained(documents, pooling="mean", **settings):
    chosen = ExplainSettings(METHODS, operators=("mask", "delete"), costs=True, **settings)
    return Explainer(with_pooling(make_bert(), pooling), Tokenizer(), chosen).explain(documents)


@pytest.mark.parametrize("pooling", ["mean", "max"])
def test_a_document_has_one_row_and_the_metrics_of_the_whole(pooling):
    documents = labelled(make_documents())
    documents["word_ids"] = torch.where(documents["special_tokens_mask"] == 1, -1, torch.arange(20) - 1)
    # People marked words that only the last window of the first document holds.
    documents["rationale"] = torch.where(documents["special_tokens_mask"] == 1, -1, 0)
    documents["rationale"][0, 16:19] = 1
    documents["rationale_missed"] = torch.zeros(3, dtype=torch.long)
    documents["char_start"] = torch.where(documents["special_tokens_mask"] == 1, -1, 2 * torch.arange(20))
    documents["char_end"] = torch.where(documents["special_tokens_mask"] == 1, -1, 2 * torch.arange(20) + 1)
    rows = explained(documents, pooling)
    assert not rows.failures
    model = with_pooling(make_bert(), pooling)
    for index, sample in enumerate((7, 8, 9)):
        (row,) = [row for row in rows.explanations if row["sample_id"] == sample and row["method"] == "ca_lig"]
        length = LENGTHS[index]
        result = attribute(model, documents, steps=9)
        assert row["scores"] == pytest.approx(result.scores[index, :length].tolist(), abs=1e-6)
        assert len(row["tokens"]) == len(row["word_ids"]) == len(row["rationale"]) == length
        assert row["window"] == len(PLACES[index])
        assert row["char_start"] == [None, *range(2, 2 * length - 2, 2), None]
        whole = perturbed_by_hand(model, documents, index, torch.ones(20, dtype=torch.bool), "mask", pooling)
        assert row["prediction"] == int(whole.argmax())
        assert row["probability"] == pytest.approx(float(whole.softmax(0).max()), abs=1e-5)
        # Comprehensiveness at one half, from the document's own ranking.
        for operator in ("mask", "delete"):
            (value,) = [
                found["value"] for found in rows.metrics
                if (found["sample_id"], found["method"], found["control"], found["metric"], found["q"]) ==
                (sample, "ca_lig", "none", "comprehensiveness", 0.5)
                and found["operator"] == operator and found["space"] == "probability"
            ]  # fmt: skip
            content = torch.arange(1, length - 1)
            top = content[result.scores[index, content].argsort(descending=True, stable=True)[: -(-(length - 2) // 2)]]
            keep = torch.ones(20, dtype=torch.bool)
            keep[top] = False
            without = perturbed_by_hand(model, documents, index, keep, operator, pooling)
            drop = whole.softmax(0) - without.softmax(0)
            assert value == pytest.approx(float(drop[row["target"]]), abs=1e-5)
    found = {(row["method"], row["metric"]) for row in rows.metrics if row["sample_id"] == 7}
    assert ("ca_lig", "token_f1") in found and ("integrated_gradients", "auprc") in found
    # A first window alone has none of the marked words, so nothing would be to find.
    scores = next(row["scores"] for row in rows.explanations if row["sample_id"] == 7 and row["method"] == "ca_lig")
    words = sorted(range(18), key=lambda word: -scores[word + 1])[:3]
    value = next(
        row["value"] for row in rows.metrics
        if (row["sample_id"], row["method"], row["metric"], row["control"]) == (7, "ca_lig", "token_f1", "none")
        and row["q"] is None
    )  # fmt: skip
    assert value == pytest.approx(len({15, 16, 17} & set(words)) / 3)


def test_rows_do_not_depend_on_the_batch():
    documents = labelled(make_documents())
    metrics = ("comprehensiveness", "sufficiency", "infidelity", "sensitivity_max", "randomisation")
    whole = explained(documents, metrics=metrics)
    costs = ("seconds", "passes", "peak_memory")

    def numbers(rows):
        names = ("sample_id", "method", "control", "metric", "operator", "space", "q")
        return {tuple(row[name] for name in names): row["value"] for row in rows if row["metric"] not in costs}

    apart = {}
    for row in range(3):
        rows = explained({key: value[row : row + 1] for key, value in documents.items()}, metrics=metrics)
        assert not rows.failures
        apart |= numbers(rows.metrics)
    together = numbers(whole.metrics)
    assert together.keys() == apart.keys() and {key[3] for key in together} >= set(metrics)
    for key, value in together.items():
        assert value == pytest.approx(apart[key], abs=1e-4), key
    passes = [row["value"] for row in whole.metrics if (row["metric"], row["method"]) == ("passes", "ca_lig")]
    assert all(9 < value < 30 for value in passes)


@pytest.mark.parametrize("pooling", ["mean", "max"])
def test_calibration_measures_what_attribute_would_give(pooling):
    model = with_pooling(make_bert(), pooling)
    documents = labelled(make_documents())
    settings = CalibrationSettings({"steps": 9}, {"lam": "auto"}, operator="mask", grid=(0.0, 0.3, 1.0))
    calibrator = Calibrator(model, Tokenizer(), settings)
    calibrator.add(documents)
    for lam in (0.0, 0.3, 1.0):
        result = attribute(model, documents, steps=9, lam=lam)
        scores = calibrator._chunks[0].scores(Candidate("column", lam))
        torch.testing.assert_close(scores.float(), result.scores, atol=1e-5, rtol=1e-4)
    found = calibrator.choose()
    result = attribute(model, documents, steps=9, lam=found.best.candidate.lam)
    rows = faithfulness_rows(
        lambda batch: model(**batch).logits,
        {key: documents[key] for key in ("input_ids", "attention_mask")},
        {"ca_lig": result.scores},
        target=result.target, special=result.special, mask=result.mask, sample_ids=[7, 8, 9], tokens=TOKENS,
        windows=windows_in(documents, documents["input_ids"], model.config),
    )  # fmt: skip
    values = {
        (row["sample_id"], row["metric"]): row["value"] for row in rows
        if row["control"] == "none" and row["q"] is None and row["space"] == "probability"
    }  # fmt: skip
    mean = sum(values[i, "comprehensiveness"] - values[i, "sufficiency"] for i in (7, 8, 9)) / 3
    assert found.best.score == pytest.approx(mean, abs=1e-5)


# --- a whole run

SETTINGS = [
    "data=files", "data.max_length=14", "data.windows.overlap=4", "data.windows.limit=3", "data.batch_size=4",
    "data.columns.rationale=rationale", "model=tiny", "model.scratch.layers=2", "model.scratch.width=16",
    "model.scratch.heads=2", "model.scratch.intermediate=32", "model.scratch.vocab_size=120", "trainer.max_epochs=1",
    "trainer.enable_progress_bar=false", "probe.num_samples=4", "probe.steps=8", "explain.num_samples=8",
    "explain.batch_size=3", "explain.methods=[ca_lig,attention_rollout,random]", "logger.wandb.mode=disabled",
]  # fmt: skip


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    """A tiny run on texts of up to four windows, whose class is told by one word anywhere."""
    folder = tmp_path_factory.mktemp("runs")
    rows = []
    for i in range(96):
        words = [f"word{chr(97 + (7 * i + 3 * k) % 26)}" for k in range(6 + i % 31)]
        words[(5 * i) % len(words)] = ("good", "bad")[i % 2]
        marks = [int(word in ("good", "bad")) for word in words]
        rows.append({"text": words, "label": ("pos", "neg")[i % 2], "rationale": marks})
    (folder / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    before = dict(os.environ)
    code = main(["run", f"run.dir={folder / 'run'}", f"data.path={folder / 'train.jsonl'}", *SETTINGS])
    os.environ.clear()
    os.environ.update(before)
    assert code == 0
    return folder / "run"


@pytest.mark.slow
def test_two_processes_train_and_explain_documents_like_one(run_dir, tmp_path):
    rows, summaries = {}, {}
    for name in ("ddp_cpu", "cpu"):
        # The weights of both runs must agree, so neither moves.
        line = [
            str(Path(sys.executable).with_name("calig")), "run", f"run.dir={tmp_path / name}", *SETTINGS,
            f"data.path={run_dir.parent / 'train.jsonl'}", f"trainer={name}", "model.lr=1e-12",
        ]  # fmt: skip
        done = subprocess.run(
            line, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=300
        )
        assert done.returncode == 0, done.stderr[-3000:]
        found = list(read_rows(tmp_path / name / "explanations"))
        assert len({(row["sample_id"], row["method"]) for row in found}) == len(found) == 24
        rows[name] = {(row["sample_id"], row["method"]): row["scores"] for row in found}
        summaries[name] = json.loads((tmp_path / name / "summary.json").read_text())
    for key, scores in rows["cpu"].items():
        assert scores == pytest.approx(rows["ddp_cpu"][key], abs=1e-5), key
    for key in ("test/accuracy", "test/loss", "explain/ca_lig/comprehensiveness", "explain/random/token_f1"):
        assert summaries["cpu"][key] == pytest.approx(summaries["ddp_cpu"][key], abs=1e-5), key


def test_a_run_explains_whole_documents(run_dir):
    rows = [row for row in read_rows(run_dir / "explanations") if row["method"] == "ca_lig"]
    assert len(rows) == 8 and max(row["window"] for row in rows) == 3
    longest = max(rows, key=lambda row: len(row["tokens"]))
    assert len(longest["tokens"]) > 14 and len(longest["scores"]) == len(longest["rationale"])
    summary = json.loads((run_dir / "summary.json").read_text())
    assert summary["explain/ca_lig/failed"] == 0 and summary["explain/ca_lig/completeness_gap_max"] < 0.05
    assert "explain/ca_lig/token_f1" in summary and "val/explain/ca_lig/comprehensiveness" in summary
    assert "truncated at 3 windows of 14 tokens" in (run_dir / "log.txt").read_text()
    assert json.loads((run_dir / "model" / "config.json").read_text())["calig_windows"] == {
        "length": 14, "overlap": 4, "pooling": "mean", "limit": 3,
    }  # fmt: skip
    assert len(load_explanations(run_dir)) == 24
    assert (run_dir / "report.html").stat().st_size > 10_000


def test_texts_are_explained_with_the_windows_of_the_run(run_dir, tmp_path, capsys):
    text = " ".join(f"word{chr(97 + k % 26)}" for k in range(20)) + " good"
    (one,) = explain(run_dir, [text], steps=9)
    assert one.tokens[-2:] == ("good", "[SEP]") and len(one.tokens) == 23
    model = AutoModelForSequenceClassification.from_pretrained(run_dir / "model").eval()
    tokenizer = AutoTokenizer.from_pretrained(run_dir / "model")
    batch = dict(tokenizer(text, return_tensors="pt"))
    batch["windows"] = torch.tensor([[[0, *range(1, 13), 22], [0, *range(9, 21), 22], [0, *range(10, 22), 22]]])
    expected = attribute(model, batch, tokenizer=tokenizer, steps=9)
    torch.testing.assert_close(torch.tensor(one.scores), expected.scores[0], atol=1e-5, rtol=1e-4)
    (again,) = explain(run_dir / "model", [text], steps=9)
    assert again.scores == pytest.approx(one.scores, abs=1e-6)
    with pytest.warns(
        UserWarning, match=r"1 text was cut to the 3 windows of 14 tokens of this model: text 0 lost 30 of"
    ):
        explain(run_dir, [" ".join(["good"] * 58)], method="attention_rollout")
    (tmp_path / "texts.txt").write_text(f"{text}\ngood\n")
    assert main(["explain", str(run_dir), "--file", str(tmp_path / "texts.txt"), "--out", str(tmp_path / "out")]) == 0
    rows = sorted(read_rows(tmp_path / "out" / "explanations"), key=lambda row: row["sample_id"])
    assert [row["window"] for row in rows] == [3, 1]
    assert [text[a:b] for a, b in zip(rows[0]["char_start"][1:4], rows[0]["char_end"][1:4], strict=True)] == [
        "worda", "wordb", "wordc",
    ]  # fmt: skip
    capsys.readouterr()


def test_a_run_that_reads_a_trained_model_otherwise_says_so(run_dir, tmp_path, capsys):
    arguments = [
        "run", "stages=[test]", f"run.dir={tmp_path / 'again'}", f"model.checkpoint={run_dir / 'model'}", "data=files",
        f"data.path={run_dir.parent / 'train.jsonl'}", "data.max_length=14", "logger.wandb.mode=disabled",
        "trainer.enable_progress_bar=false",
    ]  # fmt: skip
    assert main(arguments) == 0
    assert "this run reads truncated texts" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["data.windows.overlap=128"], "data.windows.overlap: expected less than data.max_length=128"),
        (["data.windows.overlap=126"], "data.windows.overlap=126 leaves no step from one window to the next"),
        (
            ["data.windows.pooling=max"],
            "data.windows.overlap: expected a number of tokens with data.windows.pooling=max",
        ),
        (["data.windows.overlap=8", "data.windows.pooling=median"], "data.windows.pooling: expected mean | max"),
        (["data.windows.overlap=8", "explain.flows=2"], "explain.flows: expected 0 with data.windows.overlap=8"),
        (["experiment=concepts", "data.windows.overlap=8"], "the stage concepts looks at one window"),
    ],
)
def test_mistakes_are_found_before_anything_slow(arguments, message, tmp_path, capsys):
    assert main(["run", f"run.dir={tmp_path / 'run'}", *arguments]) == 2
    assert message in " ".join(capsys.readouterr().err.split())
