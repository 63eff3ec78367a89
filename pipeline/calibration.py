"""What the stage calibrate has chosen, as the run directory keeps it, and what its options are with that.

Light (no torch): a command line reads it before it loads a model.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from calig.pipeline.config import CALIBRATION_FILE, Config, asked_options, show, without_asked
from calig.pipeline.errors import InputError

Options = Mapping[str, Mapping[str, Any]]


def read_calibration(folder: Path) -> dict[str, Any] | None:
    """The contents of a run's `calibration.json` (docs/run_directory.md); None where nothing was chosen."""
    file = folder / CALIBRATION_FILE
    return json.loads(file.read_text(encoding="utf8")) if file.is_file() else None


def calibrated_options(options: Options, folder: Path) -> dict[str, dict[str, Any]]:
    """The options of all methods with the chosen values in the place of `auto` and `per_layer`.

    Args:
        options: The `explain.options` of a configuration.
        folder: The run directory.

    Raises:
        InputError: Something is left to the stage calibrate that it has not chosen, or was asked for otherwise.
    """
    plain = without_asked(options)
    for method, asked in asked_options(options).items():
        stored = read_calibration(folder)
        said = _spell(method, asked)
        if stored is None:
            raise InputError(
                f"{said} is chosen by the stage calibrate, and {folder} has no {CALIBRATION_FILE}. Add calibrate to "
                "stages, or give a value."
            )
        if stored["method"] != method or stored["asked"] != asked:
            raise InputError(
                f"{said} is not what {folder} was calibrated for, {_spell(stored['method'], stored['asked'])}. Ask for "
                "the same, give values, or calibrate a new run."
            )
        if stored["options"] != plain[method]:
            raise InputError(
                f"{said}: {folder} was calibrated beside the options {show(stored['options'])}, not beside "
                f"{show(plain[method])}. Take the same, give values, or calibrate a new run."
            )
        plain[method] |= stored["chosen"]
    return plain


def check_evaluation(config: Config, folder: Path) -> None:
    """Refuse to evaluate a choice on what it was chosen with; the configuration may have changed since.

    Raises:
        InputError: The split or the only operator of the explain stage is that of the stored calibration.
    """
    stored = read_calibration(folder)
    if stored is None or not asked_options(config.explain.options):
        return
    if stored["split"] == config.explain.split:
        raise InputError(
            f"explain.split={config.explain.split} is the split that {folder} was calibrated on: what a value was "
            "chosen on cannot say how good it is. Explain another split, or give the options values."
        )
    operators = config.explain.operator
    names: Sequence[str] = [operators] if isinstance(operators, str) else operators
    if list(names) == [stored["operator"]]:
        raise InputError(
            f"explain.operator={stored['operator']} is what {folder} was calibrated with: the choice would be judged "
            "by what it was made for. Add another operator to explain.operator."
        )


def _spell(method: str, asked: Mapping[str, str]) -> str:
    return ", ".join(f"explain.options.{method}.{name}={word}" for name, word in asked.items())
