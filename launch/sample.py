"""Answer every align input under several wordings: sample/responses.jsonl holds K responses per input and wording.

A wording that cannot ask about an input is left out; it is counted and listed in dropped.jsonl.
"""

from __future__ import annotations

import functools
from collections import Counter

from coalign.config import cores_used
from coalign.errors import UserError
from coalign.process import derive_seed
from coalign.recipe import run_step
from coalign.records import Example, Wording, to_row
from coalign.runs.open_step import open_step
from coalign.wordings.asking import Pair, build_requests, draw_pairs, read_responses, require_end, require_requests


def main(argv: list[str]) -> None:
    """Draw wordings per input, generate the responses, and map them back to canonical words."""
    step = open_step("sample", argv, ("prepare", "paraphrase", "policy"))
    if step is None:
        return
    config, table = step.config, step.config.sample

    from coalign.clusters.shards import run_shards
    from coalign.generation.workers import Sampling, make_generate_worker
    from coalign.models.model_folder import load_codec

    examples = step.read(Example, split="align")
    if not examples:
        raise UserError("no align inputs; check data.align_share and data.max_align_inputs")
    wordings: dict[str, list[Wording]] = {}
    for wording in step.read(Wording, split="train"):
        wordings.setdefault(wording.task, []).append(wording)
    pairs, dropped = draw_pairs(examples, wordings, table.wordings_per_input, config.run.seed)
    require_end(len(pairs) * table.samples, "sample.samples and sample.wordings_per_input")

    def seeds_of(pair: Pair) -> list[int]:
        return [derive_seed(config.run.seed, "sample", config.run.round, *pair.key, k) for k in range(table.samples)]

    folder = step.policy_model()
    codec = load_codec(folder, config.model, step.output.date)
    room = config.model.answer_tokens(table.max_new_tokens)
    requests, too_long = build_requests(pairs, codec, config.model.too_long, room, seeds_of)
    for task, example, name in sorted((pair.key for pair, _ in too_long), key=lambda key: f"{key[1]} under {key[2]}"):
        dropped.append({"reason": "too_long", "task": task, "example": example, "wording": name})
    require_requests(requests, dropped, "prompt", "sample.max_new_tokens")
    step.announce(f"{len(examples)} inputs, {len(requests)} prompts, {len(requests) * table.samples} responses")

    sampling = Sampling(room, table.temperature, table.top_p, table.top_k)
    make_worker = functools.partial(
        make_generate_worker, folder, config.model, config.generation, sampling, config.run.threads
    )
    asked = [request.to_row() for request in requests]
    responses = read_responses(requests, run_shards(step.output, asked, make_worker, config.generation, "sampling"))
    step.output.write_output("responses.jsonl", map(to_row, responses))
    step.output.write_output("dropped.jsonl", dropped)
    step.output.commit(
        {
            "inputs": len({r.example for r in responses}),
            "responses": len(responses),
            "cores": cores_used(config.generation, config.run),
            "cut_off": sum(r.finish == "length" for r in responses),
            "tokens_generated": sum(r.num_tokens for r in responses),
            "dropped": dict(sorted(Counter(row["reason"] for row in dropped).items())),
        }
    )


if __name__ == "__main__":
    run_step(main)
