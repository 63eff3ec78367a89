"""What the report page is made of: plain frozen rows, filled by the report stage from a run directory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from calig.pipeline.benchmarking import BenchmarkRow

from calig.pipeline.concept_rows import ConceptRow
from calig.pipeline.flow_rows import AgreementRow
from calig.pipeline.perturbation import Curves
from calig.pipeline.render.decisions import Decision
from calig.pipeline.render.tokens import SEGMENTS

Control = Literal["none", "random", "reversed", "centre"]


@dataclass(frozen=True)
class MetricRow:
    """One cell of the metric table: a mean over samples and its 95 % interval."""

    method: str
    metric: str
    value: float
    low: float | None = None
    high: float | None = None
    control: Control = "none"
    n: int | None = None
    """Samples of the mean."""
    p: float | None = None
    """Of the difference from the primary method, adjusted; None where it was not tested."""
    beats_random: bool | None = None
    """Whether it is better than the random ranking by a test; None where it was not tested."""


@dataclass(frozen=True)
class SampleExplanation:
    """One method's explanation of one sample."""

    method: str
    scores: Sequence[float]
    """(T,) signed relevance."""
    layer_scores: Sequence[Sequence[float]] | None = None
    """(L, T) for l = 1..L, from the first block to the decision."""
    completeness_gap: float | None = None
    """Relative; the maximum over layers. None where the method defines none."""
    converged: bool = True
    metrics: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class ImageInput:
    """An image that was explained."""

    grid: tuple[int, int]
    """Rows and columns of its patches."""
    picture: bytes | None = None
    """PNG."""
    mask: bytes | None = None
    """PNG, white on the object, where one is known."""


@dataclass(frozen=True)
class Sample:
    """One explained input."""

    sample_id: int
    tokens: Sequence[str]
    word_ids: Sequence[int | None]
    """(T,) the word of each piece, None for special tokens."""
    label: int | None
    prediction: int
    probability: float | None
    rationale: Sequence[int] | None = None
    """One entry per word id, 1 where a human marked the word; may be longer than what truncation kept."""
    explanations: Sequence[SampleExplanation] = ()
    curves: Mapping[tuple[str, str], Curves] = field(default_factory=dict)
    """(method, control) to perturbation curves."""
    segment: Sequence[int | None] | None = None
    """(T,) 0 on the first text of a pair, 1 on the second, None on special tokens; None of single texts."""
    decision: Decision | None = None
    """Where it is not one class of several: a label of several, or a number."""
    image: ImageInput | None = None
    """Of an image, whose tokens are its patches."""

    @property
    def key(self) -> str:
        """Tells the sample, and the label where it may have several, from all others of the page."""
        several = self.decision is not None and self.decision.predictions is not None
        return f"{self.sample_id}-{self.decision.target}" if several and self.decision else str(self.sample_id)


@dataclass(frozen=True)
class ProbeState:
    """What the model decided about a probe sample at one point of the training, and why."""

    epoch: int
    step: int
    prediction: int
    probability: float | None
    scores: Sequence[float]
    """(T,) signed relevance."""
    decision: Decision | None = None
    """As in `Sample`."""


@dataclass(frozen=True)
class ProbeSample:
    """One probe sample over the training."""

    sample_id: int
    tokens: Sequence[str]
    word_ids: Sequence[int | None]
    label: int | None
    rationale: Sequence[int] | None
    states: Sequence[ProbeState]
    """In the order of the training."""
    segment: Sequence[int | None] | None = None
    """As in `Sample`."""
    image: ImageInput | None = None


@dataclass(frozen=True)
class FlowSample:
    """The flow of one input, which is the same for every class."""

    sample_id: int
    tokens: Sequence[str]
    layers: Sequence[int]
    """Blocks, counted from 0."""
    flow: Sequence[Sequence[Sequence[float]]]
    """By block, source and target."""


@dataclass(frozen=True)
class ReportData:
    """Everything on the page."""

    title: str
    summary: Mapping[str, float | str | None] = field(default_factory=dict)
    """summary.json: flat scalar keys such as ``test/accuracy``."""
    config_yaml: str = ""
    versions: Mapping[str, str] = field(default_factory=dict)
    curves: Mapping[str, Sequence[tuple[float, float]]] = field(default_factory=dict)
    """Scalar key to (step, value) points."""
    metrics: Sequence[MetricRow] = ()
    samples: Sequence[Sample] = ()
    label_names: Sequence[str] = ()
    primary_method: str = ""
    explained: int | None = None
    """How many samples the run has explained, where ``samples`` are only some of them."""
    failures: Sequence[Mapping[str, Any]] = ()
    """Rows of failures.jsonl: ``sample_id``, ``method``, ``reason``."""
    curves_mean: Mapping[tuple[str, str], Curves] = field(default_factory=dict)
    """(method, control) to perturbation curves, averaged over all samples of the run."""
    probe: Sequence[ProbeSample] = ()
    probe_method: str = ""
    benchmark: Sequence[BenchmarkRow] = ()
    """Rows of benchmark.csv."""
    concepts: Sequence[ConceptRow] = ()
    """Rows of concepts.csv."""
    flows: Sequence[FlowSample] = ()
    """Samples whose flow from token to token was kept."""
    agreement: Sequence[AgreementRow] = ()
    """Rows of flow_agreement.csv."""
    segments: Sequence[str] = SEGMENTS
    """What the two texts of pairs are called."""
