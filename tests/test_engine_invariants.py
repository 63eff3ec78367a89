"""Invariants 2, 3 and 5 of the engine: batch invariance, completeness, nothing left behind, nothing silent."""

import pytest
import torch
from conftest import make_batch, make_bert

from calig.pipeline.attribution import ExplainableModel, UnsupportedModelError, attribute, available_methods
from calig.pipeline.errors import InputError

METHODS = available_methods()


def footprint(model):
    """Everything of a model that explaining it must not change."""
    hooks = [
        (name, len(module._forward_hooks), len(module._forward_pre_hooks), len(module._backward_hooks))
        for name, module in model.named_modules()
    ]
    return (
        hooks,
        [(name, module.training) for name, module in model.named_modules()],
        [name for name, module in model.named_modules() if "forward" in vars(module)],
        model.config._attn_implementation,
        [(name, parameter.requires_grad, parameter.grad) for name, parameter in model.named_parameters()],
        {name: value.clone() for name, value in model.state_dict().items()},
        torch.get_rng_state(),
    )


def assert_same(before, after):
    assert before[:5] == after[:5]
    assert all(torch.equal(before[5][name], after[5][name]) for name in before[5])
    assert torch.equal(before[6], after[6])


@pytest.mark.parametrize("method", METHODS)
def test_batch_and_padding_do_not_matter(bert, method):
    lengths = (9, 6, 8, 3)
    together = attribute(bert, make_batch(lengths), method, target=1)
    wide = attribute(bert, make_batch(lengths, width=17), method, target=1)
    assert torch.allclose(together.scores, wide.scores[:, :9], atol=1e-5)
    assert (wide.scores[:, 9:] == 0).all()
    for row, length in enumerate(lengths):
        one = {key: value[row : row + 1, :length] for key, value in make_batch(lengths).items()}
        alone = attribute(bert, one, method, target=1)
        assert torch.allclose(alone.scores[0], together.scores[row, :length], atol=1e-5)
        if together.layer_scores is not None:
            assert torch.allclose(alone.layer_scores[0], together.layer_scores[row, :, :length], atol=1e-5)
            assert (together.layer_scores[row, :, length:] == 0).all()


@pytest.mark.parametrize(
    "options", [{}, {"path": "straight"}, {"steps": "auto"}, {"path": "straight", "steps": "auto"}]
)
@pytest.mark.parametrize("budget", [9, 18])  # one row at a time, and two: the last node of one and the first of another
def test_token_budget_does_not_change_results(bert, batch, options, budget):
    whole = attribute(bert, batch, "ca_lig", target=0, **options)
    narrow = attribute(ExplainableModel(bert, max_tokens_per_pass=budget), batch, "ca_lig", target=0, **options)
    assert torch.allclose(whole.scores, narrow.scores, atol=1e-5)
    assert torch.equal(whole.steps_used, narrow.steps_used)


@pytest.mark.parametrize("path", ["shared", "straight"])
@pytest.mark.parametrize("baseline", ["pad", "mean"])
def test_completeness_at_every_layer(bert, batch, path, baseline):
    steps = 257 if path == "shared" else 24
    result = attribute(bert, batch, "ca_lig", target=2, path=path, baseline=baseline, steps=steps)
    sums = result.parts["evidence"].sum(-1)
    assert sums.shape == (3, 4)
    assert torch.allclose(sums, result.output_change[:, None].expand_as(sums), rtol=1e-3, atol=1e-4)
    assert (result.completeness_gap < 2e-3).all()
    scale = result.output_change.abs().clamp_min(1e-3)[:, None]
    stated = (sums - result.output_change[:, None]).abs() / scale
    assert torch.allclose(result.completeness_gap, stated, atol=1e-4)


def test_output_change_is_the_change_of_the_logit(bert, batch):
    result = attribute(bert, batch, "integrated_gradients", target=1)
    base = torch.where(batch["special_tokens_mask"].bool(), batch["input_ids"], 0)
    mask = batch["attention_mask"]
    change = bert(batch["input_ids"], attention_mask=mask).logits - bert(base, attention_mask=mask).logits
    assert torch.allclose(result.output_change, change[:, 1].detach(), atol=1e-5)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("training", [True, False])
def test_nothing_is_left_behind(bert, batch, method, training):
    bert.train(training)
    before = footprint(bert)
    attribute(bert, batch, method)
    assert_same(before, footprint(bert))


@pytest.mark.parametrize("method", METHODS)
def test_nothing_is_left_behind_after_a_failure(bert, batch, method):
    bert.train()
    before = footprint(bert)
    with pytest.raises(InputError):
        attribute(bert, batch, method, target=99)
    calls = 0

    def fail(*_):
        nonlocal calls
        calls += 1
        if calls == 2:
            raise RuntimeError("a module that raises")

    handle = bert.bert.encoder.layer[1].output.register_forward_hook(fail)
    with pytest.raises(RuntimeError, match="a module that raises"):
        attribute(bert, batch, method, target=0)
    handle.remove()
    assert_same(before, footprint(bert))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("context", [torch.enable_grad, torch.no_grad, torch.inference_mode])
def test_every_gradient_context_gives_the_same(bert, method, context):
    reference = attribute(bert, make_batch(), method, target=1)
    with context():
        # Made inside: under inference mode these are inference tensors, the labels too.
        labelled = make_batch() | {"labels": torch.tensor([1, 1, 1])}
        found = attribute(bert, labelled, method, target="label")
    assert torch.allclose(reference.scores, found.scores, atol=1e-6)


def test_autocast_of_the_caller_does_not_enter(bert, batch):
    reference = attribute(bert, batch, target=1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = attribute(bert, batch, target=1)
    assert torch.allclose(reference.scores, found.scores, atol=1e-6)


def test_frozen_parameters_are_no_obstacle(bert, batch):
    reference = attribute(bert, batch, target=1).scores
    bert.requires_grad_(False)
    assert torch.allclose(attribute(bert, batch, target=1).scores, reference, atol=1e-6)


def test_targets(bert, batch):
    predicted = bert(batch["input_ids"], attention_mask=batch["attention_mask"]).logits.argmax(-1)
    assert torch.equal(attribute(bert, batch, "random").target, predicted)
    assert torch.equal(attribute(bert, batch, "random", target="predicted").target, predicted)
    labelled = batch | {"labels": torch.tensor([2, 0, 1])}
    assert attribute(bert, labelled, "random", target="label").target.tolist() == [2, 0, 1]
    several = attribute(bert, batch, target=torch.tensor([[0, 1], [2, 0], [1, 1]]))
    assert [result.target.tolist() for result in several] == [[0, 2, 1], [1, 0, 1]]
    assert torch.equal(several[1].scores, attribute(bert, batch, target=[1, 0, 1]).scores)
    for bad in (3, -1, [0, 1], "best", 0.5, torch.zeros(3, 1, 1).long()):
        with pytest.raises(InputError, match="target"):
            attribute(bert, batch, target=bad)
    with pytest.raises(InputError, match="labels"):
        attribute(bert, batch, target="label")


def test_special_tokens_from_mask_tokenizer_config_or_read_out(bert, batch):
    reference = attribute(bert, batch, target=1).scores
    plain = {key: batch[key] for key in ("input_ids", "attention_mask")}

    class Tokenizer:
        all_special_ids = (0, 1, 2)

    assert torch.equal(attribute(bert, plain, target=1, tokenizer=Tokenizer()).scores, reference)
    bert.config.cls_token_id, bert.config.sep_token_id = 1, 2
    assert torch.equal(attribute(bert, plain, target=1).scores, reference)
    for name in ("cls", "sep", "bos", "eos"):
        setattr(bert.config, f"{name}_token_id", None)
    with pytest.warns(UserWarning, match="no special tokens are known"):
        unknown = attribute(bert, plain, target=1)
    assert unknown.special.nonzero().tolist() == [[0, 0], [1, 0], [2, 0]]


def test_bad_inputs_say_what_is_wrong(bert, batch):
    with pytest.raises(InputError, match="input_ids"):
        attribute(bert, {"pixels": torch.zeros(1)})
    with pytest.raises(InputError, match=r"special_tokens_mask has shape \(3, 2\)"):
        attribute(bert, batch, special_tokens_mask=torch.zeros(3, 2))
    with pytest.raises(InputError, match="Did you mean 'ca_lig'"):
        attribute(bert, batch, "ca_ligg")
    with pytest.raises(InputError, match="unknown option of method 'ca_lig' 'stepz'. Did you mean 'steps'"):
        attribute(bert, batch, stepz=3)
    for bad in ({"steps": 1}, {"steps": "all"}, {"lam": 2}, {"fusion": "sum"}, {"baseline": "black"}, {"steps": True}):
        with pytest.raises(InputError, match=next(iter(bad))):
            attribute(bert, batch, **bad)
    with pytest.raises(InputError, match="lam=1"):
        attribute(bert, batch, fusion="diagonal", lam=1)
    with pytest.raises(InputError, match="needs a tokenizer with a mask token"):
        attribute(bert, batch, baseline="mask")
    with pytest.raises(UnsupportedModelError, match="no stack of blocks"):
        attribute(torch.nn.Linear(2, 2), batch)


def test_off_the_attention_interface_gradient_methods_work_and_others_say_so(batch):
    from transformers import MPNetConfig, MPNetForSequenceClassification

    torch.manual_seed(0)
    config = MPNetConfig(
        vocab_size=60, hidden_size=24, num_hidden_layers=2, num_attention_heads=3, intermediate_size=48
    )
    model = MPNetForSequenceClassification(config).eval()
    result = attribute(model, batch, "integrated_gradients", target=1)
    assert (result.completeness_gap < 1e-3).all()
    attribute(model, batch, "input_x_gradient")
    with pytest.raises(UnsupportedModelError, match=r"'mpnet'.*integrated_gradients"):
        attribute(model, batch, "ca_lig")


def test_read_out_is_found_without_a_table():
    """Mean pooling over the real tokens, as a head of the user's own."""

    class MeanPooled(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.bert = make_bert().bert
            self.head = torch.nn.Linear(24, 2)

        def forward(self, input_ids, attention_mask):
            states = self.bert(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
            weights = attention_mask[..., None] / attention_mask.sum(1)[:, None, None]
            return self.head((states * weights).sum(1))

    from calig.pipeline.attribution.inside import find_ends
    from calig.pipeline.attribution.objective import ClassLogit

    torch.manual_seed(0)
    wrapped = ExplainableModel(MeanPooled())
    with wrapped.session():
        inputs = wrapped.prepare(make_batch())
        ends = find_ends(wrapped, inputs, ClassLogit(torch.tensor([0, 1, 0])), "pad", [0])
    mask = make_batch()["attention_mask"]
    assert torch.allclose(ends.readout, mask / mask.sum(1, keepdim=True))


def test_one_bad_example_does_not_fail_its_neighbours(bert, batch):
    reference = attribute(bert, batch, target=1)
    row = batch["input_ids"][1, 2]
    others = (batch["input_ids"] != row).all(1)
    assert others.tolist() == [True, False, True]
    with torch.no_grad():
        bert.bert.embeddings.word_embeddings.weight[row] = float("nan")
    result = attribute(bert, batch, target=1)
    assert result.non_finite().tolist() == [False, True, False]
    assert torch.allclose(result.scores[others], reference.scores[others], atol=1e-5)


def test_left_padding_and_coarse_parameters_warn(bert, batch):
    flipped = {key: value.flip(1) for key, value in batch.items()}
    with pytest.warns(UserWarning, match="padded on the left"):
        attribute(bert, flipped, "input_x_gradient", target=1)
    with pytest.warns(UserWarning, match="bfloat16"):
        attribute(ExplainableModel(bert.bfloat16(), precision="model"), batch, "input_x_gradient", target=1)


def test_pad_ids_are_not_content_without_an_attention_mask(bert, batch):
    bert.config.cls_token_id, bert.config.sep_token_id = 1, 2
    result = attribute(bert, {"input_ids": batch["input_ids"]}, "integrated_gradients", target=1)
    assert (result.scores[batch["input_ids"] == 0] == 0).all()


def test_a_plain_callable_is_an_objective(bert, batch):
    margin = attribute(bert, batch, objective=lambda output: output.logits[:, 1] - output.logits[:, 0])
    one, zero = (attribute(bert, batch, target=index) for index in (1, 0))
    assert torch.allclose(margin.output_change, one.output_change - zero.output_change, atol=1e-5)
    difference = one.parts["evidence"] - zero.parts["evidence"]
    assert torch.allclose(margin.parts["evidence"], difference, atol=1e-4)
    with pytest.raises(InputError, match="one scalar per row"):
        attribute(bert, batch, objective=lambda output: output.logits)


def test_an_embedding_that_never_runs_is_an_error():
    from transformers import BartConfig, BartForSequenceClassification

    torch.manual_seed(0)
    config = BartConfig(
        vocab_size=60, d_model=24, encoder_layers=2, decoder_layers=2, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=32, decoder_ffn_dim=32, max_position_embeddings=40, num_labels=2,
    )  # fmt: skip
    model = BartForSequenceClassification(config).eval()
    ids = torch.tensor([[0, 7, 8, 9, 2]])
    with pytest.raises(UnsupportedModelError):
        attribute(model, {"input_ids": ids, "attention_mask": torch.ones_like(ids)}, "integrated_gradients", target=1)


def test_results_are_on_the_host_in_float32(bert, batch):
    result = attribute(bert.double(), batch)
    for name in ("scores", "layer_scores", "completeness_gap", "error_bound", "output_change"):
        value = getattr(result, name)
        assert value.dtype == torch.float32 and value.device.type == "cpu" and not value.requires_grad
    assert result.scores.shape == (3, 9) and result.layer_scores.shape == (3, 3, 9)
    assert result.completeness_gap.shape == result.error_bound.shape == (3, 4)
    assert result.parts["evidence"].shape == (3, 4, 9)
    assert not result.non_finite().any()
