"""Data for a model that is trained already: without labels, without training split, with the model's classes."""

import pytest
from test_data_sources import columns, settings, write_jsonl
from transformers import BertConfig, RobertaConfig, T5Config

from calig.datamodules.sources import Use, load_corpus
from calig.datamodules.text import TextDataModule
from calig.datamodules.tokenization import check_length, longest_input, train_wordpiece
from calig.pipeline.errors import InputError

NAMES = ["bad", "good"]
EXPLAIN = Use(NAMES, require_labels=False)


@pytest.fixture(scope="module")
def tokenizer():
    return train_wordpiece(["a text of 0 1 2 3 4 5 6 7 8 9"], 100)


def texts(tmp_path, *labels, name="x.jsonl", key="label"):
    return write_jsonl(tmp_path / name, [{"text": f"text {i}", key: label} for i, label in enumerate(labels)])


def labels(corpus, split="test"):
    return [example.label for example in corpus.splits[split]]


def test_unlabelled_file_is_explained_whole(tmp_path, tokenizer):
    path = write_jsonl(tmp_path / "x.jsonl", [{"text": f"text {i}"} for i in range(5)])
    data = TextDataModule(settings(path=path), tokenizer, label_names=NAMES, require_labels=False, split="val")
    data.setup()
    assert data.splits == ["val"] and data.label_names == NAMES
    batch = next(iter(data.explain_dataloader("val", batch_size=8)))
    assert sorted(batch["sample_id"].tolist()) == list(range(5)) and "labels" not in batch
    assert data.describe() == f"val 5 · 2 classes (bad, good) · no text truncated at 32 tokens · {path} has no labels"
    with pytest.raises(InputError, match=r"there is no test split: the data have val.*explain.split=val"):
        data.explain_dataloader("test")
    with pytest.raises(InputError, match=r"has no label column of a known name"):
        load_corpus(settings(path=path), 0)
    with pytest.raises(InputError, match=r"no training split to train a tokenizer on.*model.name"):
        TextDataModule(settings(path=path), require_labels=False).setup()
    with pytest.raises(InputError, match="unknown split 'tset'"):
        TextDataModule(settings(path=path), split="tset")


def test_a_folder_without_train_split(tmp_path):
    texts(tmp_path, "good", "bad", name="test.jsonl")
    assert labels(load_corpus(settings(path=str(tmp_path)), 0, EXPLAIN)) == [1, 0]
    with pytest.raises(InputError, match="no training file"):
        load_corpus(settings(path=str(tmp_path)), 0)


@pytest.mark.parametrize(
    ("given", "names", "label_map", "expected"),
    [
        (("good", "bad"), NAMES, None, [1, 0]),
        ((1, 0), NAMES, None, [1, 0]),
        (("good", "good"), NAMES, None, [1, 1]),  # one class is enough where nothing is trained
        ((1, 0), ["LABEL_0", "LABEL_1"], None, [1, 0]),
        (("x", "y"), NAMES, {"x": "bad", "y": "good"}, [0, 1]),
        (("p", "n"), ["LABEL_0", "LABEL_1"], {"p": "LABEL_1", "n": "LABEL_0"}, [1, 0]),
        ((5, 1), ["1", "5"], None, [1, 0]),  # a class whose name is a number
    ],
)
def test_labels_are_the_models_classes(tmp_path, given, names, label_map, expected):
    config = settings(path=texts(tmp_path, *given), label_map=label_map)
    for use in (Use(names), Use(names, require_labels=False)):
        corpus = load_corpus(config, 0, use)
        assert labels(corpus) == expected and corpus.label_names == names and corpus.notes == []


def test_labels_that_the_model_does_not_have(tmp_path):
    path = texts(tmp_path, "good", "odd")
    for use in (EXPLAIN, Use(NAMES)):
        with pytest.raises(InputError, match=r"unknown label 'odd'.*Options: bad, good.*row 2 of .*label_map=\{odd:"):
            load_corpus(settings(path=path), 0, use)
    # A column that merely has a label's usual name must not stop an explanation, unless it was named.
    path = texts(tmp_path, "sports", "news", key="category")
    corpus = load_corpus(settings(path=path), 0, EXPLAIN)
    assert labels(corpus) == [None, None] and "column 'category'" in corpus.notes[0]
    with pytest.raises(InputError, match="unknown label 'sports'"):
        load_corpus(settings(path=path, columns=columns(label="category")), 0, EXPLAIN)


def test_labels_are_there_for_all_rows_or_for_none(tmp_path):
    path = texts(tmp_path, "good", None, "bad")
    corpus = load_corpus(settings(path=path), 0, EXPLAIN)
    assert labels(corpus) == [None] * 3 and "1 of 3 rows have no label" in corpus.notes[0]
    with pytest.raises(InputError, match="row 2 of .*missing"):
        load_corpus(settings(path=path), 0, Use(NAMES))
    corpus = load_corpus(settings(path=path), 0, Use(require_labels=False))
    assert labels(corpus) == [None] * 3 and corpus.label_names == []


def test_controlled_corpus_of_a_model(tmp_path):
    plain = load_corpus(settings(name="controlled"), 3)
    flipped = load_corpus(settings(name="controlled"), 3, Use(list(reversed(plain.label_names))))
    assert labels(flipped) == [1 - label for label in labels(plain)]
    assert labels(load_corpus(settings(name="controlled"), 3, Use(["LABEL_0", "LABEL_1"]))) == labels(plain)
    with pytest.raises(InputError, match=r"data.name=controlled has the classes .*the model has cat, dog"):
        load_corpus(settings(name="controlled"), 3, Use(["cat", "dog"]))


def test_longest_input_of_a_model(tokenizer, tmp_path):
    assert longest_input(BertConfig(max_position_embeddings=40)) == 40
    assert longest_input(RobertaConfig(max_position_embeddings=514)) == 512
    assert longest_input(T5Config()) is None
    check_length(tokenizer, 40, positions=40)
    with pytest.raises(InputError, match=r"data.max_length=41 is more than the 40 tokens.*Set data.max_length=40"):
        check_length(tokenizer, 41, positions=40)
    # Before the data are read: the file is not even there.
    with pytest.raises(InputError, match=r"data.max_length=32 is more than the 16 tokens"):
        TextDataModule(settings(path=str(tmp_path / "none.csv")), tokenizer, max_positions=16).setup()
