"""Files of a finished run, of a model folder and of eval, each changed in one place: see `fuzzing.assert_property`.

A step that goes on nevertheless must write what it writes without the change, or record digests that show it.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from coalign.runs.digests import digest_outputs
from integration.bad_inputs import World
from integration.fuzzing import PRETRAINED, a_world, digests, examples, replace, run
from integration.odd_values import changed_file

pytestmark = pytest.mark.slow

ASK_MODEL = ("paraphrase.num_wordings=1", "paraphrase.max_attempts=1", "paraphrase.max_new_tokens=4")
BIG = {"answers.jsonl", "report.html", "model.safetensors"}  # changed as bytes only, or read by no step
# What each step reads of the steps before it; the files of its own are in BEGUN.
READS: dict[str, tuple[str, ...]] = {
    "paraphrase": ("prepare/manifest.json", "prepare/tasks.jsonl"),
    "sample": (
        *("prepare/manifest.json", "prepare/tasks.jsonl", "prepare/examples.jsonl", "paraphrase/manifest.json"),
        *("paraphrase/wordings.jsonl", "sft/manifest.json", "sft/model/config.json", "sft/model/tokenizer.json"),
    ),
    "judge": (
        *("prepare/tasks.jsonl", "prepare/examples.jsonl", "sample/responses.jsonl", "sample/manifest.json"),
        *("sft/model/generation_config.json", "sft/model/tokenizer_config.json"),
    ),
    "rank": (
        *("prepare/examples.jsonl", "paraphrase/wordings.jsonl", "sample/responses.jsonl", "judge/verdicts.jsonl"),
        *("prepare/manifest.json", "paraphrase/manifest.json", "sample/manifest.json", "judge/manifest.json"),
    ),
    "align": ("rank/groups.jsonl", "rank/manifest.json", "paraphrase/wordings.jsonl", "prepare/examples.jsonl"),
    "report": (
        *(
            "eval/metrics.json",
            "eval/metrics.json",
            "eval/manifest.json",
            "prepare/manifest.json",
            "rank/manifest.json",
        ),
        *("sft/metrics.jsonl", "align/metrics.jsonl", "paraphrase/manifest.json", "judge/manifest.json"),
    ),
    "remaining": ("eval/manifest.json", "judge/manifest.json", "eval/config.json"),
    "plan": ("prepare/manifest.json", "paraphrase/manifest.json", "prepare/model/config.json"),
}
# Each with how often it is tried: those that take a hundredth of a second more often than those that take a tenth.
STEPS = (
    ("rank",) * 8 + ("paraphrase",) * 3 + ("remaining",) * 2 + ("plan", "plan", "sample", "judge", "report", "align")
)
OWN = ("manifest.json", "config.json", ".attempts.json", "shards/00000.jsonl", "shards/responses-00000.jsonl")


@pytest.fixture(scope="session")
def whole(finished_here: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working folder with a complete run, and with the starting model at my-model; nobody changes it."""
    folder = tmp_path_factory.mktemp("fuzz") / "whole"
    shutil.copytree(finished_here.parent, folder)
    shutil.copytree(finished_here / "r" / "prepare" / "model", folder / "my-model")
    return folder


def command_of(step: str) -> list[str]:
    """Return the words after the step's name."""
    if step == "report":
        return ["runs/r"]
    return [*(["local"] if step == "remaining" else []), "config.toml"]


def sign(folder: Path) -> None:
    """Write the present digests into a step's manifest, as a person who knows them would."""
    path = folder / "manifest.json"
    try:
        manifest = json.loads(path.read_text("utf-8"))
        manifest["outputs"] |= digest_outputs(folder)
    except (ValueError, TypeError, KeyError, RecursionError, OSError):
        return
    replace(path, json.dumps(manifest).encode())


@given(data=st.data())
@examples(0.3)
def test_file_of_a_step_before(whole: Path, data: st.DataObject) -> None:
    step = data.draw(st.sampled_from(STEPS))
    name = data.draw(st.sampled_from(READS[step]))
    content = (whole / "runs/r" / name).read_bytes()
    changed = data.draw(changed_file(name, content))
    signed = name.endswith(".jsonl") and data.draw(st.booleans())
    with a_world(whole) as world:
        outputs = {} if step not in ("paraphrase", "rank", "sample", "judge") else digests(world, step)
        inputs = {} if not outputs else world.manifest(step)["inputs"]
        replace(world.run_folder / name, changed)
        if signed:
            sign((world.run_folder / name).parent)
        world.remove(step)
        outcome = run(world, step, *command_of(step))
        if outcome.code == 0 and outputs and not signed:
            same = digests(world, step) == outputs
            assert same or world.manifest(step)["inputs"] != inputs, "another result, and no digest tells of it"


@given(data=st.data())
@examples(0.12)
def test_file_of_a_begun_step(whole: Path, data: st.DataObject) -> None:
    """What a step finds in its own folder, complete or interrupted."""
    step = data.draw(st.sampled_from(("rank", "rank", "rank", "paraphrase", "judge", "sample")))
    name = data.draw(st.sampled_from(OWN))
    with a_world(whole) as world:
        folder = world.run_folder / step
        outputs = digests(world, step)
        good = {
            "manifest.json": (folder / "manifest.json").read_bytes(),
            "config.json": (folder / "config.json").read_bytes(),
            ".attempts.json": b'{"started": 1700000000.0, "spent": 3.5}',
        }.get(name, (folder / {"sample": "responses.jsonl"}.get(step, "dropped.jsonl")).read_bytes())
        changed = data.draw(changed_file(name, good))
        if name != "manifest.json":
            (folder / "manifest.json").unlink()
        replace(folder / name, changed)
        outcome = run(world, step, "config.toml")
        if outcome.code == 0 and name in ("config.json", ".attempts.json"):
            assert digests(world, step) == outputs


@given(data=st.data())
@examples(0.05)
def test_file_of_a_model(whole: Path, data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(sorted(path.name for path in (whole / "my-model").iterdir())))
    content = (whole / "my-model" / name).read_bytes()
    changed = data.draw(changed_file(name, content))
    with a_world(whole) as world:
        replace(world.folder / "my-model" / name, changed)
        world.remove("paraphrase")
        run(world, "paraphrase", "config.toml", *PRETRAINED, *ASK_MODEL)


@given(data=st.data())
@examples(0.02)
def test_checkpoint_of_a_training(whole: Path, data: st.DataObject) -> None:
    """A damaged checkpoint is passed over, or refused."""
    with a_world(whole) as world:
        folder = world.run_folder / "sft"
        (folder / "manifest.json").unlink()
        shutil.rmtree(folder / "model")
        paths = sorted(path for path in (folder / "checkpoints").rglob("*") if path.is_file() and path.suffix != ".py")
        path = data.draw(st.sampled_from(paths))
        replace(path, data.draw(changed_file(path.name, path.read_bytes())))
        run(world, "sft", "config.toml")


@given(data=st.data())
@examples(0.02)
def test_metrics_compared(whole: Path, data: st.DataObject) -> None:
    content = (whole / "runs/r/eval/metrics.json").read_bytes()
    with a_world(whole) as world:
        shutil.copytree(world.run_folder, world.folder / "runs/s")
        replace(world.folder / "runs/s/eval/metrics.json", data.draw(changed_file("metrics.json", content)))
        run(world, "report", "runs/r", "runs/s")


def test_world_is_whole(whole: Path) -> None:
    """Without a change every step of READS runs."""
    for step in READS:
        with a_world(whole) as world:
            world.remove(step)
            assert run(world, step, *command_of(step)).code == 0, step
            assert isinstance(world, World)
