"""LIG against stored numbers: definitions in float64, and the published implementation where it is sound."""

import json
from pathlib import Path

import pytest
import torch
from test_lig import apart
from transformers import BertConfig, BertForSequenceClassification, GPT2Config, GPT2ForSequenceClassification

from calig.pipeline.attribution import flow
from calig.pipeline.attribution.flow import (
    InputTokenPaths,
    ZeroPaths,
    attention_flow,
    give_self_share,
    layer_flow,
    self_share,
    slice_mlp_flow,
)

FIXTURES = Path(__file__).resolve().parents[2] / "shared" / "fixtures" / "lig"
BEST = {"bert": "gl256", "gpt2": "gl512"}

pytestmark = pytest.mark.skipif(not FIXTURES.is_dir(), reason="the reference numbers are not here")


def stored_numbers(name):
    numpy = pytest.importorskip("numpy")
    return {key: torch.from_numpy(value) for key, value in numpy.load(FIXTURES / f"tiny_{name}.npz").items()}


def stored_model(name):
    numpy = pytest.importorskip("numpy")
    meta = json.loads((FIXTURES / f"tiny_{name}_meta.json").read_text())
    weights = numpy.load(FIXTURES / f"tiny_{name}_weights.npz")
    known = {key: meta["config"][key] for key in meta["config"] if key not in ("transformers_version", "dtype")}
    known |= {"pad_token_id": 0, "is_decoder": False}
    kind, config = (
        (BertForSequenceClassification, BertConfig) if name == "bert" else (GPT2ForSequenceClassification, GPT2Config)
    )
    model = kind(config(**known)).eval()
    missing = model.base_model.load_state_dict({key: torch.from_numpy(weights[key]) for key in weights}, strict=False)
    assert all(key.startswith("pooler") for key in missing.missing_keys) and not missing.unexpected_keys
    return model


def stored_blocks(name, stored, dtype):
    """The blocks of a stored model at the stored states: those of tiny_gpt2 were rounded to float32 before use."""
    ids = stored["inputs.input_ids"]
    blocks = list(apart(stored_model(name).to(dtype), {"input_ids": ids, "attention_mask": torch.ones_like(ids)}))
    for block, states in zip(blocks, stored["hidden.z"]):
        assert torch.allclose(block.states.double(), states.double(), atol=1e-5)
        block.states = states.to(dtype)
        with torch.no_grad():
            block.projections = block.project(block.states[None])
            block.output = block._call(block.states[None])[0]
    return blocks


def flows_of(name, blocks):
    """What is asked for, by its stored name, at 64 nodes; the whole block from 0 is stiff and takes 256."""
    found = {
        "att.itb": [attention_flow(InputTokenPaths(block), 64) for block in blocks],
        "layer.itb": [layer_flow(InputTokenPaths(block), block, 64, 4096) for block in blocks],
        "mlp.att_itb_a0": [slice_mlp_flow(block, "att_itb_a0", 64, 4096) for block in blocks],
    }
    if name == "bert":  # behind a norm, paths from 0 are ill-posed
        found["att.zero"] = [attention_flow(ZeroPaths(block), 64) for block in blocks]
        found["layer.zero"] = [layer_flow(ZeroPaths(block), block, 256, 4096) for block in blocks]
        found["mlp.zero"] = [slice_mlp_flow(block, "zero", 64, 4096) for block in blocks]
    return found


def distance(values, reference):
    return float((torch.stack(list(values)).detach().double() - reference).abs().max())


@pytest.mark.parametrize("name", BEST)
@pytest.mark.parametrize(("dtype", "atol"), [(torch.float64, 1e-10), (torch.float32, 5e-6)])
def test_flows_and_their_totals(name, dtype, atol):
    stored = stored_numbers(name)
    for key, flows in flows_of(name, stored_blocks(name, stored, dtype)).items():
        # Values up to 19 there, and what is behind attention rounds: sums over nodes in float64 change nothing.
        limit = 8e-6 if (name, key, dtype) == ("gpt2", "layer.itb", torch.float32) else atol
        assert distance((one.values for one in flows), stored[f"oracle.{key}.{BEST[name]}"]) <= limit, key
        part, baseline = key.split(".")
        assert distance((one.total for one in flows), stored[f"oracle.{part}_total.{baseline}"]) <= limit, key


@pytest.mark.parametrize("name", BEST)
def test_flows_with_a_self_share(name):
    stored = stored_numbers(name)
    blocks = stored_blocks(name, stored, torch.float64)
    flows = flows_of(name, blocks)
    shares = [block.probabilities.diagonal(dim1=-2, dim2=-1) for block in blocks]
    mapped = [give_self_share(one.values, r, torch.ones_like(r).bool()) for one, r in zip(flows["att.itb"], shares)]
    assert distance((one.values for one in mapped), stored[f"oracle.att.itb_map_ratio.{BEST[name]}"]) <= 1e-10
    if name == "gpt2":
        return
    # Those of attention use shares outside [0, 1] too; LIG.md 3 refuses them.
    for part in ("att", "layer"):
        for at, (one, zero) in enumerate(zip(flows[f"{part}.itb"], flows[f"{part}.zero"])):
            r, defined = self_share(zero.values)
            found = give_self_share(one.values, r, defined)
            usable = (r >= 0) & (r <= 1)
            assert torch.equal(found.refused, ~usable) and bool(usable.any())
            reference = stored[f"oracle.{part}.itb_zero_ratio.{BEST[name]}"][at]
            picked = torch.where(usable[..., None, :], reference, one.values)
            assert torch.allclose(found.values, picked, rtol=0, atol=1e-10)


@pytest.mark.parametrize("name", BEST)
def test_what_stands_between_the_parts(name):
    stored = stored_numbers(name)
    blocks = stored_blocks(name, stored, torch.float64)
    assert distance((block.probabilities for block in blocks), stored["oracle.attn_probs"]) <= 1e-10
    if name == "bert":
        assert distance((block.middle(block.contexts[None])[0] for block in blocks), stored["oracle.u"]) <= 1e-10
        own = (block.middle(block.projections.value.transpose(1, 2))[0] for block in blocks)
        assert distance(own, stored["oracle.u0_att_itb_a0"]) <= 1e-10


@pytest.mark.parametrize("steps", [32, 128, 512])
def test_under_its_own_rule_it_is_the_published_implementation(steps, monkeypatch):
    stored = stored_numbers("bert")
    blocks = stored_blocks("bert", stored, torch.float64)
    # Trapezoids with weights 1/n, the ends half, and no gradient at the start.
    rule = tuple((k / (steps - 1), (1 if k < steps - 1 else 0.5) / steps) for k in range(1, steps))
    monkeypatch.setattr(flow, "gauss_legendre", lambda nodes: rule)
    for baseline in ("att_itb_a0", "zero"):
        found = [slice_mlp_flow(block, baseline, steps, 4096).values for block in blocks]
        assert distance(found, stored[f"ref64.mlp.{baseline}.n{steps}"]) <= 1e-6
    found = [layer_flow(ZeroPaths(block), block, steps, 4096).values for block in blocks]
    assert distance(found, stored[f"ref64.layer.zero.n{steps}"]) <= 2e-6
    found = torch.stack([layer_flow(InputTokenPaths(block), block, steps, 4096).values for block in blocks])
    noise = stored["bound.layer_a0_noise_per_unit_w.itb"] / (2 * steps)  # of its gradient at the start
    assert bool(((found - stored[f"ref64.layer.self_input_token.n{steps}"]).abs() <= noise + 1e-6).all())
