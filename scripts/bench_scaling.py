"""How the explain stage scales: processes, blocks, tokens, and memory over many samples.

usage: python scripts/bench_scaling.py [--part processes|blocks|tokens|memory|all] [--samples N] [--repeats N]

Random BERTs and random token ids: times depend on shapes alone. Every measurement runs `Trainer.predict` with the
writer of the explain stage in forked processes of one thread each; a clock starts behind their start-up. Figures in
docs/scaling.md come from here.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import resource
import statistics
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate
from transformers import BertConfig, BertForSequenceClassification

from calig.callbacks import ExplanationWriter
from calig.datamodules.samplers import ExactShare
from calig.pipeline.explainer import Explainer, ExplainSettings

WIDTH, HEADS, VOCABULARY = 256, 4, 1000


class Rows(Dataset):
    """Random rows, made when they are asked for: the data take no memory."""

    def __init__(self, count: int, tokens: int) -> None:
        self.count, self.tokens = count, tokens

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict[str, Any]:
        ids = torch.randint(5, VOCABULARY, (self.tokens,), generator=torch.Generator().manual_seed(index))
        ids[0], ids[-1] = 1, 2
        special = torch.zeros_like(ids)
        special[0] = special[-1] = 1
        return {
            "input_ids": ids,
            "attention_mask": torch.ones_like(ids),
            "special_tokens_mask": special,
            "sample_id": index,
        }


class Shares(LightningModule):
    """A model that is explained, not asked."""

    def __init__(self, model: BertForSequenceClassification, rows: Rows, batch_size: int) -> None:
        super().__init__()
        self.model, self.rows, self.batch_size = model, rows, batch_size

    def predict_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        return None

    def predict_dataloader(self) -> DataLoader:
        share = ExactShare(self.rows, rank=self.trainer.global_rank, processes=self.trainer.world_size)
        return DataLoader(self.rows, batch_size=self.batch_size, sampler=share, collate_fn=default_collate)


class Clock(Callback):
    """Seconds and resident memory of a process, from its first batch on."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.memory: list[tuple[int, float]] = []

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        trainer.strategy.barrier("start")
        self.start, self.cpu_start = time.perf_counter(), time.process_time()

    def on_predict_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int, *_: Any
    ) -> None:
        if batch_idx % 20 == 0:
            self.memory.append((batch_idx, resident()))

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        found = {
            "seconds": time.perf_counter() - self.start,
            "cpu": time.process_time() - self.cpu_start,
            "memory": self.memory,
        }
        (self.folder / f"clock-{trainer.global_rank}.json").write_text(json.dumps(found))


def resident() -> float:
    """MB of this process that are in memory now."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 1e6


def explain(
    folder: str, processes: int, count: int, blocks: int, tokens: int, width: int, batch_size: int, metrics: bool
) -> None:
    """One run, in this process and those it forks."""
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=width,
        num_hidden_layers=blocks,
        num_attention_heads=HEADS,
        intermediate_size=4 * width,
        max_position_embeddings=max(tokens, 32),
    )
    model = BertForSequenceClassification(config).eval()
    operators = ("attention",) if metrics else ()
    explainer = Explainer(model, None, ExplainSettings({"ca_lig": {"steps": 8}}, operators=operators))
    trainer = Trainer(
        accelerator="cpu",
        devices=processes,
        strategy="ddp_fork" if processes > 1 else "auto",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
        callbacks=[Clock(Path(folder)), ExplanationWriter(explainer, folder, {})],
    )
    trainer.predict(Shares(model, Rows(count, tokens), batch_size), return_predictions=False)


def measure(count: int, **settings: Any) -> tuple[float, float, list[list[float]]]:
    """Seconds of the slowest process, CPU seconds of all, and (batch, MB) of the first one."""
    arguments = {
        "processes": 1,
        "count": count,
        "blocks": 6,
        "tokens": 32,
        "width": WIDTH,
        "batch_size": 16,
        "metrics": True,
        **settings,
    }
    with tempfile.TemporaryDirectory() as folder:
        child = multiprocessing.get_context("fork").Process(target=explain, args=(folder,), kwargs=arguments)
        child.start()
        child.join()
        if child.exitcode:
            raise RuntimeError(f"the measurement of {arguments} ended with {child.exitcode}")
        clocks = [json.loads(path.read_text()) for path in sorted(Path(folder).glob("clock-*.json"))]
    return max(clock["seconds"] for clock in clocks), sum(clock["cpu"] for clock in clocks), clocks[0]["memory"]


def processes(repeats: int) -> None:
    print("processes x 1 thread: samples per second, alternating runs")
    rates: dict[int, list[float]] = {1: [], 2: []}
    for _ in range(repeats):
        for number in rates:
            count = 128 * number
            rates[number].append(count / measure(count, processes=number)[0])
    for number, found in rates.items():
        print(f"  {number}: median {statistics.median(found):6.1f}  ({', '.join(f'{rate:.1f}' for rate in found)})")
    ratios = [two / one for one, two in zip(rates[1], rates[2], strict=True)]
    print(f"  ratio: median {statistics.median(ratios):.2f}, best {max(ratios):.2f}")


def growth(key: str, values: list[int], repeats: int) -> None:
    # CPU time, which a busy machine stretches less than the time on the wall.
    print(f"CPU ms per sample against {key} (attribution alone, and with faithfulness metrics)")
    for value in values:
        times = []
        for metrics in (False, True):
            found = [measure(32, **{key: value}, metrics=metrics)[1] / 32 for _ in range(repeats)]
            times.append(1000 * statistics.median(found))
        print(f"  {value:>4}: {times[0]:8.1f} {times[1]:8.1f}")


def memory(samples: int) -> None:
    print(f"resident memory over {samples:,} samples of 8 tokens, a BERT of 1 block and width 16")
    seconds, _, points = measure(samples, blocks=1, width=16, tokens=8, batch_size=32)
    late = [(32 * batch, size) for batch, size in points if 32 * batch >= samples / 5]
    xs, ys = zip(*late, strict=True)
    slope = statistics.linear_regression(xs, ys).slope
    for part in range(0, len(points), max(1, len(points) // 8)):
        print(f"  {32 * points[part][0]:>7,}: {points[part][1]:7.1f} MB")
    print(f"  slope behind the first fifth: {1e6 * slope:.0f} bytes per sample; {seconds:.0f} s")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=("processes", "blocks", "tokens", "memory", "all"), default="all")
    parser.add_argument("--samples", type=int, default=20_000, help="of the memory part")
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    parts = {
        "processes": lambda: processes(options.repeats),
        "blocks": lambda: growth("blocks", [2, 4, 8, 12], options.repeats),
        "tokens": lambda: growth("tokens", [16, 32, 64, 128], options.repeats),
        "memory": lambda: memory(options.samples),
    }
    for name, part in parts.items():
        if options.part in (name, "all"):
            part()


if __name__ == "__main__":
    main()
