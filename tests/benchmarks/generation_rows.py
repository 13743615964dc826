"""Rows about sampling against transformers' generate, and about judging against plain rows."""

from __future__ import annotations

import functools
import random
from collections.abc import Callable
from typing import Any

import torch

from benchmarks.networks import FIRST, PAD, SMALL, STOP, TINY, Codec, Ids, Shape, make_network, random_ids
from benchmarks.rows import Row, Side
from benchmarks.workloads import judge_request, judge_requests, judge_step
from coalign.generation.cuda_graphs import FixedSteps
from coalign.generation.decoding import decode
from coalign.generation.sampling import Sampling
from coalign.generation.scoring import score
from coalign.models.worker_memory import TOKENS_ON_CPU

BATCH_TOKENS = TOKENS_ON_CPU  # what generation.batch_tokens = 0 means here
BATCH_ROWS = 16  # of a batch of generate


def generate(model: Any, prompts: list[Ids], **options: Any) -> list[Ids]:
    """Return what transformers generates for one batch, padded at the left as its documentation asks."""
    width = max(map(len, prompts))
    ids = torch.tensor([[PAD] * (width - len(p)) + p for p in prompts], device=model.device)
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=model.device)
    with torch.inference_mode():
        out = model.generate(ids, attention_mask=mask, pad_token_id=PAD, **options)
    return [row[width:] for row in out.tolist()]


def in_batches(model: Any, prompts: list[Ids], **options: Any) -> list[Ids]:
    """Return what transformers generates, some prompts at a time in their order."""
    starts = range(0, len(prompts), BATCH_ROWS)
    return [row for i in starts for row in generate(model, prompts[i : i + BATCH_ROWS], **options)]


def fixed_steps(model: Any) -> FixedSteps | None:
    """Return what a worker keeps from shard to shard."""
    return FixedSteps(model) if model.device.type == "cuda" else None


def sampling_rows(tiny: bool) -> list[Row]:
    """Return several samples of long prompts."""
    shape, count, length = (TINY, 2, 20) if tiny else (SMALL, 8, 200)
    return [sampling_row(make_network(shape), shape, count, length)]


def sampling_row(model: Any, shape: Shape, count: int, length: int, batch_tokens: int = BATCH_TOKENS) -> Row:
    """Return 8 samples of 16 tokens of prompts that are all equally long."""
    source = random.Random(1)
    prompts = [random_ids(source, length, shape) for _ in range(count)]
    seeds = [[8 * n + k for k in range(8)] for n in range(count)]
    options = {"do_sample": True, "top_k": 0, "max_new_tokens": 16, "eos_token_id": None, "num_return_sequences": 8}

    fixed = fixed_steps(model)

    def ours() -> list[Ids]:
        found = decode(model, prompts, seeds, Sampling(16, 1.0), Codec(), batch_tokens, fixed)
        return [answer.ids for answers in found for answer in answers]

    return Row(
        f"sampling, K = 8, prompts of {length} tokens, 16 new, {shape.name}",
        f"generate(num_return_sequences=8), {8 * count} rows at once",
        2.5,
        Side(ours),
        Side(lambda: generate(model, prompts, **options)),
        # Sampled by unlike random numbers: as many answers, as long.
        lambda a, b: len(a) == len(b) == 8 * count and {len(x) for x in (*a, *b)} == {16},
    )


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


def hooked(model: Any, work: Callable[[], list[Ids]]) -> Side:
    """Return work under the hooks of `count_down`."""

    def run() -> list[Ids]:
        hooks = count_down(model)
        try:
            return work()
        finally:
            for hook in hooks:
                hook.remove()

    return Side(run)


def mixed_rows(tiny: bool) -> list[Row]:
    """Return prompts of 20 to 60 tokens, answers of 4 to 128 tokens."""
    shape, count, longest = (TINY, 6, 12) if tiny else (SMALL, 64, 128)
    return [mixed_row(make_network(shape), shape, count, longest)]


def mixed_row(model: Any, shape: Shape, count: int, longest: int) -> Row:
    """Return answers of 4 to `longest` tokens."""
    source = random.Random(2)
    beginnings = [random_ids(source, source.randint(19, 59), shape) for _ in range(count)]
    prompts = [[*beginning, FIRST + source.randint(3, longest - 1)] for beginning in beginnings]

    def plain() -> list[Ids]:
        found = in_batches(model, prompts, do_sample=False, max_new_tokens=longest, eos_token_id=STOP)
        return [[*row, STOP][: [*row, STOP].index(STOP)] for row in found]

    fixed = fixed_steps(model)

    def ours() -> list[Ids]:
        found = decode(model, prompts, [[0]] * count, Sampling(longest), Codec(STOP), BATCH_TOKENS, fixed)
        return [answers[0].ids for answers in found]

    name = f"sampling, {count} prompts, mixed answers of 4-{longest} tokens, {shape.name}"
    against = f"generate, batches of {BATCH_ROWS} in arrival order"
    return Row(name, against, 2.8, hooked(model, ours), hooked(model, plain), list.__eq__)


def judge_work(tiny: bool) -> tuple[Shape, Any, list[dict[str, Any]]]:
    """Return a network and a shard of requests."""
    shape, inputs = (TINY, 1) if tiny else (SMALL, 4)
    return shape, make_network(shape), judge_requests(inputs, shape)


def close(a: list[list[float]], b: list[list[float]]) -> bool:
    """Return whether scores are equal to 1e-4."""
    return all(abs(x - y) < 1e-4 for p, q in zip(a, b, strict=True) for x, y in zip(p, q, strict=True))


def judge_rows(tiny: bool) -> list[Row]:
    """Return scoring with shared beginnings against a padded row for each response and question."""
    shape, model, requests = judge_work(tiny)
    return [judge_row(model, shape, requests)]


def judge_row(model: Any, shape: Shape, requests: list[dict[str, Any]], batch_tokens: int = BATCH_TOKENS) -> Row:
    """Return a shard of requests that a model scores both ways."""
    ratio = judge_ratio([request["prompt_ids"] for request in requests])
    scored = functools.partial(score, model, requests, Codec(), batch_tokens)
    return Row(
        f"judge, {len(requests)} prompts, {shape.name}, token ratio {ratio:.2f}",
        "one padded scoring row per response and question",
        0.6 * ratio,
        Side(scored),
        Side(lambda: scored(share=False)),
        close,
    )


def judge_ratio(prompts: list[Ids]) -> float:
    """Return the tokens of all prompts over those that are left when what prompts share is counted once."""
    beginnings = [longest_shared(ids, prompts) for ids in prompts]
    rests = sum(len(ids) - len(beginning) for ids, beginning in zip(prompts, beginnings, strict=True))
    return sum(map(len, prompts)) / (rests + sum(map(len, set(beginnings))))


def longest_shared(ids: Ids, prompts: list[Ids]) -> tuple[int, ...]:
    """Return the longest beginning that a prompt shares with another one."""
    best = 0
    for other in prompts:
        if other is not ids:
            pairs = zip(ids, other, strict=False)
            best = max(best, next((i for i, (a, b) in enumerate(pairs) if a != b), 0))
    return tuple(ids[:best])


def verdict_rows(tiny: bool) -> list[Row]:
    """Return a judge step against a generated verdict for each response and question: a word and the end of the turn.

    Twice: with every distinct response scored, and with those alone that no rule settles, as the step does it.
    """
    shape, inputs = (TINY, 2) if tiny else (SMALL, 12)
    model, work = make_network(shape), judge_step(inputs, shape)
    options = {"do_sample": False, "max_new_tokens": 2, "eos_token_id": None}

    def plain() -> int:
        return len(in_batches(model, work.every, **options))

    def row(prompts: list[Ids], name: str, target: float) -> Row:
        settled = {tuple(prompt) for prompt in work.distinct} - {tuple(prompt) for prompt in prompts}

        def ours() -> list[list[float]]:
            scored = score(model, [judge_request(prompt) for prompt in prompts], Codec(), BATCH_TOKENS)
            known = dict(zip(map(tuple, prompts), scored, strict=True))
            return [known[tuple(prompt)] for prompt in work.every if tuple(prompt) not in settled]

        return Row(
            f"judge step, {len(work.every)} verdicts, {name}, {shape.name}",
            f"generate of a verdict of 2 tokens, batches of {BATCH_ROWS}",
            target,
            Side(ours),
            Side(plain),
            lambda verdicts, scored: verdicts == len(work.every) and all(len(pair) == 2 for pair in scored),
        )

    distinct, asked = len(work.distinct), len(work.asked)
    return [
        row(work.asked, f"{asked} asked of {distinct} distinct", 10.0),
        row(work.distinct, f"{distinct} distinct, no rules", 0.0),
    ]


BUILDERS: dict[str, Callable[[bool], list[Row]]] = {
    "sampling": sampling_rows,
    "mixed": mixed_rows,
    "judge": judge_rows,
    "verdict": verdict_rows,
}
