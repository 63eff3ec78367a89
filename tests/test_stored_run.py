"""A run directory that version 0.1.0 wrote is read by this version (made by `stored_run/make_stored_run.py`)."""

import json
import shutil
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from calig.pipeline import load_explanations
from calig.pipeline.cli import main
from calig.pipeline.compose import load
from calig.pipeline.errors import InputError
from calig.pipeline.explainer import scalar_key
from calig.pipeline.loading import learning_curves, rationale_by_word
from calig.pipeline.metrics import summarise
from calig.pipeline.records import EXPLANATION_SCHEMA, METRIC_SCHEMA, SCHEMA_VERSION, read_rows

STORED = sorted((Path(__file__).parent / "stored_run").glob("run-*"))


@pytest.fixture(params=STORED, ids=lambda path: path.name)
def run(request, tmp_path):
    """A copy: the stored one is never written into."""
    return Path(shutil.copytree(request.param, tmp_path / "run"))


def test_there_is_one_and_it_is_small_and_of_no_particular_machine():
    assert STORED
    for folder in STORED:
        files = [path for path in folder.rglob("*") if path.is_file()]
        assert sum(path.stat().st_size for path in files) < 200_000
        assert not {"checkpoints", "model", "wandb"} & {path.name for path in folder.iterdir()}
        for path in files:
            content = path.read_bytes()
            assert b"/tmp/" not in content and b"/home/" not in content and b"/root/" not in content, path


def test_its_explanations_load(run):
    table = load_explanations(run)
    versions = json.loads((run / "versions.json").read_text())
    assert versions["calig"]
    config = load(run, check=False)
    assert len(table) == config.explain.num_samples * len(config.explain.methods)
    assert set(table["method"]) == set(config.explain.methods)
    for row in table:
        size = len(row["tokens"])
        assert row["tokens"][0] == "[CLS]" and row["word_ids"][0] is None
        assert len(row["scores"]) == len(row["word_ids"]) == len(row["rationale"]) == size
        assert all(len(layer) == size for layer in row["layer_scores"] or [])
        assert row["target"] == row["prediction"] and 0 <= row["probability"] <= 1
        assert sum(rationale_by_word(row)) >= 1
    layered = {row["method"] for row in table if row["layer_scores"] is not None}
    assert layered == {"ca_lig", "generic_attention"}


@pytest.mark.parametrize(
    ("pattern", "schema"),
    [
        ("explanations/part-*.parquet", EXPLANATION_SCHEMA),
        ("probe/epoch-*.parquet", EXPLANATION_SCHEMA),
        ("metrics/part-*.parquet", METRIC_SCHEMA),
    ],
)
def test_every_column_it_has_still_exists_with_its_type(run, pattern, schema):
    files = list(run.glob(pattern))
    assert files
    for file in files:
        stored = pq.read_schema(file)
        now = {field.name: field.type for field in schema}
        assert {field.name: field.type for field in stored}.items() <= now.items()
        assert json.loads(stored.metadata[b"schema_version"]) <= SCHEMA_VERSION


def test_its_summary_follows_from_its_rows(run):
    """What a number of an old run means has not changed: the same rows give the same scalars."""
    summary = json.loads((run / "summary.json").read_text())
    summaries = summarise(read_rows(run / "metrics"), seed=load(run, check=False).seed)
    seen = 0
    for (method, control, metric), found in summaries.items():
        key = scalar_key("explain", method, control, metric)
        if found.mean is not None:
            assert summary[key] == pytest.approx(found.mean, abs=1e-9), key
            seen += 1
    assert seen > 20
    curves = learning_curves(run)
    assert curves["val/accuracy"][-1][1] == pytest.approx(summary["val/accuracy"])


def test_its_report_is_rendered(run, capsys):
    assert main(["report", str(run)]) == 0
    page = (run / "report.html").read_text()
    assert str(run / "report.html") in capsys.readouterr().out
    first = next(iter(read_rows(run / "explanations")))
    for text in ("ca_lig", "generic_attention", *(token for token in first["tokens"] if token.isalpha())):
        assert text in page


def test_a_run_of_a_later_version_is_refused_by_name(run):
    file = next(run.glob("explanations/*.parquet"))
    table = pq.read_table(file)
    later = {**table.schema.metadata, b"schema_version": str(SCHEMA_VERSION + 1).encode()}
    pq.write_table(pa.Table.from_batches(table.to_batches()).replace_schema_metadata(later), file)
    with pytest.raises(InputError, match=f"schema version {SCHEMA_VERSION + 1}.*reads up to {SCHEMA_VERSION}"):
        load_explanations(run)
