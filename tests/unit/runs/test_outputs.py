"""What a step wrote is what the next step reads: manifests, rows and weights that were changed since are refused."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from coalign.errors import UserError
from coalign.records import Group, Task, Verdict, is_result, read_records, to_row
from coalign.runs.outputs import step_model, step_output
from coalign.runs.step_folder import StepFolder, read_manifest


def complete(run: Path, name: str = "judge") -> Path:
    step = StepFolder(run / name, {"a": 1}, {})
    step.open()
    step.write_output("verdicts.jsonl", [{"n": number} for number in range(4)])
    (step.path / "model").mkdir()
    (step.path / "model" / "model.safetensors").write_bytes(bytes(range(256)) * 4000)
    step.commit({"rows": 4})
    return step.path


CHANGES: dict[str, Callable[[Path], Any]] = {
    "emptied": lambda path: path.write_text(""),
    "a row removed": lambda path: path.write_text("".join(path.read_text().splitlines(keepends=True)[:-1])),
    "a key renamed": lambda path: path.write_text(path.read_text().replace('"n"', '"m"')),
    "missing": lambda path: path.unlink(),
    "a folder": lambda path: (path.unlink(), path.mkdir()),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_changed_rows_name_the_step_to_run_again(tmp_path: Path, change: Callable[[Path], Any]) -> None:
    folder = complete(tmp_path)
    path = step_output(folder, "verdicts.jsonl")
    change(path)
    with pytest.raises(UserError, match=r"judge/verdicts\.jsonl is not what the step wrote; run judge again"):
        step_output(folder, "verdicts.jsonl")


def test_exchanged_weights_of_equal_size_and_mtime_are_seen(tmp_path: Path) -> None:
    """One byte between the blocks of a quick digest, with the old time put back; a touched file is still whole."""
    folder = complete(tmp_path, "sft")
    weights = folder / "model" / "model.safetensors"
    before = weights.stat()
    assert step_model(folder) == str(folder / "model")
    os.utime(weights, ns=(before.st_atime_ns, before.st_mtime_ns + 10))
    assert step_model(folder) == str(folder / "model")
    content = bytearray(weights.read_bytes())
    content[100_000] ^= 1
    weights.write_bytes(content)
    os.utime(weights, ns=(before.st_atime_ns, before.st_mtime_ns))
    with pytest.raises(UserError, match="sft/model is not what the step wrote; run sft again"):
        step_model(folder)


@pytest.mark.parametrize(
    "text", ["", "{", "{}", "[]", "null", "[" * 100_000, '{"a": ' + "9" * 5000 + "}", '{"config": []}', "\xff"]
)
def test_a_damaged_manifest_is_one_line(tmp_path: Path, text: str) -> None:
    folder = complete(tmp_path)
    (folder / "manifest.json").write_text(text, encoding="latin-1")
    with pytest.raises(UserError, match=r"manifest\.json is damaged; remove .*judge and run judge again"):
        read_manifest(folder)


def test_a_manifest_keeps_its_seal_and_older_ones_need_none(tmp_path: Path) -> None:
    folder = complete(tmp_path)
    path = folder / "manifest.json"
    manifest = json.loads(path.read_text())
    path.write_text(json.dumps(manifest | {"counts": {"rows": 5}}))
    with pytest.raises(UserError, match="it was changed after the step wrote it"):
        read_manifest(folder)
    path.write_text(json.dumps({key: value for key, value in manifest.items() if key not in ("seal", "stamps")}))
    assert read_manifest(folder) is not None and step_model(folder) == str(folder / "model")
    path.write_text(json.dumps({**manifest, "outputs": {}, "seal": None} | {"seal": ""} | {}))
    with pytest.raises(UserError, match="damaged"):
        read_manifest(folder)


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"config": [], "inputs": {}}'])
def test_settings_of_a_begun_step_that_are_damaged_are_one_line(tmp_path: Path, text: str) -> None:
    (tmp_path / "judge").mkdir()
    (tmp_path / "judge" / "config.json").write_text(text)
    with pytest.raises(UserError, match=r"judge/config\.json .*run judge again"):
        StepFolder(tmp_path / "judge", {}, {}).open()


@pytest.mark.parametrize("text", ["", "{", "{}", "[]", '{"spent": "x", "started": 1}', '{"spent": NaN, "started": 1}'])
def test_damaged_attempts_are_forgotten(tmp_path: Path, text: str) -> None:
    first = StepFolder(tmp_path / "judge", {}, {})
    first.open()
    first.close()
    (tmp_path / "judge" / ".attempts.json").write_text(text)
    again = StepFolder(tmp_path / "judge", {}, {})
    assert not again.open() and again.spent == 0.0


VERDICT = to_row(Verdict("e", "t", "x", "stop", 2, "correct"))
CANDIDATE = {"text": "x", "reward": 2, "finish": "stop", "count": 1, "wordings": ["w"], "best": True}
GROUP: dict[str, Any] = {"example": "e", "task": "t", "wording": "w", "candidates": [CANDIDATE]}
RECORDS: list[tuple[Any, dict[str, Any], str]] = [
    (Verdict, {key: value for key, value in VERDICT.items() if key != "reward"}, "'reward' is missing"),
    (Verdict, VERDICT | {"points": 2}, "'points' is unknown"),
    (Verdict, VERDICT | {"reward": "2"}, "'reward': a whole number was expected, not '2'"),
    (Verdict, VERDICT | {"reward": True}, "'reward': a whole number"),
    (Verdict, VERDICT | {"finish": []}, "'finish': one of stop, length"),
    (Verdict, VERDICT | {"text": "\ud800"}, "half a surrogate pair"),
    (Task, {"id": "t", "instruction": "i", "labels": "x"}, "'labels': a list was expected"),
    (Group, GROUP | {"candidates": {}}, "'candidates': a list was expected"),
    (Group, GROUP | {"candidates": [1]}, "'candidates': an object was expected"),
    (Group, GROUP | {"candidates": [CANDIDATE | {"wordings": None}]}, "'wordings': a list was expected"),
]


@pytest.mark.parametrize(("kind", "row", "says"), RECORDS)
def test_a_row_that_is_no_record_names_file_line_and_key(
    tmp_path: Path, kind: Any, row: dict[str, Any], says: str
) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text("\n" + json.dumps(row) + "\n")
    with pytest.raises(UserError, match=r"rows\.jsonl, line 2: the key") as error:
        read_records(kind, path)
    assert says in str(error.value)


def test_whole_records_are_read_as_they_were_written(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(VERDICT) + "\n")
    assert [to_row(one) for one in read_records(Verdict, path)] == [VERDICT]
    path.write_text(json.dumps(GROUP) + "\n")
    (group,) = read_records(Group, path)
    assert group.candidates[0].wordings == ("w",) and group.candidates[0].best


def test_a_result_is_whole_only_with_an_answer_per_seed_of_its_own_request() -> None:
    request = {"task": "t", "repeat": 0, "prompt_ids": [1], "seeds": [1, 2]}
    answer = {"text": "x", "finish": "stop", "num_tokens": 1}
    whole = {"task": "t", "repeat": 0, "answers": [answer, answer]}
    assert is_result(whole, request)
    bad: list[dict[str, Any]] = [{"answers": [answer]}, {"task": "u"}, {"answers": [answer, {"finish": "stop"}]}]
    assert not any(is_result(whole | change, request) for change in (*bad, {"answers": None}))
    scored = {"key": 1, "prompt_ids": [1], "continuations": [[1], [2]]}
    assert is_result({"key": 1, "logps": [0.0, -1.5]}, scored)
    assert not is_result({"key": 1, "logps": [0.0]}, scored) and not is_result({"key": 1, "logps": None}, scored)
