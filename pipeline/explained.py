"""What explaining gives: rows, and how it fails."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

Rows = list[dict[str, Any]]


@dataclass
class Explained:
    """The rows of some samples, in the schemas of `calig.pipeline.records`.

    Attributes:
        explanations: One per sample and method.
        metrics: Long form.
        failures: `{sample_id, method, reason}`.
        flows: One per sample and method that knows a flow, of what is kept of it.
        files: Place in a run directory -> content, of the pictures that rows of images refer to.
    """

    explanations: Rows = field(default_factory=list)
    metrics: Rows = field(default_factory=list)
    failures: Rows = field(default_factory=list)
    flows: Rows = field(default_factory=list)
    files: dict[str, bytes] = field(default_factory=dict)

    def extend(self, other: Explained) -> None:
        """Add the rows of other samples."""
        self.explanations += other.explanations
        self.metrics += other.metrics
        self.failures += other.failures
        self.flows += other.flows
        self.files |= other.files

    def fail(self, ids: Sequence[int], method: str, reason: str, strict: bool = False) -> None:
        """Note that a method failed on some samples.

        Raises:
            SampleFailure: With `strict`, if there is a sample.
        """
        if ids and strict:
            raise SampleFailure(f"sample {ids[0]}, method '{method}': {reason} (explain.strict=true ends here)")
        self.failures += [{"sample_id": i, "method": method, "reason": reason} for i in ids]


NON_FINITE_OUTPUT = "the model's output is not finite (NaN or infinity)"
"""Reason of samples that the model itself fails on: nothing to explain, and a sign that its weights are broken."""


class SampleFailure(RuntimeError):
    """A sample or a method failed and `strict` was set."""
