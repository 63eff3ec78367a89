"""Rows on disk: whole or not at all, readable by who comes later."""

import pyarrow.parquet as pq
import pytest

from calig.pipeline import records
from calig.pipeline.errors import InputError
from calig.pipeline.loggers import join_metrics
from calig.pipeline.records import EXPLANATION_SCHEMA, METRIC_SCHEMA, read_rows, write_json, write_table

ROW = {"sample_id": 2**40, "tokens": ["ሰላም", "[SEP]"], "word_ids": [0, None], "scores": [0.5, 0.0], "method": "ca_lig"}


def test_round_trip_with_nulls_and_large_ids(tmp_path):
    write_table(tmp_path / "part-0.parquet", [ROW], EXPLANATION_SCHEMA, {"label_names": ["ja", "nein"]})
    (row,) = read_rows(tmp_path)
    assert {key: row[key] for key in ROW} == ROW
    assert row["layer_scores"] is None and row["rationale"] is None
    assert records.table_metadata(tmp_path / "part-0.parquet")["label_names"] == ["ja", "nein"]
    assert pq.read_schema(tmp_path / "part-0.parquet").equals(EXPLANATION_SCHEMA)


def test_a_crash_leaves_the_old_file_or_none(tmp_path, monkeypatch):
    path = tmp_path / "part-0.parquet"
    write_table(path, [ROW], EXPLANATION_SCHEMA)
    monkeypatch.setattr(records.os, "fsync", lambda _: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        write_table(path, [ROW, ROW], EXPLANATION_SCHEMA)
    assert len(list(read_rows(tmp_path))) == 1
    assert records.shards(tmp_path) == [path], "an unfinished file is no shard"


def test_a_newer_schema_is_refused_by_name(tmp_path, monkeypatch):
    monkeypatch.setattr(records, "SCHEMA_VERSION", 7)
    write_table(tmp_path / "part-0.parquet", [], METRIC_SCHEMA)
    monkeypatch.undo()
    with pytest.raises(InputError, match="schema version 7"):
        list(read_rows(tmp_path))


def test_a_nan_is_no_json(tmp_path):
    with pytest.raises(ValueError, match="JSON"):
        write_json(tmp_path / "summary.json", {"loss": float("nan")})
    assert not (tmp_path / "summary.json").exists()


def test_metrics_of_two_sessions_are_joined(tmp_path):
    (tmp_path / ".metrics-before.csv").write_text("step,train/loss\n1,0.5\n")
    (tmp_path / "metrics.csv").write_text("step,test/accuracy\n9,0.8\n")
    join_metrics(tmp_path)
    text = (tmp_path / "metrics.csv").read_text().split()
    assert text == ["step,test/accuracy,train/loss", "1,,0.5", "9,0.8,"]
    join_metrics(tmp_path)
    assert (tmp_path / "metrics.csv").read_text().split() == text
