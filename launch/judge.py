"""Let the model judge its own answers: judge/verdicts.jsonl holds a reward for every distinct response."""

from __future__ import annotations

import functools
import logging

from coalign.commandline import parse_command_line
from coalign.config import cores_used, table_for_other_model
from coalign.config_values import changed_values, table_values
from coalign.errors import UserError
from coalign.judging import calibration, verdicts
from coalign.prompts import NO, YES
from coalign.recipe import announce, run_step, set_up_logging
from coalign.records import Example, Response, Task, read_records, to_row
from coalign.runs.digests import digest_judge
from coalign.runs.run_folder import RunFolder, base_model_folder
from coalign.steps import STEP_TABLES

logger = logging.getLogger("coalign")


def main(argv: list[str]) -> None:
    """Run the step."""
    config = parse_command_line("judge", argv)
    set_up_logging(config.log.level)
    run, table = RunFolder(config.run, argv), config.judge
    needs = {"prepare": run.step("prepare"), "policy": run.policy(), "sample": run.step("sample")}
    settings = table_values(config, STEP_TABLES["judge"], with_neutral=False)
    step = run.begin("judge", settings, needs, digest_judge(table, config.model))
    if step is None:
        return

    tasks = {task.id: task for task in read_records(Task, needs["prepare"] / "tasks.jsonl")}
    examples = {(e.task, e.id): e for e in read_records(Example, needs["prepare"] / "examples.jsonl")}
    responses = read_records(Response, needs["sample"] / "responses.jsonl")
    answers, dropped = verdicts.distinct_answers(responses)
    decided, undecided = verdicts.decide_by_rules(answers, examples, table.gold)
    dev = [example for example in examples.values() if example.split == "dev"]
    known = calibration.calibration_answers(tasks, dev, table.max_dev_inputs, config.run.seed)
    if table.gold:
        sampled = [examples[key] for key in dict.fromkeys((r.task, r.example) for r in responses)]
        known += calibration.audit_answers(tasks, sampled, decided.values(), table.audit_share, config.run.seed)
    num_open, num_distinct = len(undecided), len(answers)
    plan = f"{len(responses)} responses, {num_distinct} distinct, {num_open} for the judge; {len(known)} known ones"
    announce("judge", changed_values(config, STEP_TABLES["judge"]), plan)

    from coalign.clusters.shards import run_shards
    from coalign.generation.workers import make_score_worker
    from coalign.models.codec import Codec
    from coalign.models.model_folder import load_tokenizer

    named = {"sft": str(needs["policy"] / "model"), "base": base_model_folder(config.model, needs["prepare"])}
    model_folder = named.get(table.model, table.model)
    model = config.model if table.model in named else table_for_other_model(config.model)
    codec = Codec(load_tokenizer(model_folder, model), model)
    verdict_ids = [codec.encode_plain(YES), codec.encode_plain(NO)]
    make_worker = functools.partial(make_score_worker, model_folder, model, config.generation, config.run.threads)
    run_here = functools.partial(run_shards, step)
    places: dict[str, str | None] = {}
    log_odds: dict[str, float] = {}

    def scores(prompt: str) -> float | None:
        key = places[prompt]
        return None if key is None else log_odds[key]

    def ask(items: list[verdicts.AnyAnswer], name: str) -> list[tuple[verdicts.AnyAnswer, verdicts.PromptsByQuestion]]:
        asked = verdicts.with_questions(items, tasks, examples, table)
        prompts = [prompt for _, by_question in asked for prompt in verdicts.all_prompts(by_question)]
        requests = verdicts.plan_requests(prompts, codec.encode_prompt, verdict_ids, codec.max_tokens, places)
        if config.model.too_long == "error":
            verdicts.require_short(asked, places, codec.max_tokens)
        for row in run_here(requests, make_worker, config.generation, f"judge {name}", name):
            log_odds[row["key"]] = row["logps"][0] - row["logps"][1]
        return asked

    # The known answers come first: a judge that is too weak is found out before the long work.
    quality = calibration.calibrate(calibration.collect_samples(ask(known, "known"), scores), table.type_question)
    for line in calibration.describe_calibration(quality):
        logger.info("%s", line)
    weak = calibration.weakness(quality, table.min_quality)
    if weak and not table.allow_weak:
        step.close()
        raise UserError(weak)
    if weak:
        logger.warning("going on with judge.allow_weak: %s", weak)
    num_known = len(log_odds)
    thresholds = {question: values["threshold"] for question, values in quality.items()}
    asked = ask(undecided, "responses")
    judged, too_long = verdicts.decide_by_judge(asked, scores, thresholds)
    decided |= judged
    dropped += too_long

    step.write_output("verdicts.jsonl", [to_row(decided[answer]) for answer in answers if answer in decided])
    step.write_output("dropped.jsonl", dropped)
    counts = verdicts.count_judging(responses, asked, decided, dropped, len(thresholds), len(log_odds) - num_known)
    counts |= {"calibration": quality, "calls_on_known_answers": num_known, "weak": weak is not None}
    counts["cores"] = cores_used(config.generation, config.run)
    for line in verdicts.describe_verdicts(counts):
        logger.info("%s", line)
    step.commit(counts)


if __name__ == "__main__":
    run_step(main)
