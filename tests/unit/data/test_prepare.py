"""launch/prepare.py in this process: what it writes, that it repeats, and its answer to every kind of bad input."""

from __future__ import annotations

import importlib.util
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from coalign.errors import UserError
from coalign.records import Example, Task, read_records, read_rows
from coalign.runs.step_folder import read_manifest

ROOT = Path(__file__).resolve().parents[3]
SNI_MINI = ROOT.parent / "shared" / "data" / "sni-mini"


def load_recipe() -> Callable[[list[str]], None]:
    spec = importlib.util.spec_from_file_location("recipe_prepare", ROOT / "launch" / "prepare.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    main: Callable[[list[str]], None] = module.main
    return main


def prepare(folder: Path, data: Path | str, *settings: str) -> Path:
    """Run the recipe with nothing but the given settings and return the step's folder."""
    config = folder / "config.toml"
    config.write_text("", encoding="utf-8")
    load_recipe()([str(config), f"run.folder={folder / 'runs'}", "run.name=r", f"data.path={data}", *settings])
    return folder / "runs" / "r" / "prepare"


def line(**values: Any) -> bytes:
    return json.dumps(values).encode() + b"\n"


def good(number: int = 0, **values: Any) -> bytes:
    return line(**{"instruction": "Say it.", "input": f"input {number}", "output": "yes", **values})


def messages(*roles: str) -> bytes:
    return line(messages=[{"role": role, "content": "text"} for role in roles])


def sni(**values: Any) -> bytes:
    task = {"Definition": ["Say it."], "Instances": [{"input": "a", "output": ["b"]}], **values}
    return json.dumps({key: value for key, value in task.items() if value is not None}).encode()


TASK = "d/tasks/task1.json"
TRAIN = "d/splits/default/train_tasks.txt"
TEST = "d/splits/default/test_tasks.txt"

# name: (files to write, data.path, further settings, what the error must match); a new case is one row.
BAD_INPUT: dict[str, tuple[dict[str, bytes], str, list[str], str]] = {
    "no path": ({}, "", [], r'data\.path="" names no data; set data\.path'),
    "missing folder": ({}, "./nope", [], r"nope: no such file or folder; check data\.path"),
    "missing file": ({}, "nope.jsonl", [], r"nope\.jsonl: no such file or folder"),
    "missing, not a hub name": ({}, "a/b/c", [], r"a/b/c: no such file or folder"),
    "missing, other format": ({}, "nope", ["data.format=sni"], r"nope: no such file or folder"),
    "unknown kind": ({"d.xyz": b"x"}, "d.xyz", [], r"d\.xyz: unknown kind of file; expected \.json,"),
    "sni from a file": ({"d.json": b"{}"}, "d.json", ["data.format=sni"], r"d\.json is a file; data\.format=sni needs"),
    "folder without data": ({"d/readme.md": b""}, "d", [], r"d: the folder holds no data; expected tasks/\*\.json"),
    "folder without tasks": ({"d/tasks/x.txt": b""}, "d", [], r"d: no task files; .* holds tasks/\*\.json"),
    "folder without jsonl": ({"d/x.csv": b""}, "d", ["data.format=jsonl"], r"d: no \*\.jsonl files"),
    "empty file": ({"d.jsonl": b"\n"}, "d.jsonl", [], r"d\.jsonl: it holds no instances"),
    # JSONL
    "malformed line": ({"d.jsonl": good() + b"{x"}, "d.jsonl", [], r"d\.jsonl, line 2: malformed JSON"),
    "line is a list": ({"d.jsonl": b"[]"}, "d.jsonl", [], r"d\.jsonl, line 1: a JSON object was expected, not list"),
    "binary": ({"d.jsonl": b"\x00\xff\xfe"}, "d.jsonl", [], r"d\.jsonl, line 1: byte 1 is not UTF-8"),
    "latin-1": ({"d.jsonl": good() + "é".encode("latin-1")}, "d.jsonl", [], r"d\.jsonl, line 2: byte 0 is not UTF-8"),
    "no instruction": ({"d.jsonl": line(output="x")}, "d.jsonl", [], r"line 1: no 'instruction' \(keys: output\)"),
    "no output": ({"d.jsonl": line(instruction="x")}, "d.jsonl", [], r"line 1: no 'output' or 'outputs' \(keys: inst"),
    "empty instruction": ({"d.jsonl": good(instruction=" ")}, "d.jsonl", [], r"line 1: instruction is empty; write it"),
    "empty output": ({"d.jsonl": good(output=" ")}, "d.jsonl", [], r"line 1: output is empty; every instance needs"),
    "empty outputs": ({"d.jsonl": good(output=[])}, "d.jsonl", [], r"line 1: output is empty; every instance needs"),
    "null output": ({"d.jsonl": good(output=None)}, "d.jsonl", [], r"line 1: output=null; expected a string or a list"),
    "number as output": ({"d.jsonl": good(output=5)}, "d.jsonl", [], r"line 1: output=5; expected a string or a list"),
    "number in outputs": (
        {"d.jsonl": good(output=["a", 5])},
        "d.jsonl",
        [],
        r"output=5 is of type int; expected a str",
    ),
    "list as input": ({"d.jsonl": good(input=["a"])}, "d.jsonl", [], r'input=\["a"\] is of type list; expected a str'),
    "wrong id": ({"d.jsonl": good(id=[1])}, "d.jsonl", [], r"line 1: id=\[1\]; expected a string or a whole number"),
    "wrong task": ({"d.jsonl": good(task=True)}, "d.jsonl", [], r"line 1: task=true; expected a string or a whole"),
    "half surrogate": ({"d.jsonl": good(input="\ud800")}, "d.jsonl", [], r"input has half a surrogate pair at char"),
    "duplicate ids": (
        {"d/a.jsonl": good(1, id="x"), "d/b.jsonl": good(2) + good(3, id="x")},
        "d",
        [],
        r"d/b\.jsonl, line 2: the id 'x' is also at .*d/a\.jsonl, line 1; ids must be unique",
    ),
    "unknown unseen task": (
        {"d.jsonl": good(task="abc")},
        "d.jsonl",
        ['data.unseen_tasks=["abd"]'],
        r"data\.unseen_tasks names 'abd', which is no task of the data; did you mean 'abc'\?",
    ),
    "nothing left": (
        {"d.jsonl": good(task="t")},
        "d.jsonl",
        ['data.unseen_tasks=["t"]', "data.sft_share=0.999", "data.align_share=0.0", "data.dev_share=0.0"],
        r"no inputs are left after the split; use more data",
    ),
    # chat messages
    "no answer": ({"d.jsonl": messages("user")}, "d.jsonl", [], r"line 1: messages have the roles user; expected"),
    "no user": ({"d.jsonl": messages("assistant")}, "d.jsonl", [], r"line 1: messages have the roles assistant; exp"),
    "unknown role": (
        {"d.jsonl": messages("human")},
        "d.jsonl",
        [],
        r'messages\[0\] has the role "human"; expected one',
    ),
    "messages no list": ({"d.jsonl": line(messages="x")}, "d.jsonl", [], r'line 1: messages="x"; expected a list'),
    "content no text": (
        {"d.jsonl": line(messages=[{"role": "user", "content": [1]}])},
        "d.jsonl",
        [],
        r"messages\[0\]\.content=\[1\] is of type list; expected a string",
    ),
    "empty user text": (
        {"d.jsonl": line(messages=[{"role": "user", "content": ""}, {"role": "assistant", "content": "x"}])},
        "d.jsonl",
        [],
        r"line 1: the user message is empty",
    ),
    "no messages": ({"d.jsonl": good()}, "d.jsonl", ["data.format=messages"], r"line 1: no 'messages' \(keys: instr"),
    # Super-NaturalInstructions
    "malformed task": ({TASK: b'{\n"Definition": x}'}, "d", [], r"tasks/task1\.json, line 2: malformed JSON"),
    "binary task": ({TASK: b"\x80"}, "d", [], r"tasks/task1\.json: byte 0 is not UTF-8"),
    "task is a list": ({TASK: b"[]"}, "d", [], r"tasks/task1\.json: a JSON object was expected, not list"),
    "no Definition": ({TASK: sni(Definition=None)}, "d", [], r"tasks/task1\.json: no 'Definition' \(keys: Instances\)"),
    "no Instances": ({TASK: sni(Instances=None)}, "d", [], r"tasks/task1\.json: no 'Instances' \(keys: Definition\)"),
    "empty Definition": ({TASK: sni(Definition=["", " "])}, "d", [], r"task1\.json: Definition is empty; every task"),
    "wrong Definition": ({TASK: sni(Definition=5)}, "d", [], r"task1\.json: Definition=5; expected a string or a list"),
    "empty Instances": (
        {TASK: sni(Instances=[])},
        "d",
        [],
        r"task1\.json: Instances=\[\]; expected a list of at least",
    ),
    "instance no object": ({TASK: sni(Instances=["x"])}, "d", [], r'Instances\[0\]="x"; expected an object with input'),
    "instance no input": (
        {TASK: sni(Instances=[{"output": "x"}])},
        "d",
        [],
        r"Instances\[0\] has no 'input' \(keys: out",
    ),
    "instance no output": (
        {TASK: sni(Instances=[{"input": "x"}])},
        "d",
        [],
        r"Instances\[0\] has no 'output' \(keys: in",
    ),
    "instance empty output": (
        {TASK: sni(Instances=[{"input": "a", "output": ["b"]}, {"input": "x", "output": [""]}])},
        "d",
        [],
        r"tasks/task1\.json: Instances\[1\]\.output is empty; every instance needs at least one reference",
    ),
    "instance wrong input": (
        {TASK: sni(Instances=[{"input": 1, "output": "x"}])},
        "d",
        [],
        r"Instances\[0\]\.input=1 is",
    ),
    "duplicate instance ids": (
        {TASK: sni(Instances=[{"id": "i", "input": c, "output": "x"} for c in "ab"])},
        "d",
        [],
        r"task1\.json: Instances\[1\]: the id 'i' is also at .*task1\.json: Instances\[0\]; ids must be unique",
    ),
    "listed task without file": (
        {TASK: sni(), TRAIN: b"task1\ntask2\n"},
        "d",
        [],
        r"train_tasks\.txt, line 2: task 'task2'",
    ),
    "task in both lists": (
        {TASK: sni(), TRAIN: b"task1", TEST: b"task1"},
        "d",
        [],
        r"test_tasks\.txt, line 1: .* train task",
    ),
    "binary list": ({TASK: sni(), TRAIN: b"\xff"}, "d", [], r"train_tasks\.txt: byte 0 is not UTF-8"),
    # Hugging Face
    "columns": (
        {"d.csv": b"question,answer\na,b\n"},
        "d.csv",
        [],
        r"the columns are question, answer; expected instruct",
    ),
    "column type": ({"d.json": good(output=5)}, "d.json", [], r"d\.json, row 1: output=5; expected a string or a list"),
    "empty cell": (
        {"d.csv": b"instruction,output\na,\n"},
        "d.csv",
        [],
        r"d\.csv, row 1: output is empty; every instance",
    ),
    "malformed json": ({"d.json": b"{x"}, "d.json", [], r"d\.json: not readable \("),
    "binary csv": ({"d.csv": b"instruction,output\n\xff,\xfe\n"}, "d.csv", [], r"d\.csv: not readable \("),
    "binary parquet": ({"d.parquet": b"\xff\xfe"}, "d.parquet", [], r"d\.parquet: not readable \("),
    "empty csv": ({"d.csv": b""}, "d.csv", [], r"d\.csv: not readable \("),
    "broken save_to_disk": ({"d/dataset_info.json": b"{"}, "d", [], r"d: not readable \("),
}


@pytest.mark.parametrize("case", BAD_INPUT)
def test_bad_input_is_one_clear_error(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files, data, settings, expected = BAD_INPUT[case]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError) as caught:
        prepare(tmp_path, data, *settings)
    message = str(caught.value)
    assert re.search(expected, message), message
    assert "\n" not in message
    assert not (tmp_path / "runs").exists(), "something was left behind"


def test_hub_name_that_cannot_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    def refuse(*_: Any, **__: Any) -> None:
        raise datasets.exceptions.DatasetNotFoundError("Dataset 'a/b' doesn't exist")

    monkeypatch.setattr(datasets, "load_dataset", refuse)
    with pytest.raises(UserError, match=r"a/b: no such file or folder here, nor on the hub \(DatasetNotFoundError"):
        prepare(tmp_path, "a/b")


def test_outputs_manifest_and_second_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = tmp_path / "d.jsonl"
    chat = messages("user", "assistant", "user", "assistant")
    data.write_bytes(b"".join(good(i, task="t") for i in range(60)) + good(0, task="t") + chat)
    step = prepare(tmp_path, data, "data.max_sft_inputs=5")
    tasks, examples = read_records(Task, step / "tasks.jsonl"), read_records(Example, step / "examples.jsonl")
    assert tasks == [Task("t", "Say it.", ("yes",), source="d")]
    assert len({example.id for example in examples}) == len(examples)
    reasons = [row["reason"] for _, row in read_rows(step / "dropped.jsonl")]
    manifest = read_manifest(step)
    assert manifest is not None
    counts = manifest["counts"]
    assert counts["inputs"]["sft"] == 5
    assert sum(counts["inputs"].values()) == len(examples)
    assert counts["dropped"] == {"merged_duplicate": 1, "multi_turn": 1, "over_limit": 60 - len(examples)}
    assert sorted(set(reasons)) == sorted(counts["dropped"]) and len(reasons) == sum(counts["dropped"].values())
    assert counts["words"]["inputs"] == {"0": 0, "1-4": len(examples)}
    assert "words in inputs:" in capsys.readouterr().out
    before = {path.name: path.read_bytes() for path in step.iterdir() if path.is_file()}
    prepare(tmp_path, data, "data.max_sft_inputs=5")
    assert "nothing to do" in capsys.readouterr().out
    assert before == {path.name: path.read_bytes() for path in step.iterdir() if path.is_file()}


def test_changed_data_or_settings_are_stale(tmp_path: Path) -> None:
    data = tmp_path / "d.jsonl"
    data.write_bytes(b"".join(good(i) for i in range(20)))
    prepare(tmp_path, data)
    with pytest.raises(UserError, match=r"data\.max_labels was 20 and is now 3"):
        prepare(tmp_path, data, "data.max_labels=3")
    data.write_bytes(b"".join(good(i) for i in range(21)))
    with pytest.raises(UserError, match=r"its input 'data' has changed"):
        prepare(tmp_path, data)


def test_mistake_can_be_mended_and_run_again(tmp_path: Path) -> None:
    data = tmp_path / "d.jsonl"
    data.write_bytes(good() + b"{")
    with pytest.raises(UserError, match="line 2"):
        prepare(tmp_path, data)
    data.write_bytes(b"".join(good(i) for i in range(20)))
    assert read_manifest(prepare(tmp_path, data)) is not None


def test_random_model_is_made_from_sft_texts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[str] = []

    def make(folder: Path, texts: Any, table: Any, seed: int) -> None:
        made.extend(texts)
        folder.mkdir()
        (folder / "config.json").write_text("{}", encoding="utf-8")

    monkeypatch.setattr("coalign.models.random_model.make_random_model", make)
    data = tmp_path / "d.jsonl"
    data.write_bytes(b"".join(good(i) for i in range(40)))
    step = prepare(tmp_path, data, "model.init=random")
    held_out = {example.input for example in read_records(Example, step / "examples.jsonl") if example.split != "sft"}
    assert "Say it." in made and "input 0" in {*made} | held_out
    assert held_out and not held_out & {*made}
    manifest = read_manifest(step)
    assert manifest is not None and "model" in manifest["outputs"]


def test_real_tasks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if not SNI_MINI.is_dir():
        pytest.skip("the shared data are not here")
    step = prepare(tmp_path, SNI_MINI)
    assert "40 seen, 11 unseen" in capsys.readouterr().out
    assert len(read_records(Task, step / "tasks.jsonl")) == 51
