"""Data that can't be used, through prepare: what is wrong with them in one line, or a warning."""

from __future__ import annotations

import gzip
import json
import logging
import socket
from pathlib import Path
from typing import Any

import pytest

from coalign.config import DataTable
from coalign.data.inventory import Inventory
from coalign.data.sources import read_sources
from coalign.data.splits import split_instances
from coalign.errors import UserError

INSTRUCTION = "Name the colour."
TURNS = [("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d")]


def rows(*items: dict[str, Any]) -> str:
    return "".join(json.dumps(item) + "\n" for item in items)


def row(number: int, **values: Any) -> dict[str, Any]:
    return {"instruction": INSTRUCTION, "input": f"input {number}", "output": f"answer {number}"} | values


def read(path: Path, text: str, **settings: Any) -> Any:
    path.write_text(text, encoding="utf-8")
    return read_sources(DataTable(path=str(path), **settings))


@pytest.mark.parametrize("wrong", ["inputs", "inpt", "Input", "INPUT", "imput", "input "])
def test_key_that_is_nearly_input_is_an_error(wrong: str, tmp_path: Path) -> None:
    """Such rows would all have an empty input, and all but one would be dropped as repeats."""
    items = [{"instruction": INSTRUCTION, wrong: f"x{i}", "output": str(i)} for i in range(20)]
    with pytest.raises(UserError, match=rf"d\.jsonl, line 1: the key '{wrong}' is unknown; did you mean 'input'\?"):
        read(tmp_path / "d.jsonl", rows(*items))


def test_other_keys_and_rows_without_an_input_are_fine(tmp_path: Path) -> None:
    items = [row(1, index=3, text="x", inputs="kept apart"), {"instruction": INSTRUCTION, "output": "b", "index": 1}]
    assert len(read(tmp_path / "d.jsonl", rows(*items)).instances) == 2


@pytest.mark.parametrize(("wrong", "right"), [("instuction", "instruction"), ("Instruction", "instruction")])
def test_mistyped_required_key_is_named(wrong: str, right: str, tmp_path: Path) -> None:
    item = row(1)
    item[wrong] = item.pop(right)
    with pytest.raises(UserError, match=f"no '{right}'.*rename '{wrong}'" if wrong != "Instruction" else "no 'instr"):
        read(tmp_path / "d.jsonl", rows(item))


def test_conversations_of_several_turns_alone(tmp_path: Path) -> None:
    talk = {"messages": [{"role": role, "content": text} for role, text in TURNS]}
    with pytest.raises(UserError, match=r"all 3 rows were left out as multi_turn"):
        read(tmp_path / "d.jsonl", rows(talk, talk, talk))


@pytest.mark.parametrize(("name", "form"), [("d.jsonl.gz", "auto"), ("d.json.gz", "hf"), ("d.gz", "jsonl")])
def test_compressed_file_is_to_be_unpacked(name: str, form: Any, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_bytes(gzip.compress(rows(row(1)).encode()))
    for place in (path, tmp_path):
        with pytest.raises(UserError, match=r"compressed.*; unpack it first|no \*\.jsonl files"):
            read_sources(DataTable(path=str(place), format=form))


def test_compressed_content_under_another_name(tmp_path: Path) -> None:
    path = tmp_path / "d.jsonl"
    path.write_bytes(gzip.compress(rows(row(1)).encode()))
    with pytest.raises(UserError, match=r"the file is compressed \(gzip\); unpack it first"):
        read_sources(DataTable(path=str(path)))


def warnings_of(path: Path, *items: dict[str, Any]) -> list[str]:
    found = read(path, rows(*items))
    prepared = split_instances(found.tasks, found.instances, DataTable(path=str(path)))
    inventory = Inventory(prepared)
    list(inventory.examples())
    return list(inventory.warnings())


def test_every_row_with_an_instruction_of_its_own_is_warned_of(tmp_path: Path) -> None:
    alpaca = [row(i, instruction=f"Instruction {i}.") for i in range(50)]
    assert "50 of 50 tasks have a single input" in warnings_of(tmp_path / "d.jsonl", *alpaca)[0]
    assert not warnings_of(tmp_path / "e.jsonl", *(row(i) for i in range(50)))


def test_rows_that_are_mostly_repeats_are_warned_of(tmp_path: Path) -> None:
    lost = [{"instruction": INSTRUCTION, "output": str(i), "question": f"x{i}"} for i in range(20)]
    assert "19 of 20 rows repeat the instruction and input" in warnings_of(tmp_path / "d.jsonl", *lost)[0]


def test_missing_data_are_looked_for_on_the_hub_only_after_saying_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Without a name service nothing is retried: the library is told to stay offline."""
    import datasets
    from huggingface_hub import constants

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(logging.getLogger("coalign"), "propagate", True)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)

    def unknown(*_: Any, **__: Any) -> Any:
        raise socket.gaierror(-2, "Name or service not known")

    seen = []

    def load(*_: Any, **__: Any) -> Any:
        seen.append((constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE))
        raise ConnectionError("offline")

    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    monkeypatch.setattr(datasets, "load_dataset", load)
    with caplog.at_level(logging.INFO), pytest.raises(UserError, match="no such file or folder here, nor on the hub"):
        read_sources(DataTable(path="me/my-tasks"))
    assert seen == [(True, True)] and "me/my-tasks: no such file or folder here; looking" in caplog.text
    (tmp_path / "data").mkdir()
    for path in ("data/my-taks", "tasks.txt", "my.jsonl", "./tasks"):
        with pytest.raises(UserError, match=r"no such file or folder; check data\.path"):
            read_sources(DataTable(path=path))


@pytest.mark.parametrize("content", [b"PAR1", b"", b"not a parquet file at all"])
def test_broken_parquet_is_one_error_without_the_librarys_own_lines(
    content: bytes, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "d.parquet"
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"d\.parquet: not readable"):
        read_sources(DataTable(path=str(path)))
    assert capfd.readouterr().err == ""


def test_header_of_a_csv_that_its_parser_refuses(tmp_path: Path) -> None:
    path = tmp_path / "d.csv"
    path.write_text("instruction," + "x" * 200_000 + "\na,b\n", encoding="utf-8")
    with pytest.raises(UserError, match=r"d\.csv: not readable \(Error: field larger"):
        read_sources(DataTable(path=str(path)))
