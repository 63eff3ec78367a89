"""The registry of attribution methods: every module of this folder that defines an `AttributionMethod` is one.

Method modules import no torch at their top, so that names, summaries and options can be read without it.
"""

from __future__ import annotations

import dataclasses
import importlib
import pkgutil
import types
import typing
from collections.abc import Mapping
from functools import cache
from typing import Any

from calig.pipeline.attribution.methods.base import AttributionMethod
from calig.pipeline.errors import InputError, unknown

__all__ = ["AttributionMethod", "available_methods", "create_method", "method_class", "method_options", "takes_option"]


@cache
def _registry() -> dict[str, type[AttributionMethod]]:
    found: dict[str, type[AttributionMethod]] = {}
    for info in pkgutil.iter_modules(__path__):
        module = importlib.import_module(f"{__name__}.{info.name}")
        for item in vars(module).values():
            own = isinstance(item, type) and issubclass(item, AttributionMethod) and item.__module__ == module.__name__
            if own and (name := item.__dict__.get("name")):
                found[name] = item
    return dict(sorted(found.items()))


def available_methods() -> tuple[str, ...]:
    """The names that `attribute(method=...)` and `explain.methods` accept, in alphabetical order."""
    return tuple(_registry())


def method_class(name: str) -> type[AttributionMethod]:
    """The class behind a method's name.

    Raises:
        InputError: No method has this name; the message suggests the nearest and lists all.
    """
    if name not in _registry():
        raise unknown("attribution method", name, available_methods())
    return _registry()[name]


def method_options(name: str) -> type:
    """The options dataclass of a method; its fields are what `attribute(method=name, **options)` accepts."""
    return method_class(name).Options


def takes_option(name: str, option: str, value: Any) -> bool:
    """Whether a method has an option and the value is of its type: `steps: auto` is not for every path."""
    hints = typing.get_type_hints(method_options(name))
    return option in hints and _fits(value, hints[option])


def create_method(name: str, options: Mapping[str, Any] | None = None) -> AttributionMethod:
    """Build a method from its name and options.

    Raises:
        InputError: An unknown method or option, or a value of the wrong type; the message names it.
    """
    cls = method_class(name)
    known = {field.name: field for field in dataclasses.fields(cls.Options)}
    hints = typing.get_type_hints(cls.Options)
    for key, value in (options or {}).items():
        if key not in known:
            raise unknown(f"option of method '{name}'", key, known)
        if not _fits(value, hints[key]):
            raise InputError(f"option '{key}' of method '{name}' takes {_spell(hints[key])}, got {value!r}.")
    return cls(cls.Options(**(options or {})))


def _fits(value: Any, hint: Any) -> bool:
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return any(_fits(value, arm) for arm in typing.get_args(hint))
    if typing.get_origin(hint) is typing.Literal:
        return any(value == choice and type(value) is type(choice) for choice in typing.get_args(hint))
    if typing.get_origin(hint) in (list, tuple):
        inner = typing.get_args(hint)[0]
        return isinstance(value, typing.get_origin(hint)) and all(_fits(item, inner) for item in value)
    if hint is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return value is None if hint is type(None) else isinstance(value, hint)


def _spell(hint: Any) -> str:
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return " or ".join(dict.fromkeys(_spell(arm) for arm in typing.get_args(hint)))
    if typing.get_origin(hint) is typing.Literal:
        return "one of " + ", ".join(repr(choice) for choice in typing.get_args(hint))
    if typing.get_origin(hint) in (list, tuple):
        return "a list of numbers"
    return "a number" if hint is float else getattr(hint, "__name__", str(hint))
