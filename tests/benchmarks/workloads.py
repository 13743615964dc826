"""Work with the lengths of real data: SFT rows, ranked groups and judge requests, made of random token ids."""

from __future__ import annotations

import dataclasses
import random
from typing import Any

from benchmarks.lengths import lengths
from benchmarks.networks import FIRST, Shape, random_ids
from coalign.training.micro_batches import Item, row_tokens

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
    """Return both questions about 8 distinct responses to each of some inputs, as the judge step asks them."""
    source = random.Random(3)
    tasks, ending = judged_tasks(), random_ids(source, ENDING, shape)
    prompts = []
    for _ in range(num_inputs):
        prompts += judge_prompts(source, source.choice(tasks), MAX_CANDIDATES, ending, shape)
    return [judge_request(prompt) for prompt in prompts]


def judged_tasks() -> list[dict[str, Any]]:
    """Return the tasks that have many answers: responses to the others are mostly settled by rules."""
    return [task for task in lengths()["tasks"] if task["distinct_answers"] >= MAX_CANDIDATES]


def judge_request(prompt: list[int]) -> dict[str, Any]:
    """Return what a worker is asked to score: the verdict is one token, yes or no."""
    return {"prompt_ids": prompt, "continuations": [[FIRST], [FIRST + 1]]}


def judge_prompts(
    source: random.Random, task: dict[str, Any], count: int, ending: list[int], shape: Shape
) -> list[list[int]]:
    """Return the first question about some distinct responses to an input, then the second one.

    The first holds instruction and input, the second the gold answer alone; then come the response and the template's
    ending.
    """
    sizes = [max(1, source.choice(task["answer"]) - 1) for _ in range(count)]  # no end-of-turn in a question
    responses = [random_ids(source, size, shape) for size in sizes]
    asked = lengths()["type_question"] + source.choice(task["prompt"])
    known = lengths()["correct_question"] + source.choice(task["answer"])
    beginnings = [random_ids(source, size - ENDING, shape) for size in (asked, known)]
    return [[*beginning, *response, *ending] for beginning in beginnings for response in responses]


@dataclasses.dataclass(frozen=True)
class Judged:
    """The prompts of a judge step: of every response and question, of distinct ones, of those no rule settles."""

    every: list[list[int]]
    distinct: list[list[int]]
    asked: list[list[int]]


def judge_step(num_inputs: int, shape: Shape) -> Judged:
    """Return inputs whose responses are equal, and settled by rules, as often as a real run's were."""
    source = random.Random(3)
    tasks, ending = judged_tasks(), random_ids(source, ENDING, shape)
    kinds = [kind for *kind, _ in lengths()["judged"]["inputs"]]
    weights = [number for *_, number in lengths()["judged"]["inputs"]]
    work = Judged([], [], [])
    for responses, distinct, asked in source.choices(kinds, weights, k=num_inputs):
        prompts = judge_prompts(source, source.choice(tasks), distinct, ending, shape)
        repeats = [*range(distinct), *source.choices(range(distinct), k=responses - distinct)]
        for first in (0, distinct):
            work.every.extend(prompts[first + place] for place in repeats)
            work.distinct.extend(prompts[first : first + distinct])
            work.asked.extend(prompts[first : first + asked])
    return work
