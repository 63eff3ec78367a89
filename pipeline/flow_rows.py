"""The rows of `flow_agreement.csv`: how well compositions agree with the flow of whole blocks (LIG.md 4)."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple, get_type_hints

from calig.pipeline.records import read_csv, write_csv

AGREEMENT_FILE = "flow_agreement.csv"
ALL = "all"
"""Stands in the place of a layer for the mean over all."""


class AgreementRow(NamedTuple):
    """One pair of configurations at one layer: means over sentences of means over their tokens."""

    method: str
    direct: str
    attention: str
    mlp: str
    layer: str
    """The block, counted from 1 as those of `layer_scores`, or `all`."""
    normalised: float
    """L2 distance of the columns, each divided by its absolute sum first."""
    low: float
    high: float
    """Ends of the 95 % bootstrap interval of `normalised`."""
    raw: float
    """L2 distance of the columns."""
    correlation: float
    """Of the columns (Pearson)."""
    ratio: float
    """Sum of the composed column over that of the direct one."""
    samples: int


def write_agreement(path: Path, rows: Iterable[AgreementRow]) -> None:
    """Write `flow_agreement.csv`, atomically."""
    write_csv(path, AgreementRow._fields, rows)


def read_agreement(path: Path) -> list[AgreementRow]:
    """The rows of `flow_agreement.csv`; none where it does not exist."""
    return [AgreementRow._make(values) for values in read_csv(path, list(get_type_hints(AgreementRow).values()))]


def by_configuration(rows: Iterable[AgreementRow]) -> dict[tuple[str, ...], dict[str, AgreementRow]]:
    """Rows by (method, direct, attention, mlp) and by layer, in their order."""
    lines: dict[tuple[str, ...], dict[str, AgreementRow]] = {}
    for row in rows:
        lines.setdefault(row[:4], {})[row.layer] = row
    return lines
