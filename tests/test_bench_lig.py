"""`scripts/bench_lig.py`: what counts as met, how it talks to the package, and what it says to bad input."""

import argparse
import contextlib
import copy
import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch
from conftest import make_batch, make_bert

from calig.pipeline.attribution.flow import Flow

SCRIPT = Path(__file__).parents[1] / "scripts" / "bench_lig.py"
OPTIONS = argparse.Namespace(att_targets=None, repeats=1)
TINY = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 48}
# The published package as far as the script uses it; every number is 1.
PACKAGE = """
class LIGConfig:
    def __init__(self, **options):
        self.__dict__.update(options)


def explain(text, config):
    tokens, ones = range(len(text.split()) + 2), lambda count: [1.0] * count
    if config.granularity == "layer":
        layer = {"z2z": {"matrix": [ones(len(tokens)) for _ in tokens]}}
    elif config.granularity == "mlp":
        layer = {"targets": {j: {"u2z": {"contributions": ones(24)}} for j in config.target_tokens}}
    else:
        heads = {h: {"contributions": ones(len(tokens))} for h in range(3)}
        layer = {"targets": {j: {"z2u": {"heads": heads}} for j in config.target_tokens}}
    print("the package prints this")
    return {"layers": {0: layer, 1: layer}}
"""


@pytest.fixture(scope="module")
def bench():
    spec = importlib.util.spec_from_file_location("bench_lig", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # its dataclasses ask for it
    spec.loader.exec_module(module)
    module.FINE = 32  # enough for a tiny model
    module.gc = argparse.Namespace(collect=int)  # there is much to look through in a process of tests
    yield module
    del sys.modules[spec.name]


@pytest.fixture(scope="module")
def both(bench):
    model, batch = make_bert(1).bert, make_batch((6,))
    batch = {key: batch[key] for key in ("input_ids", "attention_mask")}
    return bench.Ours(model, batch), bench.Ours(copy.deepcopy(model).double(), batch)


class Answers:
    """A package that answers with the exact map and an error on top."""

    def __init__(self, fine, nodes, seconds, error):
        self.fine, self.nodes, self.seconds, self.error = fine, nodes, seconds, error

    def run(self, part, targets):
        values = torch.stack([flow.values for flow in self.fine.run(part, self.nodes)])[..., targets]
        return self.seconds, values + self.error


def part_of(bench, name):
    return next(part for part in bench.PARTS if part.name == name)


@pytest.mark.parametrize(
    ("seconds", "error", "met"), [(1e6, 9.0, True), (1e6, 0.0, False), (1e-6, 9.0, False), (1e-6, 0.0, False)]
)
def test_a_target_is_met_by_the_faster_and_more_exact_only(bench, both, seconds, error, met):
    ours, fine = both
    peer = Answers(fine, bench.FINE, seconds, error)
    for name in ("layer", "mlp, slices", "att"):
        first, second = bench.measure(part_of(bench, name), ours, fine, [8, 12], peer, OPTIONS)
        assert first.met is met and first.target is not None and first.peer_gap is not None
        assert second.met is None and second.target is None  # the targets are for the first nodes


def test_what_cannot_be_compared_is_left_open(bench, both, capsys):
    ours, fine = both
    heads = bench.measure(part_of(bench, "mlp, heads"), ours, fine, [2], Answers(fine, 4, 1e6, 0.0), OPTIONS)
    recorded = [row for part in bench.PARTS for row in bench.measure(part, ours, fine, [2], None, OPTIONS)]
    for row in heads + recorded:
        assert row.met is None and row.peer_gap is None and row.peer_distance is None and row.ratio > row.target
    bench.show(heads + recorded)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1 + len(bench.PARTS) and all(" open " in line and " met " not in line for line in lines)


def test_errors_are_relative(bench):
    exact = [Flow(torch.tensor([[1.0, 0.0], [1.0, 2.0]]), torch.tensor([2.0, 2.0]))]
    gap, distance = bench.errors(torch.tensor([[[1.0, 0.0], [1.0, 3.0]]]), exact, [0, 1])
    assert (gap, distance) == pytest.approx((0.5, 1 / 6**0.5))
    assert bench.errors(torch.tensor([[[0.0], [2.0]]]), exact, [1]) == (0.0, 0.0)


def run(bench, monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["bench_lig.py", *map(str, arguments)])
    threads = torch.get_num_threads()
    try:
        bench.main()
    finally:
        torch.set_num_threads(threads)


def test_a_run_beside_the_package(bench, monkeypatch, tmp_path, capfd):
    (tmp_path / "lig" / "adapters").mkdir(parents=True)
    (tmp_path / "lig" / "__init__.py").write_text(PACKAGE)
    (tmp_path / "lig" / "adapters" / "__init__.py").write_text("")
    encoder = (
        "class EncoderAdapter:\n    @classmethod\n    def from_pretrained(cls, *_args, **_kwargs):\n        pass\n"
    )
    (tmp_path / "lig" / "adapters" / "encoder.py").write_text(encoder)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(bench, "MINILM", TINY)
    file = tmp_path / "rows.json"
    few = ["--tokens", 6, "--nodes", 4, 8, "--repeats", 1, "--att-targets", 2]
    run(bench, monkeypatch, *few, "--peer-python", sys.executable, "--json", file)
    rows = json.loads(file.read_text())
    assert [(row["part"], row["nodes"]) for row in rows] == [(part.name, n) for part in bench.PARTS for n in (4, 8)]
    assert [row["met"] for row in rows[::2]] == [False, False, False, None, False]  # it spends no time at all
    assert all(row["peer_gap"] > row["gap"] for row in rows if row["part"] != "mlp, heads")
    assert "package: 2 of 6 targets, scaled" in capfd.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--peer-python", "no/such/python"], "--peer-python=no/such/python: it cannot be started (No such file"),
        (["--peer-python", sys.executable], "No module named 'lig'); install layer-wise-integrated-gradients there"),
        (["--nodes", "0"], "argument --nodes: expected a whole number above 0, got '0'"),
        (["--repeats", "-1"], "argument --repeats: expected"),
        (["--threads", "two"], "argument --threads: expected a whole number above 0, got 'two'"),
        (["--model", "no/such/model"], "--model=no/such/model: no such folder"),
        (["--json", "no/such/rows.json"], "--json=no/such/rows.json: there is no folder to write it into"),
        (["--tokens", "8"], "--tokens=8 needs --peer-python"),
    ],
)
def test_bad_input_ends_with_one_message(bench, monkeypatch, capfd, arguments, said):
    with pytest.raises(SystemExit) as ended:
        run(bench, monkeypatch, *arguments)
    errors = capfd.readouterr().err
    assert ended.value.code == 2 and said in errors.splitlines()[-1] and "Traceback" not in errors


def test_a_package_that_ends_is_named(bench):
    peer = bench.Peer(Path("true"), Path("model"), "text", 1)
    peer.process.wait()
    with peer.process.stdout, pytest.raises(SystemExit, match="the published package ended with code 0"):
        peer.run(part_of(bench, "layer"), [0])
    with contextlib.suppress(BrokenPipeError):
        peer.process.stdin.close()
