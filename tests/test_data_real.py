"""Real data beside the repository, where it is there."""

from pathlib import Path

import pytest
from test_data_sources import columns, settings

from calig.datamodules.sources import load_corpus
from calig.datamodules.text import TextDataModule
from calig.datamodules.tokenization import train_wordpiece

DATA = Path(__file__).parents[2] / "shared" / "data"


def needs(folder):
    return pytest.mark.skipif(not (DATA / folder).is_dir(), reason=f"no {folder} data beside the repository")


@needs("hatexplain")
def test_hatexplain_two_classes():
    label_map = {"hatespeech": "toxic", "offensive": "toxic", "normal": "normal"}
    limits = {"limit_train": 2000, "limit_val": 200}
    data = TextDataModule(settings(path=str(DATA / "hatexplain"), label_map=label_map, max_length=48, **limits))
    data.setup()
    assert data.label_names == ["toxic", "normal"]
    assert {split: len(data.dataset(split)) for split in data.splits} == {"train": 2000, "val": 200, "test": 1924}
    marked = [row for row in data.dataset("test").rows if any(mark >= 0 for mark in row["rationale"])]
    assert len(marked) == 1142 and {row["labels"] for row in marked} == {0}
    assert any(row["rationale_missed"] for row in marked if row["truncated"])
    assert not any(row["rationale_missed"] for row in marked if not row["truncated"])


@needs("sst2")
def test_sst2_header_less():
    data = TextDataModule(
        settings(path=str(DATA / "sst2"), header=False, columns=columns(text="0", label="1"), max_length=64),
        vocab_size=4000,
    )
    data.setup()
    assert data.describe().startswith("train 6,920 · val 872 · test 1,821 · 2 classes (0 48 %, 1 52 %)")
    assert [row["sample_id"] for row in data.dataset("val").rows] == list(range(872))


@needs("afrisenti_amh")
def test_amharic_tweets():
    data = TextDataModule(settings(path=str(DATA / "afrisenti_amh"), limit_train=500, limit_val=50, limit_test=50))
    data.setup()
    assert data.label_names == ["negative", "neutral", "positive"]


@needs("20newsgroups")
def test_newsgroups_from_an_archive_per_split():
    path = str(DATA / "20newsgroups")
    corpus = load_corpus(settings(path=path), seed=0)
    assert {split: len(rows) for split, rows in corpus.splits.items()} == {"train": 9051, "val": 2263, "test": 7532}
    assert len(corpus.label_names) == 20 and corpus.label_names[0] == "alt.atheism" and corpus.notes == []
    limits = {"limit_train": 100, "limit_val": 10, "limit_test": 10}
    data = TextDataModule(settings(path=path, max_length=64, **limits), vocab_size=4000)
    data.setup()
    cut = data.truncation()["train"]
    assert cut.truncated > 90 and 0.5 < cut.share < 1


@needs("ud_english_ewt")
def test_treebank_without_labels():
    tokenizer = train_wordpiece(["the a of and to"], 200, 128)
    data = TextDataModule(settings(path=str(DATA / "ud_english_ewt")), tokenizer, require_labels=False, split="val")
    data.setup()
    assert data.splits == ["val"] and len(data.dataset("val")) == 2001
    batch = next(iter(data.explain_dataloader("val", 4)))
    assert "labels" not in batch and (batch["word_ids"].max(dim=1).values > 0).all()
