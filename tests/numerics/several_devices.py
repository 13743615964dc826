"""What workers of one device and of several say to the same requests, as JSON. Run by test_several_devices."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from transformers import AutoTokenizer

from coalign.config import GenerationTable, ModelTable
from coalign.generation.cuda_graphs import FixedSteps
from coalign.generation.sampling import Sampling
from coalign.generation.transformers_worker import GenerateWorker, ScoreWorker
from numerics.pretended import KIND, PretendedDevices, register
from numerics.tiny import SHAPES, network

NUM_LAYERS = {"n_layer", "n_layers", "num_hidden_layers"}
FORGETFUL = {"qwen2": {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1}}  # but for one layer
DEVICES = {"llama": 3, "gpt2": 2, "qwen2": 2}


def requests() -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Return requests for answers and for log-probs, of unlike lengths and with beginnings in common."""
    source = torch.Generator().manual_seed(0)
    prompts = [torch.randint(3, 64, (length,), generator=source).tolist() for length in (5, 9, 3, 14, 9, 2)]
    prompts.append([*prompts[1], 7, 11])
    asked = [{"prompt_ids": ids, "seeds": list(range(n, n + 1 + n % 3))} for n, ids in enumerate(prompts)]
    scored = [{"prompt_ids": ids, "continuations": [[5], [6], [7, 9, 4]]} for ids in prompts]
    return asked, scored


def answered(folder: str, table: GenerationTable) -> dict[str, Any]:
    """Return drawn and greedy answers, log-probs, and where the model's parts lie."""
    asked, scored = requests()
    limits = {"max_new_tokens": 8}
    drawing = GenerateWorker(folder, ModelTable(), table, Sampling(**limits, temperature=1.0, top_p=0.9), 1)
    greedy = GenerateWorker(folder, ModelTable(), table, Sampling(**limits), 1)
    score = ScoreWorker(folder, ModelTable(), table, 1)
    fixed = FixedSteps(drawing.model)
    return {
        "drawn": drawing(asked),
        "greedy": greedy(asked),
        "logps": [row["logps"] for row in score(scored)],
        "devices": sorted({str(parameter.device) for parameter in score.model.parameters()}),
        "recordable": fixed.is_exact(drawing.codec),
    }


def on_several(folder: str, table: GenerationTable, num_devices: int) -> dict[str, Any]:
    """Return the same from workers whose model is dealt out over devices, each with room for its part alone."""
    size = sum(path.stat().st_size for path in Path(folder).glob("*.safetensors"))
    room = 1.5 * size / num_devices
    table = table.model_copy(update={"gpus_per_worker": float(num_devices)})
    with (
        mock.patch("coalign.generation.transformers_worker.pick_device", lambda: torch.device("cuda")),
        mock.patch("torch.cuda.device_count", lambda: num_devices),
        mock.patch("torch.cuda.mem_get_info", lambda device=0: (int(room), int(room))),
        PretendedDevices(),
    ):
        return answered(folder, table)


def refused() -> str:
    """Return how tensors of two devices are refused."""
    with PretendedDevices():
        try:
            torch.ones(2, device=f"{KIND}:0") + torch.ones(2, device=f"{KIND}:1")
        except RuntimeError as error:
            return str(error)
    return ""


def main(tokenizer: str, folder: Path) -> None:
    torch.set_num_threads(1)
    table = GenerationTable(dtype="float32", batch_tokens=120, repetition_penalty=1.1)
    one: dict[str, Any] = {}
    for family in DEVICES:
        changed = {name: 5 for name in NUM_LAYERS & SHAPES[family].keys()} | FORGETFUL.get(family, {})
        network(family, torch.float32, vocab_size=300, **changed).save_pretrained(folder / family)
        AutoTokenizer.from_pretrained(tokenizer).save_pretrained(folder / family)
        one[family] = answered(str(folder / family), table)
    register()
    several = {
        f"{family} on {count}": {"one": one[family], "several": on_several(str(folder / family), table, count)}
        for family, count in DEVICES.items()
    }
    print(json.dumps({"found": several, "refused": refused()}))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
