"""Long documents: windows attributed by hand and pooled are what `attribute` gives for whole documents."""

import pytest
import torch
from conftest import make_batch, make_bert

from calig.pipeline.attribution import Contrast, ExplainableModel, NextToken, attribute, available_methods
from calig.pipeline.attribution.methods import create_method, method_options
from calig.pipeline.attribution.objective import ClassLogit
from calig.pipeline.attribution.windows import Windows, own_mean, pool
from calig.pipeline.errors import InputError

STEPS = {"steps": 17}
LENGTHS = (20, 9, 13)
# Three windows of up to ten tokens with four in common, then one, then two; [CLS] and [SEP] frame each.
PLACES = (
    ((0, *range(1, 9), 19), (0, *range(5, 13), 19), (0, *range(11, 19), 19)),
    (tuple(range(9)),),
    ((0, *range(1, 9), 12), (0, *range(4, 12), 12)),
)


def make_documents(places=PLACES, lengths=LENGTHS, **settings):
    """Documents of known windows, all framed."""
    documents = make_batch(lengths, **settings)
    windows = torch.full((len(places), max(map(len, places)), 10), -1)
    for row, of in enumerate(places):
        for number, place in enumerate(of):
            windows[row, number, : len(place)] = torch.tensor(place)
    return documents | {"windows": windows}


def one_window(documents, row, place):
    """A window as a batch of its own."""
    keys = ("input_ids", "attention_mask", "special_tokens_mask")
    return {key: documents[key][row : row + 1, list(place)] for key in keys}


def options_of(method):
    names = vars(method_options(method)())
    return {name: value for name, value in {"steps": 17, "samples": 20}.items() if name in names}


def by_hand(model, documents, method, target, **options):
    """Scores of whole documents from one call per window; the layers likewise."""
    scores, layers = [], []
    for row, of in enumerate(PLACES):
        total = torch.zeros(documents["input_ids"].shape[1])
        deep = None
        for place in of:
            one = one_window(documents, row, place)
            result = attribute(model, one, method, target=int(target[row]), **options)
            total[list(place)] += result.scores[0] / len(of)
            if result.layer_scores is not None:
                deep = torch.zeros(result.layer_scores.shape[1], len(total)) if deep is None else deep
                deep[:, list(place)] += result.layer_scores[0] / len(of)
        scores.append(total)
        layers.append(deep)
    return torch.stack(scores), None if layers[0] is None else torch.stack(layers)


def window_logits(model, documents):
    with torch.no_grad():
        return [
            torch.cat(
                [
                    model(input_ids=one["input_ids"], attention_mask=one["attention_mask"]).logits
                    for place in of
                    for one in [one_window(documents, row, place)]
                ]
            )
            for row, of in enumerate(PLACES)
        ]


def explain_all(model, batch, method="ca_lig", **options):
    return attribute(model, batch, method, **options)


@pytest.mark.parametrize("method", [name for name in available_methods() if name != "ca_lig"])
def test_windows_attributed_one_by_one_and_pooled_are_the_same(bert, method):
    if method in ("shap", "lime", "occlusion"):
        pytest.importorskip("captum")
    documents = make_documents()
    target = torch.tensor([0, 1, 2])
    result = attribute(bert, documents, method, target=target, **options_of(method))
    scores, layers = by_hand(bert, documents, method, target, **options_of(method))
    assert result.scores.shape == documents["input_ids"].shape
    assert scores.abs().sum() > 0
    torch.testing.assert_close(result.scores, scores, atol=1e-5, rtol=1e-4)
    if layers is not None:
        torch.testing.assert_close(result.layer_scores, layers, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("fusion", ["column", "diagonal", "gated", "late"])
def test_ca_lig_is_fused_on_the_scale_of_the_document(bert, fusion):
    documents = make_documents()
    method = create_method("ca_lig", STEPS | {"fusion": fusion, "lam": 0.5})
    result = attribute(bert, documents, target=1, fusion=fusion, lam=0.5, **STEPS)
    model = ExplainableModel(bert)
    for row, of in enumerate(PLACES):
        # By hand: the ingredients of each window alone, divided by the largest of all windows.
        found = []
        for place in of:
            with model.session():
                inputs = model.prepare(one_window(documents, row, place))
                found.append(method.ingredients(model, inputs, ClassLogit(torch.tensor([1])))[0])
        evidence = [parts.evidence[0] for parts in found]
        gradients = [[g[0] for g in parts.gradients] for parts in found]
        total = torch.zeros(20)
        fused = fuse_by_hand(evidence, gradients, [parts.readout[0] for parts in found], fusion)
        for place, own in zip(of, fused, strict=True):
            total[list(place)] += own.float() / len(of)
        torch.testing.assert_close(result.scores[row], total, atol=1e-5, rtol=1e-4)


def fuse_by_hand(evidence, gradients, readouts, fusion):
    def scaled(matrices):
        peak = max(float(m.abs().max()) for m in matrices)
        return [m / peak if peak else m for m in matrices]

    def rolled(factors, readout):
        total = torch.eye(len(readout))
        for factor in factors:
            total = total + factor @ total
        return readout @ (total - torch.eye(len(readout)))

    blocks = range(len(gradients[0]))
    own = [scaled([e[layer] for e in evidence]) for layer in blocks]
    if fusion == "late":
        sums = scaled([sum(own[layer][w] for layer in blocks) for w in range(len(evidence))])
        flows = scaled([rolled(gradients[w], readouts[w]) for w in range(len(evidence))])
        return [0.5 * a + 0.5 * b for a, b in zip(sums, flows, strict=True)]
    factors = []
    for layer in blocks:
        of_block = [g[layer] for g in gradients]
        if fusion == "gated":
            factors.append(scaled([g.abs() * own[layer][w] for w, g in enumerate(of_block)]))
            continue
        grads = scaled(of_block)
        keys = [
            o.expand_as(g) / len(o) if fusion == "column" else o.diag() for o, g in zip(own[layer], grads, strict=True)
        ]
        factors.append([0.5 * k + 0.5 * g for k, g in zip(keys, grads, strict=True)])
    return [rolled([f[w] for f in factors], readouts[w]) for w in range(len(evidence))]


def test_completeness_holds_for_the_pooled_logit(bert):
    documents = make_documents()
    result = attribute(bert, documents, target=2, steps="auto", tolerance=1e-3, max_steps=2000)
    logits = torch.stack([of.mean(0) for of in window_logits(bert, documents)])
    content = documents["special_tokens_mask"] == 0
    model = ExplainableModel(bert)
    with model.session():
        torch.testing.assert_close(model.logits(model.prepare(documents)), logits)
    evidence = result.parts["evidence"]
    # What each layer's tokens sum to is the change of the document's logit ...
    torch.testing.assert_close(evidence.sum(-1)[:, 0], result.output_change, atol=2e-3, rtol=1e-3)
    assert result.completeness_gap.max() < 1e-3 and bool(result.converged.all())
    exact = (evidence.sum(-1) - result.output_change[:, None]).abs() / result.output_change.abs()[:, None]
    torch.testing.assert_close(result.completeness_gap, exact, atol=1e-5, rtol=1e-2)
    # ... and that is known from the windows' own changes.
    changes = [attribute(bert, one_window(documents, 0, place), target=2, **STEPS).output_change for place in PLACES[0]]
    torch.testing.assert_close(result.output_change[0], torch.cat(changes).mean())
    assert content.sum() == sum(LENGTHS) - 6 and (result.error_bound >= result.completeness_gap - 1e-6).all()


def test_windows_that_oppose_each_other_are_refined_until_the_document_is_complete(bert):
    documents = make_documents(seed=2)
    auto = {"steps": "auto", "tolerance": 0.01, "max_steps": 4000}
    own = [attribute(bert, one_window(documents, 0, place), target=2, **auto) for place in PLACES[0]]
    changes = torch.cat([one.output_change for one in own])
    # A class for which the windows disagree: what they are off by apart adds up to more of what is left.
    assert changes.min() < 0 < changes.max()
    result = attribute(bert, {key: value[:1] for key, value in documents.items()}, target=2, **auto)
    assert result.error_bound.max() <= 0.01 and result.completeness_gap.max() <= 0.01
    apart = sum(one.error_bound.double() * one.output_change.abs()[:, None] for one in own) / 3 / changes.mean().abs()
    assert apart.max() > 0.01


@pytest.mark.parametrize("method", ["ca_lig", "integrated_gradients"])
def test_a_document_of_3000_words_is_complete(method):
    length = 3002
    document = make_batch((length,))
    starts = [*range(1, length - 1 - 38, 30), length - 1 - 38]
    windows = [[0, *range(start, start + 38), length - 1] for start in starts]
    document["windows"] = torch.tensor([windows])
    result = attribute(make_bert(layers=2), document, method, steps="auto")
    assert result.completeness_gap.max() < 0.01 and bool(result.converged.all())
    assert result.scores.shape == (1, length) and bool((result.scores[0, 1:-1] != 0).all())


@pytest.mark.parametrize("method", ["ca_lig", "integrated_gradients", "attention_rollout"])
def test_max_explains_the_window_that_wins(bert, method):
    documents = make_documents()
    options = {} if method == "attention_rollout" else STEPS
    for target in (0, 1):
        result = attribute(bert, documents, method, target=target, pooling="max", **options)
        for row, (of, logits) in enumerate(zip(PLACES, window_logits(bert, documents), strict=True)):
            winner = int(logits[:, target].argmax())
            alone = attribute(bert, one_window(documents, row, of[winner]), method, target=target, **options)
            expected = torch.zeros(20)
            expected[list(of[winner])] = alone.scores[0]
            torch.testing.assert_close(result.scores[row], expected, atol=1e-5, rtol=1e-4)
            torch.testing.assert_close(result.output_change[row], alone.output_change[0])
            if alone.completeness_gap is not None:
                torch.testing.assert_close(result.completeness_gap[row], alone.completeness_gap[0], atol=1e-4, rtol=0)


@pytest.mark.parametrize("method", ["ca_lig", "generic_attention", "integrated_gradients"])
@pytest.mark.parametrize("pooling", ["mean", "max"])
def test_neither_the_batch_nor_its_slices_matter(bert, method, pooling):
    documents = make_documents()
    options = {"target": 1, "pooling": pooling} | ({} if method == "generic_attention" else {"steps": "auto"})
    whole = attribute(bert, documents, method, **options)
    for budget in (1, 25, 4096):
        small = attribute(ExplainableModel(bert, max_tokens_per_pass=budget), documents, method, **options)
        torch.testing.assert_close(small.scores, whole.scores, atol=1e-5, rtol=1e-4)
    for row in range(3):
        alone = {key: value[row : row + 1] for key, value in documents.items()}
        own = attribute(bert, alone, method, **options)
        torch.testing.assert_close(own.scores[0], whole.scores[row], atol=1e-5, rtol=1e-4)
    wider = {key: torch.nn.functional.pad(value, (0, 5), value=-1 if key == "windows" else int("special" in key))
             for key, value in documents.items()}  # fmt: skip
    more = attribute(bert, wider, method, **options)
    torch.testing.assert_close(more.scores[:, :20], whole.scores, atol=1e-5, rtol=1e-4)
    assert not more.scores[:, 20:].any()


@pytest.mark.parametrize("method", ["ca_lig", "integrated_gradients", "raw_attention", "input_x_gradient"])
@pytest.mark.parametrize("pooling", ["mean", "max"])
def test_documents_of_one_window_are_explained_as_short_texts(bert, method, pooling):
    plain = make_batch()
    windows = torch.where(plain["attention_mask"] == 1, torch.arange(9), -1)[:, None]
    options = {} if method in ("raw_attention", "input_x_gradient") else {"steps": "auto"}
    expected = attribute(bert, plain, method, **options)
    result = attribute(bert, plain | {"windows": windows}, method, pooling=pooling, **options)
    for name in ("scores", "layer_scores", "completeness_gap", "error_bound", "output_change"):
        if (value := getattr(expected, name)) is not None:
            torch.testing.assert_close(getattr(result, name), value, atol=1e-5, rtol=1e-4)
    for name in ("target", "mask", "special", "steps_used", "converged"):
        assert torch.equal(getattr(result, name), getattr(expected, name))


def test_targets_and_objectives_are_those_of_the_document(bert):
    documents = make_documents()
    logits = torch.stack([of.mean(0) for of in window_logits(bert, documents)])
    predicted = attribute(bert, documents, **STEPS)
    assert torch.equal(predicted.target, logits.argmax(1))
    several = attribute(bert, documents, target=torch.tensor([[0, 1]] * 3), **STEPS)
    for index, result in enumerate(several):
        torch.testing.assert_close(result.scores, attribute(bert, documents, target=index, **STEPS).scores)
    # A contrast is linear in the logits, and so are its relevances.
    method = "input_x_gradient"
    apart = [attribute(bert, documents, method, target=index).scores for index in (0, 1)]
    contrast = attribute(bert, documents, method, objective=Contrast(0, against=1)).scores
    torch.testing.assert_close(contrast, apart[0] - apart[1], atol=1e-5, rtol=1e-4)
    free = attribute(bert, documents, method, objective=lambda output: output.logits[:, 0]).scores
    torch.testing.assert_close(free, apart[0], atol=1e-5, rtol=1e-4)


def test_the_model_says_how_its_windows_are_pooled(bert):
    documents = make_documents()
    bert.config.calig_windows = {"length": 10, "overlap": 4, "pooling": "max", "limit": None}
    told = attribute(bert, documents, "input_x_gradient", target=0)
    assert torch.equal(told.scores, attribute(bert, documents, "input_x_gradient", target=0, pooling="max").scores)
    assert not torch.equal(told.scores, attribute(bert, documents, "input_x_gradient", target=0, pooling="mean").scores)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"windows": torch.zeros(3, 10, dtype=torch.long)}, r"shape \(3, 10\).*expected integers \(B, V, T\)"),
        ({"windows": torch.full((3, 1, 4), 20)}, "from 20 to 20; the documents have 20 tokens"),
        ({"windows": torch.tensor([[[0]], [[-1]], [[1]]])}, "document 1 has no window"),
        ({"windows": torch.zeros(3, 1, 4)}, "expected integers"),
    ],
)
def test_windows_that_do_not_fit_are_refused(bert, change, message):
    with pytest.raises(InputError, match=message):
        attribute(bert, make_documents() | change, target=0)
    with pytest.raises(InputError, match="unknown pooling 'median'"):
        attribute(bert, make_documents(), target=0, pooling="median")
    with pytest.raises(InputError, match="a next token has one context"):
        attribute(bert, make_documents(), objective=NextToken(3))


def test_pooling_agrees_with_a_loop_and_has_its_gradient():
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(6, 3, generator=generator, dtype=torch.double, requires_grad=True)
    document = torch.tensor([0, 0, 0, 1, 2, 2])
    split = [values[:3], values[3:4], values[4:]]
    torch.testing.assert_close(pool(values, document, 3), torch.stack([part.mean(0) for part in split]))
    torch.testing.assert_close(pool(values, document, 3, "max"), torch.stack([part.amax(0) for part in split]))
    torch.testing.assert_close(own_mean(values, document)[3:], torch.stack([values[3], *[values[4:].mean(0)] * 2]))
    for pooling in ("mean", "max"):
        assert torch.autograd.gradcheck(lambda given, how=pooling: pool(given, document, 3, how), values)
    windows = Windows(torch.arange(6)[:, None], document, 3, "max")
    assert windows.winners(values[:, 0]).tolist() == [
        int(values[:3, 0].argmax()), 3, 4 + int(values[4:, 0].argmax()),
    ]  # fmt: skip
    assert windows.winners(torch.ones(6)).tolist() == [0, 3, 4]
