"""From the configuration to examples: labels, splits, limits, the hub path and the controlled corpus."""

import json
from types import SimpleNamespace

import pytest

from calig.datamodules.sources import load_corpus
from calig.datamodules.splits import cut_missing
from calig.pipeline.errors import InputError


def columns(**named):
    return SimpleNamespace(**{"text": None, "text_pair": None, "label": None, "rationale": None, **named})


def settings(**overrides):
    """The ``data`` part of a configuration with the defaults of small tests."""
    defaults = {
        "name": None,
        "path": None,
        "revision": None,
        "header": True,
        "quoted": None,
        "label_map": None,
        "max_length": 32,
        "limit_train": None,
        "limit_val": None,
        "limit_test": None,
        "columns": columns(),
        "batch_size": 4,
        "num_workers": 0,
        "val_fraction": 0.2,
        "test_fraction": 0.3,
        "size": {"train": 60, "val": 20, "test": 20},
    }
    return SimpleNamespace(**{**defaults, **overrides})


def write_jsonl(path, rows):
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return str(path)


@pytest.fixture
def reviews(tmp_path):
    rows = [{"text": f"text number {i}", "label": ("bad", "good", "fine")[i % 3]} for i in range(30)]
    return write_jsonl(tmp_path / "reviews.jsonl", rows)


def test_missing_splits_are_cut_from_train_disjoint_and_stable(reviews):
    corpus = load_corpus(settings(path=reviews), seed=1)
    ids = {split: [e.sample_id for e in examples] for split, examples in corpus.splits.items()}
    assert {split: len(rows) for split, rows in ids.items()} == {"train": 15, "val": 6, "test": 9}
    assert sorted(ids["train"] + ids["val"] + ids["test"]) == list(range(30))
    assert all(rows == sorted(rows) for rows in ids.values())
    assert load_corpus(settings(path=reviews), seed=1) == corpus
    assert load_corpus(settings(path=reviews), seed=2) != corpus
    assert all(e.text == f"text number {e.sample_id}" for rows in corpus.splits.values() for e in rows)


def test_test_split_is_never_cut_and_a_fraction_of_zero_leaves_a_split_out(tmp_path):
    for split, count in (("train", 10), ("test", 7)):
        write_jsonl(tmp_path / f"{split}.jsonl", [{"text": f"{split} {i}", "label": i % 2} for i in range(count)])
    corpus = load_corpus(settings(path=str(tmp_path)), seed=0)
    assert [len(corpus.splits[split]) for split in ("train", "val", "test")] == [8, 2, 7]
    assert all(e.text.startswith("train") for e in corpus.splits["val"])
    assert "val" not in load_corpus(settings(path=str(tmp_path), val_fraction=0.0), seed=0).splits


def test_too_few_rows_or_a_wrong_fraction_is_an_error(reviews):
    examples = load_corpus(settings(path=reviews), seed=0).splits["train"]
    with pytest.raises(InputError, match=r"has 2 rows: too few to cut test and val"):
        cut_missing({"train": examples[:2]}, 0.1, 0.1, seed=0)
    with pytest.raises(InputError, match=r"data.val_fraction=1.5"):
        cut_missing({"train": examples}, 1.5, 0.1, seed=0)


def test_limits_keep_sample_ids_and_are_nested(reviews):
    whole = load_corpus(settings(path=reviews), seed=0).splits
    small = load_corpus(settings(path=reviews, limit_train=4, limit_test=3), seed=0).splits
    larger = load_corpus(settings(path=reviews, limit_train=8), seed=0).splits
    assert [len(small[split]) for split in ("train", "val", "test")] == [4, 6, 3]
    assert all(e in larger["train"] for e in small["train"]) and all(e in whole["train"] for e in larger["train"])
    assert all(e.text == f"text number {e.sample_id}" for e in small["train"] + small["test"])
    assert load_corpus(settings(path=reviews, limit_train=99), seed=0).splits == whole
    with pytest.raises(InputError, match=r"data.limit_val=0"):
        load_corpus(settings(path=reviews, limit_val=0), seed=0)


def test_class_order(tmp_path):
    def names(labels, **keys):
        path = write_jsonl(tmp_path / "x.jsonl", [{"text": f"t {i}", "label": x} for i, x in enumerate(labels * 5)])
        return load_corpus(settings(path=path, **keys), seed=0).label_names

    assert names(["b", "a", "c"]) == ["a", "b", "c"]
    assert names([10, 9, 1]) == ["1", "9", "10"]
    assert names([1.0, 0.0]) == ["0", "1"]
    assert names([True, False]) == ["false", "true"]
    assert names([0, 1, 2], label_map={"2": "yes", "0": "no", "1": "yes"}) == ["yes", "no"]
    with pytest.raises(InputError, match="two classes; the labels hold only"):
        names(["only"])


def test_label_map_merges_and_lists_what_it_does_not_know(reviews):
    merged = load_corpus(settings(path=reviews, label_map={"good": "+", "fine": "+", "bad": "-"}), seed=0)
    assert merged.label_names == ["+", "-"]
    assert {e.sample_id % 3: e.label for e in merged.splits["train"]} == {0: 1, 1: 0, 2: 0}
    with pytest.raises(InputError, match=r"row 3 of .*label 'fine' is not in data.label_map.*found.*: bad, fine, good"):
        load_corpus(settings(path=reviews, label_map={"good": "+", "bad": "-"}), seed=0)


def test_label_that_train_never_had(tmp_path):
    write_jsonl(tmp_path / "train.jsonl", [{"text": f"t {i}", "label": "ab"[i % 2]} for i in range(10)])
    write_jsonl(tmp_path / "test.jsonl", [{"text": "x", "label": "a"}, {"text": "y", "label": "c"}])
    with pytest.raises(InputError, match=r"unknown label 'c'.*Options: a, b.*row 2 of .*test.jsonl"):
        load_corpus(settings(path=str(tmp_path)), seed=0)


@pytest.mark.parametrize(
    ("label", "message"), [(None, "row 2 .*missing"), (" ", "row 2 .*missing"), ([1], "type list")]
)
def test_bad_label(tmp_path, label, message):
    path = write_jsonl(tmp_path / "x.jsonl", [{"text": "t", "label": "a"}, {"text": "u", "label": label}])
    with pytest.raises(InputError, match=message):
        load_corpus(settings(path=path), seed=0)


def test_one_source_is_needed():
    with pytest.raises(InputError, match="none given"):
        load_corpus(settings(), seed=0)
    with pytest.raises(InputError, match=r"both 'controlled' and 'x.csv'"):
        load_corpus(settings(name="controlled", path="x.csv"), seed=0)


def test_controlled_corpus_with_sizes_as_mapping_or_object():
    corpus = load_corpus(settings(name="controlled"), seed=3)
    assert {split: len(rows) for split, rows in corpus.splits.items()} == {"train": 60, "val": 20, "test": 20}
    assert len(corpus.label_names) == 2 and all(e.rationale is not None for e in corpus.splits["test"])
    assert load_corpus(settings(name="controlled", size=SimpleNamespace(train=60, val=20, test=20)), seed=3) == corpus


def test_hub_path_on_a_local_folder(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "hub"
    folder.mkdir()
    for split in ("train", "validation", "test"):
        write_jsonl(folder / f"{split}.jsonl", [{"sentence": f"{split} {i}", "label": i % 2} for i in range(8)])
    corpus = load_corpus(settings(name=str(folder)), seed=0)
    assert corpus.label_names == ["0", "1"]
    assert [e.text for e in corpus.splits["val"]] == [f"validation {i}" for i in range(8)]
    with pytest.raises(InputError, match=r"unknown column 'sentense'.*Did you mean 'sentence'"):
        load_corpus(settings(name=str(folder), columns=columns(text="sentense")), seed=0)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(InputError, match=r"data.name='.*nothing here' could not be loaded.*data.path"):
        load_corpus(settings(name=str(tmp_path / "nothing here")), seed=0)


def test_hub_classes_have_names_and_withheld_labels_leave_the_split_out(monkeypatch):
    import datasets

    label = datasets.ClassLabel(names=["negative", "positive"])
    features = datasets.Features({"sentence": datasets.Value("string"), "label": label})

    def split(labels):
        texts = [f"text {i} of {len(labels)}" for i in range(len(labels))]
        return datasets.Dataset.from_dict({"sentence": texts, "label": labels}, features=features)

    loaded = datasets.DatasetDict(train=split([1, 0] * 10), test=split([-1, -1]))
    asked = []
    monkeypatch.setattr(datasets, "load_dataset", lambda *name, revision: asked.append((*name, revision)) or loaded)
    corpus = load_corpus(settings(name="sst2"), seed=0)
    assert corpus.label_names == ["negative", "positive"]
    assert len(corpus.splits["test"]) == 6 and corpus.notes == ["sst2 (test) has no labels: left out"]
    assert {e.sample_id % 2: e.label for e in corpus.splits["train"]} == {0: 1, 1: 0}
    load_corpus(settings(name="glue", config="sst2", revision="abc"), seed=0)
    assert asked == [("sst2", None, None), ("glue", "sst2", "abc")]
