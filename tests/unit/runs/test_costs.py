"""What the steps of a run have used, read from their manifests."""

from __future__ import annotations

import json
from pathlib import Path

from coalign.config import RunTable
from coalign.runs import costs
from coalign.steps import STEP_TABLES


def test_cost_is_read_from_the_manifests(tmp_path: Path) -> None:
    (tmp_path / "sft").mkdir()
    counts = {"updates": 30, "tokens_trained": 12000, "cores": 2}
    manifest = {"config": {}, "inputs": {}, "outputs": {}, "counts": counts, "digest": "d", "wall_seconds": 1800.0}
    (tmp_path / "sft" / "manifest.json").write_text(json.dumps(manifest))
    rows = costs.cost_rows({"sft": tmp_path / "sft", "align": tmp_path / "align"})
    assert [(row.step, row.updates, row.core_hours) for row in rows] == [("sft", 30, 1.0)]


def test_a_later_round_lists_the_steps_of_earlier_rounds() -> None:
    """The cost of a second round holds what the first one has used."""
    first = costs.steps_so_far(RunTable(folder="runs", name="r"), [])
    assert first == {name: Path("runs/r") / name for name in STEP_TABLES if name != "eval"}
    later = costs.steps_so_far(RunTable(folder="runs", name="r", round=2), [])
    assert later["sft"] == Path("runs/r/sft")
    assert later["align, round 1"] == Path("runs/r/align")
    assert later["align, round 2"] == Path("runs/r/round2/align")
    assert len(later) == 3 + 2 * 4
