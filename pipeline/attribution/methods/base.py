"""What every attribution method is."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from calig.pipeline.errors import InputError

if TYPE_CHECKING:
    from calig.pipeline.attribution.model import ExplainableModel, Inputs
    from calig.pipeline.attribution.objective import Objective
    from calig.pipeline.attribution.result import Attribution

Baseline = Literal["pad", "mask", "unk", "mean", "zero", "black", "blur"]


@dataclass(frozen=True)
class BaselineOptions:
    """Options of a method that compares the input with a baseline (METHODS 0, Baselines)."""

    baseline: Baseline = "pad"
    """What stands at the content positions of the baseline; `pad` becomes `mean` where there is no pad token, so on
    images too. `black` and `blur` are for images, `mask` and `unk` for text."""


def check_nodes(steps: int | Literal["auto"], tolerance: float) -> None:
    """Check the options that every method with nodes has.

    Raises:
        InputError: Too few nodes, or a tolerance that no error can be below or that all are.
    """
    if isinstance(steps, int) and steps < 2:
        raise InputError(f"steps takes 'auto' or at least 2 nodes, got {steps}.")
    if not 0 < tolerance < math.inf:
        raise InputError(f"tolerance takes a finite positive number, got {tolerance}.")


@dataclass(frozen=True)
class PathOptions(BaselineOptions):
    """Options of a method that integrates gradients along a path (METHODS 1)."""

    steps: int | Literal["auto"] = 16
    """Nodes of the path; `auto` refines each example's path until the error bound is below `tolerance`."""
    tolerance: float = 0.02
    """Relative error bound below which a path counts as converged."""
    max_steps: int = 129
    """Nodes after which `auto` gives up on an example and flags it."""

    def __post_init__(self) -> None:
        check_nodes(self.steps, self.tolerance)
        if self.max_steps < 9:
            raise InputError(f"max_steps takes at least 9 nodes (where `auto` starts), got {self.max_steps}.")


class AttributionMethod(ABC):
    """A way to tell which tokens support or oppose a decision.

    A subclass in a module of this folder is a method; nothing else has to know of it. Its module imports no torch at
    the top: what it computes with is imported inside `attribute`.

    Args:
        options: An instance of the class's own `Options`.
    """

    name: ClassVar[str]
    """The name in `explain.methods` and `attribute(method=...)`."""
    summary: ClassVar[str]
    """One line for `calig methods`."""
    source: ClassVar[str]
    """The paper."""
    needs_attention: ClassVar[bool] = False
    """Whether the attention maps of the model are needed."""
    signed: ClassVar[bool] = True
    """Whether scores below zero can occur."""
    parts_axes: ClassVar[Mapping[str, tuple[int, ...]]] = MappingProxyType({})
    """Name in `parts` -> its axes of tokens: a batch runs in slices that are cut to the length of their inputs."""
    Options: ClassVar[type] = BaselineOptions

    def __init__(self, options: Any) -> None:
        self.options = options

    @abstractmethod
    def attribute(self, model: ExplainableModel, inputs: Inputs, objective: Objective) -> Attribution:
        """Attribute the objective of every example to its tokens.

        Args:
            model: The model inside an open `ExplainableModel.session`.
            inputs: B examples.
            objective: What is explained.

        Returns:
            Scores of shape (B, T), and (B, L, T) for methods that look into the layers.
        """
