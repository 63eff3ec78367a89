"""The numbers of a run that are read first."""

from __future__ import annotations

from calig.pipeline.config import Config
from calig.pipeline.directory import RunDirectory
from calig.pipeline.render.labels import ON_OUTPUT, metric, number

MODEL = ("accuracy", "f1", "f1_micro", "pearson", "spearman", "rmse")
"""Of a model, as far as its task has them."""
METHOD = ("comprehensiveness", "sufficiency", "token_f1", "mask_auprc", "completeness_gap")
"""Of the primary method, as far as they were measured."""


def headlines(directory: RunDirectory, config: Config) -> dict[str, str]:
    """What is read first: the model on the test split, and the primary method beside the random ranking."""
    summary, method = directory.summary, config.explain.methods[0]
    found = {}
    for split in ("test", "val"):
        measured = [name for name in MODEL if f"{split}/{name}" in summary]
        for name in measured:
            found[f"{split} {name}"] = number(summary.get(f"{split}/{name}"), name)
        if measured:
            break
    for name in METHOD:
        if f"explain/{method}/{name}" not in summary:
            name += ON_OUTPUT
        value, control = (summary.get(f"explain/{who}/{name}") for who in (method, "random"))
        if value is not None:
            beside = "" if control is None else f"random {number(control, name)}"
            found[f"{method} {metric(name).label} {metric(name).arrow}"] = f"{number(value, name):<10}{beside}".rstrip()
    return found
