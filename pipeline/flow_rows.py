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
    vanished: float
    """Share of the tokens with a column that vanishes, which have `raw` alone."""
    refused: float
    """Share of the direct flow's columns that kept `itb`: their self share was outside 0 to 1."""
    refused_attention: float
    """The same of attention's columns, over all heads."""
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


def marked(names: tuple[str, ...], row: AgreementRow) -> tuple[str, ...]:
    """(direct, attention, mlp), with a star behind a flow that kept `itb` in some columns; see `remarks`."""
    direct, attention, mlp = names
    return (direct + "*" * (row.refused > 0), attention + "*" * (row.refused_attention > 0), mlp)


def remarks(rows: Iterable[AgreementRow]) -> list[str]:
    """What a reader of the table must know of the columns behind it, a sentence each; none where all are as named."""
    rows = [row for row in rows if row.layer == ALL]
    refused = [share for row in rows for share in (row.refused, row.refused_attention) if share > 0]
    vanished = [row.vanished for row in rows if row.vanished > 0]
    found = []
    if refused:
        found.append(f"* itb is kept in {_percent(refused)} of the columns, whose self share is outside 0 to 1")
    if vanished:
        found.append(f"{_percent(vanished)} of the targets are left out: their column vanishes")
    return found


def _percent(shares: list[float]) -> str:
    ends = [f"{100 * share:.0f}" if share >= 0.005 else "<1" for share in (min(shares), max(shares))]
    return " to ".join(dict.fromkeys(ends)) + " %"
