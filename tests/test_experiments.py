"""The experiments: tiny twins run from files of their data set's format, hub readings from a local stand-in."""

import json

import datasets
import pytest
from test_data_sources import write_jsonl

from calig.datamodules.sources import Use, load_corpus
from calig.pipeline.cli import main
from calig.pipeline.compose import compose, options
from calig.pipeline.config import Config

AMHARIC = ["ሰላም ለዓለም ይሁን", "ይህ ፊልም በጣም ጥሩ ነው", "ይህ movie መጥፎ ነው ።", "ጀግና ነህ 😀"]
TWINS = sorted(name for name in options("experiment") if name.endswith("_tiny"))
OWN = {  # the twins of this file's data sets; others have tests of their own
    *("imdb_bert_tiny", "sst2_bert_tiny", "hatexplain_bert_tiny", "agnews_bert_tiny", "afrisenti_amh_tiny"),
    *("amharic_hate_xlmr_tiny", "amharic_hate_afrolm_tiny", "movie_rationales_bert_tiny"),
}
SMALL = [
    *("model.scratch.layers=1", "model.scratch.width=16", "model.scratch.heads=2", "model.scratch.intermediate=16"),
    *("trainer.max_epochs=1", "trainer.enable_progress_bar=false", "logger=none", "probe.num_samples=2"),
    *("probe.steps=4", "explain.num_samples=3", "explain.steps=4", "explain.methods=[ca_lig,random]"),
]


def separated(path, rows, header=None):
    lines = [header] if header else []
    path.write_text("\n".join([*lines, *("\t".join(row) for row in rows)]), encoding="utf8")


def write_data(name, folder):
    """A few rows in the files that the data set has."""
    sizes = {"train": 40, "dev": 12, "test": 12}
    if name.startswith("sst2"):
        for split, count in sizes.items():
            separated(folder / f"{split}.tsv", [(f"a good film , no {i} {split}", str(i % 2)) for i in range(count)])
    elif name.startswith("hatexplain"):
        for split, count in (("train", 40), ("val", 12), ("test", 12)):
            rows = [
                {
                    **{"id": str(i), "tokens": ["some", "nasty", "words", str(i)]},
                    **{"label": ("hatespeech", "offensive", "normal")[i % 3]},
                    **{"rationale": None if i % 3 == 2 else [0, 1, 1, 0]},
                }
                for i in range(count)
            ]
            write_jsonl(folder / f"{split}.jsonl", rows)
    elif name.startswith("agnews"):
        features = datasets.Features(
            {
                "text": datasets.Value("string"),
                "label": datasets.ClassLabel(names=["World", "Sports", "Business", "Sci/Tech"]),
            }
        )
        for split, count in (("train", 60), ("test", 12)):
            rows = {
                "text": [f"{split} news {i} of the day" for i in range(count)],
                "label": [i % 4 for i in range(count)],
            }
            table = datasets.Dataset.from_dict(rows, features=features)
            table.to_parquet(folder / f"{split}-00000-of-00001.parquet")
    elif name.startswith("afrisenti"):
        for split, count in sizes.items():
            rows = [(f"{AMHARIC[i % 4]} {i}", ("negative", "neutral", "positive")[i % 3]) for i in range(count)]
            rows = [(f"'{text}'" if split == "test" else text, label) for text, label in rows]
            separated(folder / f"{split}.tsv", rows, "tweet\tlabel")
    elif name.startswith("amharic_hate"):
        for split, count in sizes.items():
            rows = [(("hate", "normal", "offensive")[i % 3], f"{AMHARIC[i % 4]} {i} {split}") for i in range(count)]
            separated(folder / f"{split}.tsv", rows)


def test_every_experiment_has_its_twin():
    full = {"imdb_bert", "sst2_bert", "hatexplain_bert", "agnews_bert", "movie_rationales_bert"}
    full |= {"afrisenti_amh", "amharic_hate_xlmr", "amharic_hate_afrolm"}
    assert {f"{name}_tiny" for name in full} == OWN and set(TWINS) >= OWN and full <= set(options("experiment"))
    for name in full:
        whole, twin = (compose([f"experiment={n}"], check=False) for n in (name, f"{name}_tiny"))
        assert whole.model.name and twin.model.name is None
        assert whole.data.label_map == twin.data.label_map and whole.data.task == twin.data.task
        assert twin.data.max_length <= whole.data.max_length


@pytest.mark.parametrize("name", sorted(OWN))
def test_every_twin_runs(name, tmp_path):
    write_data(name, tmp_path)
    embedded = name.startswith(("imdb", "movie"))
    own = ["data.size={train: 60, val: 10, test: 10}"] if embedded else [f"data.path={tmp_path}"]
    assert main(["run", f"experiment={name}", *own, *SMALL, f"run.dir={tmp_path / 'run'}"]) == 0
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert 0 <= summary["test/accuracy"] <= 1 and summary["explain/ca_lig/failed"] == 0
    assert "explain/random/comprehensiveness" in summary
    assert ("explain/ca_lig/token_f1" in summary) == (embedded or name.startswith("hatexplain"))
    page = (tmp_path / "run" / "report.html").read_text()
    assert ("ሰላም" in page) == name.startswith(("amharic", "afrisenti"))


def stand_in(name, folder):
    """What the hub would give, read by the datasets library from the files that `write_data` makes."""
    write_data(name, folder)
    if name == "agnews":
        files = {split: str(folder / f"{split}-00000-of-00001.parquet") for split in ("train", "test")}
        return datasets.load_dataset("parquet", data_files=files, cache_dir=str(folder / "cache"))
    splits = {"train": "train", "validation": "dev", "test": "test"}
    files = {split: str(folder / f"{own}.tsv") for split, own in splits.items()}
    names = ["label", "text"] if name == "amharic_hate" else ["text", "label"]
    options = {"sep": "\t", "column_names": names, "quoting": 3, "cache_dir": str(folder / "cache")}
    return datasets.load_dataset("csv", data_files=files, **options)


@pytest.mark.parametrize(
    ("group", "data", "names"),
    [
        ("amharic_hate", "uhhlt/amharichatespeechranlp", ["hate", "normal", "offensive"]),
        ("agnews", "fancyzhx/ag_news", ["World", "Sports", "Business", "Sci/Tech"]),
        ("sst2_hub", "SetFit/sst2", ["negative", "positive"]),
    ],
)
def test_hub_readings_fit_the_format_of_their_cards(group, data, names, tmp_path, monkeypatch):
    loaded = stand_in(group.removesuffix("_hub"), tmp_path)
    asked = []
    monkeypatch.setattr(datasets, "load_dataset", lambda *given, **_: asked.append(given) or loaded)
    config = compose(["model=tiny", f"data={group}", "model.scratch.max_positions=512"], check=False)
    corpus = load_corpus(config.data, config.seed)
    assert asked == [(data, None)] and corpus.label_names == names
    assert set(corpus.splits) == {"train", "val", "test"} and all(corpus.splits.values())
    assert all(e.text and isinstance(e.label, int) for rows in corpus.splits.values() for e in rows)


def test_hub_readings_of_the_other_tasks(tmp_path, monkeypatch):
    emotions = datasets.Features(
        {
            "text": datasets.Value("string"),
            "labels": datasets.Sequence(datasets.ClassLabel(names=["admiration", "anger", "neutral"])),
            "id": datasets.Value("string"),
        }
    )
    rows = {"text": ["a", "b", "c"], "labels": [[0], [1, 2], [2]], "id": ["x", "y", "z"]}
    several = datasets.Dataset.from_dict(rows, features=emotions)
    pairs = datasets.Dataset.from_dict(
        {"sentence1": ["a b", "c d"], "sentence2": ["a", "e"], "score": [0.75, 0.0]},
    )
    loaded = {"google-research-datasets/go_emotions": several, "sentence-transformers/stsb": pairs}
    splits = ("train", "validation", "test")

    def load_dataset(name, config, **_):
        assert config == ("simplified" if "emotions" in name else None)
        return datasets.DatasetDict(dict.fromkeys(splits, loaded[name]))

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    for group, task in (("go_emotions", "multi_label"), ("stsb", "regression")):
        config = compose(["model=tiny", f"data={group}"], check=False).data
        assert config.task == task
        corpus = load_corpus(config, 0, Use(task=task))
        labels = [e.label for e in corpus.splits["train"]]
        if task == "multi_label":
            assert corpus.label_names == ["admiration", "anger", "neutral"]
            assert labels == [[1.0, 0.0, 0.0], [0.0, 1.0, 1.0], [0.0, 0.0, 1.0]]
        else:
            assert corpus.label_names == ["score"] and labels == [0.75, 0.0]
            assert [e.text_pair for e in corpus.splits["test"]] == ["a", "e"]


def test_what_the_full_runs_ask_for():
    xlmr = compose(["experiment=amharic_hate_xlmr"], check=False)
    afrolm = compose(["experiment=amharic_hate_afrolm"], check=False)
    assert (xlmr.model.name, afrolm.model.name) == ("FacebookAI/xlm-roberta-base", "bonadossou/afrolm_active_learning")
    assert xlmr.data == afrolm.data and afrolm.data.max_length <= 256, "AfroLM reads 256 tokens"
    assert compose(["experiment=afrisenti_amh"], check=False).data.strip_quotes
    assert not Config().data.strip_quotes
