"""CA-LIG's form for causal models: evidence carried back to the tokens that it was gathered from."""

import pytest
import torch
from conftest import make_batch, make_bert
from test_objectives import make_gpt2
from transformers import GPT2ForSequenceClassification

from calig.pipeline.attribution import attribute
from calig.pipeline.attribution.carried import carry, sources
from calig.pipeline.errors import InputError


def naive_sources(evidence, attention):
    """The definition of one example, position by position: evidence[l][i], attention[l][i][j]."""
    count = len(evidence[0])
    found = [[[float(i == j) for j in range(count)] for i in range(count)]]
    for before, after, maps in zip(evidence, evidence[1:], attention, strict=False):
        rows = []
        for i in range(count):
            read = [0.0 if j == i else maps[i][j] * abs(before[j] - after[j]) for j in range(count)]
            kept = 1.0 if after[i] == 0 or sum(read) == 0 else min(1.0, max(0.0, before[i] / after[i]))
            weights = [
                (kept if j == i else 0) + (1 - kept) * (read[j] / sum(read) if sum(read) else 0) for j in range(count)
            ]
            rows.append([sum(weights[k] * found[-1][k][j] for k in range(count)) for j in range(count)])
        found.append(rows)
    return found


def test_sources_equal_the_definition_position_by_position():
    generator = torch.Generator().manual_seed(0)
    evidence = torch.randn(3, 5, 6, generator=generator, dtype=torch.float64)
    evidence[0, 2, 3] = 0
    attention = [torch.rand(3, 6, 6, generator=generator, dtype=torch.float64).tril() for _ in range(4)]
    found = sources(evidence, attention)
    for example in range(3):
        expected = naive_sources(evidence[example].tolist(), [maps[example].tolist() for maps in attention])
        for one, other in zip(found, expected, strict=True):
            assert torch.allclose(one[example], torch.tensor(other, dtype=torch.float64))
    assert all(torch.allclose(matrix.sum(-1), torch.ones(3, 6, dtype=torch.float64)) for matrix in found)


def test_evidence_that_a_later_token_gathers_goes_back_to_where_it_was():
    # All of it stands on token 1, block 1 gathers it at token 3, block 2 reads it there.
    evidence = torch.tensor([[[0.0, 5, 0, 0, 0], [0, 0, 0, 5, 0], [0, 0, 0, 0, 5]]])
    look = torch.full((5, 5), 0.2)
    scores = carry(evidence, [look[None], look[None]], torch.tensor([[0.0, 0, 0, 0, 1]]), lam=1.0)
    assert torch.allclose(scores, torch.tensor([0.0, 5, 0, 0, 0]).expand(1, 2, 5))
    # The attention of the read-out alone: a fifth each in block 1; in block 2 token 3 stands for token 1.
    seen = carry(evidence, [look[None], look[None]], torch.tensor([[0.0, 0, 0, 0, 1]]), lam=0.0)[0]
    assert (
        torch.allclose(seen[0], torch.ones(5)) and float(seen[1, 1]) > 1.4 and float(seen[1].sum()) == pytest.approx(5)
    )


@pytest.mark.parametrize("family", ["bert", "gpt2"])
def test_scores_are_complete_at_every_layer_and_know_no_padding(family):
    if family == "bert":
        model = make_bert()
    else:
        config = make_gpt2().config
        config.num_labels = 3
        torch.manual_seed(0)
        model = GPT2ForSequenceClassification(config).eval()
        torch.nn.init.normal_(model.score.weight, std=0.5)
    batch = make_batch()
    options = {"target": [0, 1, 2], "fusion": "carried", "steps": 65}
    found = attribute(model, batch, **options)
    sums = found.layer_scores.sum(-1)
    assert torch.allclose(sums, found.output_change[:, None].expand_as(sums), rtol=5e-3, atol=1e-3)
    assert torch.equal(found.scores, found.layer_scores[:, -1]) and found.scores.abs().max() > 1e-2
    wide = attribute(model, make_batch(width=14), **options)
    assert torch.allclose(wide.scores[:, :9], found.scores, atol=1e-4) and (wide.scores[:, 9:] == 0).all()
    alone = attribute(model, {key: value[1:2, :6] for key, value in batch.items()}, **{**options, "target": 1})
    assert torch.allclose(alone.scores[0], found.scores[1, :6], atol=1e-4)
    column = attribute(model, batch, target=[0, 1, 2], steps=65)
    assert not torch.allclose(column.scores, found.scores, atol=1e-2)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"lam": [0.5, 0.5, 0.5]}, "fusion='carried' fuses once, behind all blocks"),
        ({"return_flow": True}, "fusion='carried' fuses once and has no flow"),
        ({"attention_gradient": "signed"}, "takes attention without gradients"),
        ({"attention_gradient_at": "path"}, "takes attention without gradients"),
    ],
)
def test_options_that_it_does_not_go_with(bert, batch, options, words):
    with pytest.raises(InputError, match=words):
        attribute(bert, batch, fusion="carried", **options)
