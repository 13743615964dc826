"""Work with the lengths of real data: SFT rows, ranked groups and judge requests, made of random token ids."""

from __future__ import annotations

import random
from typing import Any

from benchmarks.lengths import lengths
from benchmarks.networks import FIRST, Shape, random_ids
from coalign.batching import Item, row_tokens

MAX_CANDIDATES = 8  # the default of rank.max_candidates
ENDING = 2  # tokens of the template after a judged response


def tuple_ids(source: random.Random, length: int, shape: Shape) -> tuple[int, ...]:
    """Return random token ids as items hold them."""
    return tuple(random_ids(source, length, shape))


def sft_items(count: int, shape: Shape, seed: int = 0) -> list[Item]:
    """Return rows of stage 1: every task as often as it has rows."""
    source = random.Random(seed)
    tasks = lengths()["tasks"]
    chosen = source.choices(tasks, [task["rows"] for task in tasks], k=count)
    return [
        Item(
            f"row {number}",
            tuple_ids(source, source.choice(task["prompt"]), shape),
            (tuple_ids(source, source.choice(task["answer"]), shape),),
        )
        for number, task in enumerate(chosen)
    ]


def equal_items(count: int, prompt: int, answer: int, shape: Shape, seed: int = 0) -> list[Item]:
    """Return rows of stage 1 that are all equally long."""
    source = random.Random(seed)
    parts = ((tuple_ids(source, prompt, shape), tuple_ids(source, answer, shape)) for _ in range(count))
    return [Item(f"row {number}", asked, (said,)) for number, (asked, said) in enumerate(parts)]


def make_group(name: str, prompt: int, responses: list[int], shape: Shape, source: random.Random) -> Item:
    """Return a ranked group: the first response is best, the others have reward 1 or 0."""
    texts = tuple(tuple_ids(source, length, shape) for length in responses)
    rewards = (2, *(source.randint(0, 1) for _ in responses[1:]))
    return Item(name, tuple_ids(source, prompt, shape), texts, rewards)


def real_groups(count: int, shape: Shape, seed: int = 0) -> list[Item]:
    """Return groups as rank makes them: as many candidates as a task has different answers, MAX_CANDIDATES at most."""
    source = random.Random(seed)
    tasks = lengths()["tasks"]
    groups = []
    for number, task in enumerate(source.choices(tasks, [task["rows"] for task in tasks], k=count)):
        responses = source.choices(task["answer"], k=min(MAX_CANDIDATES, task["distinct_answers"]))
        groups.append(make_group(f"group {number}", source.choice(task["prompt"]), responses, shape, source))
    return groups


def even_groups(count: int, shape: Shape, seed: int = 0) -> list[Item]:
    """Return groups of 8 responses of 6 tokens under a prompt of 132."""
    source = random.Random(seed)
    return [make_group(f"group {number}", 132, [6] * 8, shape, source) for number in range(count)]


def token_ratio(groups: list[Item]) -> float:
    """Return how many tokens one row per response takes, over the tokens of groups that share their prompts."""
    plain = sum(len(item.prompt) + len(response) - 1 for item in groups for response in item.responses)
    return plain / sum(row_tokens(item, shared_prefix=True)[0] for item in groups)


def judge_requests(num_inputs: int, shape: Shape) -> list[dict[str, Any]]:
    """Return both questions about the distinct responses to inputs, as the judge step asks them.

    The first question holds instruction and input, the second the gold answer alone; then come the response and the
    template's ending. The verdict is one token, yes or no.
    """
    source = random.Random(3)
    tasks = [task for task in lengths()["tasks"] if task["distinct_answers"] >= MAX_CANDIDATES]
    ending = random_ids(source, ENDING, shape)
    requests = []
    for _ in range(num_inputs):
        task = source.choice(tasks)
        sizes = [
            max(1, source.choice(task["answer"]) - 1) for _ in range(MAX_CANDIDATES)
        ]  # no end-of-turn in a question
        responses = [random_ids(source, size, shape) for size in sizes]
        asked = lengths()["type_question"] + source.choice(task["prompt"])
        known = lengths()["correct_question"] + source.choice(task["answer"])
        for beginning in (random_ids(source, size - ENDING, shape) for size in (asked, known)):
            prompts = [[*beginning, *response, *ending] for response in responses]
            requests += [{"prompt_ids": prompt, "continuations": [[FIRST], [FIRST + 1]]} for prompt in prompts]
    return requests
