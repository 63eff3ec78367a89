"""What is wrong with data, from the configuration to one message that names the thing and the way out."""

import json
import shlex
from pathlib import Path

import pytest
from test_data_sources import columns, settings, write_jsonl

from calig.datamodules.examples import TextExample
from calig.datamodules.sources import load_corpus
from calig.datamodules.splits import cut_missing
from calig.datamodules.text import TextDataModule
from calig.pipeline.compose import compose
from calig.pipeline.errors import InputError

GOOD = "text,label\n" + "".join(f"text {i},{'ab'[i % 2]}\n" for i in range(20))


def rationale(text, marks):
    """A training file whose second row holds the rationale."""
    rows = [{"text": text, "label": 0}, {"text": text, "label": 1, "rationale": marks}]
    return "\n".join(map(json.dumps, rows))


BAD = {
    "missing file": ({}, "train.csvv", ["unknown file", "train.csvv", "Options: train.csv"]),
    "empty file": ({"test.csv": ""}, "", ["test.csv is empty"]),
    "empty split": ({"test.csv": "text,label\n"}, "", ["test.csv holds no rows: the test split is empty. Fill it"]),
    "empty json": ({"test.json": "[]"}, "", ["test.json holds no rows: the test split is empty"]),
    "label column absent": (
        {"test.csv": "text,stars\nx,1\n"},
        "",
        ["test.csv has no label column", "columns: text, stars"],
    ),
    "label test only": ({"test.csv": "text,label\nx,a\ny,c\n"}, "", ["unknown label 'c'", "row 2", "test.csv", "a, b"]),
    "one class": (
        {"train.csv": "text,label\nx,a\ny,a\n"},
        "",
        ["two classes", "only a", "train.csv", "data.columns.label"],
    ),
    "empty text": (
        {"train.csv": GOOD + " ,a\n"},
        "",
        ["row 21 of", "train.csv", "text", "is missing or empty", "drop the row"],
    ),
    "missing label": ({"train.csv": GOOD + "x,\n"}, "", ["row 21 of", "label", "is missing", "drop the row"]),
    "not utf-8": (
        {"train.csv": GOOD.encode() + b"caf\xe9,a\n"},
        "",
        ["byte 0xe9 in line 22", "Save the file as UTF-8"],
    ),
    "ragged": ({"train.csv": GOOD + "a,b,c\n"}, "", ["ragged: row 21 has 3 columns, expected 2", "data.quoted"]),
    "column twice": ({"train.csv": "text,label,text\nx,a,y\n"}, "", ["more than one column 'text'", "Rename one"]),
    "rationale length": (
        {"train.jsonl": rationale(["a", "b"], [1]), "train.csv": None},
        "",
        ["row 2 of", "train.jsonl", "1 entries, the text 2 words", "one entry per token"],
    ),
    "spans overlap": (
        {"train.jsonl": rationale("abcdef", [[0, 3], [2, 4]]), "train.csv": None},
        "",
        ["row 2 of", "[0, 3) and [2, 4) overlap", "Merge them"],
    ),
    "span out of range": (
        {"train.jsonl": rationale("abcdef", [[0, 7]]), "train.csv": None},
        "",
        ["row 2 of", "[0, 7) is out of range", "the text has 6 characters"],
    ),
}


@pytest.mark.parametrize(("files", "name", "parts"), BAD.values(), ids=BAD)
def test_bad_input(tmp_path, files, name, parts):
    for file, content in ({"train.csv": GOOD} | files).items():
        if content is not None:
            (tmp_path / file).write_bytes(content if isinstance(content, bytes) else content.encode())
    data = TextDataModule(settings(path=str(tmp_path / name)))
    with pytest.raises(InputError) as caught:
        data.setup()
    message = str(caught.value)
    assert all(part in message for part in parts), message
    assert "\n" not in message


def test_the_examples_of_the_documentation_compose():
    text = (Path(__file__).parents[1] / "docs" / "data.md").read_text(encoding="utf-8").replace("\\\n", " ")
    commands = [shlex.split(line)[2:] for line in text.splitlines() if line.startswith("    calig run")]
    assert len(commands) == 10
    for command in commands:
        compose(command, check=False)


def test_text_longer_than_the_model(tmp_path):
    (tmp_path / "x.csv").write_text(GOOD)
    data = TextDataModule(settings(path=str(tmp_path / "x.csv"), max_length=32), vocab_size=100, max_positions=16)
    with pytest.raises(InputError, match=r"data.max_length=32 is more than the 16 tokens.*Set data.max_length=16"):
        data.setup()


def test_a_mapped_or_declared_class_that_train_never_had(tmp_path):
    write_jsonl(tmp_path / "train.jsonl", [{"text": f"t {i}", "label": "ab"[i % 2]} for i in range(10)])
    write_jsonl(tmp_path / "test.jsonl", [{"text": "y", "label": "c"}])
    names = {"a": "A", "b": "B", "c": "C"}
    with pytest.raises(InputError, match=r"unknown label 'C'.*Options: A, B. It stands in row 1 of .*test.jsonl"):
        load_corpus(settings(path=str(tmp_path), label_map=names), seed=0)
    with pytest.raises(InputError, match=r"two classes; the labels hold only X"):
        load_corpus(settings(path=str(tmp_path / "train.jsonl"), label_map={"a": "X", "b": "X", "c": "Y"}), seed=0)


def test_a_class_that_the_cut_or_the_limit_took_out_is_said(tmp_path):
    path = write_jsonl(tmp_path / "x.jsonl", [{"text": f"t {i}", "label": "ab"[i == 0]} for i in range(30)])
    corpus = load_corpus(settings(path=path, limit_train=1), seed=0)
    assert corpus.notes == ["no training text of b"] or corpus.notes == ["no training text of a"]


def test_hub_errors_name_the_configurations(monkeypatch):
    import datasets

    def fail(*arguments, revision):
        raise ValueError(
            "Config name is missing.\nPlease pick one among the available configs: ['cola', 'sst2']\nLike:"
        )

    monkeypatch.setattr(datasets, "load_dataset", fail)
    with pytest.raises(InputError, match=r"data.name='glue' could not be.*missing. Please.*'sst2'\] A .*data.config"):
        load_corpus(settings(name="glue"), seed=0)
    loaded = datasets.DatasetDict(extra=datasets.Dataset.from_dict({"text": ["a"]}))
    monkeypatch.setattr(datasets, "load_dataset", lambda *arguments, revision: loaded)
    with pytest.raises(InputError, match=r"data.name='glue' has no split of a usual name.*Splits: extra"):
        load_corpus(settings(name="glue"), seed=0)


def test_equal_texts_stay_together():
    examples = [TextExample(i, [f"text  {i // 3}", f"text {i // 3}"][i % 2], i % 2) for i in range(300)]
    parts = cut_missing({"train": examples}, 0.1, 0.2, seed=0)
    where = {split: {e.sample_id // 3 for e in rows} for split, rows in parts.items()}
    assert not (where["train"] & where["test"] or where["train"] & where["val"] or where["val"] & where["test"])
    assert {split: len(rows) for split, rows in parts.items()} == {"train": 210, "test": 60, "val": 30}
    assert all([e.sample_id for e in rows] == sorted(e.sample_id for e in rows) for rows in parts.values())
    # What differs only in its second text is not the same.
    pairs = [TextExample(i, "same", i % 2, text_pair=f"other {i}") for i in range(10)]
    assert len(cut_missing({"train": pairs}, 0.1, 0.2, seed=0)["test"]) == 2
    with pytest.raises(
        InputError, match=r"has 20 rows \(2 different ones, whose copies stay together\): too few to cut"
    ):
        cut_missing({"train": [TextExample(i, "ab"[i % 2], 0) for i in range(20)]}, 0.1, 0.2, seed=0)


def test_texts_of_test_that_train_has_are_said(tmp_path):
    write_jsonl(tmp_path / "train.jsonl", [{"text": f"t {i}", "label": i % 2} for i in range(20)])
    write_jsonl(tmp_path / "test.jsonl", [{"text": text, "label": 1} for text in ("t  3", "new")])
    assert load_corpus(settings(path=str(tmp_path)), seed=0).notes == ["1 of the 2 test texts are in train too"]


def test_parquet_that_is_not_utf8(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    broken = pa.array([b"fine", b"caf\xe9"], pa.binary()).cast(pa.string(), safe=False)
    pq.write_table(pa.table({"text": broken, "label": [0, 1]}), tmp_path / "x.parquet")
    with pytest.raises(InputError, match=r"column 'text' of .*x.parquet is not UTF-8"):
        load_corpus(settings(path=str(tmp_path / "x.parquet"), columns=columns(text="text")), seed=0)
