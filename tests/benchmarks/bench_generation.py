"""Sampling against transformers' generate and judging against plain rows, on a random Llama of 10M parameters.

Run by hand: `python tests/benchmarks/bench_generation.py [--json FILE]`. Both sides of a row do the same work in one
process, in turn; times are CPU seconds of this process, so that a busy machine does not count.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import random
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "distributed"))

from coalign.decoding import Sampling, decode
from coalign.likelihoods import score

PAD, STOP, FIRST = 0, 2, 8  # FIRST: the lowest token of texts
VOCABULARY = 4096
BATCH_TOKENS = 8192  # the default of generation.batch_tokens
Ids = list[int]


class Codec:
    """What decoding and scoring read of a codec."""

    pad_id = PAD

    def __init__(self, *stop_ids: int) -> None:
        self.stop_ids = list(stop_ids)


@dataclasses.dataclass(frozen=True)
class Row:
    """One line of the table: the same work done plainly and by us; `same` says whether results were equal."""

    name: str
    against: str
    target: float
    plain: Callable[[], Any]
    ours: Callable[[], Any]
    same: Callable[[Any, Any], bool]


def make_model() -> Any:
    """Return the Llama; 10.2M parameters."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=320, num_hidden_layers=7, num_attention_heads=5, intermediate_size=896,
        max_position_embeddings=1024, tie_word_embeddings=True, pad_token_id=PAD, bos_token_id=1, eos_token_id=STOP,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def random_ids(source: random.Random, length: int) -> Ids:
    return [source.randrange(FIRST + 128, VOCABULARY) for _ in range(length)]


def generate(model: Any, prompts: list[Ids], **options: Any) -> list[Ids]:
    """Return what transformers generates for one batch, padded at the left as its documentation asks."""
    width = max(map(len, prompts))
    ids = torch.tensor([[PAD] * (width - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
    with torch.inference_mode():
        out = model.generate(ids, attention_mask=mask, pad_token_id=PAD, **options)
    return [row[width:] for row in out.tolist()]


def count_down(model: Any) -> list[Any]:
    """Make a prompt's last token decide how long its answer is, by hooks that both sides pass through.

    After token FIRST + n comes FIRST + n - 1, and after FIRST the stop token. Neither side can know the length before.
    """
    seen: list[torch.Tensor] = []

    def remember(_module: Any, arguments: Any, _output: Any) -> None:
        seen[:] = [arguments[0][:, -1]]

    def decide(_module: Any, _arguments: Any, logits: torch.Tensor) -> torch.Tensor:
        last = seen[0].unsqueeze(1)
        logits[:, -1].scatter_(1, torch.where(last > FIRST, last - 1, STOP), 1e6)
        return logits

    return [
        model.get_input_embeddings().register_forward_hook(remember),
        model.get_output_embeddings().register_forward_hook(decide),
    ]


def sampling_row(model: Any) -> Row:
    """Return 8 prompts of 200 tokens, 8 samples of 16 tokens each."""
    source = random.Random(1)
    prompts = [random_ids(source, 200) for _ in range(8)]
    seeds = [[8 * n + k for k in range(8)] for n in range(8)]
    options = {"do_sample": True, "top_k": 0, "max_new_tokens": 16, "eos_token_id": None, "num_return_sequences": 8}

    def ours() -> list[Ids]:
        found = decode(model, prompts, seeds, Sampling(16, 1.0), Codec(), BATCH_TOKENS)
        return [answer.ids for answers in found for answer in answers]

    return Row(
        "sampling, K = 8, prompts of 200 tokens, 16 new",
        "generate(num_return_sequences=8), 64 rows at once",
        2.5,
        lambda: generate(model, prompts, **options),
        ours,
        lambda a, b: len(a) == len(b) == 64 and all(len(x) == len(y) == 16 for x, y in zip(a, b, strict=True)),
    )


def mixed_row(model: Any) -> Row:
    """Return 64 prompts of 20 to 60 tokens, answers of 4 to 128 tokens."""
    source = random.Random(2)
    prompts = [[*random_ids(source, source.randint(19, 59)), FIRST + source.randint(3, 127)] for _ in range(64)]

    def hooked(work: Callable[[], list[Ids]]) -> Callable[[], list[Ids]]:
        def run() -> list[Ids]:
            hooks = count_down(model)
            try:
                return work()
            finally:
                for hook in hooks:
                    hook.remove()

        return run

    def plain() -> list[Ids]:
        options = {"do_sample": False, "max_new_tokens": 128, "eos_token_id": STOP}
        found = [row for i in range(0, 64, 16) for row in generate(model, prompts[i : i + 16], **options)]
        return [row[: row.index(STOP)] for row in found]

    def ours() -> list[Ids]:
        found = decode(model, prompts, [[0]] * 64, Sampling(128), Codec(STOP), BATCH_TOKENS)
        return [answers[0].ids for answers in found]

    name = "sampling, 64 prompts, mixed answers of 4-128 tokens"
    return Row(name, "generate, batches of 16 in arrival order", 2.8, hooked(plain), hooked(ours), list.__eq__)


def judge_requests() -> list[dict[str, Any]]:
    """Return two questions about 8 responses to each of 4 inputs: a shard of 64 prompts.

    A prompt is 126 to 138 tokens of instruction, question, input and gold answer, a response of 3 to 9 and a template's
    last 4 tokens; the verdict is one token, yes or no.
    """
    source = random.Random(3)
    requests = []
    ending = random_ids(source, 4)
    for _ in range(4):
        responses = [random_ids(source, source.randint(3, 9)) for _ in range(8)]
        for _ in range(2):
            asked = random_ids(source, source.randint(126, 138))
            prompts = [[*asked, *response, *ending] for response in responses]
            requests += [{"prompt_ids": prompt, "continuations": [[FIRST], [FIRST + 1]]} for prompt in prompts]
    return requests


def close(a: list[list[float]], b: list[list[float]]) -> bool:
    """Return whether scores are equal to 1e-4."""
    return all(abs(x - y) < 1e-4 for p, q in zip(a, b, strict=True) for x, y in zip(p, q, strict=True))


def judge_row(model: Any) -> Row:
    """Return scoring with shared beginnings against a padded row for each response and question."""
    requests = judge_requests()
    plain_tokens = sum(len(r["prompt_ids"]) for r in requests)
    # A response, the template's ending after it, and a beginning once for its 8 responses.
    rests = sum(len(r["prompt_ids"]) - len(_beginning(r, requests)) for r in requests)
    ratio = plain_tokens / (rests + sum(map(len, {_beginning(r, requests) for r in requests})))
    return Row(
        f"judge, 64 prompts, token ratio {ratio:.2f}",
        "one padded scoring row per response and question",
        round(0.6 * ratio, 2),
        lambda: score(model, requests, Codec(), BATCH_TOKENS, share=False),
        lambda: score(model, requests, Codec(), BATCH_TOKENS),
        close,
    )


def _beginning(request: dict[str, Any], requests: list[dict[str, Any]]) -> tuple[int, ...]:
    """Return what the request shares with another one, the most of it."""
    ids, best = request["prompt_ids"], 0
    for other in requests:
        if other is not request:
            pairs = zip(ids, other["prompt_ids"], strict=False)
            best = max(best, next((i for i, (a, b) in enumerate(pairs) if a != b), 0))
    return tuple(ids[:best])


def verdict_row(model: Any) -> Row:
    """Return scoring with shared beginnings against a generated verdict: the word and the end of the turn."""
    requests = judge_requests()
    prompts = [r["prompt_ids"] for r in requests]
    options = {"do_sample": False, "max_new_tokens": 2, "eos_token_id": None}
    return Row(
        "judge, 64 prompts",
        "generate of a verdict of 2 tokens, batches of 16",
        10.0,
        lambda: [row for i in range(0, len(prompts), 16) for row in generate(model, prompts[i : i + 16], **options)],
        lambda: score(model, requests, Codec(), BATCH_TOKENS),
        lambda a, b: len(a) == len(b),
    )


ROWS: dict[str, Callable[[Any], Row]] = {
    "sampling": sampling_row,
    "mixed": mixed_row,
    "judge": judge_row,
    "verdict": verdict_row,
}


def measure(row: Row, repeats: int) -> dict[str, Any]:
    """Return the fewest CPU seconds of either side, in turn, after a round of each to warm up."""
    same = row.same(row.plain(), row.ours())
    seconds: dict[str, list[float]] = {"plain": [], "ours": []}
    for _ in range(repeats):
        for side, work in (("plain", row.plain), ("ours", row.ours)):
            start = time.process_time()
            work()
            seconds[side].append(time.process_time() - start)
    best = {side: min(values) for side, values in seconds.items()}
    return {
        "row": row.name,
        "against": row.against,
        "plain_cpu_seconds": round(best["plain"], 3),
        "ours_cpu_seconds": round(best["ours"], 3),
        "ratio": round(best["plain"] / best["ours"], 2),
        "target": row.target,
        "same_result": same,
    }


def main() -> None:
    """Measure the rows and print their table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", nargs="*", default=list(ROWS), choices=list(ROWS))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path, help="also write the results to this file")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    model = make_model()
    results = []
    print(f"{'row':<55} {'plain s':>8} {'ours s':>8} {'ratio':>6} {'target':>6}  same   against")
    for name in options.rows:
        found = measure(ROWS[name](model), options.repeats)
        results.append(found)
        print(
            f"{found['row']:<55} {found['plain_cpu_seconds']:>8.2f} {found['ours_cpu_seconds']:>8.2f}"
            f" {found['ratio']:>6.2f} {found['target']:>6.2f}  {found['same_result']!s:<6} {found['against']}",
            flush=True,
        )
    if options.json:
        options.json.write_text(json.dumps({"torch": torch.__version__, "results": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
