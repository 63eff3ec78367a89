"""Adaptive fusion (METHODS 2.5): choosing lambda and the fusion by the faithfulness that they reach.

Token evidence and attention gradients do not depend on the choice, so every sample is attributed once. A candidate then
costs algebra, and passes for those of its rankings alone that no candidate before had.

Shapes: N samples, K candidates, B samples of a batch, T positions, L blocks.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from calig.pipeline.attribution import ClassLogit, ExplainableModel, Objective
from calig.pipeline.attribution.documents import explained_windows
from calig.pipeline.attribution.methods import create_method
from calig.pipeline.attribution.methods.ca_lig import CALIG
from calig.pipeline.attribution.model import forward_inputs
from calig.pipeline.attribution.rollout import Fusion, Ingredients
from calig.pipeline.attribution.windows import Windows
from calig.pipeline.errors import InputError
from calig.pipeline.heads import Head
from calig.pipeline.loading import batch_rationale
from calig.pipeline.metrics import Request, bootstrap_interval, perturbed_logits, plausibility_rows
from calig.pipeline.metrics.faithfulness import BINS, comprehensiveness, sufficiency
from calig.pipeline.metrics.ranking import count, rank
from calig.pipeline.perturbers import perturber

FUSIONS: tuple[Fusion, ...] = ("column", "diagonal", "gated", "late")
SWEEPS = 2
_NOISE = 1e-6  # means closer than this are equal: rounding, which the spread over processes may change, decides nothing
_PLAUSIBILITY = ("token_f1", "auprc")

Gather = Callable[[Sequence[Any]], list[Any]]
"""Joins the lists of all processes; every process calls it."""


@dataclass(frozen=True)
class Candidate:
    """One way to fuse.

    Attributes:
        fusion: The form.
        lam: One value, one for each block, or None for `gated`, which has none.
    """

    fusion: Fusion
    lam: float | tuple[float, ...] | None

    def options(self) -> dict[str, Any]:
        """Options of `ca_lig`, as JSON has them."""
        lam = list(self.lam) if isinstance(self.lam, tuple) else self.lam
        return {"fusion": self.fusion} | ({} if lam is None else {"lam": lam})


@dataclass(frozen=True)
class CalibrationSettings:
    """What to choose, and by what.

    Attributes:
        options: Options of `ca_lig` but for those that are asked for.
        asked: Option -> word: `lam` -> `auto` or `per_layer`, `fusion` -> `auto`.
        objective: `comprehensiveness - sufficiency`, one of the two, `token_f1` or `auprc`.
        operator: How the first three remove tokens.
        grid: Values of lambda to try.
        target: `predicted`, `label` or a class index.
        seed: Of the bootstrap.
    """

    options: Mapping[str, Any]
    asked: Mapping[str, str]
    objective: str = "comprehensiveness - sufficiency"
    operator: str = "delete"
    grid: Sequence[float] = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
    target: Literal["predicted", "label"] | int = "predicted"
    seed: int = 0

    @property
    def default(self) -> Candidate:
        """What would be taken without a choice."""
        fusion = create_method("ca_lig", self.options).options.fusion
        return Candidate(fusion, None if fusion == "gated" else self._given_lam)

    @property
    def _given_lam(self) -> float | tuple[float, ...]:
        lam = create_method("ca_lig", self.options).options.lam
        return tuple(lam) if isinstance(lam, list) else lam

    def candidates(self) -> list[Candidate]:
        """All points of the grid; for `per_layer` those that its search may start from.

        A form that does not go with the other options, and lambda = 1 where it cuts the evidence off, are no points.
        """
        forms = FUSIONS if "fusion" in self.asked else (self.default.fusion,)
        if self.asked.get("lam") == "per_layer":
            forms = tuple(form for form in forms if form in ("column", "diagonal"))
        points = []
        for form in forms:
            values = sorted(self.grid) if "lam" in self.asked else [self._given_lam]
            points += [Candidate(form, None)] if form == "gated" else [Candidate(form, value) for value in values]
        return [point for point in points if self.allows(point)]

    def allows(self, candidate: Candidate) -> bool:
        """Whether `ca_lig` takes a candidate together with the other options."""
        try:
            create_method("ca_lig", {**self.options, **candidate.options()})
        except InputError:
            return False
        return True


@dataclass(frozen=True)
class Point:
    """What a candidate reached.

    Attributes:
        candidate: Which.
        score: Mean of the objective; higher is better.
        gain: Mean difference from the default, with its 95 % interval over the samples.
        low: Its lower end.
        high: Its upper end.
    """

    candidate: Candidate
    score: float
    gain: float
    low: float
    high: float

    def row(self) -> dict[str, Any]:
        """As JSON has it."""
        return {
            **self.candidate.options(),
            "score": self.score,
            "gain": self.gain,
            "gain/low": self.low,
            "gain/high": self.high,
        }


@dataclass(frozen=True)
class Calibration:
    """The result.

    Attributes:
        best: The chosen candidate.
        points: The grid in its order; then the default where the grid lacks it, and what `per_layer` found.
        count: Samples that the means are over.
        skipped: Samples left out: their scores are not finite, or the objective is undefined for them.
        evaluated: Candidates tried in all.
    """

    best: Point
    points: list[Point]
    count: int
    skipped: int
    evaluated: int


@dataclass
class _Chunk:
    """One attributed batch.

    Attributes:
        ids: B sample ids.
        batch: (B, T) what perturbed inputs are made of.
        parts: What is fused; of long documents, of the windows that are explained.
        target: (B,) explained classes.
        special: (B, T).
        mask: (B, T).
        words: (B, T) word numbers, below 0 outside words; None where the texts have none.
        rationales: Per sample the rationale by word; None where there is none.
        known: Per sample: ranking -> value of the objective.
        windows: How long documents are read, and the windows of `parts`; None of short texts.
    """

    ids: list[int]
    batch: dict[str, Tensor]
    parts: Ingredients
    target: Tensor
    special: Tensor
    mask: Tensor
    words: list[list[int]] | None
    rationales: list[list[int] | None]
    known: list[dict[tuple[int, ...], float]] = field(default_factory=list)
    windows: tuple[Windows, Windows] | None = None

    def scores(self, candidate: Candidate) -> Tensor:
        """(B, T) what a candidate gives."""
        own = self.parts.fused(candidate.fusion, 0.5 if candidate.lam is None else candidate.lam)[0][:, -1]
        return own if self.windows is None else self.windows[1].spread(own, self.mask.shape[1])


class Calibrator:
    """Chooses on the samples that are added to it.

    Args:
        model: The live model.
        tokenizer: Of the model.
        settings: What to choose, and by what.

    Raises:
        InputError: The tokenizer cannot do the operator.
        UnsupportedModelError: The model's blocks cannot be found.
    """

    def __init__(self, model: nn.Module, tokenizer: Any, settings: CalibrationSettings) -> None:
        self.model = ExplainableModel(model, tokenizer=tokenizer)
        self.settings = settings
        self.tokens = perturber(self.model, tokenizer)
        self.operator = self.tokens.named(settings.operator)
        self.tokens.check(self.operator)
        self.head = Head()  # known with the first batch
        self._chunks: list[_Chunk] = []

    def add(self, batch: Mapping[str, Any]) -> None:
        """Attribute a batch, as `Explainer.explain` takes it, and keep what is fused.

        Raises:
            UnsupportedModelError: The model's attention maps cannot be recorded.
        """
        method = create_method("ca_lig", self.settings.options)
        assert isinstance(method, CALIG)
        with self.model.session():
            inputs = self.model.prepare(batch, batch.get("special_tokens_mask"))
            logits = self.model.logits(inputs)
            self.head = Head.of(self.model.module, logits.shape[1])
            targets = self.head.targets(self.settings.target, logits, batch.get("labels"))
            # Of several labels the most probable one: a choice for all of them needs no more.
            target = torch.tensor([some[0] for some in targets], device=logits.device)
            goal: Objective = ClassLogit(target)
            read, windows = inputs, None
            if inputs.windows is not None:
                read, goal, chosen = explained_windows(self.model, inputs, goal)
                windows = inputs.windows, chosen
            parts, _, _ = method.ingredients(self.model, read, goal)
        ids = [int(i) for i in batch["sample_id"].tolist()]
        self._chunks.append(
            _Chunk(
                ids,
                forward_inputs(self.model.module, batch)
                if inputs.pixels is not None
                else {key: batch[key] for key in ("input_ids", "attention_mask", "token_type_ids") if key in batch},
                Ingredients(
                    parts.evidence.cpu(),
                    [g.cpu() for g in parts.gradients],
                    parts.readout.cpu(),
                    parts.mask.cpu(),
                    None if parts.document is None else parts.document.cpu(),
                ),
                target.cpu(),
                inputs.special.cpu(),
                inputs.mask.cpu(),
                batch["word_ids"].tolist() if "word_ids" in batch else None,
                [batch_rationale(batch, i) for i in range(len(ids))],
                [{} for _ in ids],
                windows,
            )
        )

    def choose(self, gather: Gather = list) -> Calibration:
        """Search; on every process alike.

        Args:
            gather: Joins the values of the samples of all processes.

        Raises:
            RuntimeError: The objective is defined for no sample.
        """
        tried: dict[Candidate, Tensor] = {}

        def evaluate(candidates: Sequence[Candidate]) -> None:
            new = [candidate for candidate in dict.fromkeys(candidates) if candidate not in tried]
            if new:
                tried.update(zip(new, self._values(new, gather).T, strict=True))

        grid, default = self.settings.candidates(), self.settings.default
        evaluate([*grid, default])
        defined = torch.stack(list(tried.values())).isfinite().all(dim=0)
        if not bool(defined.any()):
            raise RuntimeError(
                f"calibrate: {self.settings.objective} is defined for none of the {len(defined)} samples, or their "
                "scores are not finite. token_f1 and auprc need rationales."
            )

        def score(candidate: Candidate) -> float:
            return float(tried[candidate][defined].mean())

        def better(candidates: Sequence[Candidate]) -> Candidate:
            top = max(map(score, candidates))
            near = [candidate for candidate in candidates if score(candidate) >= top - _NOISE]
            # Of equals the one nearest to the default: a choice that the data do not make should not look like one.
            usual = default.lam if isinstance(default.lam, float | int) else 0.5
            return min(near, key=lambda c: abs(c.lam - usual) if isinstance(c.lam, float | int) else 0.0)

        best = better(grid)
        if self.settings.asked.get("lam") == "per_layer":
            best = self._by_layer(best, evaluate, score)
        shown = [*grid, *([default] if default not in grid else []), *([best] if best not in grid else [])]
        points = {candidate: self._point(candidate, tried[candidate], tried[default], defined) for candidate in shown}
        return Calibration(
            points[best], list(points.values()), int(defined.sum()), int((~defined).sum()), evaluated=len(tried)
        )

    def _by_layer(
        self,
        start: Candidate,
        evaluate: Callable[[Sequence[Candidate]], None],
        score: Callable[[Candidate], float],
    ) -> Candidate:
        """Coordinate ascent over the blocks, from one lambda for all: until a sweep gains nothing, or two are done."""
        assert isinstance(start.lam, float | int)
        blocks = len(self._chunks[0].parts.gradients) if self._chunks else 0
        values = (start.lam,) * blocks
        best, reached = Candidate(start.fusion, values), score(start)
        evaluate([best])
        for _ in range(SWEEPS):
            before = reached
            for block in range(blocks):
                values = best.lam if isinstance(best.lam, tuple) else values
                others = [
                    Candidate(start.fusion, (*values[:block], value, *values[block + 1 :]))
                    for value in sorted(self.settings.grid)
                    if value != values[block]
                ]
                others = [other for other in others if self.settings.allows(other)]
                evaluate(others)
                for other in others:
                    if score(other) > reached + _NOISE:
                        best, reached = other, score(other)
            if reached == before:
                break
        return best

    def _point(self, candidate: Candidate, values: Tensor, default: Tensor, defined: Tensor) -> Point:
        mean, low, high = bootstrap_interval((values - default)[defined], seed=self.settings.seed)
        return Point(candidate, float(values[defined].mean()), mean, low, high)

    def _values(self, candidates: Sequence[Candidate], gather: Gather) -> Tensor:
        """(N, K) values of the objective, NaN where undefined, over the samples of all processes in their order."""
        rows: list[tuple[int, list[float]]] = []
        for chunk in self._chunks:
            scores = [chunk.scores(candidate) for candidate in candidates]
            if self.settings.objective in _PLAUSIBILITY:
                found = [self._plausible(chunk, one) for one in scores]
                rows += zip(chunk.ids, map(list, zip(*found, strict=True)), strict=True)
            else:
                rows += self._faithful(chunk, scores)
        every = dict(gather(rows))
        return torch.tensor([every[i] for i in sorted(every)], dtype=torch.double).view(len(every), len(candidates))

    def _faithful(self, chunk: _Chunk, scores: Sequence[Tensor]) -> list[tuple[int, list[float]]]:
        evaluable = chunk.mask & ~chunk.special
        rankings = [
            [
                _ordered(rank(one[b], evaluable[b]).tolist()) if bool(one[b][evaluable[b]].isfinite().all()) else None
                for one in scores
            ]
            for b in range(len(chunk.ids))
        ]
        new = [
            (b, ranking)
            for b in range(len(chunk.ids))
            for ranking in dict.fromkeys(rankings[b])
            if ranking and ranking not in chunk.known[b]
        ]
        if new:
            for (b, ranking), value in zip(new, self._measure(chunk, evaluable, new), strict=True):
                chunk.known[b][ranking] = value
        return [
            (sample, [chunk.known[b][ranking] if ranking else float("nan") for ranking in rankings[b]])
            for b, sample in enumerate(chunk.ids)
        ]

    def _measure(self, chunk: _Chunk, evaluable: Tensor, new: Sequence[tuple[int, tuple[int, ...]]]) -> list[float]:
        """The objective for rankings of samples of a chunk, all in one call of the planner."""
        operator = self.operator
        whole = [Request(b, torch.ones_like(evaluable[b]), operator) for b, _ in new]
        parts = [Request(b, keep, operator) for b, ranking in new for keep in _keeps(ranking, evaluable[b])]
        with self.model.session():
            logits = perturbed_logits(
                self.model.logits_of_batch,
                chunk.batch,
                [*whole, *parts],
                tokens=self.tokens,
                special=chunk.special,
                mask=chunk.mask,
                windows=None if chunk.windows is None else chunk.windows[0],
            ).double()
        target = torch.tensor([int(chunk.target[b]) for b, _ in new])
        full = self.head.values(logits[: len(new)]).gather(1, target[:, None]).squeeze(1)
        every = self.head.values(logits[len(new) :]).view(len(new), 2, len(BINS), -1)
        removed, kept = every.gather(-1, target.view(-1, 1, 1, 1).expand(*every.shape[:-1], 1)).squeeze(-1).unbind(1)
        gained, lost = comprehensiveness(full, removed), sufficiency(full, kept)
        values = {
            "comprehensiveness": gained,
            "sufficiency": -lost,  # lower is better
            "comprehensiveness - sufficiency": gained - lost,
        }
        return values[self.settings.objective].tolist()

    def _plausible(self, chunk: _Chunk, scores: Tensor) -> list[float]:
        """token_f1 or auprc of a chunk's samples, NaN where undefined."""
        found = dict.fromkeys(chunk.ids, float("nan"))
        chosen = [
            b
            for b, rationale in enumerate(chunk.rationales)
            if rationale and any(rationale) and bool(scores[b][chunk.mask[b]].isfinite().all())
        ]
        if chosen and chunk.words is not None:
            rows = plausibility_rows(
                {"ca_lig": scores[chosen]},
                word_ids=[[word if word >= 0 else None for word in chunk.words[b]] for b in chosen],
                rationales=[chunk.rationales[b] for b in chosen],
                sample_ids=[chunk.ids[b] for b in chosen],
                signed=(),
            )
            for row in rows:
                wanted = (row["method"], row["control"], row["metric"]) == ("ca_lig", "none", self.settings.objective)
                if wanted and row["q"] is None and row["value"] is not None:
                    found[row["sample_id"]] = row["value"]
        return list(found.values())


def _keeps(ranking: Sequence[int], evaluable: Tensor) -> list[Tensor]:
    """What stays of one example: without the top k(q) for every bin, then the top k(q) only for every bin."""
    tops = []
    for q in BINS:
        top = torch.zeros_like(evaluable)
        top[list(ranking[: count(q, len(ranking))])] = True
        tops.append(top)
    return [~top for top in tops] + tops


def _ordered(ranking: list[int]) -> tuple[int, ...]:
    """A ranking sorted between the bins: the objective sees which positions are the top k(q), not their order."""
    bounds = [0, *sorted({count(q, len(ranking)) for q in BINS}), len(ranking)]
    return tuple(place for a, b in itertools.pairwise(bounds) for place in sorted(ranking[a:b]))
