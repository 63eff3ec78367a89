"""The methods that users compare with, each against a reference of its own: loops, closed forms, brute force."""

import itertools
import math
import sys

import pytest
import torch
from captum.attr import LayerIntegratedGradients
from conftest import make_batch, make_bert
from transformers import LlamaConfig, LlamaForSequenceClassification

from calig.pipeline.attribution import attribute
from calig.pipeline.errors import InputError

TARGET = 1


@pytest.fixture
def model():
    return make_bert(2, dtype=torch.float64, attention="eager")


@pytest.fixture
def alone():
    """One example of 7 tokens without padding."""
    return make_batch((7,), seed=3)


def scores(model, batch, method, **options):
    return attribute(model, batch, method, target=TARGET, **options).scores


def plain(batch):
    return {key: batch[key] for key in ("input_ids", "attention_mask")}


def observed(model, batch):
    """Logit, attention maps (L of H, T, T) with gradients, states (L+1 of T, D) with gradients, of one example."""
    states = []
    hooks = [model.bert.embeddings.register_forward_hook(lambda *a: states.append(a[-1]))]
    hooks += [
        block.register_forward_hook(lambda *a: states.append(a[-1][0] if isinstance(a[-1], tuple) else a[-1]))
        for block in model.bert.encoder.layer
    ]
    output = model(**plain(batch), output_attentions=True)
    for hook in hooks:
        hook.remove()
    logit = output.logits[0, TARGET]
    attentions = list(output.attentions)
    grads = torch.autograd.grad(logit, [*attentions, *states])
    split = len(attentions)
    return (
        logit.detach(),
        [(a[0].detach(), g[0]) for a, g in zip(attentions, grads[:split])],
        [(z[0].detach(), g[0]) for z, g in zip(states, grads[split:])],
    )


def close(found, reference, atol=1e-5):
    return torch.allclose(found.double(), reference.double(), atol=atol)


def test_raw_attention(model, alone):
    _, maps, _ = observed(model, alone)
    assert close(scores(model, alone, "raw_attention")[0], maps[-1][0].mean(0)[0])


def test_attention_gradcam(model, alone):
    _, maps, _ = observed(model, alone)
    attention, gradient = maps[-1]
    reference = sum(attention[h] * gradient[h].mean() for h in range(len(attention))) / len(attention)
    assert close(scores(model, alone, "attention_gradcam")[0], reference.clamp_min(0)[0])


def test_attcat(model, alone):
    _, maps, states = observed(model, alone)
    reference = torch.zeros(7).double()
    for (attention, _), (z, gradient) in zip(maps, states[1:]):
        reference += attention.mean(dim=(0, 1)) * (z * gradient).sum(-1)
    assert close(scores(model, alone, "attcat")[0], reference)


def shapley(worth, players):
    """Brute force over all orders of arrival."""
    value = torch.zeros(players).double()
    for order in itertools.permutations(range(players)):
        present, before = [], float(worth(()))
        for player in order:
            present.append(player)
            after = float(worth(tuple(sorted(present))))
            value[player] += after - before
            before = after
    return value / math.factorial(players)


@pytest.mark.parametrize("weights", ["attention", "last", "rollout", "gradient"])
def test_attention_shapley(model, weights):
    batch = make_batch((5,), seed=3)
    _, maps, _ = observed(model, batch)
    exchanged = {
        "attention": torch.stack([a.mean(0) for a, _ in maps]).mean(0),
        "last": maps[-1][0].mean(0),
        "gradient": torch.stack([(a * g).mean(0) for a, g in maps]).mean(0),
    }
    total = torch.eye(5).double()
    for attention, _ in maps:
        total = (attention.mean(0) + torch.eye(5)) / 2 @ total
    exchanged["rollout"] = total
    w = exchanged[weights]
    reference = shapley(lambda s: sum(w[i, j] for i in s for j in s), 5)
    found = scores(model, batch, "attention_shapley", weights=weights)[0]
    assert close(found, reference)
    assert found.sum() == pytest.approx(float(w.sum()), abs=1e-5)


@pytest.mark.parametrize("layer", [0, 1, -1])
def test_layer_integrated_gradients(model, alone, layer):
    base = torch.where(alone["special_tokens_mask"].bool(), alone["input_ids"], 0)
    module = [model.bert.embeddings, *model.bert.encoder.layer][layer]
    reference = LayerIntegratedGradients(lambda ids: model(ids).logits, module).attribute(
        alone["input_ids"], baselines=base, target=TARGET, n_steps=8, method="gausslegendre"
    )
    found = attribute(model, alone, "layer_integrated_gradients", target=TARGET, layer=layer, steps=8)
    assert close(found.scores[0], reference[0].sum(-1))
    assert found.completeness_gap.shape == (1, 1)


def test_a_layer_that_is_not_there(model, alone):
    with pytest.raises(InputError, match="layer 3 is not there; the model has 2 blocks"):
        attribute(model, alone, "layer_integrated_gradients", layer=3)


def test_attention_attribution_is_complete_block_by_block(model, alone):
    result = attribute(model, alone, "attention_attribution", target=TARGET, steps=24, return_flow=True)
    with torch.no_grad():
        whole = model(**plain(alone)).logits[0, TARGET]
        for block in range(2):
            # Without any attention the block's context is 0.
            own = model.bert.encoder.layer[block].attention.self
            hook = own.register_forward_hook(lambda _m, _a, output: (0 * output[0], *output[1:]))
            without = model(**plain(alone)).logits[0, TARGET]
            hook.remove()
            assert float(result.parts["attributed"][0, block]) == pytest.approx(float(whole - without), abs=1e-4)
    heads = 3
    assert close(result.flow.sum(dim=(-1, -2)) * heads, result.parts["attributed"])


def test_attention_attribution_of_one_block_against_a_loop(alone):
    model = make_bert(1, dtype=torch.float64, attention="eager")
    nodes = 64
    own = model.bert.encoder.layer[0].attention.self
    seen = {}
    own.value.register_forward_hook(lambda _m, _a, output: seen.update(value=output.detach()))
    attention = model(**plain(alone), output_attentions=True).attentions[0].detach()
    total = torch.zeros_like(attention)
    for k in range(nodes):
        scaled = ((k + 0.5) / nodes * attention).requires_grad_()

        def use(_m, _a, output, scaled=scaled):
            value = seen["value"].view(1, 7, 3, 8).transpose(1, 2)
            return ((scaled @ value).transpose(1, 2).reshape(1, 7, 24), *output[1:])

        hook = own.register_forward_hook(use)
        total += torch.autograd.grad(model(**plain(alone)).logits[0, TARGET], scaled)[0] / nodes
        hook.remove()
    reference = (attention * total)[0]
    result = attribute(model, alone, "attention_attribution", target=TARGET, steps=32, return_flow=True)
    assert close(result.flow[0, 0], reference.mean(0).T, atol=1e-4)
    assert close(result.scores[0], reference.clamp_min(0).mean(0)[0], atol=1e-4)


def test_beyond_intuition(model, alone):
    _, maps, states = observed(model, alone)
    total = torch.eye(7).double()
    for attention, gradient in maps:
        importance = torch.stack([(a.T @ g).abs().mean() for a, g in zip(attention, gradient)])
        total = total + sum(i * a for i, a in zip(importance / importance.sum(), attention)) @ total
    with torch.no_grad():
        base = torch.where(alone["special_tokens_mask"].bool(), alone["input_ids"], 0)
        start, end = model.bert.embeddings(base), states[0][0][None]
    mean = 0
    for k in range(200):
        point = start + (k + 0.5) / 200 * (end - start)
        hook = model.bert.embeddings.register_forward_hook(lambda *_, point=point: point.requires_grad_())
        output = model(**plain(alone), output_attentions=True)
        hook.remove()
        mean = mean + torch.autograd.grad(output.logits[0, TARGET], output.attentions[-1])[0][0] / 200
    reference = total[0] * mean.clamp_min(0).mean(0)[0]
    assert close(scores(model, alone, "beyond_intuition", steps=32)[0], reference, atol=1e-4)


def relevance_by_hand(model, ids):
    """AttnLRP of a BERT of one block, rule by rule: what every operation hands back to its inputs."""
    bert, heads = model.bert, 3
    block = bert.encoder.layer[0]
    own = block.attention.self
    z = bert.embeddings(ids)[0]
    tokens, width = z.shape

    def split(x):
        return x.view(tokens, heads, -1).transpose(0, 1)

    def linear(x, layer, y, r):
        return x * ((r / y) @ layer.weight)

    def norm(x, layer, y, r):
        centred = x - x.mean(-1, keepdim=True)
        share = r / y * layer.weight / (centred.square().mean(-1, keepdim=True) + layer.eps).sqrt()
        return x * (share - share.mean(-1, keepdim=True))

    q, k, v = own.query(z), own.key(z), own.value(z)
    s = split(q) @ split(k).mT / math.sqrt(width // heads)
    a = s.softmax(-1)
    c = (a @ split(v)).transpose(0, 1).reshape(tokens, width)
    o = block.attention.output.dense(c)
    u = block.attention.output.LayerNorm(o + z)
    h = block.intermediate.dense(u)
    g = block.intermediate.intermediate_act_fn(h)
    m = block.output.dense(g)
    out = block.output.LayerNorm(m + u)
    pre = bert.pooler.dense(out[:1])
    p = torch.tanh(pre)
    logits = model.classifier(p)
    r = torch.zeros_like(logits)
    r[0, TARGET] = logits[0, TARGET]
    r = linear(p, model.classifier, logits, r)  # to p, and tanh passes it on as it is
    r_out = torch.zeros_like(out)
    r_out[:1] = linear(out[:1], bert.pooler.dense, pre, r)
    r = norm(m + u, block.output.LayerNorm, out, r_out)
    r_m, r_u = r * m / (m + u), r * u / (m + u)
    r_g = linear(g, block.output.dense, m, r_m)
    r_u = r_u + linear(u, block.intermediate.dense, h, r_g)
    r = norm(o + z, block.attention.output.LayerNorm, u, r_u)
    r_o, r_z = r * o / (o + z), r * z / (o + z)
    r_c = split(linear(c, block.attention.output.dense, o, r_o))
    half = r_c / (2 * split(c))
    r_a = a * (half @ split(v).mT)
    r_v = split(v) * (a.mT @ half)
    r_s = s * (r_a - a * r_a.sum(-1, keepdim=True))
    half = r_s / (2 * s) / math.sqrt(width // heads)
    r_q, r_k = split(q) * (half @ split(k)), split(k) * (half.mT @ split(q))
    for x, layer, rx in ((q, own.query, r_q), (k, own.key, r_k), (v, own.value, r_v)):
        r_z = r_z + linear(z, layer, x, rx.transpose(0, 1).reshape(tokens, width))
    return r_z.sum(-1), logits[0, TARGET]


@torch.no_grad()
def test_attn_lrp_against_the_rules_by_hand(alone):
    model = make_bert(1, dtype=torch.float64)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.1)
    reference, logit = relevance_by_hand(model, alone["input_ids"])
    result = attribute(model, alone, "attn_lrp", target=TARGET)
    assert close(result.scores[0], reference)
    leak = (reference.sum() - logit).abs() / logit.abs().clamp_min(1e-3)
    assert float(result.completeness_gap[0, 0]) == pytest.approx(float(leak), rel=1e-4)
    assert model.config._attn_implementation == "sdpa"
    assert not any("forward" in module.__dict__ or module._forward_pre_hooks for module in model.modules())


def test_attn_lrp_of_gated_blocks_conserves_what_has_no_bias():
    torch.manual_seed(0)
    sizes = {"hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = LlamaConfig(vocab_size=60, **sizes, num_key_value_heads=2, pad_token_id=0, num_labels=3)
    model = LlamaForSequenceClassification(config).eval()
    batch = make_batch((8, 6))
    for block in model.model.layers:  # without attention, whose softmax leaks, everything in a Llama conserves
        torch.nn.init.zeros_(block.self_attn.o_proj.weight)
    result = attribute(model, batch, "attn_lrp", target=TARGET)
    assert result.completeness_gap.max() < 1e-3
    alone = attribute(model, {key: value[1:, :6] for key, value in batch.items()}, "attn_lrp", target=TARGET)
    assert close(alone.scores[0], result.scores[1, :6])


def presence(model, batch):
    """The logit by which content tokens are present, others holding the pad token's embedding."""
    content = (~batch["special_tokens_mask"].bool())[0].nonzero().flatten().tolist()

    def value(present):
        ids = batch["input_ids"].clone()
        for at, position in enumerate(content):
            if at not in present:
                ids[0, position] = 0
        with torch.no_grad():
            return float(model(input_ids=ids, attention_mask=batch["attention_mask"]).logits[0, TARGET])

    return value, content


def test_occlusion(model, alone):
    value, content = presence(model, alone)
    every = set(range(len(content)))
    reference = torch.zeros(7)
    for at, position in enumerate(content):
        reference[position] = value(every) - value(every - {at})
    assert close(scores(model, alone, "occlusion")[0], reference)
    assert scores(model, make_batch((9, 6)), "occlusion", window=3).isfinite().all()


def test_shap_approaches_brute_force(model, alone):
    value, content = presence(model, alone)
    reference = shapley(lambda present: value(set(present)), len(content))
    found = scores(model, alone, "shap", samples=4000)[0][content].double()
    assert float((found - reference).abs().max()) < 0.1 * float(reference.abs().max())
    assert found.sum() == pytest.approx(float(reference.sum()), abs=1e-3)


def test_lime_approaches_the_weighted_fit_over_all_sets(model, alone):
    from sklearn.linear_model import LinearRegression

    value, content = presence(model, alone)
    sets = list(itertools.product([0, 1], repeat=len(content)))
    targets = [value({i for i, present in enumerate(one) if present}) for one in sets]
    # Captum's default similarity: cosine distance under a kernel of width 1.
    ones = torch.ones(len(content))
    distance = [1 - torch.cosine_similarity(ones, torch.tensor(one).float(), dim=0).item() for one in sets]
    weights = [math.exp(-(d**2) / 2) for d in distance]
    reference = torch.from_numpy(LinearRegression().fit(sets, targets, weights).coef_)
    found = scores(model, alone, "lime", samples=6000, alpha=0)[0][content].double()
    assert float((found - reference).abs().max()) < 0.1 * float(reference.abs().max())


@pytest.mark.parametrize("method", ["shap", "lime"])
def test_sampling_is_the_same_in_every_batch_and_touches_no_global_state(method):
    model, batch = make_bert(), make_batch((8, 6, 3))
    state = torch.random.get_rng_state()
    together = scores(model, batch, method, samples=60)
    assert torch.equal(torch.random.get_rng_state(), state)
    single = scores(model, {key: value[1:2, :6] for key, value in batch.items()}, method, samples=60)
    assert close(single[0], together[1, :6], atol=1e-3)
    other = scores(model, batch, method, samples=60, seed=1)
    assert not torch.equal(other, together)
    # One content token: its score is the whole change.
    one = attribute(model, batch, method, target=TARGET, samples=60)
    if method == "shap":
        assert float(one.scores[2].sum()) == pytest.approx(float(one.output_change[2]), abs=1e-5)


def test_without_captum_the_message_says_what_to_install(monkeypatch, alone):
    monkeypatch.setitem(sys.modules, "captum.attr", None)
    monkeypatch.setitem(sys.modules, "captum", None)
    with pytest.raises(InputError, match=r"pip install -e '\.\[compare\]'"):
        scores(make_bert(), alone, "occlusion")


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        ("occlusion", {"window": 0}, "window takes 1 or more tokens, got 0"),
        ("shap", {"samples": 1}, "samples takes 2 or more, got 1"),
        ("lime", {"alpha": -1.0}, "alpha takes a finite number, 0 or more, got -1.0"),
        ("lime", {"alpha": math.nan}, "alpha takes a finite number, 0 or more, got nan"),
        ("lime", {"alpha": math.inf}, "alpha takes a finite number, 0 or more, got inf"),
        ("integrated_gradients", {"tolerance": math.nan}, "tolerance takes a finite positive number, got nan"),
        ("lig", {"tolerance": math.nan}, "tolerance takes a finite positive number, got nan"),
        ("attention_attribution", {"steps": 1}, "steps takes at least 2 nodes, got 1"),
        ("beyond_intuition", {"steps": 1}, "steps takes at least 2 nodes, got 1"),
        ("attention_shapley", {"weights": "all"}, "'weights' of method 'attention_shapley' takes one of"),
    ],
)
def test_bad_options(method, options, message):
    with pytest.raises(InputError, match=message):
        attribute(make_bert(), make_batch(), method, **options)


def test_attn_lrp_knows_both_ways_to_write_a_gate():
    """Llama and Phi-3 with the same weights are the same function, and so have the same relevance."""
    from transformers import Phi3Config, Phi3ForSequenceClassification

    sizes = {"hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4}
    sizes |= {"vocab_size": 60, "num_key_value_heads": 4, "pad_token_id": 0, "num_labels": 3, "rms_norm_eps": 1e-6}
    torch.manual_seed(0)
    llama = LlamaForSequenceClassification(LlamaConfig(**sizes, initializer_range=0.3)).eval()
    phi = Phi3ForSequenceClassification(Phi3Config(**sizes)).eval()
    weights = {}
    for name, value in llama.state_dict().items():
        weights[name] = value
    for block in range(2):
        at = f"model.layers.{block}."
        parts = [weights.pop(f"{at}self_attn.{one}_proj.weight") for one in "qkv"]
        weights[f"{at}self_attn.qkv_proj.weight"] = torch.cat(parts)
        parts = [weights.pop(f"{at}mlp.{one}_proj.weight") for one in ("gate", "up")]
        weights[f"{at}mlp.gate_up_proj.weight"] = torch.cat(parts)
    phi.load_state_dict(weights)
    batch = make_batch((8, 6))
    one, other = (attribute(model, batch, "attn_lrp", target=TARGET) for model in (llama, phi))
    assert close(one.output_change, other.output_change, atol=1e-4) and close(one.scores, other.scores, atol=1e-3)


@pytest.mark.parametrize("method", ["raw_attention", "attention_gradcam", "attention_shapley", "beyond_intuition"])
def test_several_targets_share_the_pass_with_attention_maps(method):
    model, batch = make_bert(), make_batch((8, 6))
    counts = []
    for target in ([0, 1], [[0, 1, 2], [1, 2, 0]]):
        passes = 0

        def count(*_):
            nonlocal passes
            passes += 1

        hook = model.bert.encoder.layer[2].register_forward_hook(count)
        attribute(model, batch, method, target=target)
        hook.remove()
        counts.append(passes)
    # The integrated gradient of the last map is each target's own.
    assert counts[1] == counts[0] if method != "beyond_intuition" else counts[1] < 3 * counts[0]
