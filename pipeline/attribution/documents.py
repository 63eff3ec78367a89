"""Attribution of long documents: each window's own output is attributed, and the pooling puts the shares together.

A document's objective is the mean, or the largest, of the objective's values at its windows. Given the windows, they
do not depend on each other, so with `mean` each is attributed for itself and counts 1/W; with `max` the window that
wins at the input stays the winner, and all relevance is its own. Completeness holds for the document's objective.

Shapes: B documents, N tokens of the longest, W windows of all documents, T tokens of a window.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from calig.pipeline.attribution.inputs import Inputs
from calig.pipeline.attribution.objective import Objective
from calig.pipeline.attribution.result import Attribution
from calig.pipeline.attribution.slicing import RowsObjective
from calig.pipeline.attribution.windows import Pooling, Windows, pool

if TYPE_CHECKING:
    from calig.pipeline.attribution.methods.base import AttributionMethod
    from calig.pipeline.attribution.model import ExplainableModel

Explain = Callable[[Inputs, Objective], Attribution]


def explained_windows(model: ExplainableModel, inputs: Inputs, goal: Objective) -> tuple[Inputs, Objective, Windows]:
    """What is attributed for an objective of documents.

    Args:
        model: In an open session.
        inputs: B documents with their windows.
        goal: Their objective.

    Returns:
        The windows as inputs, the same objective for them, and which they are: all, or those that win.
    """
    windows = inputs.windows
    assert windows is not None  # the caller asks of documents only
    if windows.pooling == "max":
        windows = windows.choose(windows.winners(_values(model, windows.inputs(inputs), goal, windows)))
    return windows.inputs(inputs), RowsObjective(goal, windows.document), windows


@torch.no_grad()
def _values(model: ExplainableModel, read: Inputs, goal: Objective, windows: Windows) -> Tensor:
    """(W,) the objective at each window."""

    def run(rows: Tensor) -> Tensor:
        return goal(model.module(**read.select(rows)), windows.document[rows])

    return torch.cat(model.budget.run(torch.arange(len(read), device=model.device), read.mask.shape[1], run))


def attribute_documents(
    method: AttributionMethod, model: ExplainableModel, inputs: Inputs, goals: Sequence[Objective], explain: Explain
) -> list[Attribution]:
    """Attribute objectives of documents, one after the other.

    Args:
        method: How.
        model: In an open session.
        inputs: B documents with their windows.
        goals: Objectives of the documents.
        explain: Attributes inputs that are the windows of whole documents.

    Returns:
        One (B, N) result per objective; see `joined`.
    """
    results = []
    for goal in goals:
        read, objective, windows = explained_windows(model, inputs, goal)
        results.append(joined(method, explain(read, objective), inputs, goal, windows))
    return results


def joined(
    method: AttributionMethod, result: Attribution, inputs: Inputs, goal: Objective, windows: Windows
) -> Attribution:
    """Put the attributions of windows together.

    `scores` and `layer_scores` are summed where windows overlap, by the pooling's weights; so are the `parts` that run
    over the tokens once, and no others. Matrices of tokens by tokens would grow with the square of the document's
    length: `flow` is None. `steps_used` is the largest of the windows', `converged` that all did.

    Args:
        method: That made it.
        result: (W, T), of all windows that are explained.
        inputs: B documents.
        goal: What was explained.
        windows: Those of `result`.
    """
    length = inputs.mask.shape[1]

    def own(values: Tensor, how: Pooling) -> Tensor:
        return pool(values, windows.document.cpu(), windows.size, how)

    parts = {
        name: windows.spread(part, length, method.parts_axes[name][0])
        for name, part in (result.parts or {}).items()
        if len(method.parts_axes.get(name, ())) == 1
    }
    layers, gap, bound = result.layer_scores, result.completeness_gap, result.error_bound
    return Attribution(
        scores=windows.spread(result.scores, length),
        layer_scores=None if layers is None else windows.spread(layers, length, 2),
        target=goal.target,
        mask=inputs.mask,
        special=inputs.special,
        output_change=own(result.output_change, "mean"),
        # Where they are errors of the sum, they are the document's at each of its windows.
        completeness_gap=None if gap is None else own(gap, "max"),
        error_bound=None if bound is None else own(bound, "max"),
        steps_used=own(result.steps_used, "max"),
        converged=own((~result.converged).long(), "max") == 0,
        parts=parts or None,
        method=result.method,
        options=result.options,
    )
