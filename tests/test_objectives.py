"""What is explained: contrasts, next tokens, regressions, log-probabilities; and where heads read the last block."""

import pytest
import torch
from conftest import make_batch, make_bert
from torch import nn
from transformers import (
    BertForSequenceClassification,
    DistilBertConfig,
    DistilBertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
)
from transformers.modeling_outputs import SequenceClassifierOutput

from calig.pipeline.attribution import ClassLogit, Contrast, ExplainableModel, NextToken, Regression, attribute
from calig.pipeline.attribution.inside import find_ends
from calig.pipeline.errors import InputError

LENGTHS = (9, 6, 8)
# Llama's untrained padding row is zero, where its norm is singular: a path from there needs far more nodes.
PATH = {"steps": 257, "baseline": "mean"}


def make_gpt2():
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=60, n_positions=40, n_embd=24, n_layer=3, n_head=3, initializer_range=0.3, pad_token_id=0,
        bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    return GPT2LMHeadModel(config).eval()


def make_llama():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=60, hidden_size=24, intermediate_size=48, num_hidden_layers=3, num_attention_heads=3,
        initializer_range=0.3, max_position_embeddings=40, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


LANGUAGE_MODELS = pytest.mark.parametrize("make", [make_gpt2, make_llama], ids=["gpt2", "llama"])


def padded_left(batch):
    ids, mask = batch["input_ids"], batch["attention_mask"]
    shift = (mask == 0).sum(1)
    turned = {key: torch.stack([row.roll(int(n)) for row, n in zip(batch[key], shift, strict=True)]) for key in batch}
    assert turned["attention_mask"].sum() == mask.sum() and turned["input_ids"].sum() == ids.sum()
    return turned


# --- classifiers


@pytest.mark.parametrize(
    ("method", "options"), [("integrated_gradients", {"steps": 6}), ("ca_lig", {"path": "straight", "steps": 6})]
)
def test_a_contrast_is_the_difference_of_its_classes(bert, batch, method, options):
    objective = Contrast([2, 0, 1], against=torch.tensor([1, 1, 0]))
    found = attribute(bert, batch, method, objective=objective, **options)
    one = attribute(bert, batch, method, target=[2, 0, 1], **options)
    other = attribute(bert, batch, method, target=[1, 1, 0], **options)
    assert torch.allclose(found.output_change, one.output_change - other.output_change, atol=1e-5)
    assert found.target.tolist() == [2, 0, 1]
    # Integrated gradients are linear in the objective; behind the fusion CA-LIG no longer is.
    kind = (lambda result: result.parts["evidence"]) if method == "ca_lig" else (lambda result: result.scores)
    assert torch.allclose(kind(found), kind(one) - kind(other), atol=1e-5)
    assert found.scores.abs().max() > 1e-3


def test_the_log_probability_of_a_class(bert, batch):
    objective = ClassLogit(torch.tensor(1), log_prob=True)
    found = attribute(bert, batch, "integrated_gradients", objective=objective, steps=40)
    with torch.no_grad():
        ids = torch.where(batch["special_tokens_mask"].bool(), batch["input_ids"], 0)
        logits = [bert(x, attention_mask=batch["attention_mask"]).logits for x in (batch["input_ids"], ids)]
    change = logits[0].log_softmax(1)[:, 1] - logits[1].log_softmax(1)[:, 1]
    assert torch.allclose(found.output_change, change, atol=1e-5)
    assert torch.allclose(found.scores.sum(1), change, atol=1e-3)


def test_a_regression_has_one_output(batch):
    model = make_bert(classes=1)
    found = attribute(model, batch, objective=Regression())
    by_target = attribute(model, batch, target=0)
    assert torch.allclose(found.scores, by_target.scores, atol=1e-5) and found.target.tolist() == [0, 0, 0]
    assert found.scores.abs().max() > 0
    flat = attribute(model, batch, objective=lambda output: Regression()(output.logits.squeeze(1)))
    assert torch.equal(flat.scores, found.scores)
    with pytest.raises(InputError, match=r"\(3, 3\).*name one by target="):
        attribute(make_bert(), batch, objective=Regression())


# --- language models


@LANGUAGE_MODELS
@pytest.mark.parametrize("log_prob", [False, True])
def test_next_token_is_complete_and_knows_no_padding(make, log_prob):
    model, batch = make(), make_batch(LENGTHS)
    objective = NextToken([7, 8, 9], log_prob=log_prob)
    found = attribute(model, batch, objective=objective, **PATH)
    with torch.no_grad():
        logits = model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        logits = logits.log_softmax(-1) if log_prob else logits
    at_end = torch.stack([logits[row, length - 1, 7 + row] for row, length in enumerate(LENGTHS)])
    wrapped = ExplainableModel(model)
    with wrapped.session():
        inputs = wrapped.prepare(batch)
        bound = objective.bind(inputs)
        value = bound(model(**inputs.batch), torch.arange(3))
        ends = find_ends(wrapped, inputs, bound, "mean", [0])
    assert torch.allclose(value, at_end, atol=1e-5)
    assert torch.equal(ends.readout.argmax(1), torch.tensor(LENGTHS) - 1) and (ends.readout.amax(1) == 1).all()
    sums = found.parts["evidence"].sum(-1)
    assert torch.allclose(sums, found.output_change[:, None].expand_as(sums), rtol=5e-3, atol=1e-3)
    assert found.output_change.abs().min() > 1e-2 and found.target.tolist() == [7, 8, 9]
    wide = attribute(model, make_batch(LENGTHS, width=14), objective=objective, **PATH)
    assert torch.allclose(wide.scores[:, :9], found.scores, atol=1e-4)
    for row, length in enumerate(LENGTHS):
        one = {key: value[row : row + 1, :length] for key, value in batch.items()}
        alone = attribute(model, one, objective=NextToken(7 + row, log_prob=log_prob), **PATH)
        assert torch.allclose(alone.scores[0], found.scores[row, :length], atol=1e-4)


def test_next_token_finds_its_position_behind_padding_on_the_left():
    model, batch = make_llama(), make_batch(LENGTHS)
    right = attribute(model, batch, objective=NextToken(7, position=[3, -2, 0]))
    with pytest.warns(UserWarning, match="padded on the left"):
        left = attribute(model, padded_left(batch), objective=NextToken(7, position=[3, -2, 0]))
    for row, length in enumerate(LENGTHS):
        assert torch.allclose(left.scores[row, 9 - length :], right.scores[row, :length], atol=1e-4)
    # A causal model's logit at a position depends on nothing behind it.
    assert (right.scores[0, 4:] == 0).all() and right.scores[0, :4].abs().max() > 1e-3
    assert (right.scores[1, 5:] == 0).all() and right.scores[1, 4].abs() > 0


class RowOfTheHead(nn.Module):
    """A classifier that reads the last real token with two rows of a language model's head."""

    def __init__(self, model, rows):
        super().__init__()
        self.transformer, self.config = model.transformer, model.config
        self.head = nn.Linear(24, 2, bias=False)
        self.head.weight = nn.Parameter(model.lm_head.weight.detach()[rows].clone())

    def forward(self, input_ids, attention_mask):
        hidden = self.transformer(input_ids, attention_mask=attention_mask).last_hidden_state
        last = attention_mask.sum(1) - 1
        return self.head(hidden[torch.arange(len(hidden)), last])


@pytest.mark.parametrize("method", ["ca_lig", "integrated_gradients", "generic_attention"])
def test_next_token_equals_a_classifier_with_that_row_of_the_head(method):
    model, batch = make_gpt2(), make_batch(LENGTHS)
    classifier = RowOfTheHead(model, [7, 11])
    by_token = attribute(model, batch, method, objective=NextToken(11))
    by_class = attribute(classifier, batch, method, target=1)
    assert torch.allclose(by_token.scores, by_class.scores, atol=1e-5) and by_token.scores.abs().max() > 1e-3
    pair = attribute(model, batch, method, objective=NextToken(7, against=11))
    contrast = attribute(classifier, batch, method, objective=Contrast(0, 1))
    assert torch.allclose(pair.scores, contrast.scores, atol=1e-5)


@pytest.mark.parametrize("method", ["ca_lig", "integrated_gradients", "attcat"])
def test_objectives_that_are_explained_together_are_explained_as_alone(method):
    model, batch = make_gpt2(), make_batch(LENGTHS)
    goals = [NextToken(7), NextToken([8, 9, 10], log_prob=True), NextToken(7, against=11)]
    together = attribute(model, batch, method, objective=goals)
    assert isinstance(together, list) and len(together) == 3
    for found, goal in zip(together, goals, strict=True):
        alone = attribute(model, batch, method, objective=goal)
        assert torch.equal(found.target, alone.target)
        assert torch.allclose(found.scores, alone.scores, atol=1e-5)
    assert not torch.allclose(together[0].scores, together[2].scores, atol=1e-2)


def test_objectives_that_are_explained_together_share_their_passes(monkeypatch):
    model, batch, calls = make_gpt2(), make_batch(LENGTHS), []
    original = ExplainableModel.trace
    monkeypatch.setattr(ExplainableModel, "trace", lambda *args, **kw: calls.append(1) or original(*args, **kw))
    attribute(model, batch, objective=NextToken(7))
    alone = len(calls)
    attribute(model, batch, objective=[NextToken(token) for token in (7, 8, 9, 10)])
    assert len(calls) == 2 * alone
    with pytest.raises(InputError, match="objective is an empty list"):
        attribute(model, batch, objective=[])


# --- what does not fit


@pytest.mark.parametrize(
    ("objective", "words"),
    [
        (NextToken(60), r"names a token that is not there; the model has 60"),
        (NextToken(-1), "names a token"),
        (NextToken(5, against=60), "names a token"),
        (NextToken(5, against=5), "both 5: their difference is 0"),
        (NextToken(5, position=7), "position 7 does not exist in example 1, which has 6 real tokens"),
        (NextToken(5, position=-7), "position -7 does not exist in example 1"),
        (NextToken([5, 6]), r"target has shape \(2,\); expected one integer, or \(3,\)"),
        (NextToken(0.5), "target takes integers, got torch.float32"),
        (Contrast(1, 0), r"\(2, 9, 60\); expected \(batch, classes\). A language model is explained by objective=Next"),
        (ClassLogit(torch.tensor(0)), "expected .batch, classes."),
        (Regression(), r"\(3, 9, 60\); a regression has one output"),
    ],
)
def test_what_does_not_fit_a_language_model(objective, words):
    with pytest.raises(InputError, match=words):
        attribute(make_gpt2(), make_batch(LENGTHS), objective=objective)


@pytest.mark.parametrize(
    ("objective", "words"),
    [
        (NextToken(5), r"\(2, 3\); NextToken needs \(batch, tokens, vocabulary\)"),
        (Contrast(3, 0), r"\[3, 3, 3\] names a class that is not there; the model has 3"),
        (Contrast(0, -1), "names a class"),
        (Contrast([0, 1, 2], [1, 1, 1]), "both 1"),
        (ClassLogit(torch.tensor([0, 1])), r"target has shape \(2,\)"),
        (ClassLogit(torch.tensor(7)), "names a class"),
    ],
)
def test_what_does_not_fit_a_classifier(bert, batch, objective, words):
    with pytest.raises(InputError, match=words):
        attribute(bert, batch, objective=objective)


def test_a_language_model_without_an_objective_says_how_to_name_one():
    with pytest.raises(InputError, match="objective=NextToken"):
        attribute(make_gpt2(), make_batch(LENGTHS))


# --- read-out weights


class FirstAndLast(BertForSequenceClassification):
    """A head that reads two places: the first token and the last real one."""

    def forward(self, input_ids, attention_mask):
        hidden = self.bert(input_ids, attention_mask=attention_mask).last_hidden_state
        last = hidden[torch.arange(len(hidden)), attention_mask.sum(1) - 1]
        return SequenceClassifierOutput(logits=self.classifier(hidden[:, 0] * last.tanh()))


class MeanPooled(BertForSequenceClassification):
    """A head on the mean of the real tokens."""

    def forward(self, input_ids, attention_mask):
        hidden = self.bert(input_ids, attention_mask=attention_mask).last_hidden_state
        real = attention_mask[..., None]
        return SequenceClassifierOutput(logits=self.classifier((hidden * real).sum(1) / real.sum(1)))


def readout(model, batch):
    wrapped = ExplainableModel(model)
    with wrapped.session():
        inputs = wrapped.prepare(batch)
        return find_ends(wrapped, inputs, ClassLogit(torch.tensor([0, 1, 0])), "pad", [0]).readout


def test_readout_of_the_first_token_of_a_mean_and_of_two_places(bert, batch):
    mask = batch["attention_mask"].float()
    first = torch.zeros_like(mask)
    first[:, 0] = 1
    assert torch.equal(readout(bert, batch), first)
    assert torch.equal(readout(MeanPooled(bert.config).eval(), batch), mask / mask.sum(1, keepdim=True))
    both = first / 2
    both[torch.arange(3), batch["attention_mask"].sum(1) - 1] = 0.5
    model = FirstAndLast(bert.config).eval()
    assert torch.equal(readout(model, batch), both)
    # Row w of the rollout is then the mean of the two readers' rows.
    result = attribute(model, batch, target=[0, 1, 0])
    assert result.scores[:, 1:].abs().max() > 0 and (result.scores[mask == 0] == 0).all()


def test_readout_of_the_last_token():
    from transformers import GPT2ForSequenceClassification

    torch.manual_seed(0)
    config = make_gpt2().config
    config.num_labels = 2
    weights = readout(GPT2ForSequenceClassification(config).eval(), make_batch(LENGTHS))
    assert torch.equal(weights.argmax(1), torch.tensor(LENGTHS) - 1) and torch.equal(weights.sum(1), torch.ones(3))
    distil = DistilBertForSequenceClassification(
        DistilBertConfig(vocab_size=60, dim=24, n_layers=2, n_heads=3, hidden_dim=48, pad_token_id=0)
    ).eval()
    assert torch.equal(readout(distil, make_batch(LENGTHS)).argmax(1), torch.zeros(3, dtype=torch.long))
