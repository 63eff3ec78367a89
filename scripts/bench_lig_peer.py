"""The published LIG package, timed on request: one JSON line in, one out. Started by `bench_lig.py` in its own Python.

It loads the model once and then calls `lig.explain` as its users do; loading is not in the seconds.
"""

from __future__ import annotations

import json
import os
import sys
import time

import torch
from lig import LIGConfig, explain
from lig.adapters.encoder import EncoderAdapter


def main() -> None:
    folder, text, steps, threads = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
    torch.set_num_threads(threads)
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever the package prints
    adapter = EncoderAdapter.from_pretrained(folder, device="cpu")
    EncoderAdapter.from_pretrained = classmethod(lambda *_args, **_kwargs: adapter)
    for line in sys.stdin:
        asked = json.loads(line)
        config = LIGConfig(
            model=folder,
            num_steps=steps,
            granularity=asked["part"],
            baseline_att="self_input_token",
            baseline_mlp=asked["baseline"],
            baseline_layer="self_input_token",
            target_tokens=asked["targets"],
            device="cpu",
        )
        start = time.process_time()
        result = explain(text, config=config)
        seconds = time.process_time() - start
        layers = list(result["layers"].values())
        if asked["part"] == "layer":
            values = [layer["z2z"]["matrix"] for layer in layers]
        elif asked["part"] == "mlp":
            values = [[target["u2z"]["contributions"] for target in layer["targets"].values()] for layer in layers]
        else:
            values = [
                [
                    [head["contributions"] for head in target["z2u"]["heads"].values()]
                    for target in layer["targets"].values()
                ]
                for layer in layers
            ]
        print(json.dumps({"seconds": seconds, "values": values}), file=replies, flush=True)


if __name__ == "__main__":
    main()
