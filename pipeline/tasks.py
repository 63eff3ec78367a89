"""What a model is trained to say of a text: one class, any number of labels, or a number. Loads nothing."""

from __future__ import annotations

from typing import Any, Literal, get_args

Task = Literal["classification", "multi_label", "regression"]
TASKS: tuple[Task, ...] = get_args(Task)

PROBLEM_TYPES: dict[Task, str] = {
    "classification": "single_label_classification",
    "multi_label": "multi_label_classification",
    "regression": "regression",
}
"""What transformers calls them; the loss of its models is chosen by it."""

MONITORED: dict[Task, str] = {
    "classification": "val/accuracy",
    "multi_label": "val/f1_micro",
    "regression": "val/pearson",
}
"""The scalar that picks the best weights where `model.monitor` names none."""

THRESHOLD = 0.5
"""The probability from which a label of several is predicted, where the model's config says nothing else."""


def task_of(config: Any) -> Task:
    """The task of a model, by its Hugging Face config: its problem type, else regression where it has one output."""
    problem = getattr(config, "problem_type", None)
    found = next((task for task in TASKS if PROBLEM_TYPES[task] == problem), None)
    if found is not None:
        return found
    return "regression" if getattr(config, "num_labels", None) == 1 else "classification"


def threshold_of(config: Any) -> float:
    """The probability from which a model predicts a label of several."""
    return float(getattr(config, "label_threshold", None) or THRESHOLD)
