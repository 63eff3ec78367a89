"""`attribute`: one call from a model and a batch to an attribution."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from calig.pipeline.attribution.documents import attribute_documents
from calig.pipeline.attribution.inside import with_readout_special
from calig.pipeline.attribution.methods import AttributionMethod, create_method
from calig.pipeline.attribution.model import ExplainableModel, Inputs, UnsupportedModelError
from calig.pipeline.attribution.objective import (
    ClassLogit,
    Objective,
    OutputFunction,
    Unbound,
    as_objective,
    resolve_target,
)
from calig.pipeline.attribution.result import Attribution
from calig.pipeline.attribution.slicing import cut, join, take
from calig.pipeline.attribution.structure import Blocks
from calig.pipeline.attribution.windows import Pooling
from calig.pipeline.errors import InputError

Goal = Objective | Unbound | Callable[[Any], Tensor]
"""What may be given as an objective."""


def attribute(
    model: nn.Module | ExplainableModel,
    batch: dict[str, Any],
    method: str = "ca_lig",
    *,
    target: str | int | list[int] | Tensor | None = None,
    objective: Goal | Sequence[Goal] | None = None,
    tokenizer: Any = None,
    special_tokens_mask: Tensor | None = None,
    pooling: Pooling | None = None,
    blocks: Blocks | None = None,
    embedding: str | nn.Module | None = None,
    **options: Any,
) -> Attribution | list[Attribution]:
    """Attribute a model's decision to its input tokens.

    Works in every context (training, `no_grad`, `inference_mode`, autocast) and leaves the model as it was.

    Args:
        model: A Hugging Face classifier or a module of your own, or an `ExplainableModel` around one.
        batch: What the model's forward takes, by name: `input_ids` (B, T), `attention_mask` (B, T) and so on, or
            `pixel_values` (B, C, H, W). Long documents: `input_ids` (B, N) of any length and `windows` (B, V, T), the
            positions that each window reads (-1 on padding).
        method: One of `available_methods()`.
        target: Class to explain: None or "predicted", "label" (from `batch["labels"]`), an index, one index per
            example (B,), or K per example (B, K).
        objective: What to explain instead of a class logit: `Contrast(1, 0)`, `NextToken(token_id)` of a causal
            language model, `Regression()`, any `Objective`, or a callable from the model's output to one scalar per
            row; a list of them is explained together. Excludes `target`.
        tokenizer: Names special tokens and the tokens of the `mask` and `unk` baselines; for images the image
            processor.
        special_tokens_mask: (B, T) 1 on special tokens; without it the tokenizer, then the model's config decide.
        pooling: Of documents: what is explained is the `mean` or the `max` of the objective's values at the windows;
            by default what the model's config says, else the mean.
        blocks: Where the blocks of a module of your own are, if not found; see `ExplainableModel`.
        embedding: Its word embedding, likewise.
        **options: Options of the method, for example `steps=16`, `baseline="pad"`, `path="shared"`, `lam=0.7`.

    Returns:
        The attribution; for `target` of shape (B, K), or K objectives, a list of K from the same forward passes.

    Raises:
        InputError: An unknown method or option, or a target or mask that does not fit.
        UnsupportedModelError: The model's blocks or attention maps cannot be reached.

    Example::

        result = attribute(model, tokenizer(["not bad at all"], return_tensors="pt"), tokenizer=tokenizer)
        result.scores           # (1, T), signed
        result.layer_scores     # (1, L, T)
        result.completeness_gap # (1, L + 1)
    """
    if objective is not None and target is not None:
        raise InputError("give either a target or an objective, not both.")
    several = isinstance(objective, list | tuple)
    if several and not objective:
        raise InputError("objective is an empty list; give one objective or several.")
    explainer = create_method(method, options)
    if isinstance(model, ExplainableModel):
        if blocks is not None or embedding is not None:
            raise InputError("give `blocks` and `embedding` to ExplainableModel(...), not beside one.")
        other = tokenizer is not None and tokenizer is not model.tokenizer
        wrapped = model.with_tokenizer(tokenizer) if other else model
    else:
        wrapped = ExplainableModel(model, tokenizer=tokenizer, blocks=blocks, embedding=embedding)
    with wrapped.session():
        inputs = wrapped.prepare(batch, special_tokens_mask, pooling)
        if objective is not None:
            asked = cast(Sequence[Goal], objective if several else [objective])
            goals: list[Objective] = [as_objective(goal, inputs) for goal in asked]
        else:
            labels = batch.get("labels")
            # Of a target that is given, only the number of classes is unknown: one example tells.
            predicts = target is None or isinstance(target, str)
            logits = wrapped.logits(inputs, None if predicts else torch.tensor([0]))
            indices = resolve_target(target, logits.expand(len(inputs), -1), labels)
            several = indices.ndim == 2
            goals = [ClassLogit(indices)] if indices.ndim == 1 else [ClassLogit(column) for column in indices.T]
        told = special_tokens_mask is not None or "special_tokens_mask" in batch or inputs.pixels is not None
        if not told and not inputs.special.any() and not wrapped.names_special_tokens:
            warnings.warn(
                "no special tokens are known (no mask, no tokenizer, none in the model's config): only padding and "
                "the read-out position are kept in the baseline. Pass `tokenizer=` or `special_tokens_mask=`.",
                stacklevel=2,
            )
            if inputs.windows is None:  # what a window reads out at is a word of the document
                inputs = with_readout_special(wrapped, inputs, goals[0])
        # A callable of the user's own may count positions from the end.
        trim = not any(isinstance(goal, OutputFunction) for goal in goals)
        if inputs.windows is None:
            results = _in_slices(explainer, wrapped, inputs, goals, trim=trim)
        else:
            results = attribute_documents(
                explainer,
                wrapped,
                inputs,
                goals,
                lambda read, goal: _in_slices(explainer, wrapped, read, [goal], trim=trim)[0],
            )
    return results if several else results[0]


def _in_slices(
    method: AttributionMethod, model: ExplainableModel, inputs: Inputs, goals: list[Objective], *, trim: bool
) -> list[Attribution]:
    """Run a method on slices of one pass each, so that what it keeps of a pass does not grow with the batch."""
    slices = cut(inputs, model.max_tokens, trim=trim)
    if not all(model.keeps_width(take(inputs, goals, rows[:1], columns)) for rows, columns in slices):
        slices = cut(inputs, model.max_tokens, trim=False)  # a model that pads to its window takes full width alone
    try:
        return _explain(method, model, inputs, goals, slices)
    except UnsupportedModelError:
        # Examples that cannot be explained may fill a slice: what they lack is an error only if the whole batch does.
        if len(slices) == 1:
            raise
        whole = [(torch.arange(len(inputs)), inputs.mask.shape[1])]
        return _explain(method, model, inputs, goals, whole)


def _explain(
    method: AttributionMethod,
    model: ExplainableModel,
    inputs: Inputs,
    goals: list[Objective],
    slices: list[tuple[Tensor, int]],
) -> list[Attribution]:
    found = []
    for rows, columns in slices:
        part = take(inputs, goals, rows, columns)
        found.append([method.attribute(model, part, goal) for goal in part.together])
    return [join(results, slices, inputs.mask.shape[1], method.parts_axes) for results in zip(*found, strict=True)]
