"""LIME: a sparse linear model around the input (Ribeiro et al. 2016, through Captum; METHODS 5.7)."""

from __future__ import annotations

import math
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
class LimeOptions(BaselineOptions):
    """Options of `lime`."""

    samples: int = 200
    """Sets of tokens that are tried per example."""
    alpha: float = 0.01
    """Strength of the L1 penalty; 0 is an ordinary least-squares fit."""
    seed: int = 0
    """Of the sets; each example draws from it and its own tokens."""

    def __post_init__(self) -> None:
        if self.samples < 2:
            raise InputError(f"samples takes 2 or more, got {self.samples}.")
        if not 0 <= self.alpha < math.inf:
            raise InputError(f"alpha takes a finite number, 0 or more, got {self.alpha}.")


class Lime(AttributionMethod):
    """A linear model of the objective over sets of present tokens, near ones counting more; signed.

    Needs the extra `compare`.
    """

    name = "lime"
    summary = "a sparse linear model on the presence of tokens (Captum)"
    source = "Ribeiro et al. 2016"
    Options = LimeOptions

    def attribute(self, model: ExplainableModel, inputs: Inputs, objective: Objective) -> Attribution:
        """See `AttributionMethod.attribute`."""
        from calig.pipeline.attribution import inside
        from calig.pipeline.attribution.black_box import explain_presence
        from calig.pipeline.attribution.build import build_attribution

        def explain(attr: Any, value: Callable[[Tensor], Tensor], ones: Tensor, at_once: int) -> Tensor:
            from captum._utils.models.linear_model import SkLearnLasso, SkLearnLinearRegression

            fit = SkLearnLasso(alpha=self.options.alpha) if self.options.alpha else SkLearnLinearRegression()
            return attr.Lime(value, interpretable_model=fit).attribute(
                ones, n_samples=self.options.samples, perturbations_per_eval=at_once
            )

        ends = inside.find_ends(model, inputs, objective, self.options.baseline, [0])
        scores = explain_presence(model, inputs, objective, ends, explain, self.options.seed)
        return build_attribution(self, inputs, objective, ends.output_change, scores)
