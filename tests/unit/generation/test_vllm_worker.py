"""The vLLM workers against a stand-in for vLLM: what is asked of it, and what becomes of its answers."""

from __future__ import annotations

import math
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch

from coalign import commandline
from coalign.clusters.placement import Node, asked_workers
from coalign.config import GenerationTable, ModelTable
from coalign.errors import UserError
from coalign.generation import vllm_worker, workers
from coalign.generation.sampling import Sampling

BASE = str(Path(__file__).resolve().parents[3] / "examples" / "phrasebook" / "base")
SETTINGS = GenerationTable(engine="vllm", workers=0)
STOP = 5  # the end of turn of that model


class SamplingParams:
    """Keeps its arguments."""

    def __init__(self, **arguments: Any) -> None:
        self.__dict__.update(arguments)


class FakeEngine:
    """Draws the prompt's last token plus one, as often as its seed says, then a stop token."""

    made: list[FakeEngine] = []  # noqa: RUF012

    def __init__(self, **options: Any) -> None:
        if options["model"] == "refused":
            raise ValueError("1 validation error\n  no such architecture")
        self.options, self.asked, self.ended = options, [], False
        self.llm_engine = types.SimpleNamespace(engine_core=types.SimpleNamespace(shutdown=self.end))
        FakeEngine.made.append(self)

    def end(self) -> None:
        self.ended = True

    def generate(self, prompts: list[Any], params: list[SamplingParams], use_tqdm: bool) -> list[Any]:
        assert not use_tqdm and len(prompts) == len(params)
        self.asked += list(zip(prompts, params, strict=True))
        return [self.answer(p["prompt_token_ids"], q) for p, q in zip(prompts, params, strict=True)]

    def answer(self, ids: list[int], params: Any) -> Any:
        wanted = getattr(params, "seed", 0)
        drawn = [ids[-1] + 1] * wanted + [STOP]
        drawn, cut = drawn[: params.max_tokens], len(drawn) > params.max_tokens
        logprobs = [{t: types.SimpleNamespace(logprob=-t / 1000) for t in getattr(params, "logprob_token_ids", [])}]
        output = types.SimpleNamespace(
            token_ids=tuple(drawn), finish_reason="length" if cut else "stop", logprobs=logprobs
        )
        inside = getattr(params, "prompt_logprobs", None) is not None
        read = [None, *({t: types.SimpleNamespace(logprob=-1.0)} for t in ids[1:])]
        return types.SimpleNamespace(outputs=[output], prompt_logprobs=read if inside else None)


@pytest.fixture(autouse=True)
def _fake_vllm(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stand in for the package, and forget engines and environment afterwards."""
    module = types.ModuleType("vllm")
    distributed = types.ModuleType("vllm.distributed")
    module.LLM, module.SamplingParams = FakeEngine, SamplingParams  # type: ignore[attr-defined]
    distributed.cleanup_dist_env_and_memory = lambda: None  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "vllm", module)
    monkeypatch.setitem(sys.modules, "vllm.distributed", distributed)
    monkeypatch.setattr(vllm_worker, "_engines", {})
    monkeypatch.setattr(vllm_worker, "pick_device", lambda: torch.device("cpu"))
    monkeypatch.setattr(FakeEngine, "made", [])
    for name in vllm_worker.ENVIRONMENT:
        monkeypatch.setenv(name, "")  # so that it is put back
        monkeypatch.delenv(name)


def generate_worker(**sampling: Any) -> Any:
    how = Sampling(**{"max_new_tokens": 4, **sampling})
    return workers.make_generate_worker(BASE, ModelTable(path=BASE), SETTINGS, how, 0)


def test_a_seed_is_a_request_and_token_ids_travel() -> None:
    """Each seed with the sampling's values, our stop ids and no text; in the rows' order, keys passed through."""
    worker = generate_worker(temperature=0.7, top_p=0.9, top_k=3)
    rows = [
        {"key": "a", "prompt_ids": [10, 11], "seeds": [2, 0]},
        {"key": "b", "prompt_ids": [20], "seeds": [9]},
        {"key": "c", "prompt_ids": [30], "seeds": []},
    ]
    found = worker(rows)
    asked = [(prompt, vars(params)) for prompt, params in FakeEngine.made[0].asked]
    assert [prompt for prompt, _ in asked] == [{"prompt_token_ids": ids} for ids in ([10, 11], [10, 11], [20])]
    assert [params.pop("seed") for _, params in asked] == [2, 0, 9]
    expected = {
        "max_tokens": 4,
        "temperature": 0.7,
        "top_p": 0.9,
        "top_k": 3,
        "repetition_penalty": 1.0,
        "stop_token_ids": [STOP],
    }
    assert all(params == expected | {"ignore_eos": True, "detokenize": False} for _, params in asked)
    assert [row["key"] for row in found] == ["a", "b", "c"] and all(set(row) == {"key", "answers"} for row in found)
    word = worker.codec.decode
    assert found[0]["answers"] == [
        {"text": word([12, 12]), "finish": "stop", "num_tokens": 3},
        {"text": "", "finish": "stop", "num_tokens": 1},
    ]
    assert found[1]["answers"] == [{"text": word([21] * 4), "finish": "length", "num_tokens": 4}]
    assert found[2]["answers"] == []


def test_a_request_that_ended_otherwise_is_no_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    worker = generate_worker()
    aborted = types.SimpleNamespace(outputs=[types.SimpleNamespace(token_ids=(), finish_reason="abort")])
    monkeypatch.setattr(FakeEngine, "answer", lambda *_: aborted)
    with pytest.raises(RuntimeError, match="abort"):
        worker([{"prompt_ids": [1], "seeds": [0]}])


def test_scores_are_summed_over_a_continuations_tokens() -> None:
    """Continuations that differ in the last token share a request; only longer ones ask for the prompt's log-probs."""
    worker = workers.make_score_worker(BASE, ModelTable(path=BASE), SETTINGS, 0)
    rows = [
        {"id": 1, "prompt_ids": [10, 11], "continuations": [[40], [30], [50, 60, 70], [50, 60, 71]]},
        {"id": 2, "prompt_ids": [10, 11], "continuations": [[30]]},
    ]
    found = worker(rows)
    asked = [(prompt["prompt_token_ids"], vars(params)) for prompt, params in FakeEngine.made[0].asked]
    same = {"max_tokens": 1, "temperature": 0.0, "ignore_eos": True, "detokenize": False}
    assert asked == [
        ([10, 11], same | {"logprob_token_ids": [30, 40], "prompt_logprobs": None}),
        ([10, 11, 50, 60], same | {"logprob_token_ids": [70, 71], "prompt_logprobs": 0}),
    ]
    assert found[0] == {"id": 1, "logps": pytest.approx([-0.04, -0.03, -2.07, -2.071])}
    assert found[1] == {"id": 2, "logps": pytest.approx([-0.03])}


def test_log_probs_that_are_no_numbers_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    worker = workers.make_score_worker(BASE, ModelTable(path=BASE), SETTINGS, 0)
    output = types.SimpleNamespace(finish_reason="length", logprobs=[{3: types.SimpleNamespace(logprob=math.nan)}])
    monkeypatch.setattr(FakeEngine, "answer", lambda *_: types.SimpleNamespace(outputs=[output]))
    with pytest.raises(UserError, match="not finite"):
        worker([{"prompt_ids": [1], "continuations": [[3]]}])


def test_the_engine_gets_safe_options_and_is_kept() -> None:
    """One engine per process: used again for the same model and settings, ended before another one starts."""
    generate_worker()
    workers.make_score_worker(BASE, ModelTable(path=BASE), SETTINGS, 0)
    (engine,) = FakeEngine.made
    wanted = {
        "model": BASE,
        "revision": None,
        "dtype": "float32",
        "max_model_len": 256,
        "skip_tokenizer_init": True,
        "generation_config": "vllm",
        "load_format": "safetensors",
        "trust_remote_code": False,
        "enable_prefix_caching": True,
    }
    assert {key: engine.options[key] for key in wanted} == wanted
    assert not engine.ended
    workers.make_score_worker(BASE, ModelTable(path=BASE, max_tokens=128), SETTINGS, 0)
    assert engine.ended and [e.options["max_model_len"] for e in FakeEngine.made] == [256, 128]
    assert len(vllm_worker._engines) == 1


def test_memory_is_that_of_the_workers_share(monkeypatch: pytest.MonkeyPatch) -> None:
    """A part of a GPU for a part of a worker; on a CPU a cache of batch_tokens, one context at least."""

    def options(max_tokens: int = 256, **settings: Any) -> dict[str, Any]:
        table = GenerationTable(engine="vllm", **settings)
        return vllm_worker.engine_options("hub/name", ModelTable(path="hub/name", revision="v2"), table, max_tokens)

    assert options()["revision"] == "v2"
    assert options(workers=2)["gpu_memory_utilization"] == 0.25
    assert options(batch_tokens=640)["num_gpu_blocks_override"] == 21
    assert options(1024, batch_tokens=640)["num_gpu_blocks_override"] == 33
    assert options(batch_tokens=100)["max_num_seqs"] == options(batch_tokens=100)["max_num_batched_tokens"] == 100
    monkeypatch.setattr(vllm_worker, "pick_device", lambda: torch.device("cuda", 0))
    whole, half = options(batch_tokens=65536), options(gpus_per_worker=0.5)
    assert (whole["gpu_memory_utilization"], half["gpu_memory_utilization"]) == (0.9, 0.45)
    assert whole["dtype"] == "bfloat16" and whole["max_num_batched_tokens"] == vllm_worker.MAX_STEP_TOKENS
    several = options(gpus_per_worker=2.0)
    assert (several["tensor_parallel_size"], several["gpu_memory_utilization"]) == (2, 0.9)
    assert "tensor_parallel_size" not in whole
    assert not {"num_gpu_blocks_override", "enforce_eager", "block_size"} & set(whole)


def test_workers_that_would_share_a_gpu_unasked_are_refused() -> None:
    one, none = Node("a", "alpha", 8, 1, 8, 1), Node("b", "beta", 8, 0, 8, 0)
    with pytest.raises(UserError, match=r"generation\.workers=1, or set generation\.gpus_per_worker=0\.5"):
        asked_workers([one], GenerationTable(engine="vllm", workers=2))
    assert asked_workers([one], GenerationTable(engine="vllm", workers=2, gpus_per_worker=0.5)).gpus == 0.5
    assert asked_workers([one], GenerationTable(engine="vllm", workers=1)).gpus == 1.0
    assert asked_workers([none], GenerationTable(engine="vllm", workers=2)).gpus == 0.0


def test_a_model_that_vllm_refuses_is_named() -> None:
    with pytest.raises(UserError, match="refused: vLLM can't load the model: 1 validation error no such architecture"):
        vllm_worker._engine(sys.modules["vllm"], {"model": "refused"})


def test_a_missing_package_is_named_at_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Every step that generates says how to install it before anything is read; the others don't need it."""
    monkeypatch.delitem(sys.modules, "vllm")
    monkeypatch.setattr(commandline.importlib.util, "find_spec", lambda name: None)
    config = tmp_path / "c.toml"
    config.write_text('model.init = "random"\ngeneration.engine = "vllm"\n')
    for step in ("paraphrase", "sample", "judge", "eval", "ladder", "local"):
        with pytest.raises(UserError, match=r"vLLM is not installed; pip install vllm"):
            commandline.parse_command_line(step, [str(config)])
    for step in ("prepare", "sft", "rank", "align"):
        commandline.parse_command_line(step, [str(config)])


def test_a_broken_package_is_named_by_the_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(UserError, match=r"can't be imported here \(import of vllm halted.*pip install vllm"):
        generate_worker()


def test_the_environment_keeps_what_the_user_has_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_LOGGING_LEVEL", "DEBUG")
    generate_worker()
    assert {name: vllm_worker.os.environ[name] for name in vllm_worker.ENVIRONMENT} == {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_LOGGING_LEVEL": "DEBUG",
        "VLLM_WORKER_MULTIPROC_METHOD": "spawn",
    }
