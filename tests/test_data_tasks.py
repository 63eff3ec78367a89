"""Labels of every task: lists of names, indicator columns, numbers; what is wrong with them is said with its row."""

import json

import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Sequence, Value
from test_data_sources import columns, settings, write_jsonl

from calig.datamodules.sources import Use, load_corpus
from calig.datamodules.text import TextDataModule
from calig.pipeline.errors import InputError

SETS = [["joy"], ["joy", "love"], [], ["fear"], ["love"], ["fear", "joy"]]
MULTI = Use(task="multi_label")
NUMBER = Use(task="regression")


def rows(labels, **more):
    return [{"text": f"text number {i}", "label": label} | more for i, label in enumerate(labels)]


def vectors(corpus, split="train"):
    return {example.sample_id: example.label for example in corpus.splits[split]}


def every(corpus):
    return {i: label for split in corpus.splits for i, label in vectors(corpus, split).items()}


@pytest.fixture
def lists(tmp_path):
    return write_jsonl(tmp_path / "sets.jsonl", rows(SETS * 4))


def test_lists_of_names_become_indicators(lists):
    corpus = load_corpus(settings(path=lists), 0, MULTI)
    assert corpus.label_names == ["fear", "joy", "love"]
    for i, found in every(corpus).items():
        assert found == [float(name in SETS[i % 6]) for name in corpus.label_names]
    assert len(every(corpus)) == 24


def test_a_csv_holds_json_lists(tmp_path, lists):
    lines = [
        "text,label",
        *('"text number {}","{}"'.format(i, json.dumps(s).replace('"', '""')) for i, s in enumerate(SETS * 4)),
    ]
    (tmp_path / "sets.csv").write_text("\n".join(lines))
    assert every(load_corpus(settings(path=str(tmp_path / "sets.csv")), 0, MULTI)) == every(
        load_corpus(settings(path=lists), 0, MULTI)
    )


@pytest.mark.parametrize(("yes", "no"), [(1, 0), (True, False), ("1", "0"), (1.0, 0.0), ("Yes", "no")])
def test_indicator_columns_say_the_same(tmp_path, lists, yes, no):
    names = ["joy", "fear", "love"]
    table = [
        {"text": f"text number {i}"} | {name: yes if name in found else no for name in names}
        for i, found in enumerate(SETS * 4)
    ]
    path = write_jsonl(tmp_path / "flags.jsonl", table)
    corpus = load_corpus(settings(path=path, columns=columns(indicators=names)), 0, MULTI)
    assert corpus.label_names == names  # the order of the columns
    by_name = load_corpus(settings(path=lists), 0, MULTI)
    for i, found in every(corpus).items():
        again = dict(zip(by_name.label_names, every(by_name)[i], strict=True))
        assert dict(zip(names, found, strict=True)) == again


def test_lists_of_classes_keep_their_declared_names(tmp_path):
    features = Features({"text": Value("string"), "labels": Sequence(ClassLabel(names=["zeal", "awe", "calm"]))})
    table = {"text": [f"text {i}" for i in range(20)], "labels": [[0, 2], [1], [], [2]] * 5}
    Dataset.from_dict(table, features=features).to_parquet(tmp_path / "train.parquet")
    corpus = load_corpus(settings(path=str(tmp_path)), 0, MULTI)
    assert corpus.label_names == ["zeal", "awe", "calm"]
    assert every(corpus)[4] == [1.0, 0.0, 1.0] and every(corpus)[6] == [0.0, 0.0, 0.0]


def test_label_map_merges_labels(lists):
    mapping = {"joy": "good", "love": "good", "fear": "bad"}
    corpus = load_corpus(settings(path=lists, label_map=mapping), 0, MULTI)
    assert corpus.label_names == ["good", "bad"] and every(corpus)[1] == [1.0, 0.0] and every(corpus)[5] == [1.0, 1.0]
    with pytest.raises(InputError, match=r"label 'fear' is not in data.label_map \(joy, love\)"):
        load_corpus(settings(path=lists, label_map={"joy": "good", "love": "good"}), 0, MULTI)


def test_one_label_is_enough(tmp_path):
    path = write_jsonl(tmp_path / "one.jsonl", rows([["spam"], []] * 10))
    corpus = load_corpus(settings(path=path), 0, MULTI)
    assert corpus.label_names == ["spam"] and every(corpus)[0] == [1.0] and every(corpus)[1] == [0.0]
    with pytest.raises(InputError, match="no text with a label"):
        load_corpus(settings(path=write_jsonl(tmp_path / "no.jsonl", rows([[], []]))), 0, MULTI)


@pytest.mark.parametrize(
    ("labels", "task", "said"),
    [
        ([["joy"], "joy"], MULTI, r"row 2 of .*'joy' of type str.*list of labels per text.*data.task=classification"),
        ([["joy"], 3], MULTI, r"row 2 of .*'3' of type int"),
        ([["joy"], None], MULTI, r"row 2 of .*label.*is missing"),
        ([["joy", None]], MULTI, r"row 1 of .*holds an empty one"),
        ([["joy", ["love"]]], MULTI, r"row 1 of .*type list"),
        ([1.5, "two"], NUMBER, r"row 2 of .*'two'.*one finite number per text"),
        ([1.5, float("nan")], NUMBER, r"row 2 of .*'nan'.*one finite number"),
        (["1.5", "inf"], NUMBER, r"row 2 of .*'inf'"),
        ([1.5, True], NUMBER, r"row 2 of .*'True'"),
        ([1.5, [2.0]], NUMBER, r"row 2 of .*'\[2.0\]'"),
        ([1.5, None], NUMBER, r"row 2 of .*label.*is missing"),
        ([["joy"], ["love"]], Use(), r"row 1 of .*data.task=multi_label"),
        ([1.5, 2.5], Use(), r"row 1 of .*'1.5' of type float.*data.task=regression"),
    ],
)
def test_labels_that_are_not_of_their_task(tmp_path, labels, task, said):
    path = write_jsonl(tmp_path / "x.jsonl", rows(labels))
    with pytest.raises(InputError, match=said):
        load_corpus(settings(path=path), 0, task)


def test_indicators_that_are_none(tmp_path):
    path = write_jsonl(tmp_path / "x.jsonl", [{"text": "a", "joy": 1}, {"text": "b", "joy": 2}])
    with pytest.raises(InputError, match=r"row 2 of .*column 'joy' holds '2'; an indicator is 0 or 1"):
        load_corpus(settings(path=path, columns=columns(indicators=["joy"])), 0, MULTI)
    with pytest.raises(InputError, match=r"unknown column 'joi'. Did you mean 'joy'"):
        load_corpus(settings(path=path, columns=columns(indicators=["joi"])), 0, MULTI)


def test_a_label_that_training_never_met(tmp_path):
    write_jsonl(tmp_path / "train.jsonl", rows([["joy"], ["love"]]))
    write_jsonl(tmp_path / "test.jsonl", rows([["joy", "hate"]]))
    with pytest.raises(InputError, match=r"unknown label 'hate'.*row 1 of .*never in the training split"):
        load_corpus(settings(path=str(tmp_path)), 0, MULTI)


def test_numbers_are_read_from_text_files_too(tmp_path):
    (tmp_path / "x.csv").write_text("text,score\n" + "\n".join(f"text {i},{i / 2}" for i in range(20)))
    corpus = load_corpus(settings(path=str(tmp_path / "x.csv"), columns=columns(label="score")), 0, NUMBER)
    assert corpus.label_names == ["score"] and every(corpus) == {i: i / 2 for i in range(20)}


def test_labels_of_a_model_that_is_trained(tmp_path):
    given = Use(["love", "joy"], require_labels=False, task="multi_label")
    path = write_jsonl(tmp_path / "x.jsonl", rows([["joy"], [0], []]))
    assert vectors(load_corpus(settings(path=path), 0, given), "test") == {0: [0.0, 1.0], 1: [1.0, 0.0], 2: [0.0, 0.0]}
    with pytest.raises(InputError, match=r"unknown label 'hate'.*no label of the model"):
        load_corpus(settings(path=write_jsonl(tmp_path / "y.jsonl", rows([["hate"]]))), 0, given)
    some = load_corpus(settings(path=write_jsonl(tmp_path / "z.jsonl", rows([["joy"], None]))), 0, given)
    assert vectors(some, "test") == {0: None, 1: None} and "1 of 2 rows have no label" in some.notes[0]
    number = Use(["score"], require_labels=False, task="regression")
    found = load_corpus(settings(path=write_jsonl(tmp_path / "n.jsonl", rows([1, "2.5"]))), 0, number)
    assert vectors(found, "test") == {0: 1.0, 1: 2.5}
    none = load_corpus(settings(path=write_jsonl(tmp_path / "e.jsonl", [{"text": "a"}])), 0, number)
    assert vectors(none, "test") == {0: None}


def test_batches_and_what_is_said_of_them(lists, tmp_path):
    data = TextDataModule(settings(path=lists), vocab_size=200, task="multi_label")
    data.setup()
    batch = next(iter(data.val_dataloader()))
    assert batch["labels"].dtype == torch.float32 and batch["labels"].shape == (4, 3)
    assert "3 labels (fear" in data.describe() and "1.2 per text" in data.describe()
    path = write_jsonl(tmp_path / "n.jsonl", rows([i / 4 for i in range(20)]))
    data = TextDataModule(settings(path=path), vocab_size=200, task="regression")
    data.setup()
    batch = next(iter(data.val_dataloader()))
    assert batch["labels"].dtype == torch.float32 and batch["labels"].shape == (4,)
    assert "label from " in data.describe() and "4.75, mean" in data.describe()
