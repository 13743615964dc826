"""What every key refuses: numbers beyond its bounds, texts that are no name or path, words that are no value."""

from __future__ import annotations

import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import pytest
from pydantic.fields import FieldInfo

from coalign.commandline import DEFAULT_CONFIG, load
from coalign.config import Config, SftTable
from coalign.errors import UserError
from coalign.tables import Table

EXTREMES = (
    "0",
    "-1",
    "1" + "0" * 30,
    "-1" + "0" * 30,
    "2147483648",
    "nan",
    "inf",
    "-inf",
    "1e-300",
    "1e300",
    "9" * 5000,
)
PATHS = {
    *("run.folder", "run.inputs", "model.path", "model.chat_template", "data.path", "paraphrase.files", "sft.replay"),
    *("judge.model", "eval.models", "eval.agreement", "eval.wordings_file", "eval.folder", "slurm.venv"),
}
# Texts in which a line break is no mistake: tokens, separators, and names in the data.
FREE = {
    "model.end_of_turn",
    "model.pad_token",
    "judge.item_separator",
    "data.unseen_tasks",
    "data.only_tasks",
    "data.answer_form",
}


def fields(table: Any = Config, prefix: str = "") -> Iterator[tuple[str, FieldInfo]]:
    """Yield every key, flat, with its field."""
    for name, field in table.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, Table):
            yield from fields(field.annotation, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", field


FIELDS = dict(fields())
NUMBERS = [name for name, field in FIELDS.items() if field.annotation in (int, float)]
TEXTS = [
    name
    for name, field in FIELDS.items()
    if field.annotation is str
    or (isinstance(field.annotation, types.GenericAlias) and str in get_args(field.annotation))
]


def outcome(word: str) -> Any:
    """Return the value that a word of the command line gives its key, or the error."""
    key, value = word.partition("=")[0], None
    try:
        value = load(DEFAULT_CONFIG, [word])
    except UserError as error:
        return error
    for part in key.split("."):
        value = value[part] if isinstance(value, dict) else getattr(value, part)
    return value


@pytest.mark.parametrize("key", NUMBERS)
def test_extreme_number_is_refused_in_one_short_line_or_within_bounds(key: str) -> None:
    for number in EXTREMES:
        found = outcome(f"{key}={number}")
        if isinstance(found, UserError):
            assert key.rpartition(".")[2] in str(found) and len(str(found)) < 900 and "\n" not in str(found)
        else:
            most = 2**63 - 1 if key == "run.seed" else 1e300 if key.endswith("learning_rate") else 2**31 - 1
            assert -1 <= found <= most, (key, number)


@pytest.mark.parametrize(
    "word",
    [
        *("train.beta1=1", "train.beta2=1.0", "run.seed=-1", "run.seed=9223372036854775808", "run.threads=100000"),
        *("sample.samples=100000000", "generation.workers=1000000", "eval.num_bootstrap=1000000000"),
        *("model.random.hidden_size=100000000", "sample.temperature=1e-300", "paraphrase.max_attempts=100000000"),
    ],
)
def test_number_beyond_its_bound(word: str) -> None:
    found = outcome(word)
    assert isinstance(found, UserError) and word.partition("=")[0].rpartition(".")[2] in str(found)


def test_training_that_would_not_end() -> None:
    """A batch of more rows than there are is fine; a million passes are a mistake."""
    SftTable(epochs=1, batch_rows=10**8).require_end(24, 10**8)
    SftTable(epochs=0, max_steps=250_000, batch_rows=4).require_end(12, 4)
    for table in (SftTable(epochs=0, max_steps=3, batch_rows=10**8), SftTable(epochs=1e9, batch_rows=1)):
        with pytest.raises(UserError, match=r"^sft\.(max_steps=3 x 100,000,000|epochs=1e\+09) asks for .* passes over"):
            table.require_end(24, table.batch_rows)


@pytest.mark.parametrize("key", sorted(PATHS))
def test_path_knows_the_home_folder_and_variables(key: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/own")
    monkeypatch.setenv("PLACE", "disk")
    given = {"~/x": "/own/x", "$PLACE/x": "disk/x", "/a/${PLACE}": "/a/disk", "./~/x": "./~/x", "a/b": "a/b"}
    kind = FIELDS[key].annotation
    for text, expected in given.items():
        if kind is str:
            assert outcome(f"{key}={text}") == expected
        elif get_args(kind) == (str,):
            assert outcome(f'{key}=["{text}"]') == [expected]
        else:
            assert outcome(f'{key}={{sft="{text}"}}') == {"sft": expected}
    value = "$NOSUCH/x" if kind is str else '["$NOSUCH/x"]' if get_args(kind) == (str,) else '{sft="$NOSUCH/x"}'
    assert "no variable NOSUCH" in str(outcome(f"{key}={value}"))


def test_every_key_that_names_a_file_or_folder_is_a_path() -> None:
    named = {
        key for key in TEXTS if any(word in (FIELDS[key].description or "") for word in ("folder", "file", "JSONL"))
    }
    assert named - PATHS == {"run.name", "paraphrase.num_test"} & named


def test_sources_are_paths_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/own")
    path = tmp_path / "c.toml"
    path.write_text('[[data.sources]]\npath = "~/x"\n', encoding="utf-8")
    assert load(path).data.sources[0].path == "/own/x"
    path.write_text('[[data.sources]]\npath = ""\n', encoding="utf-8")
    with pytest.raises(UserError, match=r'data\.sources\.0\.path="" names no data'):
        load(path)


@pytest.mark.parametrize(
    "name", ["", " ", ".", "..", "../../x", "/x", "a/../b", "a//b", "~/x", "a\nb", "a\x00b", "\x1b[2J"]
)
def test_run_name_is_a_name(name: str) -> None:
    found = outcome(f"run.name={name}")
    assert isinstance(found, UserError) and "\n" not in str(found) and "\x1b" not in str(found)


@pytest.mark.parametrize("name", ["demo", "1", "a/b", "rounds.2", "été", "a b"])
def test_run_name_of_any_script(name: str) -> None:
    assert outcome(f"run.name={name}") == name


@pytest.mark.parametrize("key", sorted({*TEXTS} - FREE))
def test_line_break_and_control_character_are_refused(key: str) -> None:
    for text in ("a\\nb", "a\\u0000b", "\\u001b]0;x", "a\\u2028b"):
        kind = FIELDS[key].annotation
        quoted = f'"{text}"'
        value = quoted if kind is str else f"[{quoted}]" if get_args(kind) == (str,) else f"{{sft={quoted}}}"
        found = outcome(f"{key}={value}")
        assert isinstance(found, UserError)
        assert "control character" in str(found) or "is no name" in str(found)


def test_what_stands_after_a_line_break_is_not_dropped() -> None:
    assert "goes on after a line break" in str(outcome("run.seed=1\nother=2"))
    assert "control character" in str(outcome("run.name=1\nother=2"))


def test_config_with_a_byte_order_mark(tmp_path: Path) -> None:
    path = tmp_path / "c.toml"
    path.write_bytes(b"\xef\xbb\xbf[run]\r\nname = 'x'\r\n")
    assert load(path).run.name == "x"


@pytest.mark.parametrize(
    "text",
    ["a = " + "[" * 100_000, "a = " + "[" * 400 + "]" * 400, "a = " + "1" * 5000, "[run]\nseed = 0x" + "f" * 5000],
)
def test_config_that_no_parser_takes(text: str, tmp_path: Path) -> None:
    path = tmp_path / "c.toml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match=r"c\.toml") as caught:
        load(path)
    assert len(str(caught.value)) < 1200


def test_bound_of_the_seed_is_one_that_torch_takes() -> None:
    import torch

    assert outcome("run.seed=9223372036854775807") == 2**63 - 1
    torch.Generator().manual_seed(2**63 - 1)
