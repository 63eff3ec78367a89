"""The rows of `concepts.csv`: what the stage concepts found, one row per concept, class and layer."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple, get_type_hints

from calig.pipeline.records import read_csv, write_csv

CONCEPTS_FILE = "concepts.csv"
LEVEL = 0.05
"""A row is significant where `p_bonferroni` is below this."""


class ConceptRow(NamedTuple):
    """One test (METHODS 4.2)."""

    concept: str
    layer: int
    """l of z^l: 0 is the embedding output, l the output of block l."""
    target: str
    """The class: inputs predicted as it, sensitivity of its logit."""
    share: float
    """Of the inputs with S > 0, mean over the concept's vectors."""
    sensitivity: float
    """Mean S over inputs and vectors."""
    random_share: float
    """As `share`, over the vectors between random sets."""
    t: float
    p: float
    p_bonferroni: float
    """Times the number of layers tested, at most 1."""
    significant: bool
    cav_accuracy: float
    """Of the concept's vectors on held-out examples; 0.5 is chance."""
    inputs: int
    """How many inputs were predicted as the class."""


def write_concepts(path: Path, rows: Iterable[ConceptRow]) -> None:
    """Write `concepts.csv`, atomically."""
    write_csv(path, ["class" if name == "target" else name for name in ConceptRow._fields], rows)


def read_concepts(path: Path) -> list[ConceptRow]:
    """The rows of `concepts.csv`; none where the stage has not run."""
    return [ConceptRow._make(values) for values in read_csv(path, list(get_type_hints(ConceptRow).values()))]
