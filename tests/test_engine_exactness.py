"""The engine against independent references: Captum, central differences, brute-force algebra, a naive CA-LIG."""

import pytest
import torch
from captum.attr import IntegratedGradients, LayerConductance, LayerIntegratedGradients
from conftest import make_batch, make_bert

from calig.pipeline.attribution import attribute
from calig.pipeline.attribution.rollout import fuse, fuse_late, normalise, rollout


def explain(model, batch, method="ca_lig", **options):
    return attribute(model, batch, method, **{"target": [0, 1, 2], **options})


def baseline_ids(batch):
    ids = batch["input_ids"].clone()
    ids[~batch["special_tokens_mask"].bool()] = 0
    return ids


def logits(model):
    return lambda ids, mask: model(input_ids=ids, attention_mask=mask).logits


@pytest.mark.parametrize("steps", [4, 12])
def test_straight_path_equals_captum_at_every_block(steps):
    model, batch = make_bert(), make_batch()
    mask = batch["attention_mask"]
    result = explain(model, batch, path="straight", steps=steps)
    layers = [model.bert.embeddings, *model.bert.encoder.layer]
    for depth, layer in enumerate(layers):
        reference = LayerIntegratedGradients(logits(model), layer).attribute(
            batch["input_ids"],
            baselines=baseline_ids(batch),
            target=[0, 1, 2],
            additional_forward_args=(mask,),
            n_steps=steps,
            method="gausslegendre",
        )
        reference = reference.sum(-1) * mask
        found = result.parts["evidence"][:, depth]
        assert torch.allclose(found, reference.float(), rtol=1e-5, atol=float(1e-5 * reference.abs().max()))


def test_integrated_gradients_equals_captum_on_the_embedding_output():
    model, batch = make_bert(), make_batch()
    mask = batch["attention_mask"]
    result = explain(model, batch, "integrated_gradients", steps=20)
    with torch.no_grad():
        here, there = model.bert.embeddings(batch["input_ids"]), model.bert.embeddings(baseline_ids(batch))

    def tail(embedded, mask):
        bias = torch.where(mask.bool(), 0.0, torch.finfo(torch.float32).min)[:, None, None]
        return model.classifier(model.bert.pooler(model.bert.encoder(embedded, bias).last_hidden_state))

    reference = IntegratedGradients(tail).attribute(
        here, there, target=[0, 1, 2], additional_forward_args=(mask,), n_steps=20, method="gausslegendre"
    )
    assert torch.allclose(result.scores, reference.sum(-1).float() * mask, atol=1e-5)


def test_shared_path_converges_to_captum_layer_conductance():
    model, batch = make_bert(), make_batch((7, 7, 7))

    class FromEmbedding(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.bert = model

        def forward(self, embedded):
            encoded = self.bert.bert.encoder(embedded).last_hidden_state
            return self.bert.classifier(self.bert.bert.pooler(encoded))

    wrapped = FromEmbedding()
    with torch.no_grad():
        here, there = model.bert.embeddings(batch["input_ids"]), model.bert.embeddings(baseline_ids(batch))
    result = explain(model, batch, path="shared", steps=513)
    for depth, layer in enumerate(model.bert.encoder.layer, start=1):
        reference = LayerConductance(wrapped, layer).attribute(here, there, target=[0, 1, 2], n_steps=2000)
        reference = reference.sum(-1).float()
        assert torch.allclose(result.parts["evidence"][:, depth], reference, atol=float(2e-3 * reference.abs().max()))


def test_attention_gradient_equals_central_differences_in_float64():
    model, batch = make_bert(layers=2, attention="eager", dtype=torch.float64), make_batch((6,))
    from calig.pipeline.attribution.inside import attention_matrices
    from calig.pipeline.attribution.model import ExplainableModel
    from calig.pipeline.attribution.objective import ClassLogit

    seen = {}

    def combine(attention, gradient, mask):
        seen.setdefault("maps", []).append((attention, gradient))
        return attention.mean(1)

    wrapped = ExplainableModel(model)
    with wrapped.session():
        inputs = wrapped.prepare(batch)
        attention_matrices(wrapped, inputs, ClassLogit(torch.tensor([1])), combine)

    def objective(layer, nudge):
        """The logit with one attention map nudged, by rewriting what the layer's attention returns."""
        module = model.bert.encoder.layer[layer].attention.self
        value = {}
        handles = [
            module.value.register_forward_hook(lambda _m, _a, out: value.update(v=out)),
            module.register_forward_hook(
                lambda _m, _a, out: (
                    out[0] + torch.einsum("bhqk,bkhd->bqhd", nudge, value["v"].unflatten(-1, (3, 8))).flatten(-2),
                    out[1],
                )
            ),
        ]
        try:
            with torch.no_grad():
                return model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits[0, 1]
        finally:
            for handle in handles:
                handle.remove()

    generator = torch.Generator().manual_seed(0)
    for layer, (_, gradient) in enumerate(seen["maps"]):
        for _ in range(10):
            entry = tuple(int(torch.randint(size, (), generator=generator)) for size in gradient.shape[1:])
            step = torch.zeros_like(gradient)
            step[(0, *entry)] = 1e-5
            slope = (objective(layer, step) - objective(layer, -step)) / 2e-5
            assert torch.isclose(slope, gradient[(0, *entry)], rtol=1e-5, atol=1e-9)


def test_rollout_algebra_equals_a_loop():
    generator = torch.Generator().manual_seed(0)
    factors = [torch.randn(2, 5, 5, generator=generator) for _ in range(4)]
    readout = torch.tensor([[1.0, 0, 0, 0, 0], [0, 0.5, 0.5, 0, 0]])
    rows = rollout(factors, readout)
    for b in range(2):
        relevance = [[float(i == j) for j in range(5)] for i in range(5)]
        for layer, factor in enumerate(factors):
            new = [
                [relevance[i][j] + sum(float(factor[b, i, k]) * relevance[k][j] for k in range(5)) for j in range(5)]
                for i in range(5)
            ]
            relevance = new
            for j in range(5):
                expected = sum(float(readout[b, i]) * (relevance[i][j] - float(i == j)) for i in range(5))
                assert abs(float(rows[b, layer, j]) - expected) < 1e-4 * max(1, abs(expected))


def naive_ca_lig(model, ids, special, target, *, fusion, lam, positive, nodes):
    """CA-LIG for one unpadded sequence, written from METHODS 2 alone: loops, no batching, no engine."""
    bert, head = model.bert, lambda z: model.classifier(model.bert.pooler(z))[0, target]
    base = torch.where(special, ids, torch.zeros_like(ids))
    here, there = bert.embeddings(ids[None]).detach(), bert.embeddings(base[None]).detach()

    def states(z):
        out = [z]
        for block in bert.encoder.layer:
            out.append(block(out[-1]))
        return out

    r, before = None, None
    for a in torch.linspace(0, 1, nodes, dtype=torch.float64).tolist():
        chain = states((there + a * (here - there)).requires_grad_())
        grads = torch.autograd.grad(head(chain[-1]), chain)
        now = [(z.detach(), g) for z, g in zip(chain, grads)]
        if before is not None:
            part = [((g0 + g1) / 2 * (z1 - z0)).sum(-1)[0] for (z0, g0), (z1, g1) in zip(before, now)]
            r = part if r is None else [x + y for x, y in zip(r, part)]
        before = now
    chain, maps, z = [], [], here.clone().requires_grad_()
    for block in bert.encoder.layer:
        attention = block.attention.self
        split = lambda t: t.view(1, len(ids), 3, 8).transpose(1, 2)
        q, k, v = (split(f(z)) for f in (attention.query, attention.key, attention.value))
        probabilities = (q @ k.transpose(2, 3) / 8**0.5).softmax(-1)
        maps.append(probabilities)
        mixed = block.attention.output((probabilities @ v).transpose(1, 2).reshape(1, len(ids), 24), z)
        z = block.output(block.intermediate(mixed), mixed)
    gradients = torch.autograd.grad(head(z), maps)
    unit = lambda x: x / x.abs().max() if x.abs().max() > 0 else x
    total, rows, size = torch.eye(len(ids)), [], len(ids)
    raw, summed = torch.eye(len(ids)), torch.zeros(len(ids))
    for layer, (attention, gradient) in enumerate(zip(maps, gradients)):
        product = (attention * gradient)[0].detach()
        G = (product.clamp_min(0) if positive else product).mean(0)
        evidence = unit(r[layer])
        if fusion == "column":
            F = lam * evidence[None, :].expand(size, size) / size + (1 - lam) * unit(G)
        elif fusion == "diagonal":
            F = lam * torch.diag(evidence) + (1 - lam) * unit(G)
        elif fusion == "gated":
            F = unit(G.abs() * evidence[None, :])
        if fusion == "late":
            raw, summed = raw + G @ raw, summed + evidence
            rows.append(lam * unit(summed) + (1 - lam) * unit(raw[0] - torch.eye(size)[0]))
        else:
            total = total + F @ total
            rows.append(total[0] - torch.eye(size)[0])
    return torch.stack(rows)


@pytest.mark.parametrize("fusion", ["column", "diagonal", "gated", "late"])
@pytest.mark.parametrize("attention_gradient", ["positive", "signed"])
def test_ca_lig_equals_a_naive_reference(fusion, attention_gradient):
    model, batch = make_bert(), make_batch()
    result = explain(
        model, batch, fusion=fusion, lam=0.3, attention_gradient=attention_gradient, path="shared", steps=8
    )
    for row, length in enumerate((9, 6, 8)):
        reference = naive_ca_lig(
            model,
            batch["input_ids"][row, :length],
            batch["special_tokens_mask"][row, :length].bool(),
            row,
            fusion=fusion,
            lam=0.3,
            positive=attention_gradient == "positive",
            nodes=8,
        )
        assert torch.allclose(result.layer_scores[row, :, :length], reference, rtol=1e-4, atol=1e-5)
        assert torch.allclose(result.scores[row, :length], reference[-1], rtol=1e-4, atol=1e-5)
        assert (result.scores[row, length:] == 0).all()


def test_generic_attention_and_rollout_equal_their_papers():
    model, batch = make_bert(attention="eager"), make_batch((7,))
    ids, mask = batch["input_ids"], batch["attention_mask"]
    output = model(input_ids=ids, attention_mask=mask, output_attentions=True)
    gradients = torch.autograd.grad(output.logits[0, 1], output.attentions)
    generic, mean = torch.eye(7), torch.eye(7)
    for attention, gradient in zip(output.attentions, gradients, strict=True):
        generic = generic + (attention * gradient)[0].clamp_min(0).mean(0) @ generic
        mean = (0.5 * attention[0].mean(0) + 0.5 * torch.eye(7)) @ mean
    found = attribute(model, batch, "generic_attention", target=1)
    assert torch.allclose(found.scores[0], (generic - torch.eye(7))[0].detach(), atol=1e-6)
    assert torch.allclose(attribute(model, batch, "attention_rollout").scores[0], mean[0].detach(), atol=1e-6)


def test_input_x_gradient_equals_autograd():
    model, batch = make_bert(), make_batch()
    embedded = model.bert.embeddings(batch["input_ids"]).detach().requires_grad_()
    bias = torch.where(batch["attention_mask"].bool(), 0.0, torch.finfo(torch.float32).min)[:, None, None]
    logit = model.classifier(model.bert.pooler(model.bert.encoder(embedded, bias).last_hidden_state))
    (gradient,) = torch.autograd.grad(logit[[0, 1, 2], [0, 1, 2]].sum(), [embedded])
    found = explain(model, batch, "input_x_gradient").scores
    assert torch.allclose(found, (embedded * gradient).sum(-1).detach() * batch["attention_mask"], atol=1e-5)


def test_all_zero_evidence_stays_zero():
    assert (normalise(torch.zeros(2, 3)) == 0).all()
    mask = torch.ones(1, 3, dtype=torch.bool)
    zero, gradients = torch.zeros(1, 2, 3), [torch.zeros(1, 3, 3)]
    for fusion in ("column", "diagonal", "gated"):
        assert (fuse(zero, gradients, mask, fusion=fusion, lam=0.5)[0] == 0).all()
    assert (fuse_late(zero, gradients, torch.tensor([[1.0, 0, 0]]), lam=0.5) == 0).all()


def test_flow_is_the_transposed_factor_from_source_to_target():
    model, batch = make_bert(), make_batch()
    result = explain(model, batch, return_flow=True)
    readout = torch.zeros(3, 9)
    readout[:, 0] = 1
    rebuilt = rollout(list(result.flow.transpose(-1, -2).unbind(1)), readout)
    assert torch.allclose(rebuilt, result.layer_scores, atol=1e-5)


@pytest.mark.parametrize("baseline", ["pad", "mean", "zero"])
def test_baseline_replaces_content_rows_and_nothing_else(baseline):
    from calig.pipeline.attribution.baselines import baseline_trace
    from calig.pipeline.attribution.model import ExplainableModel

    model, batch = make_bert(), make_batch()
    wrapped = ExplainableModel(model)
    with wrapped.session():
        inputs = wrapped.prepare(batch)
        state = baseline_trace(wrapped, inputs, torch.arange(3), baseline).states[0]
    plain = model.bert.embeddings(batch["input_ids"])
    content = ~batch["special_tokens_mask"].bool()
    assert torch.allclose(state[~content], plain[~content], atol=1e-6)
    embeddings = model.bert.embeddings
    row = {"pad": embeddings.word_embeddings.weight[0], "mean": embeddings.word_embeddings.weight.mean(0)}
    if baseline == "zero":
        expected = torch.zeros_like(plain)
    else:
        positions = embeddings.position_embeddings.weight[: plain.shape[1]]
        types = embeddings.token_type_embeddings.weight[0]
        expected = embeddings.LayerNorm(row[baseline] + positions + types).expand_as(plain)
    assert torch.allclose(state[content], expected[content], atol=1e-6)
