"""Randomisation: which weights become fresh in which order, that the trained ones come back, and what it tells."""

import pytest
import torch
from conftest import make_batch, make_bert
from scipy.stats import spearmanr
from test_engine_invariants import assert_same, footprint
from torch import nn
from transformers import (
    AlbertConfig,
    AlbertForSequenceClassification,
    AutoModelForSequenceClassification,
    DistilBertConfig,
    DistilBertForSequenceClassification,
    GPT2Config,
    GPT2ForSequenceClassification,
)

from calig.pipeline.attribution import ExplainableModel, UnsupportedModelError, attribute
from calig.pipeline.attribution.reset import initialise_anew, parts_from_the_top, weights_kept
from calig.pipeline.errors import InputError
from calig.pipeline.metrics import is_flagged, randomisation_rows, rank_correlation

IDS = [4, 5, 6]


def steps_of(model, batch):
    wrapped = ExplainableModel(model)
    with wrapped.session():
        return parts_from_the_top(wrapped, batch)


def measure(model, batch, methods=("input_x_gradient",), ids=IDS, options=None, **arguments):
    options = options or {}
    results = {name: attribute(model, batch, name, target=1, **options.get(name, {})) for name in methods}
    facts = next(iter(results.values()))
    return randomisation_rows(
        ExplainableModel(model),
        batch,
        {name: result.scores for name, result in results.items()},
        target=facts.target,
        special=facts.special,
        mask=facts.mask,
        sample_ids=ids,
        options=options,
        **arguments,
    )


def table(rows):
    return {(row["method"], row["sample_id"], row["q"]): row["value"] for row in rows}


def test_correlation_equals_scipy_on_evaluable_positions():
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(4, 9, generator=generator), torch.randn(4, 9, generator=generator)
    a[0, 3] = a[0, 5]  # a tie
    evaluable = torch.rand(4, 9, generator=generator) > 0.2
    evaluable[3] = False
    evaluable[3, 2] = True
    got = rank_correlation(a, b, evaluable)
    for row in range(3):
        kept = evaluable[row]
        assert got[row] == pytest.approx(spearmanr(a[row][kept], b[row][kept]).statistic, abs=1e-9)
    assert got[3].isnan()  # one position has no ranking
    with pytest.raises(InputError, match="one shape"):
        rank_correlation(a, b[:2], evaluable)


def test_head_first_then_the_blocks_from_the_top(bert, batch):
    steps = steps_of(bert, batch)
    assert [share for share, _ in steps] == [0, 1 / 3, 2 / 3, 1]
    assert steps[0][1] == [bert.bert.pooler.dense, bert.classifier]
    assert [modules for _, modules in steps[1:]] == [[block] for block in reversed(bert.bert.encoder.layer)]


def test_final_norms_belong_to_the_head_and_the_embedding_to_nothing(batch):
    config = GPT2Config(vocab_size=60, n_embd=24, n_layer=2, n_head=3, n_positions=40, pad_token_id=0)
    model = GPT2ForSequenceClassification(config).eval()
    (share, head), *_ = steps_of(model, batch)
    assert share == 0 and head == [model.transformer.ln_f, model.score]
    config = DistilBertConfig(vocab_size=60, dim=24, n_layers=2, n_heads=3, hidden_dim=48, pad_token_id=0)
    model = DistilBertForSequenceClassification(config).eval()
    assert steps_of(model, batch)[0][1] == [model.pre_classifier, model.classifier]


def albert(groups):
    config = AlbertConfig(
        vocab_size=60,
        embedding_size=8,
        hidden_size=24,
        num_hidden_layers=4,
        num_hidden_groups=groups,
        num_attention_heads=3,
        intermediate_size=48,
        pad_token_id=0,
        initializer_range=0.3,
    )
    torch.manual_seed(0)
    return AlbertForSequenceClassification(config).eval()


@pytest.mark.parametrize(("groups", "shares"), [(1, [0, 1]), (2, [0, 0.5, 1])])
def test_a_block_that_is_called_often_goes_once_with_all_its_calls(groups, shares, batch):
    assert [share for share, _ in steps_of(albert(groups), batch)] == shares


def test_blocks_that_share_all_weights_are_fresh_together(batch):
    model = make_bert(layers=3)
    one, _, three = model.bert.encoder.layer
    for name, parameter in list(three.named_parameters()):
        parent, _, leaf = name.rpartition(".")
        setattr(one.get_submodule(parent), leaf, parameter)
    steps = steps_of(model, batch)
    assert [share for share, _ in steps] == [0, 2 / 3, 1]
    assert steps[1][1] == [three]


@pytest.mark.parametrize("saved", [False, True])
def test_fresh_weights_are_those_of_the_class_also_for_a_loaded_model(saved, batch, tmp_path):
    """Loading marks tensors as initialised, and transformers then refuses to initialise them again."""
    model = make_bert(layers=2)
    if saved:
        model.save_pretrained(tmp_path)
        model = AutoModelForSequenceClassification.from_pretrained(tmp_path).eval()
    model.config.initializer_range = 0.07
    wrapped = ExplainableModel(model)
    block = model.bert.encoder.layer[1]
    before = {name: value.clone() for name, value in model.state_dict().items()}
    flags = [vars(parameter).get("_is_hf_initialized") for parameter in model.parameters()]
    with weights_kept([block]):
        initialise_anew(wrapped, [block], seed=0, step=0)
        dense = block.intermediate.dense
        assert dense.weight.detach().std() == pytest.approx(0.07, rel=0.1) and (dense.bias == 0).all()
        assert (block.output.LayerNorm.weight == 1).all()
        changed = {name for name, value in model.state_dict().items() if not torch.equal(before[name], value)}
        assert changed and all(name.startswith("bert.encoder.layer.1.") for name in changed)
        fresh = dense.weight.clone()
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert flags == [vars(parameter).get("_is_hf_initialized") for parameter in model.parameters()]
    for seed, same in ((0, True), (1, False)):
        with weights_kept([block]):
            torch.manual_seed(seed + 17)  # what was drawn before does not matter
            initialise_anew(wrapped, [block], seed=seed, step=0)
            assert torch.equal(fresh, dense.weight) == same


@pytest.mark.parametrize("error", [None, KeyboardInterrupt, RuntimeError])
def test_weights_come_back_bit_by_bit_and_no_random_number_is_used_up(error, bert, batch, monkeypatch):
    from calig.pipeline.metrics import randomisation

    before = footprint(bert)
    if error is None:
        measure(bert, batch, ["ca_lig"])
    else:
        real, calls = randomisation.attribute, []

        def fail(*arguments, **named):
            calls.append(1)
            if len(calls) == 3:
                assert not torch.equal(before[5]["classifier.weight"], bert.classifier.weight)
                raise error
            return real(*arguments, **named)

        monkeypatch.setattr(randomisation, "attribute", fail)
        with pytest.raises(error):
            measure(bert, batch, ["ca_lig"])
    assert_same(before, footprint(bert))


def test_it_works_under_inference_mode_as_the_stage_runs_it(bert, batch):
    with torch.inference_mode():
        inside = table(measure(bert, {key: value.clone() for key, value in batch.items()})[0])
    assert inside == table(measure(bert, batch)[0])
    bert.classifier.weight.sum().backward()  # the weights can still be trained


@pytest.mark.parametrize("method", ["ca_lig", "attention_rollout"])
def test_batch_and_padding_do_not_matter(bert, method):
    lengths = (9, 6, 8)
    together = table(measure(bert, make_batch(lengths, width=14), [method])[0])
    assert len(together) == 3 * 5
    for row, length in enumerate(lengths):
        one = {key: value[row : row + 1, :length] for key, value in make_batch(lengths).items()}
        for key, value in table(measure(bert, one, [method], IDS[row : row + 1])[0]).items():
            assert value == pytest.approx(together[key], abs=1e-6)


def test_the_number_without_q_is_the_last_step_and_rollout_ignores_the_head(bert, batch):
    rows = table(measure(bert, batch, ["attention_rollout", "input_x_gradient"])[0])
    for method in ("attention_rollout", "input_x_gradient"):
        for sample in IDS:
            assert rows[method, sample, None] == rows[method, sample, 1]
    # Attention rollout never looks at the head: the check must see that.
    assert all(rows["attention_rollout", sample, 0] == 1 for sample in IDS)
    assert not all(rows["input_x_gradient", sample, 0] == 1 for sample in IDS)


def test_a_method_that_ignores_the_model_is_flagged_and_one_that_follows_it_is_not():
    bert = make_bert(layers=2)
    batch = make_batch((20,) * 8)
    rows = table(measure(bert, batch, ["random", "integrated_gradients"], range(8))[0])
    means = {
        method: sum(rows[method, sample, None] for sample in range(8)) / 8
        for method in ("random", "integrated_gradients")
    }
    assert means["random"] == pytest.approx(1) and is_flagged(means["random"])
    assert abs(means["integrated_gradients"]) < 0.35 and not is_flagged(means["integrated_gradients"])
    assert not is_flagged(None)


def test_undefined_correlations_are_skipped_and_scores_that_are_not_finite_named(bert, monkeypatch):
    from dataclasses import replace

    from calig.pipeline.metrics import randomisation

    batch = make_batch((3, 6, 8))  # one evaluable position has no ranking
    real = randomisation.attribute

    def broken(*arguments, **named):
        result = real(*arguments, **named)
        scores = result.scores.clone()
        scores[1, 2] = float("inf")
        return replace(result, scores=scores)

    monkeypatch.setattr(randomisation, "attribute", broken)
    rows, errors = measure(bert, batch)
    assert {row["sample_id"] for row in rows} == {4, 6}
    assert all(row["value"] is None for row in rows if row["sample_id"] == 4)
    assert all(row["value"] is not None for row in rows if row["sample_id"] == 6)
    assert [(error.sample_id, error.method) for error in errors] == [(5, "input_x_gradient")]


def test_a_model_whose_weights_cannot_be_made_anew_is_named(batch):
    class Scale(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.ones(8))

        def forward(self, state):
            return state * self.scale

    class Plain(nn.Module):
        def __init__(self):
            super().__init__()
            self.words = nn.Embedding(60, 8)
            self.blocks = nn.ModuleList([Scale(), Scale()])
            self.head = nn.Linear(8, 2)

        def forward(self, input_ids):
            state = self.words(input_ids)
            for block in self.blocks:
                state = block(state)
            return self.head(state.mean(1))

    model = Plain()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(UnsupportedModelError, match="Scale of 'Plain' cannot be initialised anew"):
        measure(model, {"input_ids": batch["input_ids"], "special_tokens_mask": batch["special_tokens_mask"]})
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
