"""Between frozen dataclasses and JSON: the form of a file is declared once, as classes, and checked when it is read.

A field with the metadata FLAT holds a dataclass whose keys stand on disk among those of the object around it. A field
with a default may be missing in a file from before versions were written. Knows no file of ours in particular.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import types
from collections.abc import Mapping
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from coalign.errors import MalformedError, UserError

VERSION_KEY = "version"
FLAT = types.MappingProxyType({"flat": True})  # metadata of a field
MAX_WHOLE = 2**63 - 1
_NAMES = {str: "a text", int: "a whole number", float: "a number", bool: "true or false"}

Declared = TypeVar("Declared")


def to_json(value: Any) -> Any:
    """Return a dataclass as dicts and lists, keys in the order of its fields."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        found: dict[str, Any] = {}
        for field in dataclasses.fields(value):
            plain = to_json(getattr(value, field.name))
            found |= plain if field.metadata == FLAT else {field.name: plain}
        return found
    if isinstance(value, Mapping):
        return {key: to_json(one) for key, one in value.items()}
    return [to_json(one) for one in value] if isinstance(value, tuple | list) else value


def from_json(kind: type[Declared], value: Any, *, older: bool = False) -> Declared:
    """Return a dataclass from what `to_json` made. Raises MalformedError.

    `older` lets fields that have a default be missing.
    """
    made: Declared = _read(kind, value, "", older)
    return made


def with_version(value: Any, version: int) -> dict[str, Any]:
    """Return a dataclass as a JSON object that begins with the version of its form."""
    return {VERSION_KEY: version, **to_json(value)}


def read_version(kind: type[Declared], content: dict[str, Any], version: int, file: str) -> Declared:
    """Return a dataclass from a JSON object with at most this version; without one it counts as version 0.

    Raises UserError, which names the file and the field.
    """
    rest = dict(content)
    found = rest.pop(VERSION_KEY, 0)
    if not isinstance(found, int) or isinstance(found, bool) or found < 0:
        raise UserError(f"{file}: {VERSION_KEY}: a whole number was expected, not {found!r}; run the step again")
    if found > version:
        raise UserError(
            f"{file} has version {found} of its format, and this coalign reads versions up to {version}; upgrade"
            " coalign, or run the step again with this one"
        )
    try:
        return from_json(kind, rest, older=found < version)
    except MalformedError as error:
        raise UserError(f"{file}: {error}; restore the file as it was written, or run the step again") from error


@functools.cache
def _fields_of(kind: type) -> dict[str, tuple[dataclasses.Field[Any], Any]]:
    """Return the fields of a dataclass with their types, which are texts in the class itself."""
    hints = get_type_hints(kind)
    return {field.name: (field, hints[field.name]) for field in dataclasses.fields(kind)}


@functools.cache
def _keys_of(kind: type) -> frozenset[str]:
    """Return the keys that a dataclass has on disk."""
    keys: set[str] = set()
    for name, (field, hint) in _fields_of(kind).items():
        keys |= _keys_of(hint) if field.metadata == FLAT else {name}
    return frozenset(keys)


def _read(kind: Any, value: Any, path: str, older: bool) -> Any:
    origin, arguments = get_origin(kind), get_args(kind)
    if kind is Any:
        return value
    if isinstance(kind, type) and dataclasses.is_dataclass(kind):
        return _read_object(kind, _checked(dict, value, path, "an object"), path, older)
    if origin in (Union, types.UnionType):
        if value is None:
            return None
        (inner,) = (one for one in arguments if one is not types.NoneType)
        return _read(inner, value, path, older)
    if origin is tuple:
        rows = _checked(list, value, path, "a list")
        return tuple(_read(arguments[0], one, f"{path}[{place}]", older) for place, one in enumerate(rows))
    if origin is dict:
        items = _checked(dict, value, path, "an object").items()
        for key, _ in items:
            _require_whole(key, path)
        return {key: _read(arguments[1], one, _join(path, key), older) for key, one in items}
    if origin is Literal:
        if value not in arguments:
            raise MalformedError(f"{path}: one of {', '.join(map(repr, arguments))} was expected, not {_short(value)}")
        return value
    accepted = (int, float) if kind is float else kind
    return _checked(accepted, value, path, _NAMES[kind], boolean=kind is bool)


def _read_object(kind: type, value: dict[str, Any], path: str, older: bool) -> Any:
    unknown = sorted(value.keys() - _keys_of(kind))
    if unknown:
        raise MalformedError(f"{_join(path, unknown[0])}: unknown field")
    values = {}
    for name, (field, hint) in _fields_of(kind).items():
        if field.metadata == FLAT:
            own = {key: value[key] for key in value if key in _keys_of(hint)}
            values[name] = _read_object(hint, own, path, older)
        elif name in value:
            values[name] = _read(hint, value[name], _join(path, name), older)
        elif not older or (field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING):
            raise MalformedError(f"{_join(path, name)}: missing field")
    return kind(**values)


def _checked(kind: Any, value: Any, path: str, expected: str, boolean: bool = False) -> Any:
    if not isinstance(value, kind) or (isinstance(value, bool) and not boolean):
        raise MalformedError(f"{path or 'the file'}: {expected} was expected, not {_short(value)}")
    if isinstance(value, float) and not math.isfinite(value):
        raise MalformedError(f"{path}: a finite number was expected, not {value}")
    if isinstance(value, int) and abs(value) > MAX_WHOLE:
        raise MalformedError(f"{path}: a whole number of at most 19 digits was expected")
    if isinstance(value, str):
        _require_whole(value, path)
    return value


def _require_whole(text: str, path: str) -> None:
    """Raise MalformedError for half a surrogate pair, which JSON can spell and no file can hold."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise MalformedError(f"{path}: half a surrogate pair stands at character {error.start}") from error


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:39]}…"
