"""What a configuration must satisfy: known keys, types, ranges, and what holds across keys.

Every failure is one ``InputError`` that names the full key, the value, what was expected and, where a YAML file said
it, that file. ``Origins`` maps a full key to the file that set it last ("" stands for the command line).
"""

from __future__ import annotations

import difflib
import inspect
import math
import operator
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import fields, is_dataclass
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from calig.pipeline.config import (
    ARTIFACTS,
    BUILT_IN,
    CALIBRATED,
    CALIBRATION_FILE,
    KNOWN_STAGES,
    Config,
    ExplainConfig,
    Operator,
    WindowsConfig,
    asked_options,
    describe_schema,
    hints,
    show,
    type_name,
    without_asked,
)
from calig.pipeline.errors import InputError
from calig.pipeline.metrics.names import METRICS, REPEATED_METRICS

Origins = Mapping[str, str]
Section = TypeVar("Section")

_OWNED = {
    "logger": "calig sets the loggers; see logger.wandb.mode",
    "callbacks": "calig sets the callbacks; see probe, model.early_stopping and model.monitor",
    "default_root_dir": "use run.dir",
}
"""Trainer arguments that calig sets itself."""


def where(key: str, origins: Origins) -> str:
    """Say which file set a key (or the section above it); empty for the command line."""
    while key and key not in origins:
        key = key.rpartition(".")[0]
    return f" (in {origins[key]})" if origins.get(key) else ""


def wrong(key: str, value: object, expected: str, origins: Origins, hint: str = "") -> InputError:
    """Build the error for a value that its key does not take."""
    given = f"'{value}'" if isinstance(value, str) else show(value)
    return InputError(f"{key}: expected {expected}, got {given}{where(key, origins)}. {hint}".rstrip())


def unknown_key(prefix: str, name: str, options: Iterable[str], origin: str = "", hint: str = "") -> InputError:
    """Build the error for a key that does not exist: names the nearest full key and the options.

    Args:
        prefix: The section with its dot, ``"explain."``, or ``""`` at the root.
        name: The key below it; may have further parts.
        options: The keys that the section has.
        origin: The file that says it.
        hint: A sentence put at the end.
    """
    options = list(options)
    head, dot, rest = name.partition(".")
    everywhere = [row.key for row in describe_schema()]
    elsewhere = [key for key in everywhere if key.endswith(f".{head}")] if not dot else []
    near = elsewhere or [prefix + option for option in difflib.get_close_matches(head, options, n=1, cutoff=0.6)]
    if near and dot:  # a slip in the section's name: keep what follows if it exists there
        below = [key for key in everywhere if key.startswith(f"{near[0]}.")]
        near = difflib.get_close_matches(f"{near[0]}.{rest}", below, n=1, cutoff=0.6) or near
    message = f"unknown key '{prefix}{name}'" + (f" in {origin}." if origin else ".")
    if near:
        message += f" Did you mean {' or '.join(repr(key) for key in near)}?"
    level = f"under '{prefix[:-1]}'" if prefix else "at the top"
    return InputError(f"{message} Options {level}: {', '.join(options) if options else 'none'}. {hint}".rstrip())


def convert(hint: Any, value: Any, key: str, origins: Origins, limits: Mapping[str, float] | None = None) -> Any:
    """Check a value against a type and return it in that type.

    An int passes as a float and as a string (a column's number, a label); nothing else is converted: a boolean is no
    number, and ``no`` in a YAML file, which means false there, is no string.
    """
    try:
        result = _fit(hint, value, key)
    except _Misfit as misfit:
        if isinstance(value, dict) and value and dict not in [get_origin(part) for part in (hint, *get_args(hint))]:
            below = f"{key}.{next(iter(value))}"
            message = (
                f"unknown key '{below}'{where(key, origins)}: {key} is a value ({type_name(hint)}), not a section."
            )
            raise InputError(message) from None
        key, value, hint = misfit.key, misfit.value, misfit.hint
        raise wrong(key, value, _expected(hint, limits), origins, _advice(hint, value, key)) from None
    number = isinstance(result, (int, float)) and not isinstance(result, bool)
    if limits and number and not _inside(result, limits):
        raise wrong(key, value, _expected(hint, limits), origins)
    return result


def build(section: type[Section], content: Mapping[str, Any], origins: Origins, prefix: str = "") -> Section:
    """Make the dataclass of a section out of plain values; missing keys take their defaults."""
    values: dict[str, Any] = {}
    types = hints(section)  # type: ignore[arg-type]
    for item in fields(section):  # type: ignore[arg-type]  # Section is a dataclass
        if item.name not in content:
            continue
        key, hint = f"{prefix}{item.name}", types[item.name]
        if is_dataclass(hint):
            values[item.name] = build(hint, content[item.name], origins, f"{key}.")  # type: ignore[arg-type]
        else:
            values[item.name] = convert(hint, content[item.name], key, origins, item.metadata["limits"])
    return section(**values)


def check_values(config: Config, origins: Origins) -> None:
    """Check what holds between keys."""
    for key, names in (("stages", config.stages), ("explain.methods", config.explain.methods)):
        if not names:
            raise wrong(key, names, "at least one", origins)
        _no_repeats(key, names, origins)
    for stage in config.stages:
        _among("stages", "stage", stage, KNOWN_STAGES, origins)
    if isinstance(config.explain.operator, list):
        if not config.explain.operator:
            raise wrong("explain.operator", [], "at least one", origins)
        _no_repeats("explain.operator", config.explain.operator, origins)
    _check_order(config, origins)
    _check_metrics(config.explain, origins)
    for name in config.logger.wandb.artifacts:
        _among("logger.wandb.artifacts", "artifact", name, ARTIFACTS, origins)
    _no_repeats("logger.wandb.artifacts", config.logger.wandb.artifacts, origins)
    _check_calibration(config, origins)
    _check_concepts(config, origins)
    _check_data(config, origins)
    _check_windows(config, origins)
    scratch = config.model.scratch
    if scratch.width % scratch.heads:
        expected = f"a multiple of model.scratch.heads={scratch.heads}"
        raise wrong("model.scratch.width", scratch.width, expected, origins)
    checkpoint = config.model.checkpoint
    scratched = config.model.name is None and not (checkpoint and Path(checkpoint).is_dir())
    if scratched and config.data.modality == "text" and config.data.max_length > scratch.max_positions:
        hint = f"Lower it, or set model.scratch.max_positions={config.data.max_length}."
        expected = f"at most model.scratch.max_positions={scratch.max_positions}"
        raise wrong("data.max_length", config.data.max_length, expected, origins, hint)
    if config.run.resume is not None:
        if config.run.overwrite:
            raise InputError(
                "run.resume and run.overwrite=true exclude each other: continue the run, or start it anew."
            )
        if config.run.dir is not None and Path(config.run.dir) != Path(config.run.resume):
            expected = f"the directory of run.resume={config.run.resume}, where the run goes on"
            raise wrong("run.dir", config.run.dir, expected, origins, "Leave run.dir out.")
    for name, instead in _OWNED.items():
        if name in config.trainer:
            raise InputError(f"trainer.{name} is not free{where(f'trainer.{name}', origins)}: {instead}.")


def check_methods(config: Config, origins: Origins) -> None:
    """Check method names against the registry and ``explain.options`` against each method's options, in place."""
    from calig.pipeline.attribution.methods import available_methods, method_options

    known = available_methods()
    for name in config.explain.limits:
        method, of_method, metric = name.partition("/")
        if of_method:
            _among(f"explain.limits.{name}", "method", method, known, origins)
            _among(f"explain.limits.{name}", "metric that explains again", metric, REPEATED_METRICS, origins)
        else:
            options = (*METRICS, *get_args(Operator), *known)
            _among("explain.limits", "metric, operator or method", name, options, origins)
    for method in config.explain.methods:
        _among("explain.methods", "method", method, known, origins)
    if config.probe.enabled:
        _among("probe.method", "method", config.probe.method, known, origins)
    for method, given in config.explain.options.items():
        if method not in known:
            raise unknown_key("explain.options.", method, known, _origin(f"explain.options.{method}", origins))
        schema = method_options(method)
        types = get_type_hints(schema)
        names = [item.name for item in fields(schema)]
        prefix = f"explain.options.{method}."
        for name, value in given.items():
            if name not in names:
                raise unknown_key(prefix, name, names, _origin(prefix + name, origins))
            words = CALIBRATED.get(method, {}).get(name)
            hint = types[name] | Literal[words] if words else types[name]
            given[name] = convert(hint, value, prefix + name, origins)
        try:
            # Its own ranges and what it allows together; what the stage calibrate is to choose has no value yet.
            schema(**without_asked({method: given})[method])
        except InputError as error:
            key = f"explain.options.{method}"
            raise InputError(f"{key}{where(key, origins)}: {error}") from error


def check_trainer(config: Config, origins: Origins | None = None) -> None:
    """Check ``trainer.*`` against the installed Lightning's ``Trainer`` (imports it, which takes seconds)."""
    from lightning import Trainer

    origins = origins or {}
    arguments = inspect.signature(Trainer).parameters
    free = sorted(name for name in arguments if name not in _OWNED)
    for name, value in config.trainer.items():
        key = f"trainer.{name}"
        if name not in arguments:
            raise unknown_key("trainer.", name, free, _origin(key, origins), "These are the arguments of Trainer.")
        annotation = arguments[name].annotation
        if annotation is not inspect.Parameter.empty and not isinstance(annotation, str):
            convert(annotation, value, key, origins)


def _check_order(config: Config, origins: Origins) -> None:
    stages = config.stages
    if "explain" in stages and "benchmark" in stages and stages.index("benchmark") < stages.index("explain"):
        place = where("stages", origins)
        raise InputError(f"stages={show(stages)}{place}: benchmark reads what explain has written and comes after it.")


def _check_metrics(explain: ExplainConfig, origins: Origins) -> None:
    hint = "What needs neither perturbed inputs nor repeated explanations is always measured (docs/metrics.md)."
    for metric in explain.metrics:
        _among("explain.metrics", "metric", metric, METRICS, origins, hint)
    _no_repeats("explain.metrics", explain.metrics, origins)
    for name, count in explain.limits.items():
        if count is not None and count < 1:
            raise wrong(f"explain.limits.{name}", count, "int >= 1 | null", origins)


def _check_calibration(config: Config, origins: Origins) -> None:
    chosen = config.calibrate
    if not chosen.grid or not all(0 <= value <= 1 for value in chosen.grid):
        raise wrong("calibrate.grid", chosen.grid, "at least one value, each in [0, 1]", origins)
    _no_repeats("calibrate.grid", map(str, chosen.grid), origins)
    asked = asked_options(config.explain.options)
    if not asked:
        if config.stages == ["calibrate"]:
            raise InputError(
                f"stages=[calibrate]{where('stages', origins)} has nothing to choose: no option is left to it. Set "
                "explain.options.ca_lig.lam=auto (or per_layer)."
            )
        return
    method, names = next(iter(asked.items()))
    option, word = next(iter(names.items()))
    key = f"explain.options.{method}.{option}"
    said = f"{key}={word}{where(key, origins)}"
    given = config.explain.options[method]
    if "lam" in names and given.get("fusion") in ("gated", "late", "carried"):
        if given["fusion"] == "gated":
            raise InputError(f"{said}: fusion=gated has no lam to choose. Drop it, or take fusion=column.")
        if names["lam"] == "per_layer":
            raise InputError(
                f"{said}: fusion={given['fusion']} fuses once, behind all blocks. Take lam=auto, or fusion=column."
            )
    if "lam" in names and given.get("fusion") == "diagonal" and set(chosen.grid) == {1.0}:
        raise wrong("calibrate.grid", chosen.grid, "a value below 1, which fusion=diagonal needs", origins)
    if "calibrate" in config.stages:
        if "explain" in config.stages and config.stages.index("calibrate") > config.stages.index("explain"):
            raise InputError(f"stages={show(config.stages)}: calibrate chooses {key} and comes before explain.")
    elif "explain" in config.stages and not (
        config.run.resume is not None and Path(config.run.resume, CALIBRATION_FILE).is_file()
    ):
        stages = [stage for stage in KNOWN_STAGES if stage in (*config.stages, "calibrate")]
        raise InputError(
            f"{said} is chosen by the stage calibrate, which is not among stages={show(config.stages)}. Set "
            f"stages={show(stages)}, or give {option} a value."
        )
    if chosen.split == config.explain.split:
        raise InputError(
            f"{said} is chosen on calibrate.split={chosen.split}{where('calibrate.split', origins)}, the split that is "
            "explained: what a value was chosen on cannot say how good it is. Set calibrate.split or "
            "explain.split to another."
        )
    operators = config.explain.operator
    if chosen.objective not in ("token_f1", "auprc") and operators in (chosen.operator, [chosen.operator]):
        raise InputError(
            f"{said} is chosen with calibrate.operator={chosen.operator}, the only one that the explanations are "
            "measured with: the choice would be judged by what it was made for. Set calibrate.operator to another, or "
            "add one to explain.operator."
        )


def _check_concepts(config: Config, origins: Origins) -> None:
    chosen = config.concepts
    for name, given in chosen.sets.items():
        if not isinstance(given, str) and len(given) != 1:
            raise wrong(f"concepts.sets.{name}", given, "a file, or one {column: value}", origins)
    if chosen.layers is not None:
        if not chosen.layers:
            raise wrong("concepts.layers", [], "at least one, or null", origins)
        _no_repeats("concepts.layers", map(str, chosen.layers), origins)
    if "concepts" in config.stages and not chosen.sets:
        raise wrong(
            "concepts.sets",
            {},
            "at least one concept for the stage concepts",
            origins,
            "For example concepts.sets={greeting: greetings.txt} or concepts.sets={toxic: {label: toxic}}.",
        )


def _check_windows(config: Config, origins: Origins) -> None:
    windows, key = config.data.windows, "data.windows.overlap"
    if windows.overlap is None:
        for name, value in vars(windows).items():
            if value != getattr(WindowsConfig(), name):
                raise wrong(key, None, f"a number of tokens with data.windows.{name}={show(value)}", origins)
        return
    if windows.overlap >= config.data.max_length:
        expected = f"less than data.max_length={config.data.max_length}, the length of a window"
        raise wrong(key, windows.overlap, expected, origins)
    if "concepts" in config.stages:
        raise InputError(
            f"{key}={windows.overlap}{where(key, origins)}: the stage concepts looks at one window of a text. Set "
            f"{key}=null, which truncates, or leave the stage out."
        )
    if config.explain.flows != 0:
        hint = "The flow of a long text, of every token to every other, is not kept."
        raise wrong("explain.flows", config.explain.flows, f"0 with {key}={windows.overlap}", origins, hint)


def _check_data(config: Config, origins: Origins) -> None:
    data = config.data
    built_in = BUILT_IN[data.modality]
    if data.name is None and data.path is None:
        raise InputError(
            "data.name and data.path are both null: set data.path=FILE_OR_FOLDER for your own files, "
            f"data.name={built_in} for the built-in data, or data.name=NAME for a data set of the hub."
        )
    if data.name is not None and data.path is not None:
        name, path = f"{data.name}{where('data.name', origins)}", f"{data.path}{where('data.path', origins)}"
        raise InputError(
            f"data.name={name} and data.path={path} exclude each other: for your own files "
            "add data=files (or data.name=null), else drop data.path."
        )
    for key in ("config", "revision"):
        if getattr(data, key) is not None and data.name in (None, built_in):
            source = f"data.path={data.path}" if data.name is None else f"data.name={built_in}"
            expected = f"null with {source}: it belongs to a data set of the hub"
            raise wrong(f"data.{key}", getattr(data, key), expected, origins)
    roles: dict[str, str] = {}
    for role, given in vars(data.columns).items():
        for column in given if isinstance(given, list) else [given]:
            if column is not None and column in roles:
                expected = f"another column than data.columns.{roles[column]}"
                raise wrong(f"data.columns.{role}", column, expected, origins)
            roles[column] = role
    _check_task(config, origins)
    if data.val_fraction + data.test_fraction >= 1:
        expected = f"less than 1 together with data.test_fraction={data.test_fraction}"
        raise wrong("data.val_fraction", data.val_fraction, expected, origins)
    if data.label_map is not None and not data.label_map:
        raise wrong("data.label_map", {}, "at least one label, or null", origins)


def _check_task(config: Config, origins: Origins) -> None:
    """What belongs to one kind of labels only."""
    data, model = config.data, config.model
    if data.columns.indicators is not None:
        if data.task != "multi_label":
            expected = f"null with data.task={show(data.task)}: a column per label belongs to data.task=multi_label"
            raise wrong("data.columns.indicators", data.columns.indicators, expected, origins)
        if not data.columns.indicators:
            raise wrong("data.columns.indicators", [], "at least one column, or null", origins)
        if data.columns.label is not None:
            expected = "null beside data.columns.indicators: either one column of lists, or a column per label"
            raise wrong("data.columns.label", data.columns.label, expected, origins)
    if data.name == "controlled" and data.task not in (None, "classification"):
        raise wrong("data.task", data.task, "classification with data.name=controlled", origins)
    if data.task in ("multi_label", "regression") and model.label_smoothing:
        expected = f"0 with data.task={data.task}: it spreads one class over the others"
        raise wrong("model.label_smoothing", model.label_smoothing, expected, origins)
    if data.task == "regression":
        for key, value in (("model.class_weights", model.class_weights), ("data.label_map", data.label_map)):
            if value is not None:
                raise wrong(key, value, "null with data.task=regression, which has no classes", origins)


def _origin(key: str, origins: Origins) -> str:
    return where(key, origins)[len(" (in ") : -1]


def _among(key: str, kind: str, given: str, options: Iterable[str], origins: Origins, hint: str = "") -> None:
    names = list(options)
    if given in names:
        return
    near = difflib.get_close_matches(given, names, n=1, cutoff=0.5)
    guess = f" Did you mean '{near[0]}'?" if near else ""
    message = f"{key}: unknown {kind} '{given}'{where(key, origins)}.{guess} Options: {', '.join(names)}. {hint}"
    raise InputError(message.rstrip())


def _no_repeats(key: str, names: Iterable[str], origins: Origins) -> None:
    for name, count in Counter(names).items():
        if count > 1:
            raise InputError(f"{key}: '{name}' is listed {count} times{where(key, origins)}.")


class _Misfit(Exception):
    """A value that does not have its type; raised with the innermost key."""

    def __init__(self, hint: Any, value: Any, key: str) -> None:
        super().__init__(key)
        self.hint, self.value, self.key = hint, value, key


def _fit(hint: Any, value: Any, key: str) -> Any:
    """Return the value in the type, or raise _Misfit."""
    origin, args = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        return _fit_union(hint, value, key)
    if origin is Literal:
        if any(value == arg and type(value) is type(arg) for arg in args):
            return value
    elif origin in (list, tuple) and isinstance(value, (list, tuple)):
        inner = args[0] if args else Any
        return origin(_fit(inner, item, f"{key}[{index}]") for index, item in enumerate(value))
    elif origin is dict and isinstance(value, dict):
        return {_name(name, key): _fit(args[1], item, f"{key}.{name}") for name, item in value.items()}
    elif hint is Any or (hint in (NoneType, None) and value is None):
        return value
    elif isinstance(hint, type) and origin is None:
        if type(value) is hint or (isinstance(value, hint) and not isinstance(value, bool)):
            return value
        if hint in (float, str) and type(value) is int:
            return hint(value)
    raise _Misfit(hint, value, key)


def _fit_union(hint: Any, value: Any, key: str) -> Any:
    args = get_args(hint)
    for arg in args:  # the exact type first: with int | float a 1.0 stays a float, with list | str a 2 is no string
        if arg is type(value):
            return value
    inner = None
    for arg in args:
        try:
            return _fit(arg, value, key)
        except _Misfit as misfit:
            if misfit.key != key:  # the right container with a wrong element: that element is what to name
                inner = misfit
    raise inner or _Misfit(hint, value, key)


def _name(name: object, key: str) -> str:
    if isinstance(name, bool) or not isinstance(name, (str, int)):
        # YAML reads yes, no, on and off as booleans
        raise _Misfit(str, name, f"{key}.{show(name)}")
    return str(name)


def _inside(value: float, limits: Mapping[str, float]) -> bool:
    tests = {"low": operator.ge, "high": operator.le, "above": operator.gt, "below": operator.lt}
    return math.isfinite(value) and all(tests[name](value, bound) for name, bound in limits.items())


def _expected(hint: Any, limits: Mapping[str, float] | None) -> str:
    """Spell the type with its range at the number: ``int >= 2 | auto``."""
    text = type_name(hint)
    signs = {"low": ">=", "above": ">", "high": "<=", "below": "<"}
    bounds = " and ".join(f"{sign} {limits[name]}" for name, sign in signs.items() if limits and name in limits)
    number = "float" if "float" in text else "int"
    return text.replace(number, f"{number} {bounds}", 1) if bounds else text


def _advice(hint: Any, value: Any, key: str) -> str:
    """A way out for the slips that are common."""
    parts = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
    literals = [str(arg) for part in parts if get_origin(part) is Literal for arg in get_args(part)]
    near = difflib.get_close_matches(str(value), literals, n=1, cutoff=0.5)
    if near:
        return f"Did you mean '{near[0]}'?"
    if isinstance(value, str) and any(get_origin(part) is list for part in parts) and not literals:
        return f"A list is written {key}=[{value}]."
    if str in parts and isinstance(value, (bool, float)):
        return "Put it in quotes if it is meant as text."
    return ""
