"""All layers' integrated gradients in one sweep against Captum's LayerIntegratedGradients layer by layer.

    python scripts/bench_layers.py [--layers 6 --width 384 --heads 12 --tokens 24 --batch 8 --steps 16 --repeats 5]

Both run in this process on the same random BERT with the same number of nodes; what counts is the ratio. Captum takes
a straight line at each layer: `path=straight` is the like-for-like row. `path=shared`, which the pipeline uses, follows
the image of one line through all layers.
"""

import argparse
import platform
import statistics
import time

import torch
from captum.attr import LayerIntegratedGradients
from transformers import BertConfig, BertForSequenceClassification

from calig.pipeline.attribution import ExplainableModel, attribute


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    sizes = {"layers": 6, "width": 384, "heads": 12, "tokens": 24, "batch": 8, "steps": 16, "repeats": 5, "threads": 2}
    for name, default in sizes.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=1000,
        hidden_size=options.width,
        num_hidden_layers=options.layers,
        num_attention_heads=options.heads,
        intermediate_size=4 * options.width,
    )
    model = BertForSequenceClassification(config).eval()
    ids = torch.randint(5, 1000, (options.batch, options.tokens))
    ids[:, 0], ids[:, -1] = 1, 2
    special = ((ids == 1) | (ids == 2)).long()
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "special_tokens_mask": special}
    target = [0] * options.batch

    def captum() -> None:
        base = torch.where(special.bool(), ids, 0)
        layers = [model.bert.embeddings, *model.bert.encoder.layer]
        for layer in layers:
            LayerIntegratedGradients(lambda x: model(x).logits, layer).attribute(
                ids, baselines=base, target=target, n_steps=options.steps, method="gausslegendre"
            )

    wrapped = ExplainableModel(model)

    def ours(path: str) -> None:
        attribute(wrapped, batch, "ca_lig", target=target, path=path, steps=options.steps)

    runs = {"captum, layer by layer": captum, "ca_lig, path=straight": lambda: ours("straight")}
    runs["ca_lig, path=shared"] = lambda: ours("shared")
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for run in runs.values():
        run()
    for _ in range(options.repeats):  # in turn, so that a machine that drifts drifts for all
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - start)
    print(f"{platform.processor() or platform.machine()}, {options.threads} threads, torch {torch.__version__}")
    shape = f"{options.layers} blocks x {options.width}, {options.batch} x {options.tokens} tokens"
    print(f"{shape}, {options.steps} nodes")
    reference = statistics.median(seconds["captum, layer by layer"])
    for name, times in seconds.items():
        middle = statistics.median(times)
        print(f"{name:26s} {middle:7.3f} s  (min {min(times):.3f}, max {max(times):.3f})  x {reference / middle:.1f}")


if __name__ == "__main__":
    main()
