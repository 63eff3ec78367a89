"""What a causal language model would write next: against closed forms, Captum and the engine's own parts."""

import dataclasses
import re
import warnings

import pytest
import torch
from captum.attr import IntegratedGradients
from language_models import (
    FAMILIES,
    TEXTS,
    byte_level_tokenizer,
    make_folder,
    make_language_model,
    sentence_piece_tokenizer,
)
from test_explain_api import make_folder as make_classifier
from torch import nn

from calig.pipeline import NextTokenExplanation, explain, explain_next_token
from calig.pipeline.attribution import NextToken, attribute
from calig.pipeline.errors import InputError
from calig.pipeline.explained import SampleFailure
from calig.pipeline.opening import open_language_model

PROMPT = "the capital of France is"


@pytest.fixture(scope="module")
def byte_level():
    return byte_level_tokenizer()


@pytest.fixture(scope="module")
def gpt2(byte_level):
    return make_language_model("gpt2", byte_level)


def logits_behind(model, tokenizer, text):
    with torch.no_grad():
        return model(**tokenizer(text, return_tensors="pt")).logits[0, -1]


def scores(explanation):
    return torch.tensor(explanation.scores)


def test_by_default_the_likeliest_token_is_explained(gpt2, byte_level):
    found = explain_next_token(gpt2, TEXTS, tokenizer=byte_level, steps=9, batch_size=3)
    for explanation, text in zip(found, TEXTS, strict=True):
        logits = logits_behind(gpt2, byte_level, text)
        assert isinstance(explanation, NextTokenExplanation) and explanation.text == text
        assert explanation.target == explanation.prediction == int(logits.argmax())
        assert explanation.probability == pytest.approx(float(logits.softmax(0).amax()), abs=1e-5)
        assert explanation.versus is None and explanation.label is None


@pytest.mark.parametrize("family", FAMILIES)
def test_completeness_at_every_layer_in_every_family(family):
    tokenizer = sentence_piece_tokenizer() if family == "llama" else byte_level_tokenizer()
    model = make_language_model(family, tokenizer, dtype=torch.float64)
    for settings in ({}, {"log_prob": True}, {"versus": " London"}):
        (found,) = explain_next_token(model, [PROMPT], target=" Paris", tokenizer=tokenizer, steps=200, **settings)
        assert found.completeness_gap < 0.02, (family, settings, found.completeness_gap)  # the worst of all layers
        assert max(map(abs, found.scores)) > 1e-3
    assert found.tokens[0] == ("<s>" if family == "llama" else "the")


def test_a_contrast_is_the_difference_of_its_two_tokens(gpt2, byte_level):
    options = {"tokenizer": byte_level, "method": "integrated_gradients", "steps": 40}
    paris, london = (explain_next_token(gpt2, TEXTS, target=token, **options) for token in (" Paris", " London"))
    both = explain_next_token(gpt2, TEXTS, target=" Paris", versus=" London", **options)
    by_probability = explain_next_token(gpt2, TEXTS, target=" Paris", versus=" London", log_prob=True, **options)
    for one, other, pair, ratio in zip(paris, london, both, by_probability, strict=True):
        assert torch.allclose(scores(pair), scores(one) - scores(other), atol=1e-5)
        # What all tokens have in common drops out of the ratio of two probabilities.
        assert torch.allclose(scores(ratio), scores(pair), atol=1e-4)
        assert (pair.target, pair.versus) == (one.target, other.target)
        assert (pair.probability, pair.versus_probability) == (one.probability, other.probability)


class FromEmbeddings(nn.Module):
    """The next-token logits of a language model as a function of its word vectors."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, embeddings):
        return self.model(inputs_embeds=embeddings).logits[:, -1]


@pytest.mark.parametrize("family", ["llama", "qwen3"])  # what enters their blocks is the word vector alone
def test_integrated_gradients_equal_captums(family):
    tokenizer = byte_level_tokenizer()
    model = make_language_model(family, tokenizer, dtype=torch.float64)
    ids = tokenizer(PROMPT, return_tensors="pt")["input_ids"]
    target = tokenizer(" Paris")["input_ids"][0]
    table = model.get_input_embeddings()
    with torch.no_grad():
        embeddings, pad = table(ids), table(torch.full_like(ids, tokenizer.eos_token_id))
    reference = IntegratedGradients(FromEmbeddings(model)).attribute(
        embeddings, pad, target=target, n_steps=12, method="gausslegendre"
    )
    (found,) = explain_next_token(
        model, [PROMPT], target=" Paris", tokenizer=tokenizer, method="integrated_gradients", steps=12
    )
    assert torch.allclose(scores(found).double(), reference.sum(-1)[0], atol=1e-5)
    assert scores(found).abs().max() > 1e-2


def test_batches_and_padding_change_nothing(gpt2, byte_level):
    options = {"tokenizer": byte_level, "target": " Paris", "steps": 9}
    together = explain_next_token(gpt2, TEXTS, batch_size=4, **options)
    alone = explain_next_token(gpt2, TEXTS, batch_size=1, **options)
    left = byte_level_tokenizer()
    left.padding_side = "left"  # Llama's tokenizers come so; batches are made on the right all the same
    other = explain_next_token(gpt2, TEXTS, batch_size=4, **{**options, "tokenizer": left})
    for one, two, three in zip(together, alone, other, strict=True):
        assert torch.allclose(scores(one), scores(two), atol=1e-4) and torch.allclose(scores(one), scores(three))
    assert byte_level.pad_token is None  # the caller's own stays as it was


def test_the_same_as_the_engine_says(gpt2, byte_level):
    (found,) = explain_next_token(gpt2, [PROMPT], target=" Paris", tokenizer=byte_level, steps=9)
    padded = byte_level_tokenizer()
    padded.pad_token = padded.eos_token
    batch = dict(padded(PROMPT, return_tensors="pt"))
    options = {"objective": NextToken(found.target), "tokenizer": padded, "steps": 9}
    by_hand = attribute(gpt2, batch, fusion="carried", lam=0.5, **options)
    assert torch.allclose(scores(found), by_hand.scores[0], atol=1e-5)
    assert torch.allclose(torch.tensor(found.layer_scores), by_hand.layer_scores[0], atol=1e-5)
    # What is asked for wins over what suits causal models.
    for given in ({"fusion": "column"}, {"attention_gradient": "signed"}):
        (other,) = explain_next_token(gpt2, [PROMPT], target=" Paris", tokenizer=byte_level, steps=9, **given)
        assert torch.allclose(scores(other), attribute(gpt2, batch, **given, **options).scores[0], atol=1e-5)


def test_the_likeliest_tokens_together(gpt2, byte_level):
    found = explain_next_token(gpt2, TEXTS[:2], top=3, tokenizer=byte_level, steps=9)
    assert [explanation.sample_id for explanation in found] == [0, 0, 0, 1, 1, 1]
    for number, text in enumerate(TEXTS[:2]):
        own = found[3 * number : 3 * number + 3]
        assert [one.target for one in own] == logits_behind(gpt2, byte_level, text).topk(3).indices.tolist()
        for one in own:
            (alone,) = explain_next_token(gpt2, [text], target=one.target, tokenizer=byte_level, steps=9)
            assert torch.allclose(scores(one), scores(alone), atol=1e-4)


def test_position_asks_for_what_is_written_in_the_middle(gpt2, byte_level):
    whole = byte_level(PROMPT)["input_ids"]
    for position, kept in ((1, 2), (-2, len(whole) - 1)):
        (found,) = explain_next_token(gpt2, [PROMPT], position=position, tokenizer=byte_level, steps=9)
        prompt = byte_level.decode(whole[:kept])
        (cut,) = explain_next_token(gpt2, [prompt], tokenizer=byte_level, steps=9)
        assert found.tokens == cut.tokens and found.target == cut.target and torch.allclose(scores(found), scores(cut))
    with pytest.raises(InputError, match=r"position 5 does not exist in texts\[0\], which has 5 tokens"):
        explain_next_token(gpt2, [PROMPT], position=5, tokenizer=byte_level)
    pieces = sentence_piece_tokenizer()
    with pytest.raises(InputError, match=r"position 0 of texts\[0\] is a special token"):
        explain_next_token(make_language_model("llama", pieces), [PROMPT], position=0, tokenizer=pieces)


def test_an_end_that_the_tokenizer_adds_is_not_part_of_the_prompt():
    plain, ended = sentence_piece_tokenizer(), sentence_piece_tokenizer()
    ended.add_eos_token = True
    assert ended(PROMPT)["input_ids"][-1] == ended.eos_token_id != plain(PROMPT)["input_ids"][-1]
    model = make_language_model("llama", plain)
    one, other = (explain_next_token(model, [PROMPT], tokenizer=own, steps=9)[0] for own in (plain, ended))
    assert one.tokens == other.tokens and one.scores == other.scores


def test_two_forms_of_a_word_are_told_and_the_likelier_is_taken(gpt2, byte_level):
    blank, bare = byte_level(" the")["input_ids"][0], byte_level("the")["input_ids"][0]
    with pytest.warns(UserWarning, match=f'target \'the\' is two tokens of this model, " the" and "the".*id:{blank}'):
        found = explain_next_token(gpt2, TEXTS, target="the", tokenizer=byte_level, steps=4)
    for explanation, text in zip(found, TEXTS, strict=True):
        logits = logits_behind(gpt2, byte_level, text)
        assert explanation.target == (blank if logits[blank] > logits[bare] else bare)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for exact in (" the", f"id:{bare}", bare):
            explain_next_token(gpt2, [PROMPT], target=exact, tokenizer=byte_level, steps=4)


def test_what_is_shown(gpt2, byte_level):
    (found,) = explain_next_token(gpt2, [PROMPT], target=" Paris", versus=" London", tokenizer=byte_level, steps=9)
    shown = str(found)
    head = r'next " Paris" \S+ · rather than " London" \S+ · most likely "[^"]+" · ca_lig · completeness gap'
    assert re.match(head, shown)
    assert PROMPT in shown and "opposes" in shown
    assert "next &quot; Paris&quot;" in found._repr_html_()
    assert "&lt;b&gt;" in dataclasses.replace(found, token_names={found.target: "<b>"})._repr_html_()
    assert 'next " Paris" 0.125' in str(dataclasses.replace(found, probability=0.125))


def test_curves_follow_the_probability_of_the_token(gpt2, byte_level):
    (found,) = explain_next_token(gpt2, [PROMPT], target=" Paris", tokenizer=byte_level, steps=9, curves=True)
    paris, ids = found.target, byte_level(PROMPT, return_tensors="pt")["input_ids"]
    best = max(range(ids.shape[1]), key=lambda i: found.scores[i])
    keep = torch.ones_like(ids)
    keep[0, best] = 0  # no mask token: hidden from attention
    last = int(keep[0].nonzero().max())
    with torch.no_grad():
        without = gpt2(ids, attention_mask=keep).logits[0, last].softmax(0)[paris]
    removed = dict(found.curves["none"]["removed"])
    assert removed[0.0] == pytest.approx(found.probability, abs=1e-6)
    assert removed[0.2] == pytest.approx(float(without), abs=1e-6)  # one of five tokens
    assert set(found.curves) == {"none", "random", "reversed"}
    assert found.plot_curves() is not None


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"target": "Parisian"}, ['" Paris" + "i"', "a model writes one at a time"]),
        ({"target": " Paris", "versus": " Paris"}, ['texts[0]: target and versus are both " Paris"']),
        ({"top": 0}, ["top takes 1 or more, got 0"]),
        ({"top": 3, "target": " Paris"}, ["top=3", "either it, or target and versus"]),
        ({"method": "ca_lik"}, ["ca_lik", "ca_lig"]),
        ({"batch_size": 0}, ["batch_size takes 1 or more"]),
        ({"texts": []}, ["texts is empty"]),
        ({"texts": [" "]}, ["texts[0] is empty"]),
        ({"texts": ["the " * 60]}, ["texts[0] is", "the model takes 48", "Shorten it"]),
    ],
)
def test_mistakes(gpt2, byte_level, settings, words):
    given = {"texts": [PROMPT], **settings}
    with pytest.raises(InputError) as error:
        explain_next_token(gpt2, given.pop("texts"), tokenizer=byte_level, **given)
    assert all(word in str(error.value) for word in words), str(error.value)


def test_a_default_target_that_is_set_against_itself_says_so(gpt2, byte_level):
    likeliest = int(logits_behind(gpt2, byte_level, PROMPT).argmax())
    with pytest.raises(InputError, match="the most likely one; name two different tokens"):
        explain_next_token(gpt2, [PROMPT], versus=likeliest, tokenizer=byte_level)


def test_sources(tmp_path, byte_level):
    model, tokenizer = make_folder(tmp_path / "lm")
    (of_folder,) = explain_next_token(tmp_path / "lm", [PROMPT], steps=9)
    (of_live,) = explain_next_token(model, [PROMPT], tokenizer=tokenizer, steps=9)
    assert of_folder.tokens == of_live.tokens and torch.allclose(scores(of_folder), scores(of_live), atol=1e-5)
    assert open_language_model(tmp_path / "lm").model.config.tie_word_embeddings  # its head has no weights of its own
    with pytest.raises(InputError, match="not a whole classifier.*would write next is explained by --next-token"):
        explain(tmp_path / "lm", [PROMPT])
    classifier, own = make_classifier(tmp_path / "classifier")
    with pytest.raises(InputError, match="holds a BertForSequenceClassification, no causal language model.*without"):
        explain_next_token(tmp_path / "classifier", [PROMPT])
    with pytest.raises(InputError, match=r"the model's logits have shape \(1, 2\); a causal language model returns"):
        explain_next_token(classifier, [PROMPT], tokenizer=own)
    with pytest.raises(InputError, match="a source is a path or a live model, got int"):
        explain_next_token(3, [PROMPT])
    untied = make_language_model("llama", byte_level)
    untied.model.save_pretrained(tmp_path / "body")
    byte_level.save_pretrained(tmp_path / "body")
    with pytest.raises(InputError, match="holds a LlamaModel, no causal language model"):
        explain_next_token(tmp_path / "body", [PROMPT])


def test_a_model_that_returns_nan_names_the_prompt(byte_level):
    model = make_language_model("gpt2", byte_level)
    with torch.no_grad():
        model.transformer.wte.weight[byte_level(" film")["input_ids"][0]] = torch.nan
    model.lm_head.weight = nn.Parameter(torch.randn_like(model.lm_head.weight))
    with pytest.raises(SampleFailure, match="text 1 was not explained by 'ca_lig': the model's output is not finite"):
        explain_next_token(model, [PROMPT, "a good film"], tokenizer=byte_level, steps=4)
