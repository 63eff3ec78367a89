"""Occlusion: what the objective loses without a token (Zeiler & Fergus 2014, through Captum; METHODS 5.7)."""

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
class OcclusionOptions(BaselineOptions):
    """Options of `occlusion`."""

    window: int = 1
    """Neighbouring tokens that are taken away together; a token's score is its mean over the windows that hold it."""

    def __post_init__(self) -> None:
        if self.window < 1:
            raise InputError(f"window takes 1 or more tokens, got {self.window}.")


class Occlusion(AttributionMethod):
    """The drop of the objective where a token's embedding is the baseline's; signed. Needs the extra `compare`."""

    name = "occlusion"
    summary = "the drop of the objective without each token (Captum)"
    source = "Zeiler & Fergus 2014"
    Options = OcclusionOptions

    def attribute(self, model: ExplainableModel, inputs: Inputs, objective: Objective) -> Attribution:
        """See `AttributionMethod.attribute`."""
        from calig.pipeline.attribution import inside
        from calig.pipeline.attribution.black_box import explain_presence
        from calig.pipeline.attribution.build import build_attribution

        def explain(attr: Any, value: Callable[[Tensor], Tensor], ones: Tensor, at_once: int) -> Tensor:
            window = min(self.options.window, ones.shape[1])
            return attr.Occlusion(value).attribute(
                ones, sliding_window_shapes=(window,), perturbations_per_eval=at_once
            )

        ends = inside.find_ends(model, inputs, objective, self.options.baseline, [0])
        scores = explain_presence(model, inputs, objective, ends, explain, seed=0)
        return build_attribution(self, inputs, objective, ends.output_change, scores)
