"""A run that an older coalign began resumes: run_before_packages.tar.xz holds one of 30 November 2026.

That code had all modules in one folder. The archive holds a working folder with a complete run up to rank, align cut
off after its first update, and a second run whose sample step was cut off after two shards.
"""

from __future__ import annotations

import json
import tarfile
from pathlib import Path

import pytest

from integration.bad_inputs import World, losses

pytestmark = pytest.mark.deepspeed
ARCHIVE = Path(__file__).with_name("run_before_packages.tar.xz")
BORROWED = 'run.inputs={prepare = "runs/r", paraphrase = "runs/r", sft = "runs/r"}'
TWIN = 'run.inputs={prepare = "runs/r", paraphrase = "runs/r", sft = "runs/r", rank = "runs/r"}'


@pytest.fixture
def older(world: World) -> World:
    """The working folder of the archive, in the place of the one that the tests make."""
    with tarfile.open(ARCHIVE) as archive:
        archive.extractall(world.folder, filter="data")
    return world


def test_complete_steps_stay_complete_and_cut_ones_resume(older: World) -> None:
    for step in ("prepare", "paraphrase", "sft", "sample", "judge", "rank"):
        done = older.run(step)
        assert done.code == 0 and f"{step} is complete" in done.stdout, done.stderr

    half = older.run("sample", "run.name=half", BORROWED, "generation.shard_size=4")
    assert half.code == 0 and "2 of 6 shards are done already" in half.stdout, half.stdout + half.stderr
    written = [(older.folder / "runs" / run / "sample/responses.jsonl").read_text("utf-8") for run in ("half", "r")]
    assert written[0] == written[1], "the shards of the older code and the new ones make what one code makes"

    aligned = older.run("align")
    assert aligned.code == 0 and "resuming after update 1" in aligned.stdout, aligned.stdout + aligned.stderr
    twin = older.run("align", "run.name=twin", TWIN)
    assert twin.code == 0, twin.stderr
    assert losses(older.run_folder / "align") == pytest.approx(losses(older.folder / "runs/twin/align"), rel=1e-6)

    assert older.run("eval").code == 0
    metrics = json.loads((older.run_folder / "eval/metrics.json").read_text("utf-8"))
    assert {*metrics["models"]} == {"base", "sft", "align"}
