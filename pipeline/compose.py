"""Composition of a configuration: schema < groups < experiment < debug < ``key=value``.

OmegaConf reads YAML, merges the layers and resolves ``${...}``; it ends here, and plain dataclasses go down.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, is_dataclass
from importlib import resources
from pathlib import Path
from typing import Any, cast

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from calig.pipeline.config import GROUPS, Config, hints, show, type_name
from calig.pipeline.errors import InputError, unknown
from calig.pipeline.validate import (
    build,
    check_methods,
    check_trainer,
    check_values,
    convert,
    unknown_key,
    where,
    wrong,
)
from calig.pipeline.validate_modality import check_modality

DEFAULT_EXPERIMENT = "quickstart"
CONFIG_FILE = "config.yaml"
"""The file of a run directory that keeps its configuration."""

_SELECTORS = (*GROUPS, "experiment", "debug")
_SUFFIXES = (".yaml", ".yml")


@dataclass(frozen=True)
class _Layer:
    """A part of the configuration and the file that says it ("" for the command line)."""

    content: dict[str, Any]
    origin: str = ""
    folder: Path = Path()


def compose(overrides: Sequence[str], *, check: bool = True) -> Config:
    """Compose the configuration that a command line names.

    With ``run.resume=DIR`` and no experiment, the configuration of that run stands in the experiment's place.

    Args:
        overrides: ``experiment=NAME|FILE.yaml``, ``debug=NAME|FILE.yaml``, ``group=option|FILE.yaml`` and
            ``key.sub=value``, in any order.
        check: Check Trainer arguments too, which imports Lightning.

    Raises:
        InputError: Whatever is wrong, in one message that names the key, the nearest one and the options.
    """
    selected, pairs = _split(overrides)
    resume = next((layer.content["run"]["resume"] for key, layer in pairs if key == "run.resume"), None)
    if isinstance(resume, str) and "experiment" not in selected:
        for group in GROUPS:
            if group in selected:
                raise InputError(
                    f"{group}={selected[group]} says nothing to a run that is continued from its own config.yaml: "
                    f"name the experiment too, or set single keys ({group}.<key>=value)."
                )
        groups, experiment = {}, _run_layer(resume)
        name = Path(resume).name
    else:
        choice = selected.get("experiment", DEFAULT_EXPERIMENT)
        experiment = _select("experiment", choice)
        groups = _defaults(experiment)
        name = choice if not choice.endswith(_SUFFIXES) else Path(choice).stem
    layers = []
    for group in GROUPS:
        if group in selected:
            layers.append(_group_layer(group, selected[group]))
        elif group in groups:
            layers.append(_group_layer(group, groups[group], experiment))
    layers.append(experiment)
    if "debug" in selected:
        layers.append(_select("debug", selected["debug"]))
    return _assemble([*layers, *(layer for _, layer in pairs)], name, check)


def load(path: str | Path, overrides: Sequence[str] = (), *, check: bool = True) -> Config:
    """Read the configuration of a run again, with the same checks as ``compose``.

    Args:
        path: A run directory or its ``config.yaml``.
        overrides: ``key.sub=value`` settings on top.
        check: Check Trainer arguments too, which imports Lightning.
    """
    selected, pairs = _split(overrides)
    for selector, choice in selected.items():
        raise InputError(f"{selector}={choice} cannot be put on top of {path}: only key=value settings can.")
    layer = _run_layer(path, keep=True)
    return _assemble([layer, *(pair for _, pair in pairs)], Path(layer.origin).parent.name, check)


def to_yaml(config: Config) -> str:
    """Print a configuration as YAML that ``load`` reads back."""
    return OmegaConf.to_yaml(OmegaConf.create(_plain(asdict(config))))


def save(config: Config, path: str | Path) -> None:
    """Write a configuration to a file, or to ``config.yaml`` in a directory."""
    path = Path(path)
    target = path / CONFIG_FILE if path.is_dir() else path
    target.write_text(to_yaml(config), encoding="utf-8")


def options(group: str) -> list[str]:
    """List what a group (``model`` ... ``logger``, ``experiment``, ``debug``) offers: its YAML files, by name."""
    folder = resources.files("calig.configs") / group
    return sorted(item.name.removesuffix(".yaml") for item in folder.iterdir() if item.name.endswith(".yaml"))


def _split(overrides: Sequence[str]) -> tuple[dict[str, str], list[tuple[str, _Layer]]]:
    """Part the command line into what is selected and one layer for each ``key=value``."""
    selected: dict[str, str] = {}
    pairs: dict[str, _Layer] = {}
    for argument in overrides:
        key, sign, text = (part.strip() for part in argument.partition("="))
        if not sign:
            raise InputError(
                f"'{argument}' is not of the form key=value. Expected experiment=NAME, debug=NAME, group=option "
                f"(groups: {', '.join(GROUPS)}) or key.sub=value."
            )
        parts = key.split(".")
        if not all(parts):
            raise InputError(f"'{argument}' has an empty key. Expected key.sub=value, for example seed=1.")
        if key in selected or key in pairs:
            raise InputError(f"'{key}' is given twice: keep one of them.")
        if key in _SELECTORS:
            if not text:
                raise unknown(f"{key} option", text, options(key), f"A file of your own: {key}=FILE.yaml.")
            selected[key] = text
            continue
        content: Any = _value(key, text)
        for part in reversed(parts):
            content = {part: content}
        pairs[key] = _Layer(content)
    return selected, list(pairs.items())


def _value(key: str, text: str) -> Any:
    """Type the value of ``key=value``: text as it stands for keys that take text only, else as OmegaConf's dotlist."""
    quoted = text[:1] in ("'", '"')
    if _takes_text(key) and not quoted:  # `001`, `1e5` and `*.csv` are names here, not numbers or YAML
        return None if text in ("", "null", "~") else text
    try:
        return OmegaConf.to_container(OmegaConf.from_dotlist([f"value={text}"]))["value"]  # type: ignore[index,call-overload]
    except Exception as error:  # whatever the YAML parser raises
        reason = getattr(error, "problem", None) or str(error).splitlines()[0]
        message = f"{key}: cannot read the value {text} ({reason}). Put text with special characters in quotes."
        raise InputError(message) from error


def _takes_text(key: str) -> bool:
    hint: Any = Config
    for part in key.split("."):
        if not is_dataclass(hint):
            return False
        hint = hints(hint).get(part)  # type: ignore[arg-type]  # a class, not an instance
    return hint in (str, str | None)


def _read(text: str, origin: str, folder: Path) -> _Layer:
    try:
        content = OmegaConf.to_container(OmegaConf.create(text))
    except Exception as error:  # the YAML parser's errors carry the place
        mark = getattr(error, "problem_mark", None)
        place = f", line {mark.line + 1}" if mark else ""
        reason = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise InputError(f"{origin}{place}: not valid YAML ({reason}).") from error
    if not isinstance(content, dict):
        raise InputError(f"{origin}: expected a mapping of keys to values, found a list.")
    return _Layer(cast(dict[str, Any], content), origin, folder)


def _select(group: str, choice: str, beside: _Layer | None = None) -> _Layer:
    """Read an option of a group by its name, or a file of the user's (relative to the file that names it)."""
    if choice.endswith(_SUFFIXES):
        path = (beside.folder if beside else Path()) / Path(choice).expanduser()
        if not path.is_file():
            said = f" (named in {beside.origin})" if beside else ""
            known = ", ".join(options(group))
            raise InputError(f"{group}={choice}: no such file{said}. Options by name: {known}.")
        return _read(_text(path), str(path), path.parent)
    if choice not in options(group):
        hint = f"A file of your own: {group}=FILE.yaml."
        raise unknown(
            f"{group} option", choice, options(group), hint + (f" Named in {beside.origin}." if beside else "")
        )
    text = (resources.files("calig.configs") / group / f"{choice}.yaml").read_text(encoding="utf-8")
    return _read(text, f"configs/{group}/{choice}.yaml", Path())


def _group_layer(group: str, choice: str, beside: _Layer | None = None) -> _Layer:
    layer = _select(group, choice, beside)
    return _Layer({group: layer.content}, layer.origin)


def _run_layer(path: str | Path, keep: bool = False) -> _Layer:
    """Read a run's own config.yaml; where the run is continued, without how and where it was started."""
    file = Path(path)
    file = file if file.suffix in _SUFFIXES else file / CONFIG_FILE
    if not file.is_file():
        raise InputError(f"{path}: no {CONFIG_FILE} there, so this is no run directory of calig.")
    layer = _read(_text(file), str(file), file.parent)
    if not keep and isinstance(layer.content.get("run"), dict):
        for key in ("dir", "resume", "overwrite"):
            layer.content["run"].pop(key, None)
    return layer


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read as text ({error}).") from error


def _defaults(experiment: _Layer) -> dict[str, str]:
    """Take the ``defaults`` mapping (group: option) out of an experiment."""
    defaults = experiment.content.pop("defaults", None) or {}
    if not isinstance(defaults, dict):
        raise InputError(f"{experiment.origin}: defaults: expected a mapping such as {{model: tiny}}, got {defaults}.")
    for group, choice in defaults.items():
        if group not in GROUPS:
            raise unknown_key("defaults.", str(group), GROUPS, experiment.origin)
        if not isinstance(choice, str):
            raise InputError(f"{experiment.origin}: defaults.{group}: expected the name of an option, got {choice}.")
    return defaults


def _assemble(layers: Sequence[_Layer], name: str, check: bool) -> Config:
    """Merge checked layers over the schema, resolve, fill in the run's name and place, and check the whole."""
    origins: dict[str, str] = {}
    merged = OmegaConf.create(_plain(asdict(Config())))
    try:
        for layer in layers:
            merged.merge_with(OmegaConf.create(_checked(Config, layer.content, "", layer.origin, origins)))
        content = OmegaConf.to_container(merged, resolve=True)
    except OmegaConfBaseException as error:  # keys and types are checked: what is left is a ${...} that leads nowhere
        key = str(error.full_key or error.key or "")
        message = (
            f"{key}: {str(error).splitlines()[0]}{where(key, origins)}. ${{section.key}} takes the value of a key."
        )
        raise InputError(message) from error
    config = build(Config, cast(dict[str, Any], content), origins)
    run = config.run
    run.name = run.name or name
    if run.resume is not None:
        run.dir = run.dir or run.resume
    run.dir = run.dir or str(Path("runs", run.name))
    check_values(config, origins)
    check_modality(config, origins)
    check_methods(config, origins)
    if check:
        check_trainer(config, origins)
    return config


def _checked(
    section: type, content: Mapping[Any, Any], prefix: str, origin: str, origins: dict[str, str]
) -> dict[str, Any]:
    """Check one layer's keys and types against the schema and note where each key comes from."""
    limits = {item.name: item.metadata.get("limits") for item in fields(section)}
    result: dict[str, Any] = {}
    for name, value in content.items():
        key = f"{prefix}{name}"
        if name not in limits:
            hint = "Keys in a file are nested, not dotted." if origin and "." in str(name) else ""
            name = str(name)
            while not origin and isinstance(value, dict) and len(value) == 1:  # the key as it was typed
                below, value = next(iter(value.items()))
                name = f"{name}.{below}"
            raise unknown_key(prefix, name, limits, origin, hint)
        hint_type = hints(section)[name]
        origins[key] = origin
        if is_dataclass(hint_type):
            if not isinstance(value, dict) and not (value is None and origin):
                below = ", ".join(item.name for item in fields(hint_type))
                place = f" (in {origin})" if origin else ""
                message = f"{key}={show(value)}{place}: {key} is a section, not a value. Its keys: {below}."
                raise InputError(message)
            result[name] = _checked(hint_type, value or {}, f"{key}.", origin, origins)  # type: ignore[arg-type]
            continue
        if isinstance(value, dict):
            _note(value, key, origin, origins)
        if value == "???":  # OmegaConf's mark for a value that must be given would be dropped in the merge
            raise wrong(key, value, type_name(hint_type), origins)
        if not _interpolated(value):
            value = convert(hint_type, value, key, origins, limits[name])
        result[name] = value
    return result


def _note(content: Mapping[Any, Any], prefix: str, origin: str, origins: dict[str, str]) -> None:
    """Note where the keys inside an open dict come from."""
    for name, value in content.items():
        origins[f"{prefix}.{name}"] = origin
        if isinstance(value, dict):
            _note(value, f"{prefix}.{name}", origin, origins)


def _interpolated(value: Any) -> bool:
    """Whether a value waits for others: it is typed once they are known."""
    if isinstance(value, (list, dict)):
        return any(map(_interpolated, value.values() if isinstance(value, dict) else value))
    return isinstance(value, str) and "${" in value


def _plain(value: Any) -> Any:
    """Make values what YAML knows, with a literal ``${`` escaped."""
    if isinstance(value, dict):
        return {name: _plain(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value.replace("${", "\\${") if isinstance(value, str) else value
