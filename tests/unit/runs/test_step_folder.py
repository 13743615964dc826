"""The run directory: complete exactly when the manifest is there, atomic files, staleness, one writer."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest

from coalign.config import RunTable
from coalign.errors import UserError
from coalign.runs import step_folder
from coalign.runs.atomic_files import replace_folder, require_free_space, write_json, write_rows
from coalign.runs.run_folder import RunFolder
from coalign.runs.step_folder import StepFolder, lineage_of, read_manifest, require_complete

ROOT = Path(__file__).resolve().parents[3]


def complete(path: Path, config: dict[str, Any] | None = None, text: str = "a", **inputs: Path) -> Path:
    """Make a complete step with one output row."""
    step = StepFolder(path, config or {"t.x": 1}, inputs)
    assert not step.open()
    step.write_output("rows.jsonl", [{"text": text}])
    step.commit({"rows": 1})
    return path


def test_step_is_complete_exactly_when_it_has_a_manifest(tmp_path: Path) -> None:
    step = StepFolder(tmp_path / "a", {"t.x": 1}, {})
    assert not step.open()
    step.write_output("rows.jsonl", [{"n": 1}])
    assert read_manifest(tmp_path / "a") is None
    manifest = step.commit({"rows": 1})
    assert read_manifest(tmp_path / "a") == manifest
    assert manifest["counts"] == {"rows": 1} and manifest["versions"]["python"]
    assert StepFolder(tmp_path / "a", {"t.x": 1}, {}).open()
    assert not (tmp_path / "a" / "shards").exists()


@pytest.mark.parametrize("is_complete", [True, False], ids=["complete", "begun"])
def test_other_settings_are_an_error_that_names_the_first(tmp_path: Path, is_complete: bool) -> None:
    step = StepFolder(tmp_path / "a", {"t.x": 1, "t.y": 2}, {})
    step.open()
    if is_complete:
        step.commit({})
    else:
        write_rows(step.path / "shards" / "00000.jsonl", [{"n": 0}])
        step.close()
    with pytest.raises(UserError, match=r"t\.x was 1 and is now 5; use another run\.name"):
        StepFolder(tmp_path / "a", {"t.x": 5, "t.y": 7}, {}).open()


def test_a_step_without_any_work_yet_takes_other_settings(tmp_path: Path) -> None:
    step = StepFolder(tmp_path / "a", {"t.x": 1}, {})
    step.open()
    step.close()
    again = StepFolder(tmp_path / "a", {"t.x": 5}, {})
    assert not again.open()
    assert again.commit({})["config"] == {"t.x": 5}


def test_other_inputs_are_an_error(tmp_path: Path) -> None:
    complete(tmp_path / "first")
    complete(tmp_path / "second", first=tmp_path / "first")
    shutil.rmtree(tmp_path / "first")
    complete(tmp_path / "first", text="b")
    with pytest.raises(UserError, match="its input 'first' has changed"):
        StepFolder(tmp_path / "second", {"t.x": 1}, {"first": tmp_path / "first"}).open()
    with pytest.raises(UserError, match=r"second is stale: it was made from another first than is in .*first; remove"):
        lineage_of([tmp_path / "second", tmp_path / "first"])


def test_digest_depends_on_results_and_settings_alone(tmp_path: Path) -> None:
    digests = {}
    for name, config, text in [("a", 1, "a"), ("b", 1, "a"), ("c", 2, "a"), ("d", 1, "b")]:
        manifest = read_manifest(complete(tmp_path / name, {"t.x": config}, text))
        assert manifest is not None
        digests[name] = manifest["digest"]
    assert digests["a"] == digests["b"]
    assert len(set(digests.values())) == 3


def test_incomplete_step_keeps_its_shards_and_drops_half_written_files(tmp_path: Path) -> None:
    step = StepFolder(tmp_path / "a", {"t.x": 1}, {})
    step.open()
    shards = step.path / "shards"
    write_rows(shards / "00000.jsonl", [{"n": 0}])
    (shards / ".00001.jsonl.tmp").write_text('{"n": ')
    (step.path / ".rows.jsonl.tmp").write_text('{"n": ')
    step.close()
    again = StepFolder(tmp_path / "a", {"t.x": 1}, {})
    assert not again.open()
    assert [path.name for path in shards.iterdir()] == ["00000.jsonl"]
    assert not (step.path / ".rows.jsonl.tmp").exists()


def test_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    write_rows(path, [{"n": 1}])

    def failing() -> Any:
        yield {"n": 2}
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(OSError, match="No space"):
        write_rows(path, failing())
    assert path.read_text() == '{"n": 1}\n'
    with pytest.raises(ValueError, match="JSON"):
        write_json(tmp_path / "metrics.json", {"loss": float("nan")})
    assert not (tmp_path / "metrics.json").exists()


def test_folder_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    def half(folder: Path) -> None:
        (folder / "config.json").write_text("{}")
        raise RuntimeError("interrupted")

    with pytest.raises(RuntimeError, match="interrupted"):
        replace_folder(tmp_path / "model", half)
    assert not (tmp_path / "model").exists()
    replace_folder(tmp_path / "model", lambda folder: (folder / "w").write_text("1") and None)
    with pytest.raises(RuntimeError, match="interrupted"):
        replace_folder(tmp_path / "model", half)
    assert [path.name for path in (tmp_path / "model").iterdir()] == ["w"]


def test_one_writer_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(step_folder, "LOCK_WAIT_SECONDS", 0.3)
    step = StepFolder(tmp_path / "a", {"t.x": 1}, {})
    step.open()
    with pytest.raises(UserError, match=f"another process is writing to .*process {os.getpid()}"):
        StepFolder(tmp_path / "a", {"t.x": 1}, {}).open()
    monkeypatch.setenv(step_folder.LOCK_WAIT, "60")  # who takes over from a lost node waits for it to let go
    threading.Timer(1.0, step.close).start()
    StepFolder(tmp_path / "a", {"t.x": 1}, {}).open()


def test_killed_writer_leaves_no_lock(tmp_path: Path) -> None:
    code = (
        "import sys, time; from pathlib import Path; from coalign.runs.step_folder import StepFolder\n"
        "step = StepFolder(Path(sys.argv[1]), {'t.x': 1}, {}); step.open(); print('open', flush=True); time.sleep(60)"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path / "a")],
        stdout=subprocess.PIPE,
        env={"PYTHONPATH": str(ROOT / "distributed")},
    )
    assert process.stdout is not None and process.stdout.readline() == b"open\n"
    process.send_signal(signal.SIGKILL)
    process.wait(timeout=10)
    assert not StepFolder(tmp_path / "a", {"t.x": 1}, {}).open()


def test_free_space_is_checked_before_writing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(100, 90, 10 * 2**20))
    require_free_space(tmp_path / "not" / "yet", 5 * 2**20, "the model")
    with pytest.raises(UserError, match="the model needs 20 MiB, only 10 MiB are free"):
        require_free_space(tmp_path / "not" / "yet", 20 * 2**20, "the model")


def test_missing_step_names_the_command_that_makes_it(tmp_path: Path) -> None:
    run = RunFolder(RunTable(folder=str(tmp_path), name="demo"), ["configs/demo.toml", "run.seed=1"])
    with pytest.raises(UserError, match=r"deepspeed launch/sft\.py configs/demo\.toml run\.seed=1"):
        run.require("policy", run.policy())
    with pytest.raises(UserError, match=r"has not been run; run first: python launch/prepare\.py"):
        require_complete(run.step("prepare"), run.command("prepare"))
    run.step("prepare").mkdir(parents=True)
    with pytest.raises(UserError, match="is not complete"):
        require_complete(run.step("prepare"), run.command("prepare"))


def test_complete_step_does_nothing_when_begun_again(tmp_path: Path) -> None:
    run = RunFolder(RunTable(folder=str(tmp_path), name="demo"), [])
    complete(run.step("prepare"))
    step = run.begin("paraphrase", {"t.x": 1}, {"prepare": run.step("prepare")})
    assert step is not None
    step.commit({})
    assert run.begin("paraphrase", {"t.x": 1}, {"prepare": run.step("prepare")}) is None


def test_borrowed_steps_and_rounds(tmp_path: Path) -> None:
    borrowing = RunFolder(RunTable(folder=str(tmp_path), name="b", inputs={"sft": str(tmp_path / "a")}), [])
    assert borrowing.step("sft") == tmp_path / "a" / "sft"
    assert borrowing.step("align") == tmp_path / "b" / "align"
    with pytest.raises(UserError, match=r"run\.inputs\.sft=.* is not run again here"):
        borrowing.begin("sft", {}, {})
    second = RunFolder(RunTable(folder=str(tmp_path), name="b", round=2), [])
    assert second.step("sample") == tmp_path / "b" / "round2" / "sample"
    assert second.step("sft") == tmp_path / "b" / "sft"
    assert second.policy() == tmp_path / "b" / "align"
    third = RunFolder(RunTable(folder=str(tmp_path), name="b", round=3), [])
    assert third.policy() == tmp_path / "b" / "round2" / "align"


def test_files_are_read_back_as_text(tmp_path: Path) -> None:
    write_rows(tmp_path / "rows.jsonl", [{"text": "naïve 雪 \u2028 end"}])
    lines = (tmp_path / "rows.jsonl").read_bytes().decode("utf-8").split("\n")
    assert json.loads(lines[0]) == {"text": "naïve 雪 \u2028 end"} and lines[1:] == [""]


def test_a_step_made_from_an_older_ancestor_is_stale(tmp_path: Path) -> None:
    """Stage 1 run anew with other settings: groups that came from the old one are refused beside it."""
    complete(tmp_path / "sft", {"t.x": 1})
    complete(tmp_path / "sample", sft=tmp_path / "sft")
    complete(tmp_path / "rank", sample=tmp_path / "sample")
    shutil.rmtree(tmp_path / "sft")
    complete(tmp_path / "sft", {"t.x": 2})
    with pytest.raises(UserError, match=r"rank is stale: it was made from another sft than is in .*sft"):
        StepFolder(tmp_path / "align", {}, {"policy": tmp_path / "sft", "rank": tmp_path / "rank"})


def test_the_steps_of_two_rounds_do_not_clash(tmp_path: Path) -> None:
    complete(tmp_path / "sft")
    complete(tmp_path / "sample", policy=tmp_path / "sft")
    complete(tmp_path / "align", policy=tmp_path / "sft", sample=tmp_path / "sample")
    complete(tmp_path / "round2" / "sample", text="b", policy=tmp_path / "align")
    labels = lineage_of([tmp_path / "round2" / "sample", tmp_path / "align"])
    assert set(labels) == {"sft", "sample", "align", "round2/sample"}


def test_wall_time_adds_up_over_attempts(tmp_path: Path) -> None:
    """An attempt that was killed counts from its start to the last file it wrote."""
    first = StepFolder(tmp_path / "a", {}, {})
    first.started -= 100.0
    first.open()
    write_rows(first.path / "shards" / "00000.jsonl", [{"n": 0}])
    os.utime(first.path / "shards" / "00000.jsonl", (first.started + 40.0, first.started + 40.0))
    first.close()
    second = StepFolder(tmp_path / "a", {}, {})
    second.open()
    assert 40.0 <= second.commit({})["wall_seconds"] < 60.0


@pytest.mark.parametrize(("setting", "least"), [(1, 40.0), (2, 0.0)])
def test_the_time_of_what_was_encoded_counts_where_it_is_used(tmp_path: Path, setting: int, least: float) -> None:
    """Encoded rows are no work of a setting yet: another one begins anew, and its time as well."""
    first = StepFolder(tmp_path / "a", {"n": 1}, {})
    first.started -= 100.0
    first.open()
    rows = first.path / "shards" / "rows"
    rows.mkdir()
    os.utime(rows, (first.started + 40.0, first.started + 40.0))
    first.close()
    second = StepFolder(tmp_path / "a", {"n": setting}, {})
    second.open()
    assert least <= second.commit({})["wall_seconds"] < least + 20.0
