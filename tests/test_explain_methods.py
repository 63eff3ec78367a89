"""Methods side by side: used on some samples alone, failing alone, and what each of them costs."""

import sys

import pytest
import torch
from conftest import make_bert
from distributed_worker import make_rows
from torch.utils.data import default_collate

from calig.callbacks.explanation_writer import explain_parts
from calig.pipeline import explainer as explainer_module
from calig.pipeline.attribution import ExplainableModel
from calig.pipeline.attribution.methods import available_methods, takes_option
from calig.pipeline.costs import COSTS, measured
from calig.pipeline.explainer import Explainer, ExplainSettings, settings_for


def explained(only=None, methods=("ca_lig", "input_x_gradient", "random")):
    settings = ExplainSettings(
        {name: {"steps": 8} if name == "ca_lig" else {} for name in methods}, operators=("attention",), only=only or {}
    )
    return explain_parts(Explainer(make_bert(layers=2), None, settings), default_collate(make_rows(5)))


def numbers(rows):
    return {
        tuple(str(row[name]) for name in ("sample_id", "method", "control", "metric", "space", "q")): row["value"]
        for row in rows.metrics
        if row["metric"] != "seconds"
    }


def test_a_limited_method_is_used_on_its_samples_and_changes_no_number_of_the_others():
    every, some = explained(), explained({"input_x_gradient": frozenset({1, 3})})
    used = {(row["sample_id"], row["method"]) for row in some.explanations}
    assert {sample for sample, method in used if method == "input_x_gradient"} == {1, 3}
    assert {sample for sample, method in used if method == "ca_lig"} == set(range(5))
    before, after = numbers(every), numbers(some)
    left_out = {key for key in before if key[1] == "input_x_gradient" and key[0] not in "13"}
    assert after.keys() == before.keys() - left_out and left_out
    assert all(after[key] == pytest.approx(before[key], abs=1e-5) for key in after)
    assert (
        not some.failures
        and not explained({name: frozenset() for name in ("ca_lig", "input_x_gradient", "random")}).explanations
    )


@pytest.mark.parametrize("broken", ["always", "one sample"])
def test_a_method_that_raises_fails_alone(broken, monkeypatch):
    attribute = explainer_module.attribute
    poison = default_collate(make_rows(5))["input_ids"][3]

    calls = []

    def raising(model, batch, name, **named):
        calls.append(name)
        if name == "input_x_gradient" and (
            broken == "always" or any(torch.equal(row, poison) for row in batch["input_ids"])
        ):
            raise RuntimeError("an index is out of range")
        return attribute(model, batch, name, **named)

    before = numbers(explained())
    monkeypatch.setattr(explainer_module, "attribute", raising)
    rows = explained()
    if broken == "always":  # nothing is found by halves, so the others do not run again
        assert calls.count("ca_lig") == 1 and calls.count("input_x_gradient") == 6
    ids = set(range(5)) if broken == "always" else {3}
    assert {(row["sample_id"], row["method"]) for row in rows.failures} == {(i, "input_x_gradient") for i in ids}
    assert {row["reason"] for row in rows.failures} == {"RuntimeError: an index is out of range"}
    after = numbers(rows)
    assert after.keys() == {key for key in before if not (key[1] == "input_x_gradient" and int(key[0]) in ids)}
    assert all(after[key] == pytest.approx(before[key], abs=1e-5) for key in after)


@pytest.mark.parametrize("how", ["nan", "out of memory"])
@pytest.mark.parametrize("samples", [{3}, set(range(5))])
def test_a_method_that_gives_no_scores_is_missing_alone(how, samples, monkeypatch):
    """Whether on one sample or on all: no number of another method depends on it."""
    attribute = explainer_module.attribute
    texts = default_collate(make_rows(5))["input_ids"]

    def broken(model, batch, name, **named):
        results = attribute(model, batch, name, **named)
        hit = [i for i, row in enumerate(batch["input_ids"]) if any(torch.equal(row, texts[j]) for j in samples)]
        if name == "input_x_gradient" and hit and how == "out of memory":
            raise torch.OutOfMemoryError("no room")
        if name == "input_x_gradient":
            for result in results:
                result.scores[hit] = float("nan")
        return results

    before = numbers(explained())
    monkeypatch.setattr(explainer_module, "attribute", broken)
    rows = explained()
    assert {(row["sample_id"], row["method"]) for row in rows.failures} == {(i, "input_x_gradient") for i in samples}
    after = numbers(rows)
    assert after.keys() == {key for key in before if not (key[1] == "input_x_gradient" and int(key[0]) in samples)}
    assert all(after[key] == pytest.approx(before[key], abs=1e-5) for key in after)


def test_costs_are_measured_only_when_asked():
    def costs(**settings):
        chosen = ExplainSettings({"input_x_gradient": {}, "ca_lig": {"steps": 8}}, operators=(), **settings)
        rows = explain_parts(Explainer(make_bert(layers=2), None, chosen), default_collate(make_rows(5))).metrics
        return {(row["method"], row["metric"]): row["value"] for row in rows if row["metric"] in COSTS}

    assert {name for _, name in costs()} == {"seconds"}
    found = costs(costs=True)
    # The baseline, the input, and the gradient at the input; a path of 8 nodes does each of them many times.
    assert 3 <= found["input_x_gradient", "passes"] < 5 < found["ca_lig", "passes"]


def test_a_pass_is_counted_by_the_linear_maps_that_run():
    model = ExplainableModel(make_bert(layers=4))
    rows = make_rows(3)
    batch = {key: value for key, value in default_collate(rows).items() if key in ("input_ids", "attention_mask")}
    with model.session():
        with measured(model) as one:
            trace = model.trace(batch)
        size = sum(p.numel() for p in model.structure.blocks[0].parameters() if p.ndim == 2)
        assert one.work == 4 * size * batch["input_ids"].numel()
        with measured(model) as tail:  # behind the third block one is left
            model.trace(batch, start=3, state=trace.state(3).detach())
        assert 4 * tail.work == one.work
        with measured(model) as both:
            again = model.trace(batch)
            torch.autograd.grad(again.output.logits.sum(), again.state(2))
        assert 2 * both.work == 3 * one.work  # forward through four blocks, backward through two
        assert both.seconds > 0
        with measured(model, seconds_alone=True) as seconds:
            model.trace(batch)
        assert seconds.work == 0 and seconds.peak_memory is None and seconds.seconds > 0
    with pytest.raises(RuntimeError), measured(model):
        raise RuntimeError
    assert not any(part._forward_hooks for part in model.module.modules())


@pytest.mark.skipif(sys.platform != "linux", reason="the peak of memory on a CPU is Linux's own count")
def test_the_peak_of_memory_is_what_was_held_beyond_before_whatever_ran_earlier():
    model = ExplainableModel(make_bert(layers=1))
    for mib in (96, 32, 96):
        with measured(model) as cost:
            held = torch.ones(mib * 2**18)
            del held
        if cost.peak_memory is None:
            pytest.skip("this machine does not let a process reset its peak")
        assert abs(cost.peak_memory - mib) < 8


def test_shared_options_go_to_the_methods_that_take_them():
    shared = {"steps": "auto", "tolerance": 0.05}
    found = settings_for(available_methods(), {"ca_lig": {"tolerance": 0.1}}, shared)
    assert found["ca_lig"] == {"steps": "auto", "tolerance": 0.1}
    assert found["attention_attribution"] == {} == found["random"]  # its path has no `auto`
    assert settings_for(["attention_attribution"], {}, {"steps": 8}) == {"attention_attribution": {"steps": 8}}
    assert not takes_option("ca_lig", "steps", "many") and not takes_option("ca_lig", "stpes", 8)
