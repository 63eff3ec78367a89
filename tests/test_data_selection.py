"""Which rows are used, and posts without the parts that name their group."""

import json
from pathlib import Path

import pytest

from calig.datamodules.selection import PARTS
from calig.datamodules.sources import Use, load_corpus, read_column
from calig.datamodules.text import TextDataModule
from calig.pipeline.config import ColumnsConfig, DataConfig, WindowsConfig
from calig.pipeline.errors import InputError

NEWSGROUPS = Path(__file__).parents[2] / "shared" / "data" / "20newsgroups"
POST = """From: someone@somewhere.edu (Some One)
Subject: Re: brakes
Organization: rec.autos readers

In article <12@x> other@there writes:
> Mine squeak.
| And mine.

Mine do not.
They are new.

--
Some One, University of Cars
"""


def test_parts_of_a_post():
    text = POST
    for name in ("headers", "signatures", "quotes"):
        text = PARTS[name](text)
    assert text.strip() == "Mine do not.\nThey are new."
    assert PARTS["headers"]("no header\n\nat all") == "no header\n\nat all"
    assert PARTS["signatures"]("one paragraph\nof two lines") == "one paragraph\nof two lines"
    assert PARTS["quotes"](">a\nb\n>c") == "b"


def corpus(tmp_path, rows, **keys):
    path = tmp_path / "train.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    config = DataConfig(path=str(path), val_fraction=0.25, test_fraction=0.25, **keys)
    return load_corpus(config, 0), config


def make_rows():
    rows = [{"text": f"Subject: x\n\npost number {i}", "label": "abc"[i % 3], "year": 1990 + i} for i in range(24)]
    return [*rows[:5], {"text": "From: me\nSubject: empty\n\n", "label": "a", "year": 0}, *rows[5:]]


def test_rows_of_chosen_labels_are_used_and_the_others_counted(tmp_path):
    found, config = corpus(tmp_path, make_rows(), keep_labels=["a", "c"], remove=["headers"])
    assert found.label_names == ["a", "c"]
    examples = {example.sample_id: example for split in found.splits.values() for example in split}
    assert sorted(examples) == list(range(16))
    assert all(example.text.startswith("post number") for example in examples.values())
    assert found.notes == ["8 rows of other labels left out", "1 texts that held nothing but headers left out"]
    years = read_column(config, 0, Use(), "train", "year", "a test")
    assert [f"post number {year - 1990}" for year in years] == [examples[i].text for i in range(16)]


def test_what_cannot_be_selected_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"unknown label 'd'.*data.keep_labels asks for it"):
        corpus(tmp_path, make_rows(), keep_labels=["a", "d"])
    with pytest.raises(InputError, match=r"data.remove=\['quotes'\] takes parts off texts.*'text' holds list"):
        corpus(tmp_path, [{"text": ["a", "b"], "label": "a"}, {"text": ["c"], "label": "b"}], remove=["quotes"])


@pytest.mark.skipif(not NEWSGROUPS.exists(), reason="needs the shared data")
def test_newsgroups_do_not_name_themselves():
    groups = ["rec.autos", "sci.med", "sci.space"]
    config = DataConfig(path=str(NEWSGROUPS), keep_labels=groups, remove=["headers", "quotes", "signatures"])
    found = load_corpus(config, 0)
    texts = [example.text for split in found.splits.values() for example in split]
    assert found.label_names == groups and len(texts) > 2500
    raw = load_corpus(DataConfig(path=str(NEWSGROUPS), keep_labels=groups), 0)
    whole = [example.text for split in raw.splits.values() for example in split]
    assert sum("\nOrganization:" in text for text in whole) > 2000
    # What is left stands in bodies that forward a whole post.
    assert sum("\nOrganization:" in text for text in texts) < 30
    assert sum(map(len, texts)) < 0.6 * sum(map(len, whole))


# --- passages as rationales, in the form of ERASER's movie reviews


def test_passages_mark_words_wherever_they_stand(tmp_path):
    rows = [
        {"review": "a dull start .\nbut then it  soars , and soars again", "label": i % 2,
         "evidences": ["it soars ,", "dull\nstart"] if i % 3 else []}
        for i in range(24)
    ]  # fmt: skip
    rows = [{**row, "review": f"{row['review']} {i}"} for i, row in enumerate(rows)]
    columns = ColumnsConfig(text="review", label="label", rationale="evidences")
    found, config = corpus(tmp_path, rows, columns=columns, max_length=8, windows=WindowsConfig(overlap=2))
    examples = {example.sample_id: example for split in found.splits.values() for example in split}
    assert examples[0].rationale == [0] * 13
    marked = [word for word, mark in zip(examples[1].text, examples[1].rationale, strict=True) if mark]
    assert marked == ["dull", "start", "it", "soars", ","]
    data = TextDataModule(config)
    data.setup()
    row = next(row for row in data.dataset("train").rows if any(mark == 1 for mark in row["rationale"]))
    first = range(row["windows"][0][1])
    # The first window holds the dull start alone.
    assert {row["word_ids"][i] for i in first if row["rationale"][i] == 1} == {1, 2}
    assert {row["word_ids"][i] for i, mark in enumerate(row["rationale"]) if mark == 1} == {1, 2, 6, 7, 8}


def test_a_passage_that_is_not_there_is_an_error(tmp_path):
    rows = [{"text": "a b", "label": "xy"[i % 2], "rationale": ["a  b"] if i else ["c"]} for i in range(8)]
    with pytest.raises(InputError, match=r"row 1 of .*the rationale's passage 'c' does not stand in the text"):
        corpus(tmp_path, rows, columns=ColumnsConfig(rationale="rationale"))
