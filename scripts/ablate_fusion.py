"""Which fusion should be CA-LIG's default, and does choosing it on calibration data help? On one trained run.

    python scripts/ablate_fusion.py RUN [--samples 200 --steps 16 --json FILE]
    python scripts/ablate_fusion.py RUN --adaptive [--calibrate 200 --samples 300]

RUN is a run directory with a trained model. Evidence and attention gradients are computed once per sample and fused in
every way, so that all rows of a table are of the same integrals.

Without --adaptive, on the validation split: the forms of METHODS 2.3 over lambda; signed or positive attention
gradients, at the input or along the path; normalised or in logit units; evidence alone, and attention gradients alone.
With it (METHODS 2.5): fusions chosen on the validation split, measured on the test split beside the default.

Each row is compared with the default, `column` with lambda 0.7, sample by sample: mean difference, and * where its 95 %
interval leaves 0 out.
"""

import argparse
import dataclasses
import json
import os
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from calig.pipeline.attribution import ClassLogit, ExplainableModel, rollout
from calig.pipeline.attribution.methods import create_method
from calig.pipeline.attribution.methods.ca_lig import CALIG
from calig.pipeline.attribution.rollout import Ingredients
from calig.pipeline.calibrating import CalibrationSettings, Calibrator, Candidate
from calig.pipeline.compose import load
from calig.pipeline.console import Console
from calig.pipeline.loading import batch_rationale
from calig.pipeline.metrics import bootstrap_interval, faithfulness_rows, plausibility_rows
from calig.pipeline.metrics.rows import metric_key
from calig.pipeline.perturbers import perturbation_tokens
from calig.pipeline.run import RunContext, RunDirectory

METRICS = ("comprehensiveness", "sufficiency", "token_f1", "auprc")
LAMBDAS = (0.1, 0.3, 0.5, 0.7, 0.8, 0.9, 0.95)
DEFAULT = "column 0.7"
OBJECTIVES = {"comprehensiveness - sufficiency": "faithfulness", "token_f1": "token_f1"}
GRADIENTS: dict[str, dict[str, Any]] = {
    "positive": {},
    "signed": {"attention_gradient": "signed"},
    "path": {"attention_gradient_at": "path"},
}


def in_logit_units(parts: Ingredients, lam: float) -> Tensor:
    """`column` without N(.): (B, T) scores of `F^l = lam 1 r^{l-1}' / n + (1 - lam) G^l`."""
    real = parts.mask.sum(dim=1).to(parts.evidence.dtype)[:, None, None]
    factors = [
        lam * rollout.mask_pairs(parts.evidence[:, layer, None, :].expand_as(gradient), parts.mask) / real
        + (1 - lam) * gradient
        for layer, gradient in enumerate(parts.gradients)
    ]
    return rollout.rollout(factors, parts.readout)[:, -1]


def variants(found: dict[str, Ingredients]) -> dict[str, Tensor]:
    """Name -> (B, T) scores of every way to fuse.

    Args:
        found: How the attention gradients were taken (`positive`, `signed`, `path`) -> what is fused.
    """
    parts = found["positive"]
    scores = {
        f"{form} {lam}": parts.fused(form, lam)[0][:, -1] for form in ("column", "diagonal", "late") for lam in LAMBDAS
    }
    scores["gated"] = parts.fused("gated", 0.5)[0][:, -1]
    for lam in (0.5, 0.7):
        scores[f"column {lam}, logit units"] = in_logit_units(parts, lam)
        scores[f"column {lam}, G along the path"] = found["path"].fused("column", lam)[0][:, -1]
        for form in ("column", "diagonal", "late"):
            scores[f"{form} {lam}, signed G"] = found["signed"].fused(form, lam)[0][:, -1]
    scores["gated, signed G"] = found["signed"].fused("gated", 0.5)[0][:, -1]
    scores["evidence alone, all blocks"] = sum(rollout.normalise(row) for row in parts.evidence[:, :-1].unbind(dim=1))
    scores["evidence alone, r^0 (IG)"] = parts.evidence[:, 0]
    scores["G alone (lambda 0)"] = parts.fused("column", 0.0)[0][:, -1]
    return scores


def chosen(context: RunContext, samples: int, steps: int | str) -> dict[str, Candidate]:
    """Name -> what the calibration on the validation split chooses."""
    data, module = context.data, context.module
    asked = {
        "lam": {"lam": "auto"},
        "lam per layer": {"lam": "per_layer"},
        "form and lam": {"fusion": "auto", "lam": "auto"},
    }
    marked = any(1 in row["rationale"] for row in data.dataset("val").rows)
    found = {DEFAULT: Candidate("column", 0.7)}
    for objective in list(OBJECTIVES)[: 1 + marked]:
        settings = CalibrationSettings({"steps": steps}, {}, objective=objective, operator="delete")
        calibrator = Calibrator(module.model, data.tokenizer, settings)
        for batch in data.explain_dataloader("val", samples, 16, seed=0):
            calibrator.add(batch)
        for name, question in asked.items():
            calibrator.settings = dataclasses.replace(settings, asked=question)
            result = calibrator.choose()
            of = f"{name} by {OBJECTIVES[objective]}"
            found[of] = result.best.candidate
            print(f"{of}: {result.best.row()}, {result.evaluated} candidates", flush=True)
    return found


def fused(found: dict[str, Ingredients], candidates: Mapping[str, Candidate]) -> dict[str, Tensor]:
    """Name -> (B, T) scores of chosen fusions; `found` as in `variants`."""
    return {
        name: found["positive"].fused(one.fusion, 0.5 if one.lam is None else one.lam)[0][:, -1]
        for name, one in candidates.items()
    }


def measure(
    model: ExplainableModel,
    tokens: Any,
    batch: dict[str, Tensor],
    steps: int | str,
    gradients: Mapping[str, Mapping[str, Any]],
    fuse: Callable[[dict[str, Ingredients]], dict[str, Tensor]],
    operators: Sequence[str],
) -> list[Any]:
    """Metric rows of a batch for all ways to fuse.

    Args:
        model: The model.
        tokens: What perturbed inputs are built with.
        batch: (B, T) tensors of the data module.
        steps: Path nodes, or `auto`.
        gradients: Name -> options of `ca_lig` that say how the attention gradients are taken.
        fuse: Name -> (B, T) scores, of what these give.
        operators: How tokens are removed.
    """
    special = batch["special_tokens_mask"]
    with model.session():
        inputs = model.prepare(batch, special)
        logits = model.logits(inputs)
        target = logits.argmax(dim=1)
        found = {}
        for name, options in gradients.items():
            method = create_method("ca_lig", {"steps": steps, **options})
            assert isinstance(method, CALIG)
            found[name] = method.ingredients(model, inputs, ClassLogit(target))[0]
        scores = {name: values.cpu() for name, values in fuse(found).items()}
        ids = [int(i) for i in batch["sample_id"]]
        inputs_only = {key: batch[key] for key in ("input_ids", "attention_mask", "token_type_ids") if key in batch}
        rows = faithfulness_rows(
            model.logits_of_batch,
            inputs_only,
            scores,
            target=target.cpu(),
            special=inputs.special.cpu(),
            mask=inputs.mask.cpu(),
            sample_ids=ids,
            tokens=tokens,
            operators=operators,
            spaces=("probability",),
        )
    rationales = [batch_rationale(batch, i) for i in range(len(ids))]
    if any(rationale is not None for rationale in rationales):
        words = [[int(word) if word >= 0 else None for word in row] for row in batch["word_ids"]]
        rows += plausibility_rows(scores, word_ids=words, rationales=rationales, sample_ids=ids)
    return rows


def table(values: dict[str, dict[str, dict[int, float]]]) -> list[dict[str, Any]]:
    """One line per variant: mean of each metric, and its paired difference from the default with an interval."""
    lines = []
    for variant, metrics in values.items():
        line: dict[str, Any] = {"variant": variant}
        for metric, of in metrics.items():
            base = values[DEFAULT][metric]
            ids = sorted(of.keys() & base.keys())
            difference = torch.tensor([of[i] - base[i] for i in ids], dtype=torch.double)
            line[metric] = sum(of.values()) / len(of)
            line[f"{metric}/difference"] = list(bootstrap_interval(difference, seed=0))
        lines.append(line)
    return lines


def show(lines: Sequence[dict[str, Any]], names: Sequence[str]) -> None:
    """Print the table; * marks an interval of the difference that leaves 0 out."""
    widths = {name: max(20, len(name) + 3) for name in names}
    print("variant".ljust(32) + "".join(f"{name} ".rjust(widths[name]) for name in names))
    for line in lines:
        cells = []
        for name in names:
            mean, low, high = line[f"{name}/difference"]
            mark = "*" if low > 0 or high < 0 else " "
            cells.append(f"{line[name]:.3f} ({mean:+.3f}){mark}".rjust(widths[name]))
        print(line["variant"].ljust(32) + "".join(cells))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--samples", type=int, default=200)
    parser.add_argument("--steps", default="16", help="a number, or auto")
    parser.add_argument("--adaptive", action="store_true")
    parser.add_argument("--calibrate", type=int, default=200, help="samples to choose on, with --adaptive")
    parser.add_argument("--json", type=Path, help="also write the lines here")
    options = parser.parse_args()
    steps = options.steps if options.steps == "auto" else int(options.steps)
    values: dict[str, dict[str, dict[int, float]]] = defaultdict(lambda: defaultdict(dict))
    with Console(Path(os.devnull)) as console:
        context = RunContext(load(options.run), RunDirectory(options.run), console)
        data, module = context.data, context.module
        if options.adaptive:
            split, operators, gradients = "test", ("mask", "delete", "attention"), {"positive": GRADIENTS["positive"]}
            fuse = partial(fused, candidates=chosen(context, options.calibrate, steps))
        else:
            split, operators, gradients, fuse = "val", ("mask",), GRADIENTS, variants
        model = ExplainableModel(module.model, tokenizer=data.tokenizer)
        tokens = perturbation_tokens(module.model, data.tokenizer)
        for batch in data.explain_dataloader(split, options.samples, 16, seed=0):
            for row in measure(model, tokens, batch, steps, gradients, fuse, operators):
                wanted = row["metric"] in METRICS and row["q"] is None and row["value"] is not None
                if wanted and (row["control"] == "none" or row["method"] == "random"):
                    values[row["method"]][metric_key(row)][row["sample_id"]] = row["value"]
    lines = table(values)
    show(lines, [name for name in lines[-1] if name != "variant" and "/" not in name])
    if options.json:
        options.json.write_text(json.dumps(lines, indent=1))


if __name__ == "__main__":
    main()
