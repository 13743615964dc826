"""DeepSpeed ZeRO on gloo ranks against the plain torch engine: the same losses, gradient norms and weights.

The ranks take log-probs inside the head (tied to the embedding), the plain engine from the logits of all positions.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

import coalign
from coalign.config import RandomTable
from coalign.models.lora import attach_lora
from coalign.models.model_folder import load_model
from coalign.models.random_model import make_random_model
from numerics.engine import TorchEngine
from numerics.tiny import plain_logps
from numerics.traps import set_trap
from numerics.zero_ranks import NUM_STEPS, Case, run_case

pytestmark = pytest.mark.deepspeed

CASES: dict[str, dict[str, Any]] = {
    "zero0": {"train": {"zero_stage": 0}},
    "zero1": {"train": {"zero_stage": 1}},
    "zero2": {"train": {"zero_stage": 2}},
    "lora2": {"train": {"zero_stage": 2}, "lora": True},
    "checkpointing": {"train": {"zero_stage": 2, "gradient_checkpointing": True}},
    "hinge2": {"train": {"zero_stage": 2}, "loss": "hinge"},
    "dpo1": {"train": {"zero_stage": 1}, "loss": "dpo"},
    "zero3": {"train": {"zero_stage": 3}},
    "lora3": {"train": {"zero_stage": 3}, "lora": True},
    "hinge3": {"train": {"zero_stage": 3, "shared_prefix": False}, "loss": "hinge"},
}
BFLOAT16: dict[str, dict[str, Any]] = {
    f"bfloat16 zero{stage}": {"train": {"zero_stage": stage, "precision": "bfloat16"}} for stage in range(4)
}
SPOILT: dict[str, dict[str, Any]] = {
    f"spoilt zero{stage}": {"train": {"zero_stage": stage, "checkpoint_every": 3}, "loss": "spoilt"}
    for stage in range(4)
}
DROPOUT: dict[str, dict[str, Any]] = {
    f"dropout, {noise}": {"train": {"zero_stage": 3}, "lora": True, "dropout": 0.5, "noise": noise} for noise in (1, 2)
}
OFFLOADED: dict[str, dict[str, Any]] = {
    "offload2": {"train": {"zero_stage": 2, "offload_optimizer": True}},
    "offload3": {"train": {"zero_stage": 3, "offload_optimizer": True, "offload_parameters": True}},
}
MakeOnce = Callable[[str, Callable[[Path], None]], Path]
RESUMED = ("zero0", "zero1", "zero2", "zero3", "lora3")
TRAPS: dict[str, tuple[int, str, str, bool]] = {  # ranks that wrote the checkpoint, case, file, a bare pickle
    "model": (1, "zero0", "*model_states.pt", False),
    "bare": (1, "zero2", "*model_states.pt", True),
    "optimizer": (1, "zero2", "*optim_states.pt", False),
    "shard": (1, "zero3", "*optim_states.pt", False),
    "converted": (2, "zero2", "*optim_states.pt", False),
    "converted shard": (2, "zero3", "*optim_states.pt", False),
    "converted bare": (2, "zero2", "*model_states.pt", True),
}


@pytest.fixture(scope="session")
def source(made_once: MakeOnce) -> str:
    """Return a random model folder."""
    table = RandomTable(vocab_size=300, hidden_size=32, num_layers=2, num_heads=4, intermediate_size=48, context=64)
    words = ["a few words to learn a tokenizer from"]
    return str(made_once("zero_source", lambda folder: make_random_model(folder / "model", words, table, 0)) / "model")


def launch(cases: list[Case], num_ranks: int, folder: Path) -> str:
    """Train the cases one after another in one command and return what it printed; one rank needs no launcher."""
    spec = folder / "spec.json"
    for case in cases:
        case.path.mkdir(exist_ok=True)
    spec.write_text(json.dumps([dataclasses.asdict(case) for case in cases]))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    script = Path(__file__).parents[1].joinpath("zero_ranks.py")
    launcher = ["deepspeed", "--num_gpus", str(num_ranks), "--master_port", str(port), "--log_level", "warning"]
    command = launcher if num_ranks > 1 else [sys.executable]
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    sources = os.pathsep.join([str(script.parents[1]), str(Path(coalign.__file__).parents[1])])
    done = subprocess.run(
        [*command, str(script), str(spec)],
        capture_output=True,
        text=True,
        timeout=400,
        env=os.environ | {"PATH": path, "PYTHONPATH": sources},
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    return done.stdout


def curve(case: Case) -> list[dict[str, Any]]:
    """Return the training lines of a run."""
    return [json.loads(line) for line in (case.path / "metrics.jsonl").read_text().splitlines()]


def reference(case: Case) -> tuple[list[dict[str, Any]], dict[str, torch.Tensor]]:
    """Train a case with the plain torch engine in this process."""
    torch.manual_seed(0)
    network: Any = load_model(case.source, case.model_table(), torch.float32).train()
    if case.lora:
        network = attach_lora(network, case.model_table().lora)
    with contextlib.ExitStack() as patches:
        for module in ("loop", "reference"):
            patches.enter_context(mock.patch(f"coalign.training.{module}.token_logps", plain_logps))
        run_case(TorchEngine(network, case.train_table()), case)
    state = network.state_dict()
    return curve(case), {n: t for n, t in state.items() if ".lora_" in n} if case.lora else state


def assert_same_curve(found: list[dict[str, Any]], expected: list[dict[str, Any]], tolerance: float) -> None:
    """Compare all that was logged, but for the speed."""
    assert [line["step"] for line in found] == list(range(1, len(expected) + 1))
    for a, b in zip(found, expected, strict=True):
        for key in set(b) - {"kind", "step", "tokens_per_second"}:
            assert a[key] == pytest.approx(b[key], abs=tolerance, rel=tolerance), (key, b["step"])


def assert_same_weights(case: Case, expected: dict[str, torch.Tensor], tolerance: float) -> None:
    """Compare the weights after the last update."""
    found = torch.load(case.path / "state.pt")
    assert set(found) == set(expected)
    for key, tensor in expected.items():
        assert torch.allclose(found[key], tensor, rtol=0, atol=tolerance), key


def make_cases(shapes: dict[str, dict[str, Any]], source: str, folder: Path) -> dict[str, Case]:
    """Return the cases of a launch."""
    return {name: Case(str(folder / name), source, **values) for name, values in shapes.items()}


def cut_back(case: Case, folder: Path) -> Case:
    """Return a copy of a run as a kill after its seventh update would have left it."""
    shutil.copytree(case.path, folder)
    shutil.rmtree(folder / "checkpoints" / "step_000010")
    (folder / "state.pt").unlink()
    lines = (folder / "metrics.jsonl").read_text().splitlines(keepends=True)
    (folder / "metrics.jsonl").write_text("".join(lines[:7])[:-20])
    return dataclasses.replace(case, folder=str(folder))


@pytest.fixture(scope="session")
def two_ranks(source: str, made_once: MakeOnce) -> dict[str, Case]:
    """Train on two ranks."""
    shapes = CASES | SPOILT | DROPOUT | {"bfloat16": BFLOAT16["bfloat16 zero2"]}

    def fill(folder: Path) -> None:
        launch(list(make_cases(shapes, source, folder).values()), 2, folder)

    return make_cases(shapes, source, made_once("zero_two_ranks", fill))


@pytest.fixture(scope="module")
def one_rank(source: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Case]:
    """Train on one rank."""
    folder = tmp_path_factory.mktemp("one")
    cases = make_cases({name: CASES[name] for name in RESUMED}, source, folder)
    launch(list(cases.values()), 1, folder)
    return cases


@pytest.mark.parametrize("name", CASES)
def test_zero_on_two_ranks_equals_one_plain_process(name: str, two_ranks: dict[str, Case], tmp_path: Path) -> None:
    """Ten updates give the same loss, parts, gradient norm and weights as plain torch in one process."""
    case = two_ranks[name]
    expected, weights = reference(dataclasses.replace(case, folder=str(tmp_path)))
    assert len(expected) == NUM_STEPS and abs(expected[0]["loss"] - expected[-1]["loss"]) > 0.01
    assert_same_curve(curve(case), expected, 1e-5)
    assert_same_weights(case, weights, 2e-5)


@pytest.mark.parametrize("name", SPOILT)
def test_a_gradient_that_is_not_finite_stops_every_stage(name: str, two_ranks: dict[str, Case]) -> None:
    """The run stops in that update, before a checkpoint can hold spoilt weights, and the one before it stays."""
    case = two_ranks[name]
    assert "the gradient is no longer finite" in (case.path / "error.txt").read_text()
    assert [line["step"] for line in curve(case)] == [1, 2, 3]
    assert [p.name for p in (case.path / "checkpoints").glob("step_*")] == ["step_000003"]


def assert_close_in_bfloat16(case: Case, folder: Path) -> None:
    """Compare losses and gradient norms with a float32 run, loosely."""
    values = {**case.train, "precision": "float32"}
    expected, _ = reference(dataclasses.replace(case, folder=str(folder), train=values))
    for found, exact in zip(curve(case), expected, strict=True):
        assert found["loss"] == pytest.approx(exact["loss"], rel=0.02)
        assert found["grad_norm"] == pytest.approx(exact["grad_norm"], rel=0.1)
    assert all(t.dtype is torch.bfloat16 for t in torch.load(case.path / "state.pt").values())


def test_bfloat16_stays_close_to_float32(two_ranks: dict[str, Case], tmp_path: Path) -> None:
    """Training in bfloat16 follows the float32 curve."""
    assert_close_in_bfloat16(two_ranks["bfloat16"], tmp_path)


def test_two_ranks_resume_on_one_and_on_two(two_ranks: dict[str, Case], tmp_path: Path) -> None:
    """A run killed after a checkpoint goes on with fewer ranks, or as many, as if nothing had happened."""
    for num_ranks, names, tolerance in ((1, ["zero2"], 1e-4), (2, ["zero3", "dropout, 1"], 1e-5)):
        cases = {name: cut_back(two_ranks[name], tmp_path / name) for name in names}
        assert launch(list(cases.values()), num_ranks, tmp_path).count("resuming after update 5") == len(names)
        for name, case in cases.items():
            assert_same_curve(curve(case), curve(two_ranks[name]), tolerance)
            assert_same_weights(case, torch.load(two_ranks[name].path / "state.pt"), tolerance)


def test_adapters_and_their_dropout_follow_the_seed_on_every_rank(two_ranks: dict[str, Case]) -> None:
    """The same run is the same wherever torch's random state begins, and dropout does something."""
    first, second = (two_ranks[name] for name in DROPOUT)
    assert_same_curve(curve(first), curve(second), 0.0)
    assert_same_weights(first, torch.load(second.path / "state.pt"), 0.0)
    assert abs(curve(first)[-1]["loss"] - curve(two_ranks["lora3"])[-1]["loss"]) > 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("num_ranks", [1, 2])
def test_every_stage_resumes_on_another_number_of_ranks(
    num_ranks: int, one_rank: dict[str, Case], two_ranks: dict[str, Case], tmp_path: Path
) -> None:
    """Two ranks to one and one to two, every ZeRO stage, LoRA and ranking: the undisturbed run within 1e-4."""
    before = two_ranks if num_ranks == 1 else one_rank
    cases = {name: cut_back(before[name], tmp_path / name) for name in RESUMED}
    printed = launch(list(cases.values()), num_ranks, tmp_path)
    assert printed.count("resuming after update 5") == len(RESUMED)
    for name, case in cases.items():
        assert_same_curve(curve(case), curve(before[name]), 1e-4)
        assert_same_weights(case, torch.load(before[name].path / "state.pt"), 1e-4)


@pytest.mark.slow
def test_no_pickle_of_a_checkpoint_runs_code(
    one_rank: dict[str, Case], two_ranks: dict[str, Case], tmp_path: Path
) -> None:
    """A trap with a digest that fits ends the run in one line and is not sprung; the run beside it resumes."""
    whole = cut_back(one_rank["zero2"], tmp_path / "whole")
    trapped = {}
    for name, (ranks, case, pattern, bare) in TRAPS.items():
        trapped[name] = cut_back((one_rank, two_ranks)[ranks - 1][case], tmp_path / name)
        set_trap(trapped[name].path / "checkpoints" / "step_000005", pattern, tmp_path / f"{name} was sprung", bare)
    printed = launch([whole, *trapped.values()], 1, tmp_path)
    assert printed.count("resuming after update 5") == 1
    assert_same_curve(curve(whole), curve(one_rank["zero2"]), 1e-4)
    assert not list(tmp_path.glob("*sprung"))
    for name, case in trapped.items():
        complaint = (case.path / "error.txt").read_text()
        assert "holds a pickle that could run code" in complaint and "\n" not in complaint, name


@pytest.mark.slow
def test_offload_changes_nothing(source: str, tmp_path: Path) -> None:
    """Optimizer states and parameters in CPU memory give the same curve and weights."""
    cases = make_cases(OFFLOADED, source, tmp_path)
    launch(list(cases.values()), 2, tmp_path)
    for case in cases.values():
        expected, weights = reference(dataclasses.replace(case, folder=str(tmp_path)))
        assert_same_curve(curve(case), expected, 1e-5)
        assert_same_weights(case, weights, 2e-5)


@pytest.mark.slow
def test_bfloat16_on_every_stage(source: str, tmp_path: Path) -> None:
    """Every ZeRO stage trains in bfloat16 and logs a finite gradient norm."""
    cases = make_cases(BFLOAT16, source, tmp_path)
    launch(list(cases.values()), 2, tmp_path)
    for case in cases.values():
        assert_close_in_bfloat16(case, tmp_path)
