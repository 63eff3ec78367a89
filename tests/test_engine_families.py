"""Every family against references that know nothing of the engine: states, gradients, attention, read-out, clean-up."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_batch
from families import (
    DECODERS,
    ENCODERS,
    UNNAMED,
    VISION,
    Family,
    baseline_rows,
    blocks_of,
    build,
    images,
    logits_of,
    naive_tail_gradients,
    nudged_attention,
    state_at,
)
from test_engine_invariants import assert_same, footprint

from calig.pipeline.attribution import ExplainableModel, UnsupportedModelError, attribute, available_methods
from calig.pipeline.attribution.inside import find_ends
from calig.pipeline.attribution.objective import ClassLogit

FAMILIES = [*ENCODERS, *DECODERS, *VISION, *UNNAMED]
TARGET = 1


@dataclass
class Case:
    family: Family
    model: Any
    batch: dict
    keys: dict  # the part of the batch that the forward takes
    mask: torch.Tensor
    special: torch.Tensor

    def rows(self, rows, width=None):
        return {key: value[rows][:, :width] if width else value[rows] for key, value in self.batch.items()}


@pytest.fixture(scope="module", params=FAMILIES, ids=lambda family: family.name)
def case(request):
    family = request.param
    model = build(family)
    if family.image:
        batch = images()
        tokens = family.special + 16
        special = (torch.arange(tokens) < family.special).expand(3, -1)
        return Case(family, model, batch, batch, torch.ones(3, tokens, dtype=torch.bool), special)
    batch = make_batch()
    keys = {key: batch[key] for key in ("input_ids", "attention_mask")}
    mask = batch["attention_mask"].bool()
    return Case(family, model, batch, keys, mask, batch["special_tokens_mask"].bool() & mask)


def test_the_blocks_are_found(case):
    wrapped = ExplainableModel(case.model)
    assert list(wrapped.structure.blocks) == blocks_of(case.model, case.family)
    with wrapped.session():
        inputs = wrapped.prepare(case.batch)
        depth = len(wrapped.trace(inputs.select(torch.arange(3))).states) - 1
    assert depth == 3 if case.family.name == "modernbert" else 2
    assert torch.equal(inputs.mask, case.mask) and torch.equal(inputs.special, case.special)


def test_straight_path_equals_a_naive_tail_at_every_layer_and_is_complete(case):
    model, family = case.model, case.family
    result = attribute(model, case.batch, "ca_lig", target=TARGET, path="straight", steps=5)
    if family.image:
        there = {"pixel_values": torch.zeros_like(case.batch["pixel_values"])}
        origins = [state_at(model, family, there, depth) for depth in range(result.layer_scores.shape[1] + 1)]
        with torch.no_grad():
            base = logits_of(model(**there))
    else:
        row = model.get_input_embeddings()(torch.tensor([[0]]))[0, 0].detach()
        with baseline_rows(model, case.mask & ~case.special, row):
            origins = [state_at(model, family, case.keys, depth) for depth in range(result.layer_scores.shape[1] + 1)]
            with torch.no_grad():
                base = logits_of(model(**case.keys))
    with torch.no_grad():
        change = (logits_of(model(**case.keys)) - base)[:, TARGET]
    assert torch.allclose(result.output_change.double(), change, atol=1e-5)
    for depth, origin in enumerate(origins):
        end = state_at(model, family, case.keys, depth)
        wanted = naive_tail_gradients(model, family, case.keys, depth, origin, end, TARGET, 5) * case.mask
        found = result.parts["evidence"][:, depth].double()
        assert torch.allclose(found, wanted, rtol=1e-5, atol=1e-5 * float(wanted.abs().max())), depth
    fine = attribute(model, case.batch, "ca_lig", target=TARGET, path="straight", steps=48)
    # A ReLU has kinks, which no smooth rule integrates well.
    assert (fine.completeness_gap < (0.1 if family.name == "opt" else 2e-2)).all(), fine.completeness_gap


def hugging_face(model):
    return getattr(model, "vit", model) if not hasattr(model, "config") else model


def test_recorded_attention_is_what_the_family_reports(case):
    wrapped = ExplainableModel(case.model)
    with wrapped.session(), torch.no_grad():
        inputs = wrapped.prepare(case.batch)
        found = wrapped.trace(inputs.select(torch.arange(3)), attention=True).attentions
    inner = hugging_face(case.model)
    before = inner.config._attn_implementation
    inner.set_attn_implementation("eager")
    keys = dict(case.keys)
    if case.family.name == "vit_mae":
        keys["noise"] = torch.arange(16).expand(3, -1)
    with torch.no_grad():
        wanted = inner(**keys, output_attentions=True).attentions
    inner.set_attn_implementation(before)
    assert len(found) == len(wanted) >= 2
    pairs = (case.mask[:, None, :, None] & case.mask[:, None, None, :]).expand_as(wanted[0])
    for mine, theirs in zip(found, wanted, strict=True):
        assert torch.allclose(mine[pairs], theirs[pairs], atol=1e-7)
        assert torch.allclose(
            torch.where(case.mask[:, None, :, None], mine, 0).sum(-1)[0, 0, 0], torch.tensor(1.0).double()
        )


def test_attention_gradient_equals_central_differences(case, monkeypatch):
    # Many families compute norms and softmax in float32 whatever their weights are: too coarse for differences.
    monkeypatch.setattr(torch, "float32", torch.float64)
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    wrapped = ExplainableModel(case.model)
    one = {key: value[:1] for key, value in case.keys.items()}
    with wrapped.session():
        trace = wrapped.trace(wrapped.prepare(one).batch, attention=True)
        gradients = torch.autograd.grad(logits_of(trace.output)[0, TARGET], trace.attentions)
    inner = hugging_face(case.model)
    before = inner.config._attn_implementation
    inner.set_attn_implementation("eager")
    tokens = case.mask.shape[1]
    query = 0 if case.family.reads.startswith("first") else tokens - 1
    for layer, entry in ((0, (1, query, 2)), (len(gradients) - 1, (2, query, min(1, query)))):
        values = []
        for step in (1e-5, -1e-5):
            with nudged_attention(case.model, layer, entry, step), torch.no_grad():
                values.append(logits_of(case.model(**one))[0, TARGET])
        slope = float(values[0] - values[1]) / 2e-5
        assert slope != 0
        assert abs(slope - float(gradients[layer][(0, *entry)])) < 1e-5 * abs(slope) + 1e-8
    inner.set_attn_implementation(before)


@pytest.mark.parametrize("path", ["shared", "straight"])
def test_neither_batch_nor_padding_matter(case, path):
    options = {"target": TARGET, "steps": 4, "path": path}
    together = attribute(case.model, case.batch, **options)
    alone = attribute(case.model, case.rows([1]), **options)
    scale = float(together.scores.abs().max())
    assert torch.allclose(alone.scores[0], together.scores[1], atol=1e-5 * scale)
    if not case.family.image:
        short = attribute(case.model, case.rows([1], 6), **options)
        wide = attribute(case.model, make_batch(width=14), **options)
        assert torch.allclose(short.scores[0], together.scores[1, :6], atol=1e-5 * scale)
        assert torch.allclose(wide.scores[:, :9], together.scores, atol=1e-5 * scale)
        assert (together.scores[~case.mask] == 0).all() and (wide.scores[:, 9:] == 0).all()


def test_the_read_out_is_where_the_head_reads(case):
    wrapped = ExplainableModel(case.model)
    with wrapped.session():
        inputs = wrapped.prepare(case.batch)
        found = find_ends(wrapped, inputs, ClassLogit(torch.full((3,), TARGET)), "mean", [0]).readout
    tokens = case.mask.shape[1]
    place = torch.arange(tokens)
    last = case.mask.sum(1, keepdim=True) - 1
    wanted = {
        "first": (place == 0).expand(3, -1),
        "last": place == last,
        "patches": (place >= case.family.special).expand(3, -1),
        "first and patches": ((place == 0) | (place >= case.family.special)).expand(3, -1),
    }[case.family.reads].double()
    assert torch.allclose(found, wanted / wanted.sum(1, keepdim=True))


def test_every_method_runs_and_leaves_the_model_as_it_was(case):
    if not hasattr(case.model, "config"):
        case.model.config = case.model.vit.config  # what `footprint` looks at
    case.model.train()
    before = footprint(case.model)
    for method in available_methods():
        if method == "lig" and case.family.name == "qwen3":  # it normalises queries and keys
            with pytest.raises(UnsupportedModelError, match="lig does not work on it"):
                attribute(case.model, case.batch, method)
            continue
        result = attribute(case.model, case.batch, method, target=TARGET)
        assert not result.non_finite().any() and result.scores.shape == case.mask.shape, method
        # A rectified map and a sparse fit may be 0 everywhere.
        assert method in ("attention_gradcam", "lime") or (result.scores.abs().sum(1) > 0).all(), method
    assert_same(before, footprint(case.model))
    case.model.eval()


@pytest.mark.parametrize("family", [f for f in DECODERS if f.name in ("llama", "opt")], ids=lambda family: family.name)
def test_the_padding_side_does_not_matter_where_the_logits_do_not_depend_on_it(family):
    model, right = build(family), make_batch()
    left = {key: value.clone() for key, value in right.items()}
    real = right["attention_mask"].bool()
    for key, value in right.items():
        for row in range(3):
            left[key][row] = torch.cat([value[row, ~real[row]], value[row, real[row]]])
    keys = ("input_ids", "attention_mask")
    with torch.no_grad():
        logits = [model(**{key: batch[key] for key in keys}).logits for batch in (right, left)]
    assert torch.allclose(*logits, atol=1e-5), "this family's own logits depend on the side"
    wanted = attribute(model, right, target=TARGET)
    with pytest.warns(UserWarning, match="padded on the left"):
        found = attribute(model, left, target=TARGET)
    for row in range(3):
        assert torch.allclose(
            found.scores[row, left["attention_mask"][row].bool()], wanted.scores[row, real[row]], atol=1e-5
        )


# ------------------------------------------------------------------------------------ off the attention interface

OFF = [
    Family(
        "deberta-v2", "deberta.encoder.layer", settings={"relative_attention": True, "pos_att_type": ["c2p", "p2c"]}
    ),
    Family("mpnet", "mpnet.encoder.layer"),
    Family("longformer", "longformer.encoder.layer", settings={"attention_window": 4}),
    Family("falcon", "transformer.h", "last"),
    Family("bloom", "transformer.h", "last", settings={"n_layer": 2, "n_head": 3}),
    Family(
        "xlnet",
        "transformer.layer",
        "last",
        settings={"d_model": 24, "n_layer": 2, "n_head": 3, "d_inner": 32, "max_position_embeddings": None},
    ),
]


@pytest.mark.parametrize("family", OFF, ids=lambda family: family.name)
def test_off_the_attention_interface(family):
    model = build(family)
    # XLNet reads the last position, so it cannot be padded on the right.
    batch = make_batch((12, 12, 12)) if family.name == "xlnet" else make_batch(width=12)
    mask, content = batch["attention_mask"].bool(), ~batch["special_tokens_mask"].bool()
    keys = {key: batch[key] for key in ("input_ids", "attention_mask")}
    result = attribute(model, batch, "integrated_gradients", target=TARGET, steps=32)
    with baseline_rows(model, content.T if family.name == "xlnet" else content, model.get_input_embeddings().weight[0]):
        origin = state_at(model, family, keys, 0)
    end = state_at(model, family, keys, 0)
    wanted = naive_tail_gradients(model, family, keys, 0, origin, end, TARGET, 32)
    wanted = wanted.T if family.name == "xlnet" else wanted
    assert torch.allclose(result.scores.double(), wanted * mask, atol=1e-5 * float(wanted.abs().max()))
    assert (result.completeness_gap < 1e-2).all()
    alone = attribute(
        model, {key: value[1:2] for key, value in batch.items()}, "integrated_gradients", target=1, steps=32
    )
    assert torch.allclose(alone.scores[0], result.scores[1], atol=1e-5)
    attribute(model, batch, "input_x_gradient", target=TARGET)
    for method in ("ca_lig", "attention_rollout", "generic_attention"):
        with pytest.raises(UnsupportedModelError, match=f"'{family.name}'.*integrated_gradients"):
            attribute(model, batch, method, target=TARGET)


def test_as_many_rows_as_tokens_do_not_say_which_come_first():
    model = build(next(family for family in OFF if family.name == "xlnet"))
    batch = make_batch((6,) * 6)
    whole = attribute(model, batch, "integrated_gradients", target=TARGET, steps=8).scores
    part = {key: value[:5] for key, value in batch.items()}
    assert torch.allclose(
        attribute(model, part, "integrated_gradients", target=TARGET, steps=8).scores, whole[:5], atol=1e-5
    )


def test_a_model_that_pads_inside_says_how_to_pad_outside():
    longformer = next(family for family in OFF if family.name == "longformer")
    with pytest.raises(
        UnsupportedModelError, match=r"'longformer' work on 12 positions .* 9 tokens.*pad_to_multiple_of"
    ):
        attribute(build(longformer), make_batch(), "integrated_gradients")


def test_a_stack_that_is_only_half_of_a_block_is_refused():
    """XLM has no block modules: attention and feed-forward parts stand in lists of their own."""
    family = Family("xlm", "", settings={"emb_dim": 24, "n_layers": 2, "n_heads": 3})
    with pytest.raises(UnsupportedModelError, match=r"enters block 1 of 'xlm' is not all.*2 TransformerFFN"):
        attribute(build(family), make_batch(), "integrated_gradients", target=TARGET)


def test_the_documentation_lists_what_is_tested_here():
    page = (Path(__file__).resolve().parents[1] / "docs" / "models.md").read_text()
    rows = [line for line in page.splitlines() if line.startswith("| ")]
    for names, start in (
        ([*ENCODERS], "| text encoders"),
        ([*DECODERS], "| decoders as classifiers"),
        ([*VISION], "| images"),
        (UNNAMED, "| named nowhere in the code"),
        (OFF, "| off the attention interface"),
    ):
        row = next(line for line in rows if line.startswith(start))
        listed = {name.strip(" `") for name in row.split("|")[2].split(",")}
        assert listed == {family.name for family in names}
    source = "".join(
        path.read_text() for path in (Path(__file__).resolve().parents[1] / "pipeline" / "attribution").glob("*.py")
    )
    assert not [family.name for family in UNNAMED if f"{family.name!r}" in source or f'"{family.name}"' in source]
