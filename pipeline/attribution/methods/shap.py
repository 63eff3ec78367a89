"""SHAP: Shapley values of the presence of tokens, by Kernel SHAP (Lundberg & Lee 2017, through Captum; METHODS 5.7)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from calig.pipeline.attribution.methods.base import AttributionMethod, BaselineOptions
from calig.pipeline.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from calig.pipeline.attribution.model import ExplainableModel, Inputs
    from calig.pipeline.attribution.objective import Objective
    from calig.pipeline.attribution.result import Attribution


@dataclass(frozen=True)
class ShapOptions(BaselineOptions):
    """Options of `shap`."""

    samples: int = 200
    """Sets of tokens that are tried per example."""
    seed: int = 0
    """Of the sets; each example draws from it and its own tokens."""

    def __post_init__(self) -> None:
        if self.samples < 2:
            raise InputError(f"samples takes 2 or more, got {self.samples}.")


class Shap(AttributionMethod):
    """Kernel SHAP: a weighted linear model of the objective over sets of present tokens; signed.

    Exact only when all sets are tried; the scores of an example of one token are exact. Needs the extra `compare`.
    """

    name = "shap"
    summary = "Kernel SHAP on the presence of tokens (Captum)"
    source = "Lundberg & Lee 2017"
    Options = ShapOptions

    def attribute(self, model: ExplainableModel, inputs: Inputs, objective: Objective) -> Attribution:
        """See `AttributionMethod.attribute`."""
        from calig.pipeline.attribution import inside
        from calig.pipeline.attribution.black_box import explain_presence
        from calig.pipeline.attribution.build import build_attribution

        def explain(attr: Any, value: Callable[[Tensor], Tensor], ones: Tensor, at_once: int) -> Tensor:
            if ones.shape[1] == 1:  # the kernel has no weight for a single feature
                return (value(ones) - value(0 * ones))[None]
            return attr.KernelShap(value).attribute(
                ones, n_samples=self.options.samples, perturbations_per_eval=at_once
            )

        ends = inside.find_ends(model, inputs, objective, self.options.baseline, [0])
        scores = explain_presence(model, inputs, objective, ends, explain, self.options.seed)
        return build_attribution(self, inputs, objective, ends.output_change, scores)
