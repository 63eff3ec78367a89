"""`lig` against the published package layer-wise-integrated-gradients: seconds as ratios, and the error of each.

    python scripts/bench_lig.py [--model DIR] [--tokens 32] [--nodes 12 32] [--peer-python PATH] [--json FILE]

The published package needs transformers 4, so it runs in a Python of its own: `--peer-python` names one in which
layer-wise-integrated-gradients is installed. Both work on the same text, in turn, and medians of processor time are
compared, which what else runs on the machine hardly changes. The package's 32 steps of the trapezoid rule stand
against Gauss-Legendre nodes here; a target counts as met only where the error here is the smaller one, and is left open
where the package's error is not known: without `--peer-python`, and for heads, which it does not have. Errors are the
worst completeness gap (a column's sum against what it must be, relative) and the distance from a map of 256 nodes in
float64, relative to its length.

Without `--peer-python` the recorded seconds of the package are compared with wall time here: 0.1.0, MiniLM, 32 tokens,
32 steps, 2 threads, on another machine. Without `--model` the model is a random one of MiniLM's shape.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import gc
import json
import platform
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModel, AutoTokenizer, BertConfig, BertModel

from calig.pipeline.attribution import ExplainableModel
from calig.pipeline.attribution.flow import (
    Flow,
    InputTokenPaths,
    attention_flow,
    head_mlp_flow,
    layer_flow,
    slice_mlp_flow,
)
from calig.pipeline.attribution.within_block import Block, take_apart

MINILM = {"hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 12, "intermediate_size": 1536}
PEER_STEPS = 32  # the package's default
RECORDED = {"layer": 10.0, "mlp": 2.1, "att": 331.0}
RECORDED_TOKENS = 32
FINE = 256
TEXT = (
    "the quiet harbour town woke slowly while fishermen carried nets and baskets to the boats that waited beside the "
    "old stone pier under a pale morning sky full of gulls and nobody in the market had heard that the ferry which "
    "brought flour and letters from the mainland would not come before the storm was over so the baker lent his last "
    "sack to the school and the teacher promised that her children would sing for him on the first dry day of spring"
)


@dataclass(frozen=True)
class Part:
    """One kind of flow: ours, and what the package calls it."""

    name: str
    target: float
    run: Callable[[Block, int, int], Flow]
    peer: str
    baseline: str = "att_itb_a0"


def _turned(flow: Flow) -> Flow:
    """The MLP's map with the target last, as the others have it."""
    return Flow(flow.values.T, flow.total)


PARTS = (
    Part("layer", 30, lambda block, n, budget: layer_flow(InputTokenPaths(block), block, n, budget), "layer"),
    Part("mlp, slices", 10, lambda block, n, budget: _turned(slice_mlp_flow(block, "att_itb_a0", n, budget)), "mlp"),
    Part(
        "mlp, slices from 0",
        10,
        lambda block, n, budget: _turned(slice_mlp_flow(block, "zero", n, budget)),
        "mlp",
        "zero",
    ),
    Part("mlp, heads", 10, lambda block, n, budget: _turned(head_mlp_flow(block, "att_itb_a0", n, budget)), "mlp"),
    Part("att", 1000, lambda block, n, _: attention_flow(InputTokenPaths(block), n), "att"),
)


@dataclass(frozen=True)
class Row:
    """One measured ratio and what it should be; a gap or distance of the package is None where it was not run."""

    part: str
    nodes: int
    ratio: float
    target: float | None
    met: bool | None  # None: not judged
    seconds: float
    peer_seconds: float
    gap: float
    peer_gap: float | None
    distance: float
    peer_distance: float | None
    note: str


class Peer:
    """The package in its own process."""

    def __init__(self, python: Path, folder: Path, text: str, threads: int) -> None:
        script = Path(__file__).with_name("bench_lig_peer.py")
        command = [str(python), str(script), str(folder), text, str(PEER_STEPS), str(threads)]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    @staticmethod
    def what_is_wrong(python: Path) -> str | None:
        """Why the package cannot be run with this Python, None where it can."""
        try:
            probe = [str(python), "-c", "import lig.adapters.encoder, torch"]
            done = subprocess.run(probe, capture_output=True, text=True, check=False)
        except OSError as error:
            return f"it cannot be started ({error.strerror})"
        if done.returncode:
            last = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
            return f"it cannot import the published package ({last}); install layer-wise-integrated-gradients there"
        return None

    def run(self, part: Part, targets: list[int]) -> tuple[float, Tensor]:
        """Processor seconds, and the maps (L, ..., source or dimension, target)."""
        assert self.process.stdin is not None and self.process.stdout is not None
        asked = {"part": part.peer, "baseline": part.baseline, "targets": targets}
        with contextlib.suppress(BrokenPipeError):  # it has ended, and there is no line to read
            self.process.stdin.write(json.dumps(asked) + "\n")
            self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"the published package ended with code {self.process.wait()}; its messages stand above.")
        answer = json.loads(line)
        values = torch.tensor(answer["values"], dtype=torch.float64)
        return answer["seconds"], values if part.peer == "layer" else values.movedim(1, -1)

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


class Ours:
    """`lig`'s parts on one text; the pass through the model and the checks of its blocks are in the seconds."""

    def __init__(self, model: Any, batch: dict[str, Tensor]) -> None:
        self.model, self.batch = ExplainableModel(model), batch

    def run(self, part: Part, nodes: int) -> list[Flow]:
        with self.model.session():
            blocks = take_apart(self.model, self.model.prepare(self.batch), 0)
            return [part.run(block, nodes, self.model.max_tokens) for block in blocks]


def errors(values: Tensor, exact: list[Flow], targets: list[int]) -> tuple[float, float]:
    """Worst relative gap of a column's sum, and distance from the exact map relative to its length."""
    total = torch.stack([flow.total for flow in exact])[..., targets]
    reference = torch.stack([flow.values for flow in exact])[..., targets]
    gap = (values.sum(-2) - total).abs() / total.clamp_min(1e-3)
    return float(gap.max()), float((values - reference).norm() / reference.norm())


def measure(part: Part, ours: Ours, fine: Ours, nodes: list[int], peer: Peer | None, options: Any) -> list[Row]:
    tokens = ours.batch["input_ids"].shape[1]
    every = list(range(tokens))
    slow = part.peer == "att"
    asked = every[: options.att_targets] if slow and options.att_targets else every
    clock = time.process_time if peer else time.perf_counter
    seconds: dict[int, list[float]] = {count: [] for count in nodes}
    peer_seconds: list[float] = []
    peer_values = None
    if peer and slow:
        peer.run(part, every[:1])  # it compiles, which does not count
    for turn in range(options.repeats + 1):  # the first does not count
        for count in nodes:
            gc.collect()
            start = clock()
            ours.run(part, count)
            seconds[count].append(clock() - start)
        if peer and not (slow and turn):  # minutes: once
            spent, peer_values = peer.run(part, asked)
            peer_seconds.append(spent * tokens / len(asked))
    exact = fine.run(part, FINE)
    theirs = statistics.median(peer_seconds[1:] or peer_seconds) if peer else RECORDED[part.peer]
    own = part.name != "mlp, heads"  # the package knows no heads there
    peer_gap, peer_distance = (None, None) if peer_values is None or not own else errors(peer_values, exact, asked)
    rows = []
    for count in nodes:
        spent = statistics.median(seconds[count][1:])
        gap, distance = errors(torch.stack([flow.values for flow in ours.run(part, count)]).double(), exact, every)
        ratio = theirs / spent
        judged = count == nodes[0]
        met = None
        if judged and peer_gap is not None and peer_distance is not None:
            met = ratio >= part.target and gap < peer_gap and distance < peer_distance
        note = f"package: {len(asked)} of {tokens} targets, scaled" if peer and len(asked) < tokens else ""
        note = note if peer else "package: recorded, another machine"
        rows.append(
            Row(
                *(part.name, count, ratio, part.target if judged else None, met),
                *(spent, theirs, gap, peer_gap, distance, peer_distance, note),
            )
        )
    return rows


def show(rows: list[Row]) -> None:
    def number(value: float | None) -> str:
        return "-" if value is None else f"{value:.1e}"

    for row in rows:
        verdict = {True: "met", False: "MISSED", None: "" if row.target is None else "open"}[row.met]
        target = "" if row.target is None else f">= {row.target:g}"
        print(
            f"{row.part:20s} n={row.nodes:<4d} {row.ratio:8.1f}x {target:8s} {verdict:7s} "
            f"{row.peer_seconds:8.2f} / {row.seconds:.3f} s   gap {number(row.peer_gap)} / {number(row.gap)}   "
            f"distance {number(row.peer_distance)} / {number(row.distance)}   {row.note}",
            flush=True,
        )


def random_model(folder: Path) -> None:
    """A random encoder of MiniLM's shape, with a tokenizer that knows the words of the text."""
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", ".", *dict.fromkeys(TEXT.split())]
    (folder / "vocab.txt").write_text("\n".join(words) + "\n")
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "BertTokenizer"}))
    torch.manual_seed(0)
    model = BertModel(BertConfig(vocab_size=len(words), pad_token_id=0, **MINILM))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):  # of zeros, a norm would make every path from 0 happen at its start
                parameter.normal_(std=0.02)
    model.save_pretrained(folder)


def text_of(tokenizer: Any, tokens: int) -> str:
    """Words that make exactly so many tokens."""
    text = ""
    for word in TEXT.split():
        longer = f"{text} {word}".strip()
        if len(tokenizer(longer)["input_ids"]) > tokens:
            break
        text = longer
    text += " ." * (tokens - len(tokenizer(text)["input_ids"]))
    found = len(tokenizer(text)["input_ids"])
    if found != tokens:
        raise SystemExit(f"--tokens={tokens}: the text has {found} tokens at most")
    return text


def positive(text: str) -> int:
    """A whole number above 0, for argparse."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number above 0, got {text!r}")
    return int(text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="folder of a BERT-like encoder to measure instead of the random one")
    parser.add_argument("--tokens", type=positive, default=32)
    parser.add_argument("--nodes", type=positive, nargs="+", default=[12, 32], help="the targets are for the first")
    parser.add_argument("--repeats", type=positive, default=3)
    parser.add_argument("--threads", type=positive, default=1)
    parser.add_argument("--peer-python", type=Path, help="a Python that has the published package")
    parts = ["layer", "mlp", "att"]
    parser.add_argument("--peer-parts", nargs="*", choices=parts, default=parts, help="what to run of the package")
    parser.add_argument("--att-targets", type=positive, help="run the package's att for so many targets, and scale")
    parser.add_argument("--json", type=Path, help="also write the rows there")
    options = parser.parse_args()
    if not options.peer_python and options.tokens != RECORDED_TOKENS:
        parser.error(f"--tokens={options.tokens} needs --peer-python: recorded is {RECORDED_TOKENS} tokens")
    if options.model and not options.model.is_dir():
        parser.error(f"--model={options.model}: no such folder")
    if options.json and not options.json.absolute().parent.is_dir():
        parser.error(f"--json={options.json}: there is no folder to write it into")
    if options.peer_python and (wrong := Peer.what_is_wrong(options.peer_python)):
        parser.error(f"--peer-python={options.peer_python}: {wrong}")
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as made:
        folder = options.model or Path(made)
        if options.model is None:
            random_model(folder)
        tokenizer = AutoTokenizer.from_pretrained(folder)
        text = text_of(tokenizer, options.tokens)
        model = AutoModel.from_pretrained(folder).eval()
        batch = dict(tokenizer(text, return_tensors="pt"))
        ours, fine = Ours(model, batch), Ours(copy.deepcopy(model).double(), batch)
        peer = Peer(options.peer_python, folder, text, options.threads) if options.peer_python else None
        machine = platform.processor() or platform.machine()
        print(
            f"{machine}, {options.threads} threads, torch {torch.__version__}, {folder.name}, {options.tokens} tokens"
        )
        print("package / here; n: nodes here, the package has 32 steps")
        rows: list[Row] = []
        for part in PARTS:
            if peer and part.peer not in options.peer_parts:
                continue
            new = measure(part, ours, fine, options.nodes, peer, options)
            show(new)
            rows += new
        if peer:
            peer.close()
    if options.json:
        options.json.write_text(json.dumps([asdict(row) for row in rows], indent=1))


if __name__ == "__main__":
    main()
