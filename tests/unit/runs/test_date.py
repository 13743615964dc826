"""The date that chat templates see: one for all steps of a run, in every manifest."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

from coalign.runs.step_folder import StepFolder


def complete(folder: Path, inputs: dict[str, Path] | None = None, **changed: Any) -> Path:
    """Complete a step and return its folder; `changed` keys of its manifest are replaced, None takes one out."""
    step = StepFolder(folder, {}, inputs or {})
    step.open()
    step.commit({})
    manifest = json.loads((folder / "manifest.json").read_text())
    kept = {key: value for key, value in (manifest | {"seal": None} | changed).items() if value is not None}
    (folder / "manifest.json").write_text(json.dumps(kept))
    return folder


def test_a_run_has_the_date_of_its_first_step(tmp_path: Path) -> None:
    """Also when an earlier step is made again later, with the same digest."""
    prepare = complete(tmp_path / "prepare", date="2026-11-30")
    sft = complete(tmp_path / "sft", {"prepare": prepare})
    assert json.loads((sft / "manifest.json").read_text())["date"] == "2026-11-30"
    again = complete(tmp_path / "again" / "prepare", date="2026-12-05")
    assert StepFolder(tmp_path / "align", {}, {"prepare": again, "policy": sft}).date == "2026-11-30"


def test_a_step_without_inputs_has_todays_date(tmp_path: Path) -> None:
    before = time.strftime("%Y-%m-%d", time.gmtime())
    found = StepFolder(tmp_path / "prepare", {}, {}).date
    assert before <= found <= time.strftime("%Y-%m-%d", time.gmtime())


def test_an_older_manifest_has_the_day_on_which_it_finished(tmp_path: Path) -> None:
    older = complete(tmp_path / "prepare", date=None, finished="2026-11-29T23:59:59Z")
    assert StepFolder(tmp_path / "sft", {}, {"prepare": older}).date == "2026-11-29"
