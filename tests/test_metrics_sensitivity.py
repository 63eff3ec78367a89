"""sensitivity_max against Captum and by hand; its noise depends on the seed and the sample alone."""

import pytest
import torch
from captum.metrics import sensitivity_max as captum_sensitivity_max
from conftest import make_batch, make_bert
from test_engine_invariants import assert_same, footprint
from torch import nn
from transformers import AlbertConfig, AlbertForSequenceClassification, RobertaConfig, RobertaForSequenceClassification

from calig.pipeline.attribution import ExplainableModel, UnsupportedModelError, attribute
from calig.pipeline.attribution.noise import embedding_noise, embedding_width
from calig.pipeline.errors import InputError
from calig.pipeline.metrics import sensitivity_max, sensitivity_rows
from calig.pipeline.metrics.sensitivity import draw_noise, noisy_scores, take_rows

METHODS = ["ca_lig", "integrated_gradients", "generic_attention", "attention_rollout", "input_x_gradient"]


def measure(model, batch, methods, ids, *, target=1, options=None, seed=0, **arguments):
    options = options or {}
    wrapped = ExplainableModel(model)
    results = {name: attribute(wrapped, batch, name, target=target, **options.get(name, {})) for name in methods}
    first = next(iter(results.values()))
    return sensitivity_rows(
        wrapped,
        batch,
        {name: result.scores for name, result in results.items()},
        target=first.target,
        special=first.special,
        mask=first.mask,
        sample_ids=ids,
        options=options,
        seed=seed,
        **arguments,
    )


def values(rows):
    return {(row["method"], row["sample_id"]): row["value"] for row in rows}


def gradient_times_input(model, batch, words, target):
    """Input x gradient at the embedding output, written out for BERT's own modules."""
    where = {"attention_mask": batch["attention_mask"]}
    with torch.no_grad():
        end = model.bert.embeddings(inputs_embeds=words)
    hook = model.bert.encoder.layer[0].register_forward_pre_hook(lambda _, args: (end.requires_grad_(), *args[1:]))
    try:
        with torch.enable_grad():
            logits = model(inputs_embeds=words, **where).logits
            (gradient,) = torch.autograd.grad(logits[torch.arange(len(words)), target].sum(), end)
    finally:
        hook.remove()
    return torch.where(batch["attention_mask"].bool(), (gradient * end).sum(-1).detach(), 0.0)


def test_equals_captum_with_the_same_draws(bert):
    batch, ids, draws = make_batch((9, 6, 8)), [40, 7, 2**33], 10
    rows, errors = measure(bert, batch, ["input_x_gradient"], ids, target=2, seed=5)
    assert not errors
    content = batch["attention_mask"].bool() & ~batch["special_tokens_mask"].bool()
    words = bert.bert.embeddings.word_embeddings(batch["input_ids"]).detach()

    def perturb(inputs, radius):
        assert radius == 0.02 and len(inputs) == 3 * draws
        noise = torch.zeros_like(inputs).view(3, draws, *inputs.shape[1:])
        for b, sample_id in enumerate(ids):
            noise[b][:, content[b]] = draw_noise(int(content[b].sum()), 24, seed=5, sample_id=sample_id, draws=draws)
        return inputs + noise.view_as(inputs)

    def explain(inputs, **_):
        inputs = inputs[0] if isinstance(inputs, tuple) else inputs
        every = {key: value.repeat_interleave(len(inputs) // 3, 0) for key, value in batch.items()}
        return (gradient_times_input(bert, every, inputs, torch.full((len(inputs),), 2)),)

    expected = captum_sensitivity_max(explain, words, perturb, perturb_radius=0.02, n_perturb_samples=draws)
    got = torch.tensor([row["value"] for row in rows])
    assert (got > 1e-3).all()
    torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-6)


def test_by_hand():
    mask = torch.tensor([[True, True, False], [True, True, True]])
    scores = torch.tensor([[3.0, 4.0, 99.0], [0.0, 0.0, 0.0]])
    moved = torch.tensor([[[3.0, 4.0, 7.0], [0.0, 8.0, 7.0]], [[1.0, 0.0, 0.0]] * 2])
    first, second = sensitivity_max(scores, moved, mask).tolist()
    assert first == pytest.approx(1.0)  # |(-3, 4)| / |(3, 4)|; the padded position does not count
    assert second != second  # nothing can be relative to 0
    with pytest.raises(InputError, match=r"\(B, R, T\)"):
        sensitivity_max(scores, scores, mask)


def test_noise_fills_the_ball_and_depends_on_seed_and_sample_alone():
    state = torch.get_rng_state()
    noise = draw_noise(50, 24, seed=3, sample_id=8)
    assert noise.shape == (10, 50, 24)
    assert 0.0199 < noise.abs().max() <= 0.02 and abs(float(noise.mean())) < 2e-4
    assert noise.std() == pytest.approx(0.02 / 3**0.5, rel=0.02)  # uniform
    assert torch.equal(noise, draw_noise(50, 24, seed=3, sample_id=8))
    for other in (draw_noise(50, 24, seed=4, sample_id=8), draw_noise(50, 24, seed=3, sample_id=9)):
        assert not torch.equal(noise, other)
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize("method", METHODS)
def test_batch_and_padding_do_not_matter_and_nothing_is_left_behind(bert, method):
    lengths, ids = (9, 6, 8), [4, 5, 6]
    before = footprint(bert)
    options = {"ca_lig": {"steps": "auto"}, "integrated_gradients": {"steps": 5}}
    together, _ = measure(bert, make_batch(lengths), [method], ids, options=options)
    wide, _ = measure(bert, make_batch(lengths, width=17), [method], ids, options=options)
    together, wide = values(together), values(wide)
    for row, length in enumerate(lengths):
        one = {key: value[row : row + 1, :length] for key, value in make_batch(lengths).items()}
        alone, _ = measure(bert, one, [method], [ids[row]], options=options)
        (value,) = values(alone).values()
        assert value > 1e-4
        assert value == pytest.approx(together[method, ids[row]], rel=1e-3)
        assert value == pytest.approx(wide[method, ids[row]], rel=1e-3)
    assert_same(before, footprint(bert))


def test_more_radius_moves_more_and_none_moves_nothing(bert, batch):
    none, some, more = (
        values(measure(bert, batch, ["ca_lig"], [1, 2, 3], radius=radius)[0]) for radius in (0.0, 0.02, 0.2)
    )
    for key in none:
        assert none[key] < 1e-5 < some[key] < more[key]


def families():
    small = {"vocab_size": 60, "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3}
    torch.manual_seed(0)
    yield "roberta", RobertaForSequenceClassification(RobertaConfig(**small, intermediate_size=48, pad_token_id=0))
    narrow = AlbertConfig(**small, intermediate_size=48, embedding_size=8, pad_token_id=0)
    yield "albert", AlbertForSequenceClassification(narrow)


@pytest.mark.parametrize(("name", "model"), list(families()), ids=lambda value: value if isinstance(value, str) else "")
def test_noise_goes_where_it_is_put(name, model, batch):
    """Against `inputs_embeds`. RoBERTa takes positions from the ids, ALBERT's words are narrower than its blocks."""
    model.eval()
    wrapped = ExplainableModel(model)
    ids, mask = batch["input_ids"], batch["attention_mask"]
    where = mask.bool() & ~batch["special_tokens_mask"].bool()
    width = embedding_width(wrapped, ids)
    assert width == (8 if name == "albert" else 24)
    noise = 0.5 * torch.randn(int(where.sum()), width, generator=torch.Generator().manual_seed(1))
    words = model.get_input_embeddings()(ids)
    words[where] += noise
    positions = {"position_ids": (mask.cumsum(1) * mask)} if name == "roberta" else {}
    with torch.no_grad():
        expected = model(inputs_embeds=words, attention_mask=mask, **positions).logits
        with embedding_noise(wrapped, ids, where, noise) as fed:
            got = model(input_ids=fed, attention_mask=mask).logits
            swapped = model(input_ids=fed[[2, 0, 2]], attention_mask=mask[[2, 0, 2]]).logits
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(swapped, expected[[2, 0, 2]], rtol=1e-4, atol=1e-5)
    assert "forward" not in vars(model.get_input_embeddings())


def test_a_word_embedding_that_does_not_run_is_named():
    class Detour(nn.Module):
        """Looks its words up by hand."""

        def __init__(self):
            super().__init__()
            self.words = nn.Embedding(60, 8)
            self.blocks = nn.ModuleList(nn.TransformerEncoderLayer(8, 2, 16, 0.0, batch_first=True) for _ in range(2))

        def forward(self, input_ids):
            state = self.words.weight[input_ids % 60]
            for block in self.blocks:
                state = block(state)
            return state.mean(1)

    model = ExplainableModel(Detour().eval())
    ids = torch.tensor([[5, 6]])
    with (
        pytest.raises(UnsupportedModelError, match="does not run"),
        embedding_noise(model, ids, torch.ones(1, 2).bool(), torch.zeros(2, 8)) as fed,
    ):
        model.module(fed)


def test_scores_that_are_not_finite_are_an_error_of_the_sample_alone(bert, batch, monkeypatch):
    from calig.pipeline.metrics import sensitivity

    real = sensitivity.noisy_scores

    def broken(*arguments, **named):
        scores = real(*arguments, **named)
        scores[1, 3, 2] = float("nan")
        return scores

    monkeypatch.setattr(sensitivity, "noisy_scores", broken)
    rows, errors = measure(bert, batch, ["input_x_gradient"], [4, 5, 6])
    assert [row["sample_id"] for row in rows] == [4, 6]
    assert [(error.sample_id, error.method) for error in errors] == [(5, "input_x_gradient")]


def test_a_score_of_zero_everywhere_has_no_relative_change(bert, batch):
    scores = {"input_x_gradient": torch.zeros(batch["input_ids"].shape)}
    facts = attribute(bert, batch, "input_x_gradient", target=1)
    rows, errors = sensitivity_rows(
        ExplainableModel(bert),
        batch,
        scores,
        target=facts.target,
        special=facts.special,
        mask=facts.mask,
        sample_ids=[1, 2, 3],
        options={},
    )
    assert [row["value"] for row in rows] == [None] * 3 and not errors


def test_a_text_of_special_tokens_alone_does_not_move():
    bert = make_bert()
    batch = make_batch((2, 6))
    rows, _ = measure(bert, batch, ["attention_rollout"], [1, 2])
    assert rows[0]["value"] < 1e-6 < rows[1]["value"]


def test_take_rows_keeps_what_has_no_row_per_example(batch):
    taken = take_rows(batch | {"flag": True, "one": torch.ones(())}, torch.tensor([2, 2]), 3)
    assert taken["flag"] is True and taken["one"].ndim == 0
    assert torch.equal(taken["input_ids"], batch["input_ids"][[2, 2]])


def test_noisy_scores_have_the_shape_they_say(bert, batch):
    facts = attribute(bert, batch, "input_x_gradient", target=1)
    given = {"target": facts.target, "special": facts.special, "mask": facts.mask, "sample_ids": [1, 2, 3]}
    scores = noisy_scores(ExplainableModel(bert), batch, "input_x_gradient", options={}, draws=4, **given)
    assert scores.shape == (3, 4, 9)
    assert (scores.transpose(1, 2)[~facts.mask] == 0).all()


@pytest.mark.parametrize("method", ["lime", "shap", "random", "integrated_gradients"])
def test_no_noise_changes_nothing_whatever_a_method_draws(method):
    model, batch = make_bert(), make_batch((8, 6, 5))
    wrapped = ExplainableModel(model)
    special, mask = batch["special_tokens_mask"].bool(), batch["attention_mask"].bool()
    where = mask & ~special
    options = {"samples": 30} if method in ("lime", "shap") else {}
    found = [attribute(wrapped, batch, method, target=0, **options).scores]
    with embedding_noise(wrapped, batch["input_ids"], where, torch.zeros(int(where.sum()), 24)) as ids:
        found.append(attribute(wrapped, {**batch, "input_ids": ids}, method, target=0, **options).scores)
    assert torch.allclose(*found, atol=1e-5)


def test_a_table_that_two_stacks_share_gets_the_noise_once_each():
    from transformers import T5Config, T5EncoderModel

    class Classifier(torch.nn.Module):
        def __init__(self):
            super().__init__()
            sizes = {"d_model": 16, "d_kv": 4, "d_ff": 32, "num_layers": 2, "num_heads": 4}
            self.encoder = T5EncoderModel(T5Config(vocab_size=60, **sizes, pad_token_id=0))
            self.head = torch.nn.Linear(16, 3)

        def forward(self, input_ids, attention_mask=None):
            return self.head(self.encoder(input_ids, attention_mask=attention_mask).last_hidden_state.mean(1))

    torch.manual_seed(0)
    wrapped, batch = ExplainableModel(Classifier().eval()), make_batch((6, 6))
    where = ~batch["special_tokens_mask"].bool()
    noise = torch.randn(int(where.sum()), 16)
    plain = attribute(wrapped, batch, "input_x_gradient", target=0)
    with embedding_noise(wrapped, batch["input_ids"], where, noise) as ids:
        moved = attribute(wrapped, {**batch, "input_ids": ids}, "input_x_gradient", target=0)
    assert moved.scores.isfinite().all() and not torch.allclose(moved.scores, plain.scores)
