"""Objectives beside the class logit: a contrast, the next token of a language model, the output of a regression.

Each is given to `attribute(objective=...)` as the user writes it and bound to the batch there.
Shapes: B examples, N rows of one internal pass.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from calig.pipeline.attribution.model import Inputs
from calig.pipeline.attribution.objective import BoundObjective, logits_of, per_example, pick, raw_logits
from calig.pipeline.errors import InputError

Indices = int | Sequence[int] | Tensor
"""One index for every example, or one per example (B,)."""


@dataclass(frozen=True)
class Contrast:
    """The logit of one class minus that of another: why this class rather than that one.

    Attributes:
        target: The class that positive relevance supports; one, or one per example.
        against: The class that it is set against; one, or one per example.

    Example::

        attribute(model, batch, objective=Contrast(1, against=0))
    """

    target: Indices
    against: Indices

    def bind(self, inputs: Inputs) -> BoundObjective:
        """See `Unbound`."""
        target, against = _pair(self.target, self.against, len(inputs))

        def read(output: Any, rows: Tensor) -> Tensor:
            logits = logits_of(output)
            return pick(logits, target, rows, "class") - pick(logits, against, rows, "class")

        return BoundObjective(read, target)


@dataclass(frozen=True)
class NextToken:
    """The logit that a causal language model gives a token as the next one (METHODS 2.6).

    Attributes:
        target: Id of the token in question; one, or one per example.
        position: The token that the model predicts from, counted over the real tokens of each example, from the end if
            negative; one, or one per example. By default the last one: what would be written next.
        log_prob: Take the log-probability, which every other token has a part in.
        against: Id of a token whose logit is subtracted: why this token rather than that one.

    Example::

        attribute(model, tokenizer("The capital of France is", return_tensors="pt"), objective=NextToken(paris))
    """

    target: Indices
    position: Indices = -1
    log_prob: bool = False
    against: Indices | None = None

    def bind(self, inputs: Inputs) -> BoundObjective:
        """See `Unbound`."""
        if inputs.windows is not None:
            raise InputError(
                "a next token has one context: `windows` are for classifiers. Leave them out of the batch."
            )
        against: Tensor | None = None
        if self.against is None:
            target = per_example(self.target, len(inputs), "target")
        else:
            target, against = _pair(self.target, self.against, len(inputs))
        column = _columns(per_example(self.position, len(inputs), "position"), inputs.mask.cpu())

        def read(output: Any, rows: Tensor) -> Tensor:
            logits = raw_logits(output)
            if logits.ndim != 3:
                raise InputError(
                    f"the model's logits have shape {tuple(logits.shape)}; NextToken needs (batch, tokens, "
                    "vocabulary), as a causal language model returns. A classifier is explained by target=."
                )
            here = logits[torch.arange(len(rows), device=logits.device), column.to(logits.device)[rows]]
            values = here.log_softmax(dim=1) if self.log_prob else here
            value = pick(values, target, rows, "token")
            return value if against is None else value - pick(values, against, rows, "token")

        return BoundObjective(read, target)


class Regression:
    """The one output of a regression model (`num_labels=1`).

    Example::

        attribute(model, batch, objective=Regression())
    """

    def __call__(self, output: Any) -> Tensor:
        """Read (N,) from an output of shape (N, 1) or (N,).

        Raises:
            InputError: The model has several outputs.
        """
        values = raw_logits(output)
        if values.ndim == 2 and values.shape[1] == 1:
            return values[:, 0]
        if values.ndim != 1:
            raise InputError(
                f"the model's output has shape {tuple(values.shape)}; a regression has one output per example. Of "
                "several, name one by target=."
            )
        return values


def _pair(target: Indices, against: Indices, batch: int) -> tuple[Tensor, Tensor]:
    one, other = per_example(target, batch, "target"), per_example(against, batch, "against")
    for index in one[one == other].tolist():
        raise InputError(f"target and against are both {index}: their difference is 0 for every input.")
    return one, other


def _columns(position: Tensor, mask: Tensor) -> Tensor:
    """Columns (B,) of positions (B,) that count the real tokens of a mask (B, T), on whichever side its padding is."""
    real = mask.sum(dim=1)
    place = torch.where(position < 0, position + real, position)
    for example in ((place < 0) | (place >= real)).nonzero().flatten().tolist():
        raise InputError(
            f"position {int(position[example])} does not exist in example {example}, which has {int(real[example])} "
            "real tokens: they count from 0, or from the end with -1."
        )
    order = torch.argsort((~mask).long(), dim=1, stable=True)  # the real ones first, in their order
    return order.gather(1, place[:, None]).squeeze(1)
