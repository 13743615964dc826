"""Rows about what it costs to compare what a step wrote with its manifest, as a share of the next step's own work."""

from __future__ import annotations

import atexit
import dataclasses
import functools
import random
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

from benchmarks.generation_rows import BATCH_TOKENS
from benchmarks.lengths import lengths
from benchmarks.networks import SMALL, TINY, Codec, Shape, made_up_word, make_folder, make_network
from benchmarks.rows import Row, Side
from benchmarks.training_rows import TABLE, align_sides
from benchmarks.workloads import judge_request, judge_step, real_groups
from coalign.generation.scoring import score
from coalign.records import Response
from coalign.runs import outputs
from coalign.runs.step_folder import StepFolder
from numerics.engine import TorchEngine

SHARE = 0.01  # of the next step's time, at most
RESPONSES = "responses.jsonl"
UPDATES = 20  # of a short training step


def scratch() -> Path:
    """Return a folder that is removed when this process ends."""
    place = Path(tempfile.mkdtemp())
    atexit.register(shutil.rmtree, place, ignore_errors=True)
    return place


def write_responses(folder: Path, count: int) -> None:
    """Write the output of a sample step, with answers as long as real ones."""
    source = random.Random(4)
    answers = [size for task in lengths()["tasks"] for size in task["answer"]]

    def row(number: int) -> Response:
        size = source.choice(answers)
        text = " ".join(made_up_word(source, ["ba", "den", "fis", "gol"]) for _ in range(size))
        return Response(f"task-{number // 16:06}", "task", f"model:{number % 16}", 0, text, text, "stop", size)

    step = StepFolder(folder, {}, {})
    step.open()
    step.write_output(RESPONSES, (dataclasses.asdict(row(number)) for number in range(count)))
    step.commit({})


def write_model(folder: Path, shape: Shape) -> None:
    """Write the output of a training step."""
    step = StepFolder(folder, {}, {})
    step.open()
    make_folder(folder, shape)
    step.commit({})


def compare(folder: Path, name: str) -> str:
    """Return what is wrong with an output, found by a process that has not compared it before."""
    outputs._compared.clear()
    return outputs.complaint_of_output(folder, name)


def sees_a_change(folder: Path, file: str, name: str, complaint: object) -> bool:
    """Return whether the whole output was believed, and is not with one bit of its last byte changed."""
    path = folder / file
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    seen = compare(folder, name)
    path.write_bytes(content)
    return complaint == "" and seen != ""


def row_of(what: str, folder: Path, file: str, name: str, ours: float, against: str, plain: Side) -> Row:
    """Return a comparison, as a share of the work on `plain.amount` of the `ours` things that the step works on."""
    return Row(
        f"compared with the manifest: {what}",
        against,
        SHARE,
        Side(functools.partial(compare, folder, name), ours),
        plain,
        lambda _, complaint: sees_a_change(folder, file, name, complaint),
        at_most=True,
    )


def output_rows(tiny: bool) -> list[Row]:
    """Return rows that judge reads, against its scoring; a model that align reads, against its updates."""
    shape, count, inputs, groups = (TINY, 200, 1, 2) if tiny else (SMALL, 100_000, 12, 16)
    sampled, trained, copied = (scratch() / step for step in ("sample", "sft", "sft"))
    write_responses(sampled, count)
    write_model(trained, shape)
    shutil.copytree(trained, copied)  # as another run's folder that was copied here: its files have other stamps

    work, model = judge_step(inputs, shape), make_network(shape)
    requests = [judge_request(prompt) for prompt in work.asked]
    judge = Side(lambda: score(model, requests, Codec(), BATCH_TOKENS), len(work.every) / 2)
    _, align = align_sides(TorchEngine(make_network(shape), TABLE), real_groups(groups, shape))

    weights, step = "model/model.safetensors", f"an align step of {UPDATES} updates"
    return [
        row_of(f"{count:,} responses", sampled, RESPONSES, RESPONSES, count, "judge's scoring of as many", judge),
        row_of(f"model by stamps, {shape.name}", trained, weights, outputs.MODEL, UPDATES, step, align),
        row_of(f"model by digest, {shape.name}", copied, weights, outputs.MODEL, UPDATES, step, align),
    ]


BUILDERS: dict[str, Callable[[bool], list[Row]]] = {"outputs": output_rows}
