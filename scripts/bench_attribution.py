"""The attribution engine against Captum: seconds as ratios, the gap each row reaches, and peak memory.

    python scripts/bench_attribution.py [--model DIR] [--rows 8] [--tokens 32 128] [--json FILE]
    python scripts/bench_attribution.py --auto DIR --data FILE.jsonl

Everything runs in one process on the same batch with the same number of nodes, in turn, so that a machine that drifts
drifts for all; medians of processor time are compared, which what else runs there hardly changes. Without `--model`
the models are random: a MiniLM-shaped encoder (6 blocks of 384) with 16 nodes and a BERT-base-shaped one (12 of 768)
with 4 nodes at 128 tokens. Random weights are smooth: their gaps flatter every method. What a fine-tuned model needs
is what `--auto` measures: the nodes and seconds with which `steps="auto"` brings every text of FILE (JSON lines with
`text`, or a list `tokens`) below 2 %, and the uniform nodes that reach the same worst text.
"""

from __future__ import annotations

import argparse
import gc
import json
import platform
import statistics
import time
import weakref
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from captum.attr import LayerIntegratedGradients
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForSequenceClassification, AutoTokenizer, BertConfig, BertForSequenceClassification

from calig.pipeline.attribution import ClassLogit, ExplainableModel, attribute
from calig.pipeline.attribution.inside import find_ends, layer_evidence
from calig.pipeline.attribution.quadrature import relative_gap

MINILM = {"hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 12, "intermediate_size": 1536}
BERT_BASE = {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 3072}


@dataclass(frozen=True)
class Row:
    """One measured ratio and what it should be."""

    setting: str
    name: str
    value: float
    target: str
    met: bool | None
    detail: str = ""


class PeakBytes(TorchDispatchMode):
    """The most bytes that tensors made within the context held at once.

    Every storage that an operation returns is counted until it is freed; what stood before is not counted. Temporary
    buffers inside an operation are not seen, which does not matter to how a peak grows.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self.known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for item in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(item, Tensor):
                self._count(item.untyped_storage())
        return result

    def _count(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key in self.known:
            return
        self.known.add(key)
        size = storage.nbytes()
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._free, key, size)

    def _free(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.live -= size


def medians(runs: dict[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """Median seconds of each run; all in turn, after one run of each that does not count."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(repeats + 1):
        for name, run in runs.items():
            gc.collect()
            start = time.process_time()
            run()
            if turn:
                seconds[name].append(time.process_time() - start)
    return {name: statistics.median(times) for name, times in seconds.items()}


def random_model(shape: dict[str, int]) -> nn.Module:
    torch.manual_seed(0)
    return BertForSequenceClassification(BertConfig(vocab_size=1000, pad_token_id=0, **shape)).eval()


def random_batch(vocabulary: int, rows: int, tokens: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(5, vocabulary, (rows, tokens), generator=generator)
    ids[:, 0], ids[:, -1] = 1, 2
    special = ((ids == 1) | (ids == 2)).long()
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "special_tokens_mask": special}


def compare(model: Any, batch: dict[str, Tensor], nodes: int, repeats: int, setting: str) -> list[Row]:
    """The ratios of one model and batch."""
    wrapped = ExplainableModel(model)
    encoder = getattr(model, model.base_model_prefix)
    blocks = [encoder.embeddings, *encoder.encoder.layer]
    rows, depth = len(batch["input_ids"]), len(blocks) - 1
    target = [0] * rows
    goal = ClassLogit(torch.zeros(rows, dtype=torch.long))
    ids, special = batch["input_ids"], batch["special_tokens_mask"].bool()
    base = torch.where(special, ids, model.config.pad_token_id or 0)
    found: dict[str, Any] = {}

    def captum(layers: list[nn.Module]) -> list[Tensor]:
        # The baseline that ours is: the pad token's row at content positions.
        return [
            LayerIntegratedGradients(lambda x: model(x).logits, layer)
            .attribute(ids, baselines=base, target=target, n_steps=nodes, method="gausslegendre")
            .sum(-1)
            for layer in layers
        ]

    def shared() -> None:
        with wrapped.session():
            inputs = wrapped.prepare(batch)
            ends = find_ends(wrapped, inputs, goal, "pad", [0], gradients=True)
            evidence = layer_evidence(
                wrapped,
                inputs,
                goal,
                ends,
                layers=list(range(depth + 1)),
                path="shared",
                steps=nodes,
                tolerance=0.02,
                max_steps=nodes,
            ).evidence
        found["shared path"] = relative_gap(evidence, ends.output_change)
        found["change"] = ends.output_change

    def straight() -> None:
        with wrapped.session():
            inputs = wrapped.prepare(batch)
            ends = find_ends(wrapped, inputs, goal, "pad", None)
            evidence = layer_evidence(
                wrapped,
                inputs,
                goal,
                ends,
                layers=list(range(depth + 1)),
                path="straight",
                steps=nodes,
                tolerance=0.02,
                max_steps=nodes,
            ).evidence
        found["straight path"] = relative_gap(evidence, ends.output_change)

    def whole() -> None:
        result = attribute(wrapped, batch, "ca_lig", target=target, path="shared", steps=nodes)
        found["CA-LIG"] = result.completeness_gap

    def plain() -> None:
        found["plain"] = captum(blocks[:1])

    def layered() -> None:
        found["layered"] = captum(blocks)

    runs: dict[str, Callable[[], object]] = {
        "shared": shared,
        "whole": whole,
        "plain": plain,
        "straight": straight,
        "layered": layered,
    }
    seconds = medians(runs, repeats)
    for name in ("plain", "layered"):
        found[name] = relative_gap(torch.stack(found[name], dim=1), found["change"])
    gaps = {name: f"{float(gap.max()):.1e}" for name, gap in found.items() if name != "change"}

    def row(name: str, over: str, under: str, limit: float, at_most: bool, gap: str) -> Row:
        value = seconds[over] / seconds[under]
        met = value <= limit if at_most else value >= limit
        detail = f"{seconds[over]:.2f} / {seconds[under]:.2f} s; worst gap {gap}"
        return Row(setting, name, value, f"{'<=' if at_most else '>='} {limit}", met, detail)

    ours = f"{gaps['shared path']} (shared)"
    least = 6.0 if depth <= 6 else 12.0
    return [
        row("all layers (shared) / Captum IG on embeddings", "shared", "plain", 0.9, True, f"{ours}, {gaps['plain']}"),
        row("Captum layer IG / shared path", "layered", "shared", least, False, f"{gaps['layered']}, {ours}"),
        row(
            "Captum layer IG / straight path", "layered", "straight", 1.4, False, f"{gaps['straight path']} (straight)"
        ),
        row("CA-LIG / shared path alone", "whole", "shared", 1.25, True, f"{gaps['CA-LIG']} (CA-LIG)"),
    ]


def peaks(model: Any, batch: dict[str, Tensor], setting: str) -> Row:
    """Peak bytes of CA-LIG at 64 steps against 8."""
    wrapped = ExplainableModel(model)
    found = []
    for steps in (8, 64):
        with PeakBytes() as counter:
            attribute(wrapped, batch, "ca_lig", target=[0] * len(batch["input_ids"]), steps=steps)
        found.append(counter.peak)
    value = found[1] / found[0]
    detail = f"{found[1] / 2**20:.0f} / {found[0] / 2**20:.0f} MiB of tensors"
    return Row(setting, "peak memory, 64 steps / 8 steps", value, "<= 1.1", value <= 1.1, detail)


def lengths(model: Any, vocabulary: int, tokens: int, repeats: int, setting: str) -> Row:
    """A ragged batch against the same inputs one width wide: what length buckets save."""
    batch = random_batch(vocabulary, 16, tokens)
    real = torch.linspace(max(4, tokens // 8), tokens, 16).long()
    keep = torch.arange(tokens) < real[:, None]
    batch = {"input_ids": batch["input_ids"] * keep, "attention_mask": keep.long()}
    batch["special_tokens_mask"] = (batch["input_ids"] <= 2).long()
    wrapped = ExplainableModel(model)

    def run(objective: Any = None) -> None:
        options = {"objective": objective} if objective else {"target": [0] * 16}
        attribute(wrapped, batch, "ca_lig", steps=8, **options)

    # A callable's batch is kept at its width.
    seconds = medians({"cut": run, "whole": lambda: run(lambda output: output.logits[:, 0])}, repeats)
    value = seconds["whole"] / seconds["cut"]
    detail = f"16 texts of {int(real[0])} to {tokens} tokens; {seconds['whole']:.2f} / {seconds['cut']:.2f} s"
    return Row(setting, "ragged batch, one width / cut to length", value, "", None, detail)


def fine_tuned(folder: Path, data: Path, count: int, tolerance: float) -> list[Row]:
    """Nodes and seconds of `auto` on real texts against the uniform nodes that reach the same worst text."""
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    texts = read_texts(data, count)
    wrapped = ExplainableModel(model, tokenizer=tokenizer)

    def run(chosen: list[str], **options: Any) -> tuple[Tensor, Tensor]:
        """Worst gap over layers and nodes of each text."""
        gaps, nodes = [], []
        for start in range(0, len(chosen), 16):
            batch = tokenizer(chosen[start : start + 16], padding=True, truncation=True, return_tensors="pt")
            result = attribute(wrapped, dict(batch), "ca_lig", **options)
            gaps.append(result.completeness_gap.amax(1))
            nodes.append(result.steps_used)
        return torch.cat(gaps), torch.cat(nodes).double()

    setting = f"fine-tuned, {len(texts)} texts"
    start = time.process_time()
    gap, nodes = run(texts, steps="auto", tolerance=tolerance, max_steps=2049)
    spent = time.process_time() - start
    detail = f"{int(nodes.min())} to {int(nodes.max())}, median {int(nodes.median())}; {spent:.1f} s"
    rows = [
        Row(setting, "auto: mean nodes", float(nodes.mean()), "", None, detail),
        Row(setting, "auto: worst gap", float(gap.max()), f"<= {tolerance}", bool((gap <= tolerance).all())),
    ]
    steps, left = 9, texts
    while left and steps < 2000:
        steps = 2 * steps - 1
        # Texts that fewer nodes served are not run again: the count found is the least that doubling can find.
        gap, _ = run(left, steps=steps)
        rows.append(
            Row(setting, f"uniform, {steps} nodes: worst gap", float(gap.max()), "", None, f"{len(left)} texts")
        )
        left = [text for text, own in zip(left, gap.tolist(), strict=True) if own > tolerance]
    share = float(nodes.mean()) / steps
    rows.append(Row(setting, "nodes of auto / of uniform", share, "<= 0.25", share <= 0.25))
    return rows


def read_texts(data: Path, count: int) -> list[str]:
    """The first texts of a file of JSON lines with a key `text` or `tokens`."""
    lines = (json.loads(line) for line in data.read_text().splitlines())
    texts = (line["text"] if "text" in line else " ".join(line["tokens"]) for line in lines)
    return list(dict.fromkeys(texts))[:count]


def show(rows: list[Row]) -> None:
    for row in rows:
        verdict = {True: "met", False: "MISSED", None: ""}[row.met]
        print(
            f"{row.setting:28s} {row.name:46s} {row.value:8.3g}  {row.target:8s} {verdict:6s} {row.detail}", flush=True
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="a BERT-like classifier to measure instead of the random ones")
    parser.add_argument("--nodes", type=int, help="nodes; 16, or 4 for 12 blocks with 128 tokens")
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--tokens", type=int, nargs="+", default=[32, 128])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--auto", type=Path, help="a fine-tuned classifier, for error control on real texts")
    parser.add_argument("--data", type=Path, help="with --auto: a file of JSON lines")
    parser.add_argument("--texts", type=int, default=120, help="with --auto: how many")
    parser.add_argument("--json", type=Path, help="also write the rows there")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print(f"{platform.processor() or platform.machine()}, {options.threads} threads, torch {torch.__version__}")
    rows: list[Row] = []
    if options.auto:
        rows += fine_tuned(options.auto, options.data, options.texts, 0.02)
        show(rows)
    else:
        if options.model:
            loaded = AutoModelForSequenceClassification.from_pretrained(options.model).eval()
            models = {options.model.name: loaded}
        else:
            models = {"MiniLM": random_model(MINILM), "BERT-base": random_model(BERT_BASE)}
        for name, model in models.items():
            for tokens in options.tokens:
                deep = model.config.num_hidden_layers > 6
                nodes = options.nodes or (4 if deep and tokens >= 128 else 16)
                repeats = min(3, options.repeats) if deep and tokens >= 128 else options.repeats
                setting = f"{name} {options.rows}x{tokens} n={nodes}"
                batch = random_batch(model.config.vocab_size, options.rows, tokens)
                new = compare(model, batch, nodes, repeats, setting)
                new.append(peaks(model, batch, setting))
                if not deep:
                    new.append(lengths(model, model.config.vocab_size, tokens, repeats, setting))
                show(new)
                rows += new
    if options.json:
        options.json.write_text(json.dumps([asdict(row) for row in rows], indent=1))


if __name__ == "__main__":
    main()
