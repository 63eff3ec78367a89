"""The rules of AttnLRP in families that write norms and gates in other ways: by hand, by conservation, by equal models.

Without attention, whose softmax leaks, and without biases, relevance is conserved at every layer.
"""

import pytest
import torch
import transformers
from conftest import make_batch
from torch import nn
from torch.nn import functional

from calig.pipeline.attribution import NextToken, UnsupportedModelError, attribute
from calig.pipeline.attribution.lrp_functions import FunctionRules

TARGET = 1
SIZES = {
    "vocab_size": 60,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32,
    "initializer_range": 0.3,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
EXPERTS = {"num_experts": 4, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16}


def build(family, kind="ForSequenceClassification", *, attention=False, **more):
    """A random model in float64 without biases; without attention too, unless asked for."""
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**{**SIZES, **more})
    config.num_labels = 3
    model = getattr(transformers, f"{family}{kind}")(config).double().eval()
    for name, parameter in model.named_parameters():
        behind = any(part in name for part in ("o_proj", "self_attn.out_proj", "self_attention.experts.output_linear"))
        if name.endswith("bias") or (behind and not attention):
            nn.init.zeros_(parameter)
    if model.config.model_type in ("mixtral", "qwen2_moe"):
        model.set_experts_implementation("eager")  # the one that takes float64
    return model


def explain(model, batch=None, **options):
    batch = make_batch((8, 6)) if batch is None else batch
    options = options or {"target": TARGET}
    return attribute(model, batch, "attn_lrp", **options)


def alone():
    return make_batch((7,), seed=3)


@pytest.mark.parametrize("experts", ["eager", "grouped_mm", "batched_mm"])
@pytest.mark.parametrize(("family", "more"), [("Mixtral", {"num_local_experts": 4}), ("Qwen2Moe", EXPERTS)])
def test_mixtures_of_experts_conserve_relevance(family, more, experts):
    model = build(family, **more).float()
    model.set_experts_implementation(experts)
    assert explain(model).completeness_gap.max() < 1e-3
    assert all(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize(
    ("family", "more"),
    [("Cohere", {}), ("Cohere2", {}), ("Lfm2", {"layer_types": ["conv", "full_attention"]})],
)
def test_language_models_conserve_relevance(family, more):
    model = build(family, "ForCausalLM", **more)
    result = explain(model, alone(), objective=NextToken(torch.tensor(5)))
    assert result.completeness_gap.max() < 1e-3


def test_gates_that_no_module_is_named_for_conserve_relevance():
    assert explain(build("JetMoe", kv_channels=6)).completeness_gap.max() < 1e-3


@torch.no_grad()
def relevance_of_a_mixture(model, ids):
    """LRP by hand of a one-block Mixtral without attention: relevance of the last token, to which all of it goes."""
    block, moe = model.model.layers[0], model.model.layers[0].mlp
    z = model.model.embed_tokens(ids)[0, -1]

    def norm(module, x):
        return module.weight * x / (x.square().mean() + module.variance_epsilon).sqrt()

    n = norm(block.post_attention_layernorm, z)
    weights, chosen = (moe.gate.weight @ n).softmax(0).topk(moe.top_k)
    parts = []
    for weight, expert in zip(weights / weights.sum(), chosen):
        into, out = moe.experts.gate_up_proj[expert], moe.experts.down_proj[expert]
        g, u = (into @ n).chunk(2)
        parts.append((weight, into, out, g, u, g * torch.sigmoid(g) * u))
    y = sum(weight * out @ h for weight, _, out, _, _, h in parts)
    final = norm(model.model.norm, z + y)
    logit = final @ model.score.weight[TARGET]
    r = final * model.score.weight[TARGET]  # what each feature gives to the logit, and no less through the norm
    r_z, r_y = r * z / (z + y), r * y / (z + y)
    for weight, into, out, g, u, h in parts:
        r_h = h * (weight * out.T @ (r_y / y))
        w_g, w_u = into.chunk(2)
        r_z = r_z + n * (w_g.T @ (r_h / 2 / g)) + n * (w_u.T @ (r_h / 2 / u))
    return r_z.sum(), logit


def test_a_mixture_of_experts_against_the_rules_by_hand():
    model, batch = build("Mixtral", num_hidden_layers=1, num_local_experts=4), alone()
    reference, logit = relevance_of_a_mixture(model, batch["input_ids"])
    assert reference == pytest.approx(float(logit))  # the rules conserve
    found = explain(model, batch)
    expected = torch.zeros(7)
    expected[-1] = reference
    assert torch.allclose(found.scores[0].float(), expected, atol=1e-5)


def test_experts_that_are_all_alike_are_explained_as_one():
    """Then the mixture is a Llama, whatever the router does."""
    mixture = build("Mixtral", attention=True, num_local_experts=4)
    same = {name: getattr(mixture.config, name) for name in ("rms_norm_eps", "rope_parameters")}
    llama = build("Llama", attention=True, **same)
    weights = mixture.state_dict()
    for name, value in weights.items():
        if "experts" in name:
            value.copy_(value[:1].expand_as(value))
    for at in range(2):
        mlp = f"model.layers.{at}.mlp"
        gate, up = weights.pop(f"{mlp}.experts.gate_up_proj")[0].chunk(2)
        weights |= {f"{mlp}.gate_proj.weight": gate, f"{mlp}.up_proj.weight": up}
        weights[f"{mlp}.down_proj.weight"] = weights.pop(f"{mlp}.experts.down_proj")[0]
        del weights[f"{mlp}.gate.weight"]
    llama.load_state_dict(weights)
    one, other = explain(mixture), explain(llama)
    assert torch.allclose(one.layer_scores, other.layer_scores, atol=1e-5)
    assert torch.allclose(one.scores, other.scores, atol=1e-5)


class Centred(nn.Module):
    """Cohere's norm through torch's function, which has a rule of its own."""

    def __init__(self, norm):
        super().__init__()
        self.norm = [norm]  # no child: it must not be found

    def forward(self, states):
        norm = self.norm[0]
        return norm.weight * functional.layer_norm(states, states.shape[-1:], eps=norm.variance_epsilon)


def test_a_layer_norm_written_by_hand_is_one():
    model = build("Cohere", "ForCausalLM", attention=True, use_qk_norm=True)
    batch, asked = alone(), {"objective": NextToken(torch.tensor(5))}
    for name, parameter in model.named_parameters():
        if "norm" in name:
            nn.init.normal_(parameter, 1.0, 0.3)
    found = explain(model, batch, **asked)
    norms = [name for name, module in model.named_modules() if type(module).__name__ == "CohereLayerNorm"]
    assert len(norms) == 7  # of the blocks, their queries and keys, and the last
    for name in norms:
        model.set_submodule(name, Centred(model.get_submodule(name)))
    reference = explain(model, batch, **asked)
    assert torch.allclose(found.scores, reference.scores, atol=1e-5)
    assert torch.allclose(found.layer_scores, reference.layer_scores, atol=1e-5)


class LinearByHand(nn.Module):
    """A linear map as a matrix product, the way experts are written whose weights are one parameter."""

    def __init__(self, linear):
        super().__init__()
        self.weight = linear.weight

    def forward(self, states):
        return states @ self.weight.T


def test_parameters_are_no_activations():
    model = build("Llama", attention=True)
    reference = explain(model)
    for block in model.model.layers:
        block.mlp.down_proj = LinearByHand(block.mlp.down_proj)
    assert torch.allclose(explain(model).scores, reference.scores, atol=1e-6)


class SoftSignNorm(nn.Module):
    """No norm: every entry is divided by a number of its own."""

    def forward(self, states):
        return states / (1 + states.abs())


def test_a_norm_of_an_unknown_kind_is_refused_by_name():
    model = build("Llama")
    model.model.layers[1].input_layernorm = SoftSignNorm()
    with pytest.raises(UnsupportedModelError, match="the norm SoftSignNorm of 'llama' is of a kind that attn_lrp does"):
        explain(model)
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert not any("forward" in module.__dict__ for module in model.modules())


class Fused(nn.Module):
    """Attention in one call, whose result is used or not."""

    def __init__(self, used):
        super().__init__()
        self.used = used

    def forward(self, states):
        returned = functional.scaled_dot_product_attention(states, states, states)
        return returned if self.used else states


def test_products_out_of_reach_are_refused_where_relevance_flows():
    model = build("Llama")
    model.model.layers[1].mlp = Fused(used=True)
    with pytest.raises(UnsupportedModelError, match="'llama' multiplies activations inside scaled_dot_product_atten"):
        explain(model)
    model.model.layers[1].mlp = Fused(used=False)
    assert explain(model).completeness_gap.max() < 1e-3


CONSTANT = torch.linspace(1, 2, 4, dtype=torch.float64)


def held(x, y):
    """The product in place, read through the tensor that was multiplied."""
    x.mul_(y)
    return x


@pytest.mark.parametrize(
    ("function", "shares"),
    [
        (lambda x, y: x * y, (0.5, 0.5)),
        (lambda x, y: torch.mul(x, other=y), (0.5, 0.5)),
        (lambda x, y: held(x.clone(), y), (0.5, 0.5)),
        (lambda x, y: x @ y.T, (0.5, 0.5)),
        (lambda x, y: torch.einsum("ij,ij,ij->i", x, y, y), (1 / 3, 2 / 3)),
        (lambda x, y: x[:, :, None] * y[:, None], (0.5, 0.5)),
        (lambda x, y: functional.glu(torch.cat([x, y], -1)), (0.5, 0.5)),
        (lambda x, y: x * y[:, :1], (1, 0)),
        (lambda x, y: y[:, :1] * x, (1, 0)),
        (lambda x, y: x / y, (1, 0)),
        (lambda x, y: x.clone().div_(y), (1, 0)),
        (lambda x, y: x / y.square().mean(-1, keepdim=True).sqrt(), (1, 0)),
        (lambda x, y: x * torch.rsqrt(x.square().mean(-1, keepdim=True)), (1, 0)),
        (lambda x, y: (x * CONSTANT).square(), (1, 0)),
        (lambda x, y: functional.normalize(x), (1, 0)),
        (lambda x, y: functional.rms_norm(x, (4,), CONSTANT), (1, 0)),
        (lambda x, y: functional.layer_norm(x, (4,), CONSTANT), (1, 0)),
    ],
)
def test_what_a_function_gives_to_its_factors(function, shares):
    torch.manual_seed(0)
    x, y = (torch.randn(3, 4, dtype=torch.float64).requires_grad_() for _ in range(2))
    with FunctionRules("a model"):
        value = function(x, y)
    assert torch.allclose(value, function(x, y))
    # Nobody reads the whole of it alike.
    total = (value * torch.randn_like(value)).sum()
    gradients = torch.autograd.grad(total, (x, y), allow_unused=True)
    for one, gradient, share in zip((x, y), gradients, shares):
        relevance = 0.0 if gradient is None else float((one.detach() * gradient).sum())
        assert relevance == pytest.approx(share * float(total.detach()))
