"""What vLLM does for the rows "vllm" and "vllm-mixed": `python vllm_answers.py SPEC.json`, in vLLM's own environment.

Prints one JSON object: CPU and wall seconds of LLM.generate, its answers, and greedy answers to the same prompts.
Stands alone: nothing of coalign is installed there. peer_rows.py writes the spec and says why vLLM is set up so.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

from vllm import LLM, SamplingParams


def answers_of(outputs: list[Any]) -> list[list[int]]:
    """Return the token ids of all samples, prompt by prompt."""
    return [list(sample.token_ids) for output in outputs for sample in output.outputs]


def main(path: str) -> None:
    """Answer the prompts of the spec again and again; the first time warms up."""
    spec = json.loads(Path(path).read_text(encoding="utf-8"))
    llm = LLM(model=spec["model"], **spec["options"])
    prompts = [{"prompt_token_ids": ids} for ids in spec["prompts"]]
    same = {"max_tokens": spec["max_tokens"], "ignore_eos": True, "detokenize": False}
    same["stop_token_ids"] = spec["stop_ids"]
    params = SamplingParams(n=spec["samples"], temperature=spec["temperature"], **same)
    cpu_seconds = wall_seconds = 0.0
    for number in range(1 + spec["rounds"]):
        assert llm.reset_prefix_cache(), "a round would find the last one's prompts computed"
        began = time.process_time(), time.monotonic()
        outputs = llm.generate(prompts, params, use_tqdm=False)
        if number:
            cpu_seconds += time.process_time() - began[0]
            wall_seconds += time.monotonic() - began[1]
    greedy = llm.generate(prompts, SamplingParams(temperature=0.0, **same), use_tqdm=False)
    found = {
        "seconds": cpu_seconds,
        "wall_seconds": wall_seconds,
        "answers": answers_of(outputs),
        "greedy": answers_of(greedy),
    }
    print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main(sys.argv[-1])
