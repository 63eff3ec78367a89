"""The perturbation planner against a plain batched forward over the same inputs, built beforehand.

    python scripts/bench_perturbation.py [--texts 16 --methods 6 --operators mask delete --layers 6 --width 384 --json]

The list of requests is that of `faithfulness_rows` for comprehensiveness, sufficiency and log-odds: every method's and
control's top k removed and kept. Both sides run in turn in this process on the same random BERT, on a GPU if there is
one; what counts is the ratio of their throughputs, 1 if the planner cost nothing. `cpu_ratio` is the same in processor
time, which other work on the machine hardly moves; `host_s` is the planner's time around a forward that costs nothing.
"""

import argparse
import json
import statistics
import time

import torch
from transformers import BertConfig, BertForSequenceClassification

from calig.pipeline.metrics import PerturbationTokens, Request, count, perturbed_logits, random_rank, reverse

BINS = (0.01, 0.05, 0.1, 0.2, 0.5)
PAD, MASK, CLS, SEP = 0, 1, 2, 3


def build_requests(mask: torch.Tensor, special: torch.Tensor, options: argparse.Namespace) -> list[Request]:
    """One random ranking per method and its reversal, and the random control."""
    requests = [Request(b, torch.ones_like(row), options.operators[0]) for b, row in enumerate(mask)]
    for b, evaluable in enumerate(mask & ~special):
        rankings = [random_rank(evaluable, seed=seed, sample_id=b) for seed in range(options.methods + 1)]
        rankings += [reverse(ranking) for ranking in rankings[1:]]
        for ranking in rankings:
            for q in BINS:
                top = torch.zeros_like(evaluable)
                top[ranking[: count(q, len(ranking))]] = True
                requests += [Request(b, keep, name) for name in options.operators for keep in (~top, top)]
    return requests


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    sizes = {"texts": 16, "shortest": 20, "longest": 60, "methods": 6, "layers": 6, "width": 384, "heads": 12}
    for name, default in (sizes | {"repeats": 5, "threads": 2, "budget": 8192}).items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--operators", nargs="+", default=["mask"])
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    config = BertConfig(
        vocab_size=30522,
        hidden_size=options.width,
        num_hidden_layers=options.layers,
        num_attention_heads=options.heads,
        intermediate_size=4 * options.width,
    )
    model = BertForSequenceClassification(config).eval().to(device)
    lengths = torch.randint(options.shortest, options.longest + 1, (options.texts, 1))
    mask = torch.arange(options.longest) < lengths
    ids = torch.randint(1000, 30000, mask.shape).masked_fill(~mask, PAD)
    ids[:, 0] = CLS
    ids.scatter_(1, lengths - 1, SEP)
    special = (ids == CLS) | (ids == SEP)
    batch = {"input_ids": ids, "attention_mask": mask.long(), "token_type_ids": torch.zeros_like(ids)}
    batch = {key: value.to(device) for key, value in batch.items()}
    requests = build_requests(mask, special, options)

    built: list[dict[str, torch.Tensor]] = []

    def forward(fed: dict[str, torch.Tensor]) -> torch.Tensor:
        return model(**fed).logits

    def recording(fed: dict[str, torch.Tensor]) -> torch.Tensor:
        built.append(fed)
        return forward(fed)

    def planner(through: object = forward) -> None:
        given = {"tokens": PerturbationTokens(pad_id=PAD, mask_id=MASK), "special": special, "mask": mask}
        perturbed_logits(through, batch, requests, token_budget=options.budget, **given)  # type: ignore[arg-type]

    def plain() -> None:
        with torch.inference_mode():
            torch.cat([forward(fed) for fed in built]).cpu()

    planner(recording)

    def host() -> None:
        planner(lambda fed: torch.zeros(len(fed["input_ids"]), 2, device=device))

    runs = {"plain": plain, "planner": planner, "host": host}
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    processor: dict[str, list[float]] = {name: [] for name in runs}
    for run in runs.values():
        run()
    for _ in range(options.repeats):  # in turn, so that a machine that drifts drifts for all
        for name, run in runs.items():
            start, worked = time.perf_counter(), time.process_time()
            run()
            seconds[name].append(time.perf_counter() - start)
            processor[name].append(time.process_time() - worked)
    middle = {name: statistics.median(times) for name, times in seconds.items()}
    ratios = [a / b for a, b in zip(seconds["plain"], seconds["planner"], strict=True)]
    cpu_ratios = [a / b for a, b in zip(processor["plain"], processor["planner"], strict=True)]
    result = {
        "device": torch.cuda.get_device_name() if device.type == "cuda" else f"cpu, {options.threads} threads",
        "requests": len(requests),
        "distinct": sum(len(fed["input_ids"]) for fed in built),
        "tokens": sum(fed["input_ids"].numel() for fed in built),
        "batches": len(built),
        "plain_s": middle["plain"],
        "planner_s": middle["planner"],
        "host_s": middle["host"],
        "cpu_ratio": statistics.median(cpu_ratios),
        "ratio": statistics.median(ratios),
        "ratio_min": min(ratios),
        "ratio_max": max(ratios),
    }
    if options.json:
        print(json.dumps(result))
    else:
        for name, value in result.items():
            print(f"{name:10s} {value:.3f}" if isinstance(value, float) else f"{name:10s} {value}")


if __name__ == "__main__":
    main()
