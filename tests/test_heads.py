"""Several labels per text and regression: targets, rows and faithfulness, against closed forms of a linear model."""

from types import SimpleNamespace

import pytest
import torch
from conftest import make_batch, make_bert
from torch import nn

from calig.pipeline.errors import InputError
from calig.pipeline.explainer import Explainer, ExplainSettings
from calig.pipeline.heads import Head
from calig.pipeline.metrics import summarise
from calig.pipeline.metrics.faithfulness import BINS
from calig.pipeline.metrics.ranking import count

WIDTH, VOCABULARY = 6, 60


class Block(nn.Module):
    """A residual block that is linear: its output is its input, doubled and halved again."""

    def __init__(self):
        super().__init__()
        self.up = nn.Linear(WIDTH, WIDTH, bias=False)
        with torch.no_grad():
            self.up.weight.copy_(0.5 * torch.eye(WIDTH))

    def forward(self, states):
        return self.up(states) + 0.5 * states


class Bag(nn.Module):
    """Mean of the word vectors into a linear head: every attribution of it has a closed form."""

    def __init__(self, outputs, problem):
        super().__init__()
        torch.manual_seed(3)
        self.embed = nn.Embedding(VOCABULARY, WIDTH)
        self.layers = nn.ModuleList([Block(), Block()])
        self.head = nn.Linear(WIDTH, outputs)
        self.config = SimpleNamespace(problem_type=problem, pad_token_id=0, num_labels=outputs)

    def forward(self, input_ids, attention_mask):
        states = self.embed(input_ids)
        for layer in self.layers:
            states = layer(states)
        weights = attention_mask / attention_mask.sum(1, keepdim=True)
        return self.head((states * weights.unsqueeze(-1)).sum(1))


def labelled(batch, labels):
    return batch | {"labels": labels, "sample_id": torch.arange(len(labels))}


def explained(model, batch, *, target="predicted", metrics=(), operators=(), methods=("integrated_gradients",), **more):
    settings = ExplainSettings(
        {name: {} if name in ("random", "generic_attention") else {"steps": 4} for name in methods},
        target=target,
        metrics=metrics,
        operators=operators,
        strict=True,
        **more,
    )
    return Explainer(model, None, settings).explain(batch)


def closed_form(model, batch, row, output):
    """w (e_i - mean of all word vectors) / n on words, 0 on special tokens, whose baseline is themselves."""
    real = batch["attention_mask"][row].bool()
    ids = batch["input_ids"][row][real]
    scores = (model.embed(ids) - model.embed.weight.mean(0)) @ model.head.weight[output] / len(ids)
    return torch.where(batch["special_tokens_mask"][row][real].bool(), 0.0, scores).tolist()


@pytest.fixture
def several():
    return Bag(4, "multi_label_classification").eval()


@pytest.fixture
def number():
    return Bag(1, "regression").eval()


def predicted_of(model, batch):
    return model(batch["input_ids"], batch["attention_mask"]).sigmoid().detach()


def test_every_predicted_label_is_explained_exactly(several):
    batch = labelled(make_batch(), torch.zeros(3, 4))
    probabilities = predicted_of(several, batch)
    wanted = {(i, c) for i in range(3) for c in range(4) if probabilities[i, c] >= 0.5}
    wanted |= {(i, int(p.argmax())) for i, p in enumerate(probabilities) if p.max() < 0.5}
    rows = explained(several, batch).explanations
    assert {(row["sample_id"], row["target"]) for row in rows} == wanted and len(rows) == len(wanted)
    assert len({sum(i == sample for sample, _ in wanted) for i in range(3)}) > 1, "texts with unlike numbers of labels"
    for row in rows:
        i, c = row["sample_id"], row["target"]
        assert row["scores"] == pytest.approx(closed_form(several, batch, i, c), abs=1e-5)
        assert row["completeness_gap"] < 1e-4
        assert row["probability"] == pytest.approx(float(probabilities[i, c]), abs=1e-6)
        assert row["predictions"] == [k for k in range(4) if probabilities[i, k] >= 0.5]
        assert row["prediction"] == int(probabilities[i].argmax())
        assert row["labels"] == [] and row["label"] is None


def test_given_labels_are_explained_and_the_threshold_decides(several):
    labels = torch.tensor([[1.0, 0, 0, 1], [0, 0, 0, 0], [0, 0, 1, 0]])
    batch = labelled(make_batch(), labels)
    rows = explained(several, batch, target="label").explanations
    best = int(predicted_of(several, batch)[1].argmax())
    assert {(row["sample_id"], row["target"]) for row in rows} == {(0, 0), (0, 3), (1, best), (2, 2)}
    assert {row["sample_id"]: row["labels"] for row in rows} == {0: [0, 3], 1: [], 2: [2]}
    assert {row["target"] for row in explained(several, batch, target=2).explanations} == {2}
    several.config.label_threshold = 1e-6
    assert len(explained(several, batch).explanations) == 12
    several.config.label_threshold = 1 - 1e-6
    assert len(explained(several, batch).explanations) == 3, "the most probable one, where none is predicted"
    with pytest.raises(InputError, match=r"labels have the shape \(3,\).*\(3, 4\)"):
        Head("multi_label").targets("label", torch.zeros(3, 4), torch.zeros(3))


def test_one_label_is_no_regression():
    model = Bag(1, "multi_label_classification").eval()
    batch = labelled(make_batch(), torch.ones(3, 1))
    found = explained(model, batch, metrics=("comprehensiveness", "positive_auc"), operators=("attention",))
    probabilities = predicted_of(model, batch)
    for row in found.explanations:
        assert row["probability"] == pytest.approx(float(probabilities[row["sample_id"], 0]), abs=1e-6)
        assert row["labels"] == [0] and "value" not in row
        assert row["scores"] == pytest.approx(closed_form(model, batch, row["sample_id"], 0), abs=1e-5)
    assert {row["space"] for row in found.metrics if row["metric"] == "comprehensiveness"} == {"probability", "logit"}


def reference(model, batch, row, output, scores, q, *, kept):
    """The output without the top k(q) words, or with them alone, read off a shorter text."""
    real = batch["attention_mask"][row].bool()
    ids, special = batch["input_ids"][row][real], batch["special_tokens_mask"][row][real].bool()
    words = [i for i in range(len(ids)) if not special[i]]
    top = sorted(words, key=lambda i: -scores[i])[: count(q, len(words))]
    stays = [i for i in range(len(ids)) if special[i] or ((i in top) == kept)]
    return float(model(ids[stays][None], torch.ones(1, len(stays)))[0, output])


@pytest.mark.parametrize("problem", ["multi_label_classification", "regression"])
def test_faithfulness_of_each_head_against_shorter_texts(problem):
    one = problem == "regression"
    model = Bag(1 if one else 4, problem).eval()
    batch = labelled(make_batch(), torch.rand(3) if one else torch.ones(3, 4))
    names = ("comprehensiveness", "sufficiency", "log_odds", "deletion_auc", "positive_auc", "infidelity")
    found = explained(model, batch, target="label", metrics=names, operators=("delete",))
    own = {(row["sample_id"], row["target"]): row for row in found.explanations}
    assert len(own) == (3 if one else 12)
    measured = {row["metric"] for row in found.metrics if row["operator"] is not None}
    assert measured == ({"comprehensiveness", "sufficiency", "deletion_auc", "infidelity"} if one else set(names))
    link = (lambda x: x) if one else (lambda x: float(torch.tensor(x).sigmoid()))
    checked = 0
    for row in found.metrics:
        if row["metric"] not in ("comprehensiveness", "sufficiency") or row["q"] not in BINS:
            continue
        if row["control"] != "none" or (not one and row["space"] == "logit"):
            continue
        i, c = row["sample_id"], row.get("target", 0)
        whole = model(batch["input_ids"][i : i + 1], batch["attention_mask"][i : i + 1])[0, c].item()
        part = reference(model, batch, i, c, own[i, c]["scores"], row["q"], kept=row["metric"] == "sufficiency")
        assert row["value"] == pytest.approx(link(whole) - link(part), abs=1e-5)
        checked += 1
    assert checked == len(own) * 2 * len(BINS)


def test_accuracy_while_removing_is_that_of_the_label_itself(several):
    labels = torch.tensor([[1.0, 0, 0, 1], [0, 1, 0, 0], [0, 0, 1, 0]])
    batch = labelled(make_batch(), labels)
    found = explained(
        several, batch, target=1, metrics=("positive_auc",), operators=("delete",), perturbation_target="label"
    )
    at_start = {row["sample_id"]: row["value"] for row in found.metrics if row["q"] == 0 and row["control"] == "none"}
    predicted = predicted_of(several, batch)[:, 1] >= 0.5
    assert at_start == {i: float(bool(predicted[i]) == bool(labels[i, 1])) for i in range(3)}


def test_a_regression_is_explained_by_its_output(number):
    batch = labelled(make_batch(), torch.tensor([0.5, 1.0, -2.0]))
    rows = explained(number, batch).explanations
    outputs = number(batch["input_ids"], batch["attention_mask"])[:, 0]
    for row in rows:
        i = row["sample_id"]
        assert row["scores"] == pytest.approx(closed_form(number, batch, i, 0), abs=1e-5)
        assert row["value"] == pytest.approx(float(outputs[i]), abs=1e-6) and row["probability"] is None
        assert row["label_value"] == pytest.approx(float(batch["labels"][i])) and row["label"] is None
        assert row["target"] == 0 and "predictions" not in row


def test_a_sample_counts_once_whatever_its_labels(several):
    """The mean over samples of the mean over their labels, and the same for every way to cut the batch."""
    labels = torch.tensor([[1.0, 1, 1, 1], [0, 1, 0, 0], [0, 0, 1, 1]])
    batch = labelled(make_batch(), labels)
    options = {"target": "label", "metrics": ("comprehensiveness",), "operators": ("attention",)}
    found = explained(several, batch, methods=("integrated_gradients", "random"), **options)
    summary = summarise(found.metrics)["integrated_gradients", "none", "comprehensiveness@attention"]
    values = {}
    for row in found.metrics:
        own = (row["method"], row["control"], row["metric"], row["space"], row["q"])
        if own == ("integrated_gradients", "none", "comprehensiveness", "probability", None):
            values.setdefault(row["sample_id"], {})[row["target"]] = row["value"]
    assert {i: sorted(own) for i, own in values.items()} == {0: [0, 1, 2, 3], 1: [1], 2: [2, 3]}
    expected = sum(sum(own.values()) / len(own) for own in values.values()) / 3
    assert summary.n == 3 and summary.mean == pytest.approx(expected, abs=1e-9)
    alone = [explained(several, {key: value[i : i + 1] for key, value in batch.items()}, **options) for i in range(3)]
    together = {
        (row["sample_id"], row["target"]): row["scores"] for row in found.explanations if row["method"] != "random"
    }
    for part in alone:
        for row in part.explanations:
            assert row["scores"] == pytest.approx(together[row["sample_id"], row["target"]], abs=1e-5)


def test_every_label_is_complete_in_a_transformer():
    model = make_bert(classes=3)
    model.config.problem_type = "multi_label_classification"
    model.config.label_threshold = 0.01
    batch = labelled(make_batch(), torch.ones(3, 3))
    settings = ExplainSettings({"ca_lig": {"steps": "auto", "tolerance": 0.01}}, operators=(), strict=True)
    rows = Explainer(model, None, settings).explain(batch).explanations
    assert len(rows) == 9
    assert all(row["completeness_gap"] <= 0.011 for row in rows if row["converged"]) and any(
        row["converged"] for row in rows
    )
    # The same numbers as with one target at a time; nodes are fixed, because refinement looks at all targets.
    fixed = {"ca_lig": {"steps": 12}}
    shared = Explainer(model, None, ExplainSettings(fixed, operators=(), strict=True)).explain(batch).explanations
    for c in range(3):
        one = Explainer(model, None, ExplainSettings(fixed, target=c, operators=(), strict=True))
        for row in one.explain(batch).explanations:
            same = next(r for r in shared if (r["sample_id"], r["target"]) == (row["sample_id"], c))
            assert row["scores"] == pytest.approx(same["scores"], abs=1e-5)
