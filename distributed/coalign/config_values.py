"""Values of a Config as flat keys, {"table.key": value}: for manifests, and for what a step announces.

Knows no step and no file.
"""

from __future__ import annotations

from typing import Any, get_args

from pydantic.fields import FieldInfo

from coalign.config import Config
from coalign.tables import Table as Table


def table_values(config: Config, tables: tuple[str, ...], *, with_neutral: bool = True) -> dict[str, Any]:
    """Return {"table.key": value} of the tables, flat; `with_neutral` False leaves out what a manifest does.

    Those are neutral keys, and later keys at their default.
    """
    flat: dict[str, Any] = {}
    for name in tables:
        _collect(getattr(config, name), name, flat, with_neutral)
    return flat


def changed_values(config: Config, tables: tuple[str, ...]) -> dict[str, Any]:
    """Return the flat keys of the tables whose value differs from the built-in default."""
    defaults = table_values(Config(), tables)
    return {key: value for key, value in table_values(config, tables).items() if defaults.get(key) != value}


def default_values() -> dict[str, Any]:
    """Return {"table.key": value} of the built-in defaults, flat."""
    return table_values(Config(), tuple(Config.model_fields))


def differing_values(values: dict[str, Any]) -> dict[str, Any]:
    """Return those of flat values, such as a manifest's, that differ from the built-in default."""
    defaults = default_values()
    return {key: value for key, value in values.items() if defaults.get(key) != value}


def _collect(table: Table, prefix: str, flat: dict[str, Any], with_neutral: bool) -> None:
    for key, field in type(table).model_fields.items():
        value = getattr(table, key)
        if isinstance(value, Table):
            _collect(value, f"{prefix}.{key}", flat, with_neutral)
        elif value == {} and issubclass(get_args(field.annotation)[-1], Table):
            continue  # tables by name of which none is set: as in manifests from before the key
        elif with_neutral or not _left_out(value, field):
            flat[f"{prefix}.{key}"] = _plain(value)


def _plain(value: Any) -> Any:
    """Return a key's value for JSON."""
    if isinstance(value, list):
        return [one.model_dump() if isinstance(one, Table) else one for one in value]
    if isinstance(value, dict) and any(isinstance(one, Table) for one in value.values()):
        return {name: one.model_dump(exclude_unset=True) for name, one in value.items()}
    return value


def _left_out(value: Any, field: FieldInfo) -> bool:
    extra = field.json_schema_extra if isinstance(field.json_schema_extra, dict) else {}
    return bool(extra.get("neutral") or (extra.get("later") and value == field.default))


def known_keys() -> list[str]:
    """Return the name of every key, flat, with those of the tables themselves."""
    flat: dict[str, Any] = {}
    config = Config()
    for name in Config.model_fields:
        _collect(getattr(config, name), name, flat, with_neutral=True)
    return [*flat, *Config.model_fields, "model.lora", "model.random", "data.answer_form"]
