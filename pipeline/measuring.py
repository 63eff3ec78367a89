"""What is measured of the explanations of a batch: against perturbed inputs and rationales, again, and in seconds."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from calig.pipeline.attribution import Attribution, ExplainableModel, UnsupportedModelError
from calig.pipeline.attribution.methods import method_class
from calig.pipeline.batch_facts import BatchFacts
from calig.pipeline.errors import InputError
from calig.pipeline.explained import Explained, Rows
from calig.pipeline.loading import batch_rationale
from calig.pipeline.metrics import (
    MetricError,
    faithfulness_rows,
    plausibility_rows,
    randomisation_rows,
    sensitivity_rows,
    special_share,
)
from calig.pipeline.metrics.faithfulness import SPACES
from calig.pipeline.metrics.localisation_rows import localisation_rows
from calig.pipeline.metrics.names import FAITHFULNESS_METRICS, OF_ONE_OUTPUT
from calig.pipeline.metrics.rows import make_row
from calig.pipeline.metrics.sensitivity import take_rows
from calig.pipeline.perturbers import perturbable

if TYPE_CHECKING:
    from calig.pipeline.explainer import ExplainSettings

_REPEATED: dict[str, Callable[..., tuple[list[Any], list[MetricError]]]] = {
    "sensitivity_max": sensitivity_rows,
    "randomisation": randomisation_rows,
}


@dataclass(frozen=True)
class Measurer:
    """Measures the methods of a batch.

    A method that fails on a sample is missing there, and no number of another method depends on it: means say how many
    samples they are over, and comparisons pair the samples that two methods share.

    Attributes:
        model: What was explained.
        settings: What to measure, of which methods and samples.
        tokens: What perturbed inputs are built with.
    """

    model: ExplainableModel
    settings: ExplainSettings
    tokens: Any

    def measure(
        self,
        rows: Explained,
        facts: BatchFacts,
        results: Mapping[str, Attribution],
        good: Mapping[str, Sequence[int]],
        costs: Mapping[str, Mapping[str, float]],
    ) -> None:
        """Add the metric rows of a batch, and what failed.

        Args:
            rows: Are added to.
            facts: Of the batch.
            results: Method -> its scores.
            good: Method -> the examples that it has finite scores for.
            costs: Method -> cost -> value per sample.
        """
        self._compare_all(rows, facts, results, good)
        for metric in _REPEATED:
            if metric in self.settings.metrics:
                for chosen, names in self._chosen_again(metric, good, facts).items():
                    self._repeat(rows, metric, facts, results, chosen, names)
        for name, result in results.items():
            share = special_share(result.scores, result.special, result.mask)
            for i in good[name]:
                at = (facts.ids[i], name, "none")
                if name != "random":
                    rows.metrics.append(dict(make_row(*at, "special_share", float(share[i]))))
                if result.completeness_gap is not None:
                    gap = float(result.completeness_gap[i].max())
                    rows.metrics.append(dict(make_row(*at, "completeness_gap", gap)))
                rows.metrics += [dict(make_row(*at, cost, value)) for cost, value in costs[name].items()]

    def _compare_all(
        self,
        rows: Explained,
        facts: BatchFacts,
        results: Mapping[str, Attribution],
        good: Mapping[str, Sequence[int]],
    ) -> None:
        """Faithfulness and plausibility; methods share the perturbed inputs of the samples that they all explained."""
        together: dict[tuple[str, ...], list[int]] = {}
        for i in range(len(facts.ids)):
            together.setdefault(tuple(name for name in results if i in good[name]), []).append(i)
        waiting = [(names, examples) for names, examples in together.items() if names]
        while waiting:
            names, examples = waiting.pop()
            try:
                rows.metrics += self._compare(facts, {name: results[name] for name in names}, examples)
                continue
            except MetricError as error:
                failed, method = facts.ids.index(error.sample_id), error.method
                rows.fail([error.sample_id], method or names[0], error.reason, self.settings.strict)
            left = [(names, [i for i in examples if i != failed])]
            if method in names:
                left.append((tuple(name for name in names if name != method), [failed]))
            waiting += [(some, of) for some, of in left if some and of]

    def _compare(self, facts: BatchFacts, results: Mapping[str, Attribution], usable: Sequence[int]) -> Rows:
        """Faithfulness and plausibility of all methods on the usable examples."""
        rows: list[Any] = []
        first = next(iter(results.values()))
        # The method `random` is the metrics' own control and is measured as such.
        scores = {name: result.scores[list(usable)] for name, result in results.items() if name != "random"}
        ids = [facts.ids[i] for i in usable]
        one_output = facts.head.task == "regression"
        spaces = ("logit",) if one_output else SPACES
        classes = facts.true_classes()
        for (metrics, operators), group in self._groups(facts, usable).items():
            if one_output:  # no class to be right about, and a softmax that is always 1
                metrics = tuple(name for name in metrics if name in OF_ONE_OUTPUT)
            if not metrics:
                continue
            windows = None if facts.windows is None else facts.windows.take(torch.tensor(group))
            rows += faithfulness_rows(
                self.model.logits_of_batch,
                perturbable(self.model, facts, group),
                {name: result.scores[group] for name, result in results.items() if name != "random"},
                target=first.target[group],
                special=first.special[group],
                mask=facts.mask[group],
                sample_ids=[facts.ids[i] for i in group],
                tokens=self.tokens,
                operators=tuple(dict.fromkeys(map(self.tokens.named, operators))),
                metrics=metrics,
                spaces=spaces,
                labels=None if classes is None else classes[group],
                scale=facts.head.scale or "softmax",
                threshold=facts.head.threshold,
                perturbation_target=self.settings.perturbation_target,
                seed=self.settings.seed,
                windows=windows,
            )
        if self.settings.plausibility and facts.image is not None and "object_mask" in facts.batch:
            rows += localisation_rows(
                scores,
                facts.batch["object_mask"][usable],
                special=first.special[usable],
                grid=facts.image.grid,
                sample_ids=ids,
                seed=self.settings.seed,
            )
        rationales = [batch_rationale(facts.batch, i) for i in usable]
        if self.settings.plausibility and any(rationale is not None for rationale in rationales):
            rows += plausibility_rows(
                scores,
                word_ids=[facts.word_ids(i, first.special[i], padded=True) for i in usable],
                rationales=rationales,
                sample_ids=ids,
                signed=[name for name in scores if method_class(name).signed],
                dataset_length=self.settings.dataset_length,
                seed=self.settings.seed,
            )
        return rows

    def _groups(
        self, facts: BatchFacts, usable: Sequence[int]
    ) -> dict[tuple[tuple[str, ...], tuple[str, ...]], list[int]]:
        """(metrics, operators) of perturbed inputs -> the examples that they are measured on."""
        settings = self.settings
        perturbing = [name for name in settings.metrics if name in FAITHFULNESS_METRICS]
        groups: dict[tuple[tuple[str, ...], tuple[str, ...]], list[int]] = {}
        for i in usable:
            metrics = settings.wanted(perturbing, facts.ids[i])
            operators = settings.wanted(settings.operators, facts.ids[i])
            if metrics and operators:
                groups.setdefault((metrics, operators), []).append(i)
        return groups

    def _chosen_again(
        self, metric: str, good: Mapping[str, Sequence[int]], facts: BatchFacts
    ) -> dict[tuple[int, ...], list[str]]:
        """Examples that a metric explains again -> the methods that do; a method may have a limit of its own."""
        groups: dict[tuple[int, ...], list[str]] = {}
        for name, examples in good.items():
            limits = (metric, f"{name}/{metric}")
            chosen = tuple(i for i in examples if self.settings.wanted(limits, facts.ids[i]) == limits)
            if chosen and name != "random":
                groups.setdefault(chosen, []).append(name)
        return groups

    def _repeat(
        self,
        rows: Explained,
        metric: str,
        facts: BatchFacts,
        results: Mapping[str, Attribution],
        chosen: Sequence[int],
        names: Sequence[str],
    ) -> None:
        """Explain examples again; what raises is taken apart until its method and its sample stand alone."""
        first = results[names[0]]
        index = torch.tensor(chosen)
        ids = [facts.ids[i] for i in chosen]
        try:
            found, errors = _REPEATED[metric](
                self.model,
                take_rows(facts.batch, index, len(facts.ids)),
                {name: results[name].scores[index] for name in names},
                target=first.target[index],
                special=first.special[index],
                mask=first.mask[index],
                sample_ids=ids,
                options=self.settings.methods,
                seed=self.settings.seed,
            )
        except Exception as error:
            known = isinstance(error, UnsupportedModelError | InputError)  # true of every sample
            if self.settings.strict and not known:
                raise
            reason = f"{metric}: {error}" if known else f"{metric}: {type(error).__name__}: {error}"
        else:
            rows.metrics += [dict(row) for row in found]
            for broken in errors:
                rows.fail([broken.sample_id], broken.method or names[0], broken.reason, self.settings.strict)
            return
        # Behind the handler: the error holds on to the tensors of the failed try.
        if len(names) > 1:
            for name in names:
                self._repeat(rows, metric, facts, results, chosen, [name])
        elif len(chosen) > 1 and not known:
            for half in index.tensor_split(2):
                self._repeat(rows, metric, facts, results, half.tolist(), names)
        else:
            rows.fail(ids, names[0], reason, self.settings.strict)
