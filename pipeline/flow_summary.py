"""What the explain stage says of the flows it kept: the agreement table, to the file, the terminal and the loggers."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch

from calig.callbacks.media import MediaLog
from calig.pipeline.attribution.agreement import CONFIGURATIONS, MEASURES
from calig.pipeline.flow_rows import (
    AGREEMENT_FILE,
    ALL,
    AgreementRow,
    by_configuration,
    marked,
    remarks,
    write_agreement,
)
from calig.pipeline.metrics import bootstrap_interval
from calig.pipeline.records import read_rows
from calig.pipeline.run import RunContext

_SHOWN_LAYERS = 6


def summarise_flows(context: RunContext) -> None:
    """Write `flow_agreement.csv`, print it and log it, where a method has measured agreement."""
    folder = context.directory / "flow"
    rows = agreement_rows(read_rows(folder, ["method", "layers", "agreement"]), context.config.seed)
    if not rows:
        return
    write_agreement(context.directory / AGREEMENT_FILE, rows)
    table = AgreementRow._fields, [list(row) for row in rows]
    MediaLog(context.loggers).log(context.trainer.global_step, tables={"explain/flow_agreement": table})
    show(context, rows)


def agreement_rows(flows: Iterable[Mapping[str, Any]], seed: int = 0) -> list[AgreementRow]:
    """Average what the samples of `flow/` measured; the best configuration over all layers first.

    Args:
        flows: Rows of `FLOW_SCHEMA`, those without `agreement` among them.
        seed: Of the bootstrap.

    Returns:
        A row for each configuration and layer, and one for all layers; what no sample has a number for is left out.
    """
    measured: dict[tuple[str, int, str], list[torch.Tensor]] = defaultdict(list)
    for row in flows:
        if row["agreement"] is None:
            continue
        values = torch.tensor(row["agreement"], dtype=torch.float64)  # (L, C, 4)
        names = [str(layer + 1) for layer in row["layers"]]
        for place in range(len(CONFIGURATIONS)):
            for name, layer in zip([ALL, *names], [values[:, place].nanmean(0), *values[:, place]], strict=True):
                measured[row["method"], place, name].append(layer)
    rows = []
    for (method, place, layer), numbers in measured.items():
        stacked = torch.stack(numbers)
        usable = stacked[stacked[:, MEASURES.index("normalised")].isfinite()]
        if not len(usable):
            continue
        mean = dict(zip(MEASURES, usable.nanmean(0).tolist(), strict=True))
        _, low, high = bootstrap_interval(usable[:, MEASURES.index("normalised")], seed=seed)
        rows.append(
            AgreementRow(
                *(method, *CONFIGURATIONS[place], layer, mean["normalised"], low, high),
                *(mean["raw"], mean["correlation"], mean["ratio"]),
                *(mean["vanished"], mean["refused"], mean["refused_attention"], len(usable)),
            )
        )
    overall = {row[:4]: row.normalised for row in rows if row.layer == ALL}
    return sorted(rows, key=lambda row: (row.method, overall[row[:4]], row[:4], row.layer == ALL, _number(row.layer)))


def show(context: RunContext, rows: Sequence[AgreementRow]) -> None:
    """Print a line for each configuration: normalised L2 by layer, and over all layers the other measures."""
    layers = list(dict.fromkeys(row.layer for row in rows if row.layer != ALL))
    shown = layers[:: -(-len(layers) // _SHOWN_LAYERS)]
    context.console.table(
        f"flow     normalised L2 between the whole block and attention with MLP, by layer · {rows[0].samples} samples",
        ["block = att + mlp ↓", *shown, ALL, "corr ↑", "ratio"],
        [
            [
                "{} = {} + {}".format(*marked(names[1:], line[ALL])).replace("att_", "").replace("_ratio", ""),
                *(_short(line[layer].normalised) if layer in line else "-" for layer in [*shown, ALL]),
                _short(line[ALL].correlation),
                f"{line[ALL].ratio:.2f}",
            ]
            for names, line in by_configuration(rows).items()
        ],
        "\n".join(
            [
                *remarks(rows),
                f"baselines of the three flows; ratio of their sums; in full: {context.directory / AGREEMENT_FILE}",
            ]
        ),
    )


def _short(value: float) -> str:
    """Three decimals without the leading zero, so that a model of six blocks fits into 80 columns."""
    return f"{value:.3f}".replace("0.", ".", 1)


def _number(layer: str) -> int:
    return int(layer) if layer != ALL else 0
