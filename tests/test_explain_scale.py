"""The explain stage at scale: killed, continued on another number of processes, damaged, and in flat memory."""

import json
import random
import shutil

import pyarrow.parquet as pq
import pytest
import torch
from conftest import make_bert
from forked import run_worker
from safetensors.torch import load_file, save_file
from test_cli import TINY

from calig.pipeline import manifest
from calig.pipeline.cli import main
from calig.pipeline.costs import COSTS
from calig.pipeline.records import read_rows, read_samples, shards
from calig.pipeline.stages.explain import model_mark

SAMPLES = 41
METHODS = ("ca_lig", "random")
SETTINGS = [
    *(item for item in TINY if not item.startswith(("data.size.test", "explain."))),
    f"data.size.test={SAMPLES + 5}",
    f"explain.num_samples={SAMPLES}",
    f"explain.methods=[{','.join(METHODS)}]",
    "explain.batch_size=2",
    "explain.batches_per_shard=1",
    "logger.wandb.mode=disabled",
    "trainer.accelerator=cpu",
]


def explain_line(folder, devices, *more):
    strategy = "ddp_fork" if devices > 1 else "auto"
    start = f"run.resume={folder}" if folder.exists() else f"run.dir={folder}"
    return ["run", start, *more, f"trainer.devices={devices}", f"trainer.strategy={strategy}"]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The settings of a run that only explains, and what an uninterrupted one gives."""
    folder = tmp_path_factory.mktemp("scale")
    run_worker("command", "run", f"run.dir={folder / 'model'}", *SETTINGS, "stages=[fit]", "probe.enabled=false")
    settings = [*SETTINGS, "stages=[explain]", f"model.name={folder / 'model' / 'model'}"]
    run_worker("command", *explain_line(folder / "whole", 1, *settings))
    return settings, rows_of(folder / "whole"), summary_of(folder / "whole"), folder / "whole"


def copied(whole, tmp_path):
    """The uninterrupted run, as if it had been broken off just before its end."""
    folder = shutil.copytree(whole[-1], tmp_path / "run")
    (folder / ".stages.json").unlink()
    return folder


def summary_of(folder):
    return json.loads((folder / "summary.json").read_text())


def rows_of(folder):
    found = list(read_rows(folder / "explanations"))
    rows = {(row["sample_id"], row["method"]): row["scores"] for row in found}
    assert len(rows) == len(found), "a sample is there twice"
    return rows


def assert_same_results(folder, whole):
    _, expected, summary, _ = whole
    rows = rows_of(folder)
    assert rows.keys() == expected.keys() and len(rows) >= SAMPLES * len(METHODS)
    for key, scores in expected.items():
        assert all(abs(a - b) < 1e-5 for a, b in zip(scores, rows[key], strict=True)), key
    numbers = [tuple(v for k, v in row.items() if k != "value") for row in read_rows(folder / "metrics")]
    assert len(set(numbers)) == len(numbers), "a metric is there twice"
    found = summary_of(folder)
    for key, value in summary.items():
        if not any(cost in key for cost in COSTS):
            # A gap is one sample's rounding; which samples share a batch, and so its padding, is another matter now.
            assert abs(found[key] - value) < (1e-5 if "gap" in key else 1e-6), key
    assert not (folder / "failures.jsonl").exists() and not list(folder.rglob(".*.tmp"))


@pytest.mark.parametrize("kills", [3, pytest.param(20, marks=pytest.mark.slow)])
def test_killed_at_random_moments_and_continued_on_other_numbers_of_processes(kills, whole, tmp_path):
    settings, *_ = whole
    draw = random.Random(kills)
    folder = tmp_path / "run"
    killed = attempts = 0
    left = []  # shards that stood after each kill
    while killed < kills:
        attempts += 1
        line = explain_line(folder, 1 + attempts % 2, *settings)
        moment = (folder / "manifest", draw.randint(0, 12 // kills + 1), draw.uniform(0, 0.1))
        if run_worker("command", *line, kill=moment):
            # Done before its moment had come: another run, so that the number of kills is as promised.
            assert_same_results(folder, whole)
            folder = tmp_path / f"run{attempts}"
        else:
            killed += 1
            left.append(len(list((folder / "manifest").glob("part-*.json"))))
    assert any(0 < shards < SAMPLES / 2 for shards in left), "nothing was half done"
    run_worker("command", *explain_line(folder, 2 - attempts % 2, *settings))
    assert_same_results(folder, whole)


def test_more_processes_than_samples_left_and_none_left(whole, tmp_path):
    settings, *_ = whole
    folder = copied(whole, tmp_path)
    last = sorted((folder / "manifest").glob("*.json"))[-1]
    (folder / "explanations" / f"{last.stem}.parquet").unlink()  # the last shard holds one sample of 41
    for left in (1, 0):
        (folder / ".stages.json").unlink(missing_ok=True)
        run_worker("command", *explain_line(folder, 2, *settings))
        assert_same_results(folder, whole)
        log = " ".join((folder / "log.txt").read_text().split())
        assert f"{SAMPLES - left} samples are explained already" in log
    assert f"{last.stem}.parquet is gone; its samples are explained again" in log


@pytest.mark.parametrize("damage", ["truncated", "one byte", "manifest", "only metrics", "only explanations"])
def test_a_damaged_shard_is_named_and_explained_again(damage, whole, tmp_path):
    settings, *_ = whole
    folder = copied(whole, tmp_path)
    name = "part-00000-00003"
    file = folder / "explanations" / f"{name}.parquet"
    words = [f"{name}.parquet", "its samples are explained again"]
    if damage == "truncated":
        file.write_bytes(file.read_bytes()[:-100])
        words.append("bytes")
    elif damage == "one byte":
        content = bytearray(file.read_bytes())
        content[len(content) // 2] ^= 1
        file.write_bytes(content)
        words.append("checksum")
    elif damage == "manifest":
        path = folder / "manifest" / f"{name}.json"
        path.write_text(path.read_text()[:40])
        words[0] = f"{name}.json"
    else:  # killed between two files of a shard: nothing to say
        words = []
        (folder / "manifest" / f"{name}.json").unlink()
        other = "explanations" if damage == "only metrics" else "metrics"
        (folder / other / f"{name}.parquet").unlink()
    assert main(explain_line(folder, 1, *settings)) == 0
    log = " ".join((folder / "log.txt").read_text().split())
    assert all(word in log for word in words), log
    assert_same_results(folder, whole)


def test_going_on_with_other_settings_is_refused(whole, tmp_path, capsys):
    settings, *_ = whole
    folder = copied(whole, tmp_path)
    assert main(explain_line(folder, 1, *settings, "explain.target=1")) == 2
    # Lightning patches loaders while it asks for them, and an error in its hooks would leave them so.
    assert not hasattr(torch.utils.data.DataLoader.__init__, "__wrapped__")
    error = capsys.readouterr().err
    assert "explain.target=predicted" in error and "now it is 1" in error and str(folder / "manifest") in error
    assert len(manifest.take_up(folder).done) == SAMPLES


@pytest.mark.parametrize(
    ("changed", "said"),
    [(["seed=1"], "seed=0"), (["data.max_length=8"], "data=46 examples"), ([], "model=weights")],
)
def test_other_data_another_seed_or_another_model_are_refused(changed, said, whole, tmp_path, capsys):
    """The model lies in the same folder as before; its weights are others."""
    settings, *_ = whole
    folder = copied(whole, tmp_path)
    named = next(item for item in settings if item.startswith("model.name"))
    model = shutil.copytree(named.partition("=")[2], tmp_path / "model")
    if not changed:
        weights = load_file(model / "model.safetensors")
        weights["classifier.bias"] = weights["classifier.bias"] + 0.5
        save_file(weights, model / "model.safetensors", {"format": "pt"})
    settings = [item for item in settings if item != named and not item.startswith("seed")]
    code = main(explain_line(folder, 1, *settings, *changed, f"model.name={model}"))
    error = capsys.readouterr().err
    assert code == 2 and f"explained with {said}" in error, error
    assert len(manifest.take_up(folder).done) == SAMPLES


def test_a_model_and_data_that_were_moved_are_the_same(whole, tmp_path):
    settings, *_ = whole
    folder = copied(whole, tmp_path)
    named = next(item for item in settings if item.startswith("model.name"))
    model = shutil.copytree(named.partition("=")[2], tmp_path / "model")
    settings = [item for item in settings if item != named]
    assert main(explain_line(folder, 1, *settings, f"model.name={model}")) == 0


def test_the_mark_of_a_model_is_of_its_weights_and_not_of_their_precision():
    model = make_bert(layers=2).bfloat16()
    before = model_mark(model)
    assert model_mark(model.float()) == before
    with torch.no_grad():
        model.classifier.weight[0, 0] += 1
    assert model_mark(model) != before


def test_datasets_reads_the_result_directly(whole, tmp_path):
    from datasets import load_dataset

    _, expected, _, folder = whole
    files = str(folder / "explanations" / "*.parquet")
    rows = load_dataset("parquet", data_files=files, split="train", cache_dir=str(tmp_path / "cache"))
    assert {(row["sample_id"], row["method"]) for row in rows} == expected.keys()
    assert sum(pq.read_metadata(file).num_rows for file in shards(folder / "explanations")) == len(rows)


def test_methods_added_to_a_run_are_as_if_they_had_been_there_from_the_start(whole, tmp_path):
    """Also where a shard of the first session is lost then: its methods and its random control are made again."""
    settings, *_ = whole
    more = f"explain.methods=[{METHODS[0]},integrated_gradients,occlusion,{METHODS[1]}]"
    settings = [item for item in settings if not item.startswith("explain.methods")]
    limit = "explain.limits.occlusion=5"
    at_once, folder = tmp_path / "at_once", copied(whole, tmp_path)
    assert main(explain_line(at_once, 1, *settings, more, limit)) == 0
    line = explain_line(folder, 1, *settings, more, limit)
    assert main(line) == 0
    log = " ".join((folder / "log.txt").read_text().split())
    assert f"{SAMPLES} samples are explained already; integrated_gradients, occlusion for them too now" in log
    assert len({row["sample_id"] for row in read_rows(folder / "explanations") if row["method"] == "occlusion"}) == 5
    for _ in range(2):
        assert rows_of(folder).keys() == rows_of(at_once).keys()
        assert_same_results(folder, (None, rows_of(at_once), summary_of(at_once), None))
        lost = folder / "explanations" / "part-00000-00003.parquet"
        (folder / ".stages.json").unlink()
        lost.unlink(missing_ok=True)
        assert main(line) == 0
    samples = list(read_samples(folder / "explanations", ["sample_id", "method"]))
    assert len(samples) == SAMPLES and {len(rows) for rows in samples} == {3, 4}


def test_methods_that_stand_are_not_dropped_nor_changed(whole, tmp_path, capsys):
    settings, *_ = whole
    folder = copied(whole, tmp_path)
    without = [item for item in settings if not item.startswith("explain.methods")]
    for line in ([*without, "explain.methods=[ca_lig]"], [*settings, "explain.options.ca_lig.lam=0.9"]):
        assert main(explain_line(folder, 1, *line)) == 2
        assert "are explained with explain.methods=" in capsys.readouterr().err
