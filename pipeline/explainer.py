"""A batch to rows: attributions of all methods, their metrics and costs, and what failed.

One piece of code for the probe during training, the explain stage and `explain()`.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from calig.pipeline.attribution import Attribution, ExplainableModel, UnsupportedModelError, attribute
from calig.pipeline.attribution.methods import create_method, takes_option
from calig.pipeline.batch_facts import BatchFacts
from calig.pipeline.costs import measured
from calig.pipeline.errors import InputError
from calig.pipeline.explained import NON_FINITE_OUTPUT, Explained
from calig.pipeline.heads import Head
from calig.pipeline.image_rows import image_facts, patch_numbers
from calig.pipeline.measuring import Measurer
from calig.pipeline.metrics.names import DEFAULT_METRICS, PerturbationTarget, operator_name
from calig.pipeline.metrics.sensitivity import take_rows
from calig.pipeline.perturbers import perturber


@dataclass(frozen=True)
class ExplainSettings:
    """What to compute of every batch.

    Attributes:
        methods: Method name -> its options, in order; the first is the primary one.
        target: `predicted`, `label` or a class index; of several labels per text, each that is predicted or given.
        operators: Perturbation operators of the faithfulness metrics; none leaves these metrics out.
        metrics: Of `calig.pipeline.metrics.names.METRICS`.
        only: Metric, operator, method or `method/metric` (of `REPEATED_METRICS`) -> the ids of the samples that it is
            used on; all where it has no entry.
        measured: Ids of the samples whose random control is measured already, beside other methods.
        flows: Ids of the samples whose flow from token to token is kept, where a method knows one.
        perturbation_target: Whose accuracy `positive_auc` and `negative_auc` follow.
        dataset_length: Mean number of rationale words over the data set, None where there are no rationales.
        plausibility: Compare with rationales or object masks where a batch has them.
        strict: Raise at the first failure instead of keeping it as a row.
        costs: Measure each method's passes and peak of memory beside its seconds; resets torch's memory counter.
        seed: Seed of the random controls, the noise and the fresh weights.
        max_tokens_per_pass: Memory budget of the engine, see `ExplainableModel`; does not change results.
    """

    methods: Mapping[str, Mapping[str, Any]]
    target: Literal["predicted", "label"] | int = "predicted"
    operators: Sequence[str] = ("mask",)
    metrics: Sequence[str] = DEFAULT_METRICS
    only: Mapping[str, Collection[int]] = field(default_factory=dict)
    measured: Collection[int] = ()
    flows: Collection[int] = ()
    perturbation_target: PerturbationTarget = "prediction"
    dataset_length: float | None = None
    plausibility: bool = True
    strict: bool = False
    costs: bool = False
    seed: int = 0
    max_tokens_per_pass: int | Literal["auto"] = "auto"

    def __post_init__(self) -> None:
        for name, options in self.methods.items():
            create_method(name, options)
        object.__setattr__(self, "only", {operator_name(name): ids for name, ids in self.only.items()})

    def wanted(self, names: Iterable[str], sample_id: int) -> tuple[str, ...]:
        """Those of some metrics, operators or methods that are used on a sample."""
        return tuple(name for name in names if sample_id in self.only.get(operator_name(name), (sample_id,)))


def settings_for(
    methods: Sequence[str], options: Mapping[str, Mapping[str, Any]], shared: Mapping[str, Any]
) -> dict[str, dict[str, Any]]:
    """Options per method: the shared ones that a method takes (`steps`, `tolerance`, ...), then its own."""
    return {
        name: {key: value for key, value in shared.items() if takes_option(name, key, value)}
        | dict(options.get(name, {}))
        for name in methods
    }


class Explainer:
    """Explains batches of a classifier of texts or images.

    Args:
        model: The live model, unwrapped.
        tokenizer: Of the model. Without one, tokens are shown as ids and only operators that need no token work. Of
            images the processor, which knows their colours; without one the mean colour is taken for 0.
        settings: What to compute.

    Raises:
        UnsupportedModelError: The model's blocks cannot be found.
        InputError: An operator that the tokenizer, or the model of images, cannot do.
    """

    def __init__(self, model: nn.Module, tokenizer: Any, settings: ExplainSettings) -> None:
        self.model = ExplainableModel(model, tokenizer=tokenizer, max_tokens_per_pass=settings.max_tokens_per_pass)
        self.tokenizer = tokenizer
        self.settings = settings
        self.tokens = perturber(self.model, tokenizer)
        for operator in settings.operators:
            self.tokens.check(self.tokens.named(operator))

    def explain(self, batch: Mapping[str, Any]) -> Explained:
        """Explain a batch.

        Args:
            batch: The model's inputs, each (B, T), and what stands beside them: `sample_id` (B,); `labels` (B,),
                `special_tokens_mask`, `word_ids` (-1 on special tokens), `rationale` (-1 on special tokens; each
                (B, T)) and `rationale_missed` (B,) where known; of pairs `segment` (B, T). Of long documents also
                `windows` (B, V, W), see `attribute`; a row is then as long as its document. Of images `pixel_values`
                (B, C, H, W) and, where known, `object_mask` (B, H, W): 1 on the object, 0 beside it, -1 for an example
                without one.

        A batch that does not fit into memory is halved until it does; a sample that does not fit alone is a failure.

        Raises:
            SampleFailure: With `strict`, at the first failure.
        """
        try:
            return self._explain(batch)
        except torch.OutOfMemoryError:
            size = len(batch["sample_id"])
            if size == 1:
                raise
        # Behind the handler: the error holds on to the frames of the failed try, and so to their tensors.
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        rows = Explained()
        for half in torch.arange(size).tensor_split(2):
            rows.extend(self.explain(take_rows(batch, half, size)))
        return rows

    def _explain(self, batch: Mapping[str, Any]) -> Explained:
        ids = [int(i) for i in batch["sample_id"].tolist()]
        by_methods: dict[tuple[str, ...], list[int]] = {}
        for i, sample_id in enumerate(ids):
            by_methods.setdefault(self.settings.wanted(self.settings.methods, sample_id), []).append(i)
        rows = Explained()
        if len(by_methods) > 1:
            for chosen in by_methods.values():
                rows.extend(self._explain(take_rows(batch, torch.tensor(chosen), len(ids))))
            return rows
        wanted = next(iter(by_methods), ())
        special = batch.get("special_tokens_mask")
        with self.model.session():
            inputs = self.model.prepare(batch, special)
            with measured(self.model, seconds_alone=not self.settings.costs) as one_pass:
                logits = self.model.logits(inputs)
            broken = ~logits.isfinite().all(dim=1).cpu()
            if broken.any():
                return self._without(batch, ids, broken)
            head = Head.of(self.model.module, logits.shape[1])
            chosen_targets = head.targets(self.settings.target, logits, batch.get("labels"))
            counts = [len(some) for some in chosen_targets]
            if len(set(counts)) > 1:  # texts with as many labels share their forward passes
                for count in sorted(set(counts)):
                    some = torch.tensor([i for i, own in enumerate(counts) if own == count])
                    rows.extend(self._explain(take_rows(batch, some, len(ids))))
                return rows
            target = torch.tensor(chosen_targets, device=logits.device)  # (B, K)
            results: dict[str, list[Attribution]] = {}
            costs: dict[str, dict[str, float]] = {}
            strict = self.settings.strict
            for name in wanted:
                options = self.settings.methods[name]
                try:
                    with measured(self.model, seconds_alone=not self.settings.costs) as cost:
                        result = attribute(
                            self.model, dict(batch), name, target=target, special_tokens_mask=special, **options
                        )
                except (UnsupportedModelError, InputError) as error:
                    rows.fail(ids, name, str(error), strict)
                    continue
                except torch.OutOfMemoryError as error:
                    if len(ids) > 1:
                        raise
                    rows.fail(ids, name, f"out of memory: {error}", strict)
                    continue
                except Exception as error:
                    # Whoever asks for a batch halves it: alone, the sample fails for this method and no other. Where
                    # all fail there is nothing to find, and the other methods need not run again for every half.
                    if strict or not self._fails_on_each(batch, name, target, error):
                        raise
                    rows.fail(ids, name, f"{type(error).__name__}: {error}", strict)
                    continue
                assert isinstance(result, list)  # K targets per example
                costs[name] = {"seconds": cost.seconds / target.numel()}
                if one_pass.work:
                    # Of the batch without its padding: methods cut it away, and lengths would count twice.
                    costs[name]["passes"] = cost.work / (one_pass.work * inputs.filled * target.shape[1])
                if cost.peak_memory is not None:
                    costs[name]["peak_memory"] = cost.peak_memory
                results[name] = result
        image = image_facts(self.model, inputs)
        if image is not None:
            batch = {**batch, "word_ids": patch_numbers(inputs.special)}
            rows.files = image.files(ids, batch, self.tokenizer)
        mask, logits = inputs.mask.cpu(), logits.detach().float().cpu()
        for k, of_target in enumerate(target.cpu().unbind(1)):
            facts = BatchFacts(batch, mask, logits, of_target, ids, head, image, inputs.windows)
            found = self._rows(facts, {name: own[k] for name, own in results.items()}, costs)
            if k:
                found.flows = []  # the same for every target
            rows.extend(found)
        return rows

    def _rows(
        self,
        facts: BatchFacts,
        results: Mapping[str, Attribution],
        costs: Mapping[str, Mapping[str, float]],
    ) -> Explained:
        """The rows of one target per example."""
        rows, ids = Explained(), facts.ids
        good: dict[str, list[int]] = {}
        for name, result in results.items():
            bad = result.non_finite()
            failed = [ids[i] for i in bad.nonzero().flatten().tolist()]
            rows.fail(failed, name, "a score is not finite", self.settings.strict)
            good[name] = (~bad).nonzero().flatten().tolist()
            rows.explanations += [self._explanation(facts, result, i) for i in good[name]]
            rows.flows += [
                row for i in good[name] if (row := facts.flow_row(result, i, self.settings.flows)) is not None
            ]
        with self.model.session():  # in the precision that the explanations are made in
            Measurer(self.model, self.settings, self.tokens).measure(rows, facts, results, good, costs)
        before = self.settings.measured
        shared = ("random", "centre")
        rows.metrics = [row for row in rows.metrics if row["control"] not in shared or row["sample_id"] not in before]
        if facts.head.task == "multi_label":
            targets = dict(zip(ids, facts.target.tolist(), strict=True))
            rows.metrics = [row | {"target": targets[row["sample_id"]]} for row in rows.metrics]
        return rows

    def _fails_on_each(self, batch: Mapping[str, Any], name: str, target: Tensor, error: Exception) -> bool:
        """Whether a method raises the error of a batch for each of its samples alone too."""
        size = len(batch["sample_id"])
        for i in range(size if size > 1 else 0):
            one = take_rows(batch, torch.tensor([i]), size)
            try:
                attribute(
                    self.model,
                    one,
                    name,
                    target=target[i : i + 1],
                    special_tokens_mask=one.get("special_tokens_mask"),
                    **self.settings.methods[name],
                )
            except Exception as own:
                if (type(own), str(own)) == (type(error), str(error)):
                    continue
            return False
        return True

    def _without(self, batch: Mapping[str, Any], ids: Sequence[int], broken: Tensor) -> Explained:
        """Explain a batch without the examples that the model returns NaN for; those are failures of every method."""
        rows = Explained()
        failed = [ids[i] for i in broken.nonzero().flatten().tolist()]
        for name in self.settings.methods:
            wanted = [i for i in failed if self.settings.wanted([name], i)]
            rows.fail(wanted, name, NON_FINITE_OUTPUT, self.settings.strict)
        good = (~broken).nonzero().flatten()
        if len(good):
            rows.extend(self.explain(take_rows(batch, good, len(ids))))
        return rows

    def _explanation(self, facts: BatchFacts, result: Attribution, i: int) -> dict[str, Any]:
        real = facts.mask[i]
        gap, bound = result.completeness_gap, result.error_bound
        layers = result.layer_scores
        return {
            "sample_id": facts.ids[i],
            **self._what_was_read(facts, result, i),
            "word_ids": facts.word_ids(i, result.special[i]),
            "scores": result.scores[i, real].tolist(),
            "layer_scores": None if layers is None else layers[i][:, real].tolist(),
            **facts.decision(i),
            "method": result.method,
            "completeness_gap": None if gap is None else float(gap[i].max()),
            "steps_used": int(result.steps_used[i]),
            "error_bound": None if bound is None else float(bound[i].max()),
            "converged": bool(result.converged[i]),
            "rationale": facts.token_rationale(i),
            "segment": facts.segment(i),
            **facts.placed(i),
        }

    def _what_was_read(self, facts: BatchFacts, result: Attribution, i: int) -> dict[str, Any]:
        """The columns that texts and images fill differently."""
        if facts.image is not None:
            return facts.image.columns(i, facts.ids[i], result.special[i], facts.batch)
        ids = facts.batch["input_ids"][i]
        return {"tokens": self.token_texts(ids[facts.mask[i].to(ids.device)])}

    def token_texts(self, ids: Tensor) -> list[str]:
        """The tokens of (T,) ids as the tokenizer spells them."""
        numbers = ids.tolist()
        if self.tokenizer is None:
            return [str(number) for number in numbers]
        return list(self.tokenizer.convert_ids_to_tokens(numbers))


def scalar_key(prefix: str, method: str, control: str, metric: str) -> str:
    """Spell a scalar's key: `<prefix>/<method>/<metric>`, controls as `<prefix>/random/...` and `.../reversed/...`."""
    middle = f"{method}/reversed" if control == "reversed" else method
    return f"{prefix}/{middle}/{metric}"
