"""Answer every align input under several wordings: sample/responses.jsonl holds K responses for each.

A wording is left out of an input, counted and listed, when its template misses the input or its answer map gives no
distinct words on it. Whether the map has the gold answer is not looked at: the align inputs may stand for unlabelled
ones (judge.gold = false); with gold answers rank counts such groups.
"""

from __future__ import annotations

import functools
from collections import Counter
from typing import Any

from coalign.commandline import parse_command_line
from coalign.config import cores_used
from coalign.config_values import changed_values, table_values
from coalign.errors import UserError
from coalign.process import derive_seed
from coalign.recipe import announce, run_step, set_up_logging
from coalign.records import Example, Response, Wording, read_records, to_row
from coalign.runs.run_folder import RunFolder
from coalign.steps import STEP_TABLES
from coalign.text import unit_hash
from coalign.wordings.wordings import canonical_answer, misfit, render_prompt


def main(argv: list[str]) -> None:
    """Run the step."""
    config = parse_command_line("sample", argv)
    set_up_logging(config.log.level)
    run, table, seed = RunFolder(config.run, argv), config.sample, config.run.seed
    needs = {"prepare": run.step("prepare"), "paraphrase": run.step("paraphrase"), "policy": run.policy()}
    step = run.begin("sample", table_values(config, STEP_TABLES["sample"], with_neutral=False), needs)
    if step is None:
        return

    from coalign.clusters.shards import run_shards
    from coalign.generation.workers import Sampling, make_generate_worker
    from coalign.models.codec import Codec, check_lengths
    from coalign.models.model_folder import load_tokenizer

    examples = {e.id: e for e in read_records(Example, needs["prepare"] / "examples.jsonl") if e.split == "align"}
    wordings: dict[str, list[Wording]] = {}
    for wording in read_records(Wording, needs["paraphrase"] / "wordings.jsonl"):
        if wording.split == "train":
            wordings.setdefault(wording.task, []).append(wording)
    if not examples:
        raise UserError("no align inputs; check data.align_share and data.max_align_inputs")

    folder = str(needs["policy"] / "model")
    codec = Codec(load_tokenizer(folder, config.model), config.model)
    pairs: dict[str, tuple[Example, Wording]] = {}
    requests: list[dict[str, Any]] = []
    dropped: list[dict[str, Any]] = []
    for example in examples.values():
        order = sorted(wordings.get(example.task, []), key=lambda w: unit_hash(str(seed), example.id, w.id))
        reasons = {w.id: misfit(w, example.input) for w in order}
        where = {"task": example.task, "example": example.id}
        dropped += [{"reason": reasons[w.id], **where, "wording": w.id} for w in order if reasons[w.id]]
        for wording in [w for w in order if not reasons[w.id]][: table.wordings_per_input]:
            prompt = str(render_prompt(wording, example.input))
            key = f"{example.id} under {wording.id}"
            pairs[key] = (example, wording)
            place = ("sample", config.run.round, example.task, example.id, wording.id)
            seeds = [derive_seed(seed, *place, k) for k in range(table.samples)]
            requests.append({"key": key, "prompt_ids": codec.encode_prompt(prompt), "seeds": seeds})
    lengths = ((r["key"], len(r["prompt_ids"]) + table.max_new_tokens) for r in requests)
    too_long = check_lengths(lengths, codec.max_tokens, config.model.too_long)
    requests = [r for r in requests if r["key"] not in too_long]
    for example, wording in (pairs[key] for key in sorted(too_long)):
        dropped.append({"reason": "too_long", "task": example.task, "example": example.id, "wording": wording.id})
    reasons_dropped = Counter(row["reason"] for row in dropped)
    plan = f"{len(examples)} inputs, {len(requests)} prompts, {len(requests) * table.samples} responses"
    announce("sample", changed_values(config, STEP_TABLES["sample"]), plan)

    sampling = Sampling(table.max_new_tokens, table.temperature, table.top_p, table.top_k)
    make_worker = functools.partial(
        make_generate_worker, folder, config.model, config.generation, sampling, config.run.threads
    )
    responses = []
    for row in run_shards(step, requests, make_worker, config.generation, "sampling"):
        example, wording = pairs[row["key"]]
        for k, a in enumerate(row["answers"]):
            same = canonical_answer(wording, example.input, a["text"])
            responses.append(
                Response(example.id, example.task, wording.id, k, a["text"], same, a["finish"], a["num_tokens"])
            )
    finishes = Counter(r.finish for r in responses)
    step.write_output("responses.jsonl", map(to_row, responses))
    step.write_output("dropped.jsonl", dropped)
    step.commit(
        {
            "inputs": len({r.example for r in responses}),
            "responses": len(responses),
            "cores": cores_used(config.generation, config.run),
            "cut_off": finishes["length"],
            "tokens_generated": sum(r.num_tokens for r in responses),
            "dropped": dict(sorted(reasons_dropped.items())),
        }
    )


if __name__ == "__main__":
    run_step(main)
