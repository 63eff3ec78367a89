"""LIG: closed forms against automatic differentiation through the real blocks, and what `attribute` makes of them."""

import pytest
import torch
from conftest import make_batch, make_bert
from transformers import (
    AutoModelForSequenceClassification,
    DebertaV2Config,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    Qwen3Config,
)

from calig.pipeline.attribution import ExplainableModel, UnsupportedModelError, attribute, within_block
from calig.pipeline.attribution.flow import (
    InputTokenPaths,
    ZeroPaths,
    attention_flow,
    give_self_share,
    head_mlp_flow,
    layer_flow,
    self_share,
    slice_mlp_flow,
)
from calig.pipeline.attribution.within_block import take_apart
from calig.pipeline.attribution.within_layer import block_flows, flow_agreement, flow_scores
from calig.pipeline.errors import InputError

SMALL = {
    "vocab_size": 60,
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 40,
    "pad_token_id": 0,
}


def decoder(kind, **options):
    torch.manual_seed(0)
    config = kind(**{**SMALL, "initializer_range": 0.3, "num_labels": 3, **options})
    return AutoModelForSequenceClassification.from_config(config).double().eval()


def gpt2():
    return decoder(GPT2Config, n_embd=24, n_layer=2, n_head=4, n_inner=40, n_positions=32)


def llama():
    return decoder(LlamaConfig, num_key_value_heads=2, max_position_embeddings=32)


def neox():  # attention and MLP side by side
    return decoder(GPTNeoXConfig, max_position_embeddings=32)


# The RMS norm of Llama computes in float32 whatever the model's precision.
PRECISION = {"llama": 2e-5}
MODELS = {"bert": lambda: make_bert(2, dtype=torch.float64), "gpt2": gpt2, "llama": llama, "gpt_neox": neox}


def apart(model, batch, row=0):
    wrapped = ExplainableModel(model)
    with wrapped.session():
        yield from take_apart(wrapped, wrapped.prepare(batch), row)


def by_autograd(run, start, end, nodes=12):
    """Set-to-set integrated gradients, target by target: (T, D) from start(j) to end, run gives (T, ...)."""
    positions, weights = legendre(nodes)
    columns = []
    for j in range(len(end)):
        first = run(start(j))[j].detach()
        column = 0
        for position, weight in zip(positions, weights):
            point = (start(j) + position * (end - start(j))).requires_grad_()
            moved = (run(point)[j] - first).norm(dim=-1)
            grads = [
                torch.autograd.grad(one, point, retain_graph=True)[0] if one > 0 else torch.zeros_like(point)
                for one in moved.reshape(-1)
            ]
            column = column + weight * torch.stack([(grad * (end - start(j))).sum(-1) for grad in grads])
        columns.append(column)
    return torch.stack(columns, dim=-1).squeeze(0)  # (heads, source, target), or (source, target)


@pytest.mark.parametrize("name", MODELS)
def test_layer_and_attention_flow_equal_automatic_differentiation(name):
    for block in apart(MODELS[name](), make_batch((5,))):
        z, atol = block.states, PRECISION.get(name, 1e-9)
        paths = InputTokenPaths(block)
        direct = by_autograd(through(block), own_vector(z), z)
        assert torch.allclose(layer_flow(paths, block, 12, 4096).values, direct, atol=atol)
        direct = by_autograd(through_attention(block), own_vector(z), z)
        assert torch.allclose(attention_flow(paths, 12).values, direct, atol=atol)


def through(block):
    return lambda x: block._call(x[None])[0]


def through_attention(block):
    """Contexts in the graph of the block's input, straight from its attention call."""

    def contexts(x):
        found = []

        def capture(module, query, key, value, *args, **kwargs):
            groups = query.shape[1] // key.shape[1]
            found.extend((query[0], key[0].repeat_interleave(groups, 0), value[0].repeat_interleave(groups, 0)))
            return within_block.eager_function(module)(module, query, key, value, *args, **kwargs)

        with within_block.attention_calls(block.host, capture):
            block._call(x[None])
        query, key, value = found
        scores = query @ key.mT * block.projections.scale + block.projections.mask
        return (scores.softmax(-1) @ value).transpose(0, 1)

    return contexts


def own_vector(states):
    return lambda j: states[j].expand_as(states)


def test_flow_from_zero_equals_automatic_differentiation():
    for block in apart(make_bert(1, dtype=torch.float64), make_batch((5,))):
        nothing = torch.zeros_like(block.states)
        direct = by_autograd(through(block), nothing.expand(5, -1, -1).__getitem__, block.states, 32)
        assert torch.allclose(layer_flow(ZeroPaths(block), block, 32, 4096).values, direct, atol=1e-8)


@pytest.mark.parametrize("name", MODELS)
def test_mlp_by_heads_sums_to_what_the_layer_sums_to(name):
    for block in apart(MODELS[name](), make_batch((6, 5))):
        mlp = head_mlp_flow(block, "att_itb_a0", 32, 4096)
        layer = layer_flow(InputTokenPaths(block), block, 32, 4096)
        assert torch.allclose(mlp.total, layer.total, atol=PRECISION.get(name, 1e-12))
        assert torch.allclose(mlp.values.sum(1), mlp.total, atol=PRECISION.get(name, 1e-8))


OUTPUT = {"bert": "attention.output.dense", "gpt2": "attn.c_proj", "llama": "self_attn.o_proj"}


def through_projection(block, name, states, given=None):
    """What leaves the block, `given` (T, H, d) instead of what enters its output projection, and that itself."""
    heads, seen = block.projections.value.shape[1], []

    def swap(_module, args):
        seen.append(args[0][0].unflatten(-1, (heads, -1)))
        return args if given is None else (given.flatten(-2)[None],)

    handle = block.module.get_submodule(OUTPUT[name]).register_forward_pre_hook(swap)
    try:
        return block._call(states[None])[0], seen[0]
    finally:
        handle.remove()


def heads_by_autograd(block, name, baseline):
    """(T, H, target), from the model's own modules alone."""
    z = block.states
    with torch.no_grad():
        end = through_projection(block, name, z)[1]
        own = torch.stack([through_projection(block, name, row.expand_as(z))[1][j] for j, row in enumerate(z)])
    start = torch.zeros_like(end) if baseline == "zero" else own
    return by_autograd(lambda given: through_projection(block, name, z, given)[0], lambda _: start, end)


@pytest.mark.parametrize("baseline", ["att_itb_a0", "zero"])
@pytest.mark.parametrize("name", OUTPUT)
def test_mlp_by_heads_equals_automatic_differentiation(name, baseline):
    for block in apart(MODELS[name](), make_batch((5,))):
        found = head_mlp_flow(block, baseline, 12, 4096).values
        for j, whole in enumerate(heads_by_autograd(block, name, baseline).unbind(-1)):
            expected = torch.zeros_like(found)
            expected[j] = found[j]  # of other targets' contexts nothing arrives
            assert torch.allclose(whole.to(found), expected, atol=PRECISION.get(name, 1e-9))


@pytest.mark.parametrize("name", ["bert", "gpt2", "llama"])
def test_mlp_by_slices_equals_automatic_differentiation(name):
    for block in apart(MODELS[name](), make_batch((6, 5))):
        found = slice_mlp_flow(block, "att_itb_a0", 24, 4096)
        own = block.projections.value[0].transpose(0, 1)
        start, end = (block.middle(contexts[None])[0].detach() for contexts in (own, block.contexts))
        assert torch.allclose(block.rest_from_middle(end[None])[0], block.output, atol=PRECISION.get(name, 1e-10))
        target = 2
        first = block.rest_from_middle(start[None])[0, target].detach()
        total = torch.zeros_like(start[target])
        for position, weight in zip(*legendre(24)):
            point = (start + position * (end - start)).requires_grad_()
            moved = (block.rest_from_middle(point[None])[0, target] - first).norm()
            total += weight * torch.autograd.grad(moved, point)[0][target]
        reference = total * (end - start)[target]
        assert torch.allclose(found.values[target], reference, atol=PRECISION.get(name, 1e-10))


def legendre(nodes):
    from numpy.polynomial.legendre import leggauss

    positions, weights = (torch.from_numpy(part) for part in leggauss(nodes))
    return (positions + 1) / 2, weights / 2


@pytest.mark.parametrize("flow", ["layer", "composed"])
def test_attribution_has_shapes_sums_and_batch_invariance(flow):
    model, batch = make_bert(), make_batch((9, 6, 8))
    result = attribute(model, batch, "lig", flow=flow, steps=24)
    assert result.flow.shape == (3, 3, 9, 9) and result.parts["att"].shape == (3, 3, 3, 9, 9)
    assert result.parts["mlp"].shape == (3, 3, 9, 3)
    assert torch.equal(result.flow, result.parts["layer" if flow == "layer" else "composed"])
    assert torch.allclose(result.scores.sum(1), torch.ones(3), atol=1e-5) and (result.scores >= 0).all()
    assert torch.equal(result.scores, result.layer_scores[:, -1])
    assert result.completeness_gap.max() < 1e-3 and result.converged.all()
    totals = result.parts["layer"].sum(-2)
    assert torch.allclose(totals, result.parts["layer_total"], atol=1e-4)
    alone = attribute(model, {key: value[1:2, :6] for key, value in batch.items()}, "lig", flow=flow, steps=24)
    assert torch.allclose(alone.scores[0], result.scores[1, :6], atol=1e-5)
    assert torch.allclose(alone.flow[0], result.flow[1, :, :6, :6], atol=1e-4)
    assert not result.flow[1, :, 6:].any() and not result.flow[1, :, :, 6:].any()


def test_padding_on_the_left_of_a_decoder_does_not_matter():
    model = llama().float()  # in float64 the family's own eager attention has no row for padding
    batch = make_batch((6,), width=9)
    right = {key: value for key, value in batch.items() if key != "special_tokens_mask"}
    left = {key: value.roll(3, 1) for key, value in right.items()}
    with torch.no_grad():
        assert torch.allclose(model(**right).logits, model(**left).logits, atol=1e-5)
    special = batch["special_tokens_mask"]
    one = attribute(model, right, "lig", special_tokens_mask=special)
    with pytest.warns(UserWarning, match="padded on the left"):
        other = attribute(model, left, "lig", special_tokens_mask=special.roll(3, 1))
    assert torch.allclose(one.scores, other.scores.roll(-3, 1), atol=1e-6)


def test_scores_follow_the_columns_back_from_the_readout():
    torch.manual_seed(0)
    flow, mask = torch.randn(1, 3, 4, 4), torch.tensor([[True, True, True, False]])
    flow[0, 1, :, 2] = 0  # a vanishing column keeps its token
    readout = torch.tensor([[0.0, 0.0, 1.0, 0.0]])
    for own in (False, True):
        carried = readout[0, :3]
        for layer in (2, 1, 0):
            share = flow[0, layer, :3, :3].abs()
            for j in range(3):
                share[:, j] = share[:, j] / share[:, j].sum() if share[:, j].sum() else torch.eye(3)[j]
            carried = (share if own else (share + torch.eye(3)) / 2) @ carried
        found = flow_scores(flow, readout, mask, has_self_share=own)
        assert torch.allclose(found[0, -1, :3], carried, atol=1e-6)


def test_agreement_against_a_loop():
    torch.manual_seed(0)
    direct, composed = torch.randn(2, 2, 5, 5).double(), torch.randn(2, 2, 5, 5).double()
    composed[0, 0, :, 1] = 0
    mask = torch.tensor([[True] * 5, [True] * 3 + [False] * 2])
    found = flow_agreement(direct, composed, mask)
    for b, n in ((0, 5), (1, 3)):
        for layer in range(2):
            for j in range(n):
                one, other = direct[b, layer, :n, j], composed[b, layer, :n, j]
                assert torch.isclose(found.raw[b, layer, j], (one - other).norm())
                assert float(found.vanished[b, layer, j]) == (not other.any())
                if not other.any():
                    assert found.correlation[b, layer, j].isnan() and found.ratio[b, layer, j].isnan()
                    continue
                expected = (one / one.abs().sum() - other / other.abs().sum()).norm()
                assert torch.isclose(found.normalised[b, layer, j], expected)
                assert torch.isclose(found.correlation[b, layer, j], torch.corrcoef(torch.stack([one, other]))[0, 1])
                assert torch.isclose(found.ratio[b, layer, j], other.sum() / one.sum())
    assert found.raw[1, :, 3:].isnan().all() and found.vanished[1, :, 3:].isnan().all()


def composed_by_hand(att, mlp):
    """By heads, from (H, T, T) and (T, H)."""
    heads, tokens = att.shape[0], att.shape[1]
    result = torch.zeros(tokens, tokens, dtype=torch.float64)
    for i in range(tokens):
        for j in range(tokens):
            for h in range(heads):
                result[i, j] += att[h, i, j] / att[h, :, j].sum() * mlp[j, h]
    return result


@pytest.mark.parametrize(
    ("baseline", "flow", "own"),
    [
        ("itb", "composed", False),
        ("zero", "composed", True),
        ("itb_map_ratio", "composed", True),
        ("itb_zero_ratio", "composed", True),
        ("itb", "layer", False),
        ("zero", "layer", True),
        ("itb_map_ratio", "layer", False),  # attention's alone
        ("itb_zero_ratio", "layer", True),
    ],
)
def test_scores_by_hand(baseline, flow, own):
    model, batch = with_biases(make_bert()), make_batch((5,))
    result = attribute(model, batch, "lig", baseline=baseline, flow=flow)
    carried = [1.0, 0.0, 0.0, 0.0, 0.0]  # the head reads the first token
    for layer in (2, 1, 0):
        part = result.parts["layer"][0, layer]
        if flow == "composed":
            part = composed_by_hand(result.parts["att"][0, layer], result.parts["mlp"][0, layer])
        before = [0.0] * 5
        for j in range(5):
            size = sum(abs(float(part[i, j])) for i in range(5))
            for i in range(5):
                share = abs(float(part[i, j])) / size
                before[i] += carried[j] * (share if own else (share + (i == j)) / 2)
        carried = before
    assert result.scores[0].tolist() == pytest.approx(carried, abs=1e-5)


def test_composed_by_slices_against_a_loop():
    result = attribute(make_bert(), make_batch((5,)), "lig", composition="slices")
    att, mlp, composed = (result.parts[name][0] for name in ("att", "mlp", "composed"))
    assert mlp.shape == (3, 5, 24) and att.shape == (3, 3, 5, 5)
    for layer in range(3):
        for i in range(5):
            for j in range(5):
                expected = sum(float(att[layer, d // 8, i, j] * mlp[layer, j, d]) for d in range(24))
                assert float(composed[layer, i, j]) == pytest.approx(expected, rel=1e-4, abs=1e-4)


def test_composed_by_heads_adds_up_to_the_whole_layer():
    result = attribute(make_bert(), make_batch(), "lig", steps=32)
    mask = result.mask[:, None].expand_as(result.parts["layer_total"])
    composed = result.parts["composed"].sum(-2)
    assert torch.allclose(composed[mask], result.parts["layer_total"][mask], rtol=1e-4, atol=1e-4)


def with_biases(model, std=0.5):
    """Fresh biases are 0, which makes growing from 0 ill-posed."""
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=std)
    return model


def test_auto_takes_the_nodes_it_needs_and_flags_what_it_misses():
    model, batch = with_biases(make_bert()), make_batch()
    tight = attribute(model, batch, "lig", baseline="zero", steps="auto", tolerance=1e-5, max_steps=512)
    assert tight.converged.all() and (tight.steps_used > 16).any()
    loose = attribute(model, batch, "lig", baseline="zero", steps="auto", tolerance=1e-7, max_steps=16)
    assert not loose.converged.any() and (loose.steps_used == 16).all()


def test_shares_from_the_map_from_zero_carry_its_error():
    model, batch = with_biases(make_bert(2), std=0.1), make_batch((6, 4))

    def found(baseline, steps):
        return attribute(model, batch, "lig", baseline=baseline, steps=steps, tolerance=1e-4)

    gaps = {name: found(name, 16).completeness_gap for name in ("itb", "zero", "itb_zero_ratio")}
    assert torch.equal(gaps["itb_zero_ratio"], torch.maximum(gaps["itb"], gaps["zero"]))
    used = {name: found(name, "auto").steps_used for name in gaps}
    assert torch.equal(used["itb_zero_ratio"], torch.maximum(used["itb"], used["zero"]))
    assert (used["zero"] > used["itb"]).all()


def test_self_shares_by_hand():
    model, batch = with_biases(make_bert(2, spread=1.0, attention="eager"), std=0.1), make_batch((6,))
    ids = {key: batch[key] for key in ("input_ids", "attention_mask")}
    with torch.no_grad():
        own = torch.stack(model(**ids, output_attentions=True).attentions, dim=1).diagonal(dim1=-2, dim2=-1)
    names = ("itb", "zero", "itb_zero_ratio", "itb_map_ratio")
    parts = {name: attribute(model, batch, "lig", baseline=name, steps=64).parts for name in names}
    kept = torch.zeros(1, 2, dtype=torch.long)
    for part in ("att", "layer"):
        itb, zero = parts["itb"][part], parts["zero"][part]
        r = zero.diagonal(dim1=-2, dim2=-1) / zero.sum(-2)
        usable = (r >= 0) & (r <= 1)
        shares = {"itb_zero_ratio": torch.where(usable, r, 0.0), "itb_map_ratio": own if part == "att" else 0 * r}
        for name, share in shares.items():
            assert torch.allclose(parts[name][part].sum(-2), itb.sum(-2), atol=1e-4)
            for j in range(6):
                expected = itb[..., j] * (1 - share[..., j, None])
                expected[..., j] += share[..., j] * itb[..., j].sum(-1)
                assert torch.allclose(parts[name][part][..., j], expected, atol=1e-3), (name, part)
        kept += (~usable).flatten(2).sum(-1)
    assert torch.equal(parts["itb_zero_ratio"]["refused"], kept) and kept.any()
    assert not parts["itb_map_ratio"]["refused"].any()


def test_columns_of_padding_are_not_counted_as_refused():
    options = {"baseline": "itb_zero_ratio", "mlp_baseline": "att_itb_a0", "composition": "heads", "max_tokens": 4096}
    for block in apart(with_biases(make_bert(2, spread=1.0), std=0.02), make_batch((7,))):
        zero, itb = ZeroPaths(block), InputTokenPaths(block)
        att, att_zero = (attention_flow(paths, 32).values for paths in (itb, zero))
        layer, layer_zero = (layer_flow(paths, block, 32, 4096).values for paths in (itb, zero))
        refused = give_self_share(att, *self_share(att_zero)).refused.sum(0)
        refused = refused + give_self_share(layer, *self_share(layer_zero)).refused
        assert block_flows(block, 32, **options).refused == int(refused.sum())
        target = int(refused.argmax())
        block.real = torch.arange(7) != target
        assert block_flows(block, 32, **options).refused == int(refused.sum() - refused[target]) < int(refused.sum())


def test_some_layers_only():
    model, batch = make_bert(), make_batch()
    whole, part = (attribute(model, batch, "lig", layers=layers) for layers in (None, [2, 0]))
    assert torch.equal(part.flow, whole.flow[:, [2, 0]])
    # Relevance passes the blocks as the model does, whatever the order that they are named in.
    one, other = (attribute(model, batch, "lig", layers=layers) for layers in ([2, 0, 1], [0, 1, 2]))
    assert torch.equal(one.scores, whole.scores) and torch.equal(other.scores, whole.scores)
    assert torch.equal(one.layer_scores, whole.layer_scores[:, [2, 0, 1]])
    with pytest.raises(InputError, match=r"layers names a block twice: \[0, 0\]"):
        attribute(model, batch, "lig", layers=[0, 0])
    with pytest.raises(InputError, match=r"layers \[3\].*the model has 3"):
        attribute(model, batch, "lig", layers=[3])
    with pytest.raises(InputError, match="'layers' of method 'lig' takes a list of numbers or NoneType, got 2"):
        attribute(model, batch, "lig", layers=2)


@pytest.mark.parametrize("options", [{"baseline": "zero"}, {"baseline": "itb_zero_ratio"}])
def test_ill_posed_baselines_of_pre_norm_blocks_are_refused(options):
    with pytest.raises(UnsupportedModelError, match="ill-posed for 'gpt2'.*baseline='itb'"):
        attribute(gpt2(), make_batch(), "lig", **options)


def test_slices_from_zero_are_refused_in_front_of_a_norm():
    with pytest.raises(UnsupportedModelError, match="composition='slices' with mlp_baseline='zero' is ill-posed"):
        attribute(gpt2(), make_batch(), "lig", composition="slices", mlp_baseline="zero")
    assert attribute(gpt2(), make_batch(), "lig", composition="slices").flow.isfinite().all()


def test_slices_need_an_mlp_part_of_its_own():
    with pytest.raises(UnsupportedModelError, match="'gpt_neox'.*composition='heads'"):
        attribute(neox(), make_batch(), "lig", composition="slices")


def test_normalised_queries_and_keys_are_refused_by_name():
    model = decoder(Qwen3Config, num_key_value_heads=2, head_dim=6, max_position_embeddings=32)
    with pytest.raises(UnsupportedModelError, match="'qwen3' are not linear"):
        attribute(model, make_batch(), "lig")


def test_families_off_the_interface_are_refused_by_name():
    model = AutoModelForSequenceClassification.from_config(DebertaV2Config(**SMALL))
    with pytest.raises(UnsupportedModelError, match="'deberta-v2'"):
        attribute(model, make_batch(), "lig")


def test_the_model_is_left_as_it_was():
    model, batch = make_bert(), make_batch()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    attribute(model, batch, "lig", composition="slices")
    assert model.config._attn_implementation == "sdpa"
    for module in model.modules():
        assert "forward" not in module.__dict__
        assert not module._forward_hooks and not module._forward_pre_hooks
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
