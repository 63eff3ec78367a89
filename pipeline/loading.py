"""Reading a run back."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow.parquet as pq

from calig.pipeline.errors import InputError
from calig.pipeline.perturbation import CURVE_METRICS, Curves, perturbation_curves
from calig.pipeline.records import explained_key, logged_rows, read_bins, read_rows, shards, table_metadata

if TYPE_CHECKING:
    from datasets import Dataset


def load_explanations(run: str | Path) -> Dataset:
    """The explanations of a run, one row per sample, method and target (`calig.pipeline.records`).

    Raises:
        InputError: The folder holds no explanations.
    """
    from datasets import Dataset, concatenate_datasets

    files = shards(Path(run) / "explanations")
    if not files:
        raise InputError(f"{run} holds no explanations: expected {Path(run) / 'explanations'}/part-*.parquet.")
    for file in files:
        table_metadata(file)
    # File by file: a reader of several files would take `key=value` in their path for a column.
    return concatenate_datasets([Dataset.from_parquet(str(file)) for file in files])


def learning_curves(run: str | Path) -> dict[str, list[tuple[float, float]]]:
    """Every scalar of `metrics.csv` as (step, value) points; empty where there is none."""
    curves: dict[str, list[tuple[float, float]]] = {}
    for row in logged_rows(Path(run)):
        for key, text in row.items():
            if text and key not in ("epoch", "step"):
                curves.setdefault(key, []).append((float(row["step"]), float(text)))
    return curves


def mean_curves(run: str | Path) -> dict[tuple[str, str], Curves]:
    """The perturbation curves of a run, averaged over all its samples: (method, control) -> curves."""
    rows = read_rows(Path(run) / "explanations", columns=["sample_id", "target", "probability", "predictions"])
    probabilities = {explained_key(row): row["probability"] for row in rows}
    return perturbation_curves(read_bins(Path(run) / "metrics", list(CURVE_METRICS)), probabilities)


def read_probes(run: str | Path) -> list[tuple[int, int, list[dict[str, Any]]]]:
    """The probes of a run: (epoch, optimiser step, explanation rows), in the order of the training."""
    probes = []
    for file in sorted(Path(run).glob("probe/epoch-*-step-*.parquet")):
        _, epoch, _, step = file.stem.split("-")
        table_metadata(file)  # refuses what a later version wrote
        with pq.ParquetFile(file) as opened:  # a dataset reader would make columns of `key=value` in the path
            probes.append((int(epoch), int(step), opened.read().to_pylist()))
    return probes


def rationale_by_word(row: Mapping[str, Any]) -> list[int] | None:
    """The rationale of an explanation row, one entry per word number instead of one per token."""
    if row["rationale"] is None:
        return None
    words = {word: mark for word, mark in zip(row["word_ids"], row["rationale"], strict=True) if word is not None}
    return [words.get(word, 0) for word in range(max(words, default=-1) + 1)]


def batch_rationale(batch: Mapping[str, Any], i: int) -> list[int] | None:
    """The rationale of sample i of a batch, one entry per word number; None where nothing is known of one.

    Args:
        batch: (B, T) `rationale` (1, 0, or -1 where nobody marked) and `word_ids` (-1 on special tokens and
            padding), and perhaps (B,) `rationale_missed`, the rationale words that truncation cut off.
        i: Which sample.

    Returns:
        1 per rationale word. Words of a second text count as outside; those cut off stand behind the last word, where
        nothing scores.
    """
    if "rationale" not in batch or "word_ids" not in batch:
        return None
    marks = batch["rationale"][i].tolist()
    missed = int(batch["rationale_missed"][i]) if "rationale_missed" in batch else 0
    if max(marks) < 0 and not missed:
        return None
    words = [None if word < 0 else int(word) for word in batch["word_ids"][i].tolist()]
    known = rationale_by_word({"word_ids": words, "rationale": [max(0, mark) for mark in marks]})
    return [*(known or []), *[1] * missed]
