"""What eval asks of each model: inputs under wordings, repeats for the noise floors; and the answers read back.

Pure text and paths: knows no model. summary.py makes the tables from the responses.
"""

from __future__ import annotations

import dataclasses
import logging
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from coalign.config import EvalTable, GenerationTable
from coalign.errors import UserError
from coalign.evaluation.metrics_schema import Summary
from coalign.process import derive_seed
from coalign.records import Example, Response, Row, Task, Wording, read_records
from coalign.runs.digests import digest_file
from coalign.runs.outputs import step_output
from coalign.text import loose_key, unit_hash
from coalign.wordings.asking import Pair, Request, read_responses
from coalign.wordings.wording_files import load_wordings
from coalign.wordings.wordings import expected_answer, render_prompt

NOISE_TEMPERATURE = 0.7

logger = logging.getLogger("coalign")

# (what, requests, generation mode, temperature, rows per shard or 0 for what is configured) -> result rows in order
Generate = Callable[[str, list[Request], str, float, int], Iterable[Row]]


@dataclasses.dataclass(frozen=True, slots=True)
class ModelOutput:
    """What one model said: greedy answers, the two noise floors, and greedy answers in the other generation mode
    (none with vLLM).

    `num_tokens` counts everything that was generated for it.
    """

    answers: list[Response]
    neighbours: list[Response] = dataclasses.field(default_factory=list)
    samples: list[Response] = dataclasses.field(default_factory=list)
    other_mode: list[Response] = dataclasses.field(default_factory=list)
    num_tokens: int = 0


def plan_pairs(
    tasks: Iterable[Task], examples: Iterable[Example], wordings: Iterable[Wording], table: EvalTable
) -> tuple[list[Pair], list[dict[str, Any]]]:
    """Return every input of the split under every wording of its task, and what was dropped, with reasons.

    Wordings are taken in file order, inputs in hash order. Raises UserError when nothing is left.
    """
    of_task: dict[str, list[Wording]] = defaultdict(list)
    for wording in wordings:
        of_task[wording.task].append(wording)
    inputs: dict[str, list[Example]] = defaultdict(list)
    for example in examples:
        if example.split == table.split:
            inputs[example.task].append(example)
    pairs: list[Pair] = []
    dropped: list[dict[str, Any]] = []
    for task in tasks:
        chosen = of_task[task.id][: table.max_wordings or None]
        if not chosen or not inputs[task.id]:
            dropped.append({"reason": "no_wordings" if inputs[task.id] else "no_inputs", "task": task.id})
            continue
        ordered = sorted(inputs[task.id], key=lambda example: (unit_hash(loose_key(example.input)), example.id))
        for example in ordered[: table.max_inputs or None]:
            for wording in chosen:
                prompt, reason = _render(example, wording)
                if reason:
                    row = {"reason": reason, "task": task.id, "example": example.id, "wording": wording.id}
                    dropped.append(row)
                else:
                    pairs.append(Pair(example, wording, prompt))
    if not pairs:
        source = f"paraphrase.num_{table.split}" if not table.wordings_file else table.wordings_file
        raise UserError(
            f"eval has nothing to ask: no input of the {table.split} split has a wording that fits it; see {source} and"
            " the data.*_share settings"
        )
    return pairs, dropped


def _render(example: Example, wording: Wording) -> tuple[str, str]:
    prompt = render_prompt(wording, example.input)
    if prompt is None:
        return "", "fields_regex"
    if all(expected_answer(wording, example.input, gold) is None for gold in example.outputs):
        return "", "answer_map"
    return prompt, ""


def too_long_row(pair: Pair, num_tokens: int) -> Row:
    """Return the row of dropped.jsonl for a pair whose prompt of `num_tokens` and answer exceed the context."""
    task, example, wording = pair.key
    return {"reason": "too_long", "task": task, "example": example, "wording": wording, "num_tokens": num_tokens}


def noise_requests(requests: Sequence[Request], num_inputs: int) -> list[Request]:
    """Return one wording (the first) of `num_inputs` inputs, taken in hash order over all tasks."""
    first: dict[tuple[str, str], Request] = {}
    for request in requests:
        first.setdefault(request.pair.key[:2], request)
    ordered = sorted(first, key=lambda place: unit_hash("noise", *place))
    return [first[place] for place in ordered[:num_inputs]]


def repeats_among_others(
    chosen: Sequence[Request], requests: Sequence[Request], repeats: int, seed: int
) -> tuple[list[Request], int]:
    """Return the chosen requests `repeats` times, each time among other requests, and how many rows a repeat has.

    A repeat is to be a shard of its own, so that no two copies of a request are ever computed together. It holds as
    many others ("filler") as chosen ones, but at most half of those that there are: each repeat draws its own by hash.
    """

    def order(request: Request, what: str, repeat: int) -> int:
        return derive_seed(seed, "neighbours", what, repeat, *request.pair.key)

    keys = {request.pair.key for request in chosen}
    others = [request for request in requests if request.pair.key not in keys]
    num_others = min(len(chosen), (len(others) + 1) // 2)
    rows = []
    for repeat in range(repeats):
        drawn = sorted(others, key=lambda r: order(r, "filler", repeat))[:num_others]
        together = [dataclasses.replace(r, repeat=repeat) for r in chosen]
        together += [dataclasses.replace(r, repeat=repeat, filler=True) for r in drawn]
        rows += sorted(together, key=lambda r: order(r, "place", repeat))
    return rows, len(chosen) + num_others


def seeded_samples(requests: Sequence[Request], samples: int, seed: int) -> list[Request]:
    """Return every request once, asking for several seeded samples."""

    def seeds(request: Request) -> list[int]:
        return [derive_seed(seed, "eval", *request.pair.key, sample) for sample in range(samples)]

    return [dataclasses.replace(request, seeds=seeds(request)) for request in requests]


def held_out_wordings(
    table: EvalTable, paraphrased: Path, tasks: Iterable[Task]
) -> tuple[list[Wording], list[dict[str, Any]], dict[str, str]]:
    """Return the wordings to ask under, what was dropped of a file of wordings, and that file's digest by name.

    Without a file: the wordings of the split in the folder of the paraphrase step.
    """
    if not table.wordings_file:
        found = read_records(Wording, step_output(paraphrased, "wordings.jsonl"))
        return [wording for wording in found if wording.split == table.split], [], {}
    wordings, dropped = load_wordings([table.wordings_file], {task.id: task for task in tasks})
    return wordings, dropped, {"wordings_file": digest_file(Path(table.wordings_file), "eval.wordings_file")}


def collect_answers(
    requests: Sequence[Request],
    table: EvalTable,
    generation: GenerationTable,
    seed: int,
    generate: Generate,
) -> ModelOutput:
    """Ask a model for its answers, both noise floors, and the noise floor's inputs again in the other mode.

    vLLM has one mode.
    """
    mode, num_tokens = generation.mode, 0

    def ask(
        what: str, asked: list[Request], mode: str, temperature: float = 0.0, shard_size: int = 0
    ) -> list[Response]:
        nonlocal num_tokens
        rows = list(generate(what, asked, mode, temperature, shard_size))
        num_tokens += sum(answer["num_tokens"] for row in rows for answer in row["answers"])
        return read_responses(asked, rows)

    few = noise_requests(requests, table.noise_inputs)
    answers = ask("answers", list(requests), mode)
    repeats, shard_size = repeats_among_others(few, requests, table.noise_samples, seed)
    neighbours = ask("neighbours", repeats, "fast", shard_size=shard_size)
    samples = ask("samples", seeded_samples(few, table.noise_samples, seed), mode, NOISE_TEMPERATURE)
    other_mode = neighbours if mode == "exact" else ask("exact", few, "exact") if generation.engine != "vllm" else []
    return ModelOutput(answers, neighbours, samples, other_mode, num_tokens)


def count_models(
    summary: Summary, outputs: dict[str, ModelOutput], pairs: Sequence[Pair], cores: int
) -> dict[str, Any]:
    """Return the step's counts: what was asked and answered, the tokens that all models have generated, CPU cores."""
    return {
        "pairs": len(pairs),
        "models": {name: dataclasses.asdict(model.counts) for name, model in summary.models.items()},
        "tokens_generated": sum(output.num_tokens for output in outputs.values()),
        "cores": cores,
    }
