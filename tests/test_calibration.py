"""Adaptive fusion: a lambda for each block, the search against brute force, and what a run does with the choice."""

import copy
import itertools
import json
import threading
from types import SimpleNamespace

import pyarrow.parquet as pq
import pytest
import torch
from conftest import make_batch, make_bert
from test_cli import TINY

from calig.pipeline import explain
from calig.pipeline.attribution import attribute
from calig.pipeline.attribution.methods import create_method
from calig.pipeline.attribution.rollout import normalise
from calig.pipeline.calibrating import CalibrationSettings, Calibrator
from calig.pipeline.cli import main
from calig.pipeline.compose import compose, load, save
from calig.pipeline.errors import InputError
from calig.pipeline.metrics import PerturbationTokens, faithfulness_rows, plausibility_rows
from calig.pipeline.records import read_rows

# --- the engine: a lambda for each block


@pytest.mark.parametrize("fusion", ["column", "diagonal"])
def test_a_lam_for_each_block_equals_a_loop(bert, batch, fusion):
    lams = [0.9, 0.2, 0.5]
    found = attribute(bert, batch, fusion=fusion, lam=lams, target=1, return_flow=True)
    zero = attribute(bert, batch, fusion="column", lam=0, target=1, return_flow=True)  # its flow is N(G), transposed
    for row, length in enumerate((9, 6, 8)):
        total = torch.eye(9)
        for block, lam in enumerate(lams):
            own = normalise(found.parts["evidence"][row : row + 1, block])[0]
            factor = (1 - lam) * zero.flow[row, block].T
            for query, key in itertools.product(range(length), repeat=2):
                if fusion == "column":
                    factor[query, key] += lam * own[key] / length
                elif query == key:
                    factor[query, key] += lam * own[key]
            total = total + factor @ total
            assert torch.allclose(found.layer_scores[row, block], (total - torch.eye(9))[0], atol=1e-5)
    same = attribute(bert, batch, fusion=fusion, lam=(0.3, 0.3, 0.3), target=1)
    assert torch.equal(same.scores, attribute(bert, batch, fusion=fusion, lam=0.3, target=1).scores)
    assert json.loads(json.dumps(found.options))["lam"] == lams
    assert create_method("ca_lig", json.loads(json.dumps(same.options))).options.lam == [0.3, 0.3, 0.3]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"lam": [0.5, 0.5]}, "lam has 2 values and the model 3 blocks"),
        ({"lam": [0.5, 1.5, 0.5]}, r"in \[0, 1\], or one for each block, got \[0.5, 1.5, 0.5\]"),
        ({"lam": []}, "lam takes a number"),
        ({"lam": ["a", "b", "c"]}, "takes a number or a list of numbers, got"),
        ({"lam": "auto"}, "takes a number or a list of numbers, got 'auto'"),
        ({"lam": [0.5] * 3, "fusion": "late"}, "'late' fuses once, behind all blocks"),
        ({"lam": [0.5] * 3, "fusion": "gated"}, "'gated' has no lam"),
        ({"lam": [1.0] * 3, "fusion": "diagonal"}, "nothing reach the read-out row"),
    ],
)
def test_lams_that_do_not_fit(bert, batch, options, words):
    with pytest.raises(InputError, match=words):
        attribute(bert, batch, **options)


# --- the search

TOKENIZER = SimpleNamespace(
    pad_token_id=0, mask_token_id=3, cls_token_id=1, sep_token_id=2, all_special_ids=[0, 1, 2, 3]
)
GRID = (0.0, 0.2, 0.4, 0.7, 1.0)


def make_samples():
    """Two batches of six samples with words and rationales."""
    batches = []
    for number, lengths in enumerate([(12, 9, 11), (8, 10, 7)]):
        batch = make_batch(lengths, seed=number)
        place = torch.arange(max(lengths)).expand(3, -1)
        content = batch["attention_mask"].bool() & ~batch["special_tokens_mask"].bool()
        batch["sample_id"] = torch.arange(3) + 10 * number
        batch["word_ids"] = torch.where(content, place - 1, -1)
        batch["rationale"] = torch.where(content, (batch["input_ids"] % 3 == 0).long(), -1)
        batches.append(batch)
    return batches


def calibrator(model, batches, asked, **settings):
    options = settings.pop("options", {"steps": 8})
    made = Calibrator(model, TOKENIZER, CalibrationSettings(options, asked, grid=GRID, **settings))
    for batch in batches:
        made.add(batch)
    return made


def naive_score(model, batches, options, objective="comprehensiveness - sufficiency", operator="delete"):
    """The mean of the objective by the front door: `attribute`, then the metrics of the explain stage."""
    rows = []
    for batch in batches:
        result = attribute(model, batch, steps=8, tokenizer=TOKENIZER, **options)
        scores, ids = {"ca_lig": result.scores}, batch["sample_id"]
        if objective == "token_f1":
            words = [[None if word < 0 else word for word in row] for row in batch["word_ids"].tolist()]
            marks = [
                [mark for mark, word in zip(row, own, strict=True) if word is not None]
                for row, own in zip(batch["rationale"].tolist(), words, strict=True)
            ]
            rows += plausibility_rows(scores, word_ids=words, rationales=marks, sample_ids=ids)
            continue
        rows += faithfulness_rows(
            lambda inputs: model(**inputs).logits,
            {key: batch[key] for key in ("input_ids", "attention_mask")},
            scores,
            target=result.target,
            special=result.special,
            mask=result.mask,
            sample_ids=ids,
            tokens=PerturbationTokens.from_tokenizer(TOKENIZER),
            operators=[operator],
            spaces=["probability"],
        )
    total, count = 0.0, 0
    for row in rows:
        if (row["method"], row["control"], row["q"]) == ("ca_lig", "none", None) and row["value"] is not None:
            sign = {"comprehensiveness": 1, "sufficiency": -1, "token_f1": 1}.get(row["metric"], 0)
            if sign and row["metric"] in objective:
                total, count = total + sign * row["value"], count + (row["metric"] in objective.split(" - ")[0])
    return total / count


OBJECTIVES = ["comprehensiveness - sufficiency", "comprehensiveness", "sufficiency", "token_f1"]


@pytest.mark.parametrize(
    ("objective", "operator", "options"),
    [
        *((objective, "delete", {}) for objective in OBJECTIVES),
        ("comprehensiveness - sufficiency", "mask", {"fusion": "late"}),
        ("sufficiency", "attention", {"fusion": "diagonal"}),
    ],
)
def test_auto_is_the_best_of_the_grid_by_brute_force(objective, operator, options):
    model, batches = make_bert(), make_samples()
    found = calibrator(
        model, batches, {"lam": "auto"}, options={"steps": 8, **options}, objective=objective, operator=operator
    ).choose()
    grid = [lam for lam in GRID if not (options == {"fusion": "diagonal"} and lam == 1)]
    reference = {
        lam: naive_score(model, batches, {**options, "lam": lam}, objective=objective, operator=operator)
        for lam in grid
    }
    assert [point.candidate.lam for point in found.points] == grid
    for point in found.points:
        assert point.score == pytest.approx(reference[point.candidate.lam], abs=1e-6)
        assert point.gain == pytest.approx(reference[point.candidate.lam] - reference[0.7], abs=1e-6)
        assert point.low - 1e-9 <= point.gain <= point.high + 1e-9
    assert found.best.score == max(point.score for point in found.points)
    assert reference[found.best.candidate.lam] == pytest.approx(max(reference.values()), abs=1e-6)
    assert len(set(reference.values())) > 1, "a grid of equals would test nothing"
    assert (found.count, found.skipped, found.evaluated) == (6, 0, len(grid))


def test_per_layer_climbs_from_the_best_single_lam_and_says_what_it_reached():
    model, batches = make_bert(layers=2, seed=2), make_samples()
    single = calibrator(model, batches, {"lam": "auto"}).choose()
    found = calibrator(model, batches, {"lam": "per_layer"}).choose()
    lams = found.best.candidate.lam
    assert isinstance(lams, tuple) and len(lams) == 2
    assert found.best.score > single.best.score + 1e-6, "this model gains, else nothing is tested"
    assert found.best.score == pytest.approx(naive_score(model, batches, {"lam": list(lams)}), abs=1e-6)
    # Every change of one block alone is no better: the search ended at a summit of the grid.
    for block, value in itertools.product(range(2), GRID):
        other = [value if place == block else lam for place, lam in enumerate(lams)]
        assert naive_score(model, batches, {"lam": other}) <= found.best.score + 1e-5
    assert found.points[-1] is found.best and found.evaluated > len(GRID)


def test_fusion_is_chosen_with_or_without_lam():
    model, batches = make_bert(), make_samples()
    alone = calibrator(model, batches, {"fusion": "auto"}, options={"steps": 8, "lam": 0.2}).choose()
    forms = ["column", "diagonal", "gated", "late"]
    assert [point.candidate.fusion for point in alone.points] == forms
    reference = {
        form: naive_score(model, batches, {"fusion": form} | ({} if form == "gated" else {"lam": 0.2}))
        for form in forms
    }
    assert alone.best.score == pytest.approx(max(reference.values()), abs=1e-6)
    assert alone.best.candidate.fusion == max(reference, key=reference.get)
    both = calibrator(model, batches, {"fusion": "auto", "lam": "auto"}).choose()
    assert len(both.points) == 5 + 4 + 1 + 5  # diagonal has no lam = 1, gated has none at all
    assert both.best.score >= alone.best.score - 1e-6
    gated = next(point for point in both.points if point.candidate.fusion == "gated")
    assert gated.candidate.options() == {"fusion": "gated"}
    layered = calibrator(model, batches, {"fusion": "auto", "lam": "per_layer"}).choose()
    assert {point.candidate.fusion for point in layered.points} == {"column", "diagonal"}


def test_equal_rankings_run_once(monkeypatch):
    model, batches = make_bert(), make_samples()
    made = calibrator(model, batches, {"lam": "auto"})
    rows = []
    forward = made.model.logits_of_batch
    monkeypatch.setattr(
        made.model, "logits_of_batch", lambda batch: rows.append(len(batch["input_ids"])) or forward(batch)
    )
    made.choose()
    everything = 6 * len(GRID) * 10
    assert sum(rows) < everything / 2
    rows.clear()
    made.choose()
    assert not rows, "a ranking that is known is not run again"


def test_processes_choose_like_one():
    model, batches = make_bert(seed=3), make_samples()
    for asked in ({"lam": "per_layer"}, {"lam": "auto", "fusion": "auto"}):
        one = calibrator(model, batches, asked).choose()
        parts: dict[int, list] = {}
        gate = threading.Barrier(2)

        def gather(rank, rows, parts=parts, gate=gate):
            parts[rank] = list(rows)
            gate.wait(timeout=60)
            joined = parts[0] + parts[1]
            gate.wait(timeout=60)
            return joined

        # The batches the other way round: the order must not matter either.
        halves = [calibrator(copy.deepcopy(model), [batches[1 - rank]], asked) for rank in range(2)]
        results = {}

        def work(rank, halves=halves, results=results, gather=gather):
            results[rank] = halves[rank].choose(lambda rows: gather(rank, rows))

        threads = [threading.Thread(target=work, args=(rank,)) for rank in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(timeout=120)
        assert results[0] == results[1] == one


def test_samples_without_a_value_are_left_out():
    model, batches = make_bert(), make_samples()
    batches[0]["rationale"][1] = torch.where(batches[0]["rationale"][1] > 0, 0, batches[0]["rationale"][1])
    found = calibrator(model, batches, {"lam": "auto"}, objective="token_f1").choose()
    assert (found.count, found.skipped) == (5, 1)
    for batch in batches:
        batch["rationale"].fill_(-1)
    with pytest.raises(RuntimeError, match="token_f1 is defined for none of the 6 samples"):
        calibrator(model, batches, {"lam": "auto"}, objective="token_f1").choose()


# --- configuration

ASKED = "explain.options.ca_lig.lam=auto"
CONFIG_ERRORS = {
    "no stage": (
        [ASKED, "stages=[fit,explain]"],
        "explain.options.ca_lig.lam=auto is chosen by the stage calibrate",
        "Set stages=[fit, calibrate, explain], or give lam a value",
    ),
    "order": ([ASKED, "stages=[fit,explain,calibrate]"], "comes before explain"),
    "nothing asked": (["stages=[calibrate]"], "has nothing to choose", "explain.options.ca_lig.lam=auto"),
    "same split": ([ASKED, "explain.split=val"], "calibrate.split=val", "the split that is explained"),
    "same split by calibrate": ([ASKED, "calibrate.split=test"], "calibrate.split=test", "explained"),
    "same operator": ([ASKED, "explain.operator=delete"], "calibrate.operator=delete, the only one"),
    "same operators": ([ASKED, "explain.operator=[mask]", "calibrate.operator=mask"], "add one to explain.operator"),
    "gated": ([ASKED, "explain.options.ca_lig.fusion=gated"], "fusion=gated has no lam to choose"),
    "late": (
        ["explain.options.ca_lig.lam=per_layer", "explain.options.ca_lig.fusion=late"],
        "fusion=late fuses once",
        "lam=auto",
    ),
    "word": (["explain.options.ca_lig.lam=atuo"], "float | list[float] | auto | per_layer", "Did you mean 'auto'?"),
    "fusion word": (["explain.options.ca_lig.fusion=per_layer"], "column | diagonal | gated | late | carried | auto"),
    "grid": (["calibrate.grid=[0.5,1.5]"], "calibrate.grid: expected at least one value, each in [0, 1]"),
    "empty grid": (["calibrate.grid=[]"], "calibrate.grid: expected at least one value"),
    "diagonal grid": (
        [ASKED, "explain.options.ca_lig.fusion=diagonal", "calibrate.grid=[1]"],
        "calibrate.grid: expected a value below 1, which fusion=diagonal needs, got [1.0]",
    ),
    "grid twice": (["calibrate.grid=[0.5,0.5]"], "calibrate.grid: '0.5' is listed 2 times"),
    "objective": (["calibrate.objective=fidelity"], "calibrate.objective: expected comprehensiveness - sufficiency |"),
}


@pytest.mark.parametrize("case", CONFIG_ERRORS, ids=str)
def test_mistakes_end_with_2_and_the_way_out(case, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    arguments, *words = CONFIG_ERRORS[case]
    assert main(["run", *arguments]) == 2
    error = capsys.readouterr().err
    assert all(word in error for word in words), error
    assert "Traceback" not in error and len(error.strip().splitlines()) == 1
    assert not list(tmp_path.iterdir())


def test_the_words_survive_the_file(tmp_path):
    config = compose(["explain=calibrated", "explain.options.ca_lig.fusion=auto"], check=False)
    assert config.explain.options["ca_lig"] == {"lam": "auto", "fusion": "auto"}
    save(config, tmp_path)
    assert load(tmp_path, check=False).explain == config.explain
    numbers = compose(["explain.options.ca_lig.lam=[0.2,1,0.4,0.5]"], check=False)
    assert numbers.explain.options["ca_lig"]["lam"] == [0.2, 1.0, 0.4, 0.5]
    # Measured with more operators than the one that it is chosen with.
    compose([ASKED, "explain.operator=[mask,delete]"], check=False)


# --- a run

QUIET = ["logger.wandb.mode=disabled", "explain.methods=[ca_lig]"]
CALIBRATED = [*TINY, *QUIET, ASKED, "calibrate.grid=[0.2,0.9]", "calibrate.num_samples=9"]


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("calibrated") / "run"
    assert main(["run", f"run.dir={folder}", *CALIBRATED]) == 0
    return folder


def test_a_run_explains_with_what_it_chose(run_dir):
    stored = json.loads((run_dir / "calibration.json").read_text())
    lam = stored["chosen"]["lam"]
    assert lam in (0.2, 0.9) and stored["chosen"].keys() == {"lam"}
    assert (stored["num_samples"], stored["split"], stored["operator"]) == (9, "val", "delete")
    assert [point["lam"] for point in stored["points"]] == [0.2, 0.9, 0.7]
    best = max(stored["points"][:2], key=lambda point: point["score"])
    assert stored["score"] == pytest.approx(best["score"], abs=1e-6)
    summary = json.loads((run_dir / "summary.json").read_text())
    assert summary["calibrate/ca_lig/lam"] == lam and summary["calibrate/ca_lig/score"] == stored["score"]
    assert summary["calibrate/ca_lig/gain/low"] <= summary["calibrate/ca_lig/gain"]
    file = next((run_dir / "explanations").glob("*.parquet"))
    assert json.loads(pq.read_schema(file).metadata[b"methods"])["ca_lig"]["lam"] == lam
    log = (run_dir / "log.txt").read_text()
    assert "probe    ca_lig with its defaults for lam=auto" in log
    assert "9 samples of the val split" in log and "chosen" in log
    assert load(run_dir, check=False).explain.options["ca_lig"]["lam"] == "auto"


def test_rows_and_texts_use_the_calibrated_lam(run_dir, capsys):
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    lam = json.loads((run_dir / "calibration.json").read_text())["chosen"]["lam"]
    model = AutoModelForSequenceClassification.from_pretrained(run_dir / "model").eval()
    tokenizer = AutoTokenizer.from_pretrained(run_dir / "model")
    row = next(read_rows(run_dir / "explanations"))
    ids = torch.tensor([tokenizer.convert_tokens_to_ids(row["tokens"])])
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    chosen, other = (attribute(model, batch, tokenizer=tokenizer, steps="auto", lam=value) for value in (lam, 0.5))
    assert torch.allclose(chosen.scores[0], torch.tensor(row["scores"]), atol=1e-5)
    assert not torch.allclose(other.scores[0], torch.tensor(row["scores"]), atol=1e-5)
    (explanation,) = explain(run_dir, ["the plot was not bad"])
    (explicit,) = explain(run_dir, ["the plot was not bad"], lam=lam)
    assert explanation.scores == explicit.scores
    assert explain(run_dir, ["the plot was not bad"], lam=0.5)[0].scores != explanation.scores
    assert main(["explain", str(run_dir), "--text", "the plot was not bad"]) == 0
    assert "supports" in capsys.readouterr().out


def test_continuing_takes_the_choice_and_refuses_another_question(tmp_path, capsys):
    folder = tmp_path / "run"
    assert main(["run", f"run.dir={folder}", *CALIBRATED, "stages=[fit,calibrate]"]) == 0
    before = (folder / "calibration.json").read_text()
    with pytest.warns(UserWarning, match="has no calibration.json.*Explained with the defaults"):
        (folder / "calibration.json").rename(folder / "aside.json")
        explain(folder, ["the plot was not bad"], steps=4)
    (folder / "aside.json").rename(folder / "calibration.json")
    lam = json.loads(before)["chosen"]["lam"]
    (found,) = explain(folder, ["the plot was not bad"])  # chosen, and not explained with yet
    assert found.scores == explain(folder, ["the plot was not bad"], lam=lam)[0].scores
    for change, words in {
        "explain.options.ca_lig.lam=per_layer": "is not what",
        "explain.options.ca_lig.fusion=late": "was calibrated beside the options",
        "calibrate.split=train explain.split=val": "is the split that",
        "calibrate.operator=mask explain.operator=delete": "is what",
    }.items():
        capsys.readouterr()
        assert main(["run", f"run.resume={folder}", "stages=[explain]", *change.split()]) == 2
        assert words in capsys.readouterr().err
    assert main(["run", f"run.resume={folder}", "stages=[explain]"]) == 0
    assert (folder / "calibration.json").read_text() == before
    file = next((folder / "explanations").glob("*.parquet"))
    assert json.loads(pq.read_schema(file).metadata[b"methods"])["ca_lig"]["lam"] == lam
    capsys.readouterr()
    assert main(["run", f"run.resume={folder}", "stages=[fit,calibrate,explain]"]) == 0
    assert "is finished" in capsys.readouterr().out


def test_a_run_that_stopped_before_the_choice_makes_the_same(run_dir, tmp_path):
    folder = tmp_path / "run"
    assert main(["run", f"run.dir={folder}", *CALIBRATED, "stages=[fit]"]) == 0
    assert main(["run", f"run.resume={folder}", "stages=[calibrate,explain]"]) == 0
    assert (folder / "calibration.json").read_text() == (run_dir / "calibration.json").read_text()


def test_a_list_of_lams_is_counted_before_the_training(tmp_path, capsys):
    lams = ["explain.options.ca_lig.lam=[0.1,0.2,0.3]", f"run.dir={tmp_path / 'run'}"]
    assert main(["run", *TINY, *QUIET, *lams]) == 2
    assert "lam has 3 values and the model 2 blocks" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_calibration_without_rationales_or_labels_is_refused_before_the_training(tmp_path, capsys):
    (tmp_path / "rows.csv").write_text("text,label\n" + "".join(f"thing {i} is {i % 2},{i % 2}\n" for i in range(60)))
    settings = [item for item in CALIBRATED if not item.startswith("data.size")]
    own = ["data=files", f"data.path={tmp_path / 'rows.csv'}", f"run.dir={tmp_path / 'run'}"]
    assert main(["run", *settings, *own, "calibrate.objective=token_f1"]) == 2
    assert "calibrate.objective=token_f1 needs rationales" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
