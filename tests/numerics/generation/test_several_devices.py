"""A model larger than a GPU: its layers lie on several simulated devices, and its answers are those of one device."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import coalign
from coalign.config import RandomTable
from coalign.models.random_model import make_random_model


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Return what workers with one device and with several said; in a process that knows of the pretended ones."""
    folder = tmp_path_factory.mktemp("several")
    table = RandomTable(vocab_size=300, hidden_size=32, num_layers=2, num_heads=4, intermediate_size=48, context=64)
    make_random_model(folder / "tokenizer", ["some words to learn from"], table, 1)
    script = Path(__file__).parents[1].joinpath("several_devices.py")
    sources = os.pathsep.join([str(script.parents[1]), str(Path(coalign.__file__).parents[1])])
    # transformers loads by threads otherwise, to which a dispatch mode of torch does not reach.
    environment = os.environ | {"PYTHONPATH": sources, "HF_DEACTIVATE_ASYNC_LOAD": "1"}
    command = [sys.executable, str(script), str(folder / "tokenizer"), str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=400, env=environment)
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def test_layers_on_several_devices_answer_and_score_alike(result: dict[str, Any]) -> None:
    """Drawn and greedy answers token by token, log-probs up to rounding; every device holds a part of the model."""
    assert set(result["found"]) == {"llama on 3", "gpt2 on 2", "qwen2 on 2"}
    for name, found in result["found"].items():
        one, several = found["one"], found["several"]
        assert one["devices"] == ["cpu"]
        assert several["devices"] == [f"pretended:{number}" for number in range(int(name[-1]))], name
        texts = [answer["text"] for row in one["drawn"] for answer in row["answers"]]
        assert len(set(texts)) > 5, name
        assert several["drawn"] == one["drawn"], name
        assert several["greedy"] == one["greedy"], name
        for ours, theirs in zip(several["logps"], one["logps"], strict=True):
            assert ours == pytest.approx(theirs, abs=1e-5), name
        assert not several["recordable"], "a CUDA graph of one device would miss what the others do"


def test_pretended_devices_refuse_what_real_ones_do(result: dict[str, Any]) -> None:
    """Without this the comparison would show nothing."""
    assert result["refused"] == "aten::add: its tensors lie on ['pretended:0', 'pretended:1']"
