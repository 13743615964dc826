"""Let the model judge its own answers: judge/verdicts.jsonl holds one reward per distinct response."""

from __future__ import annotations

import functools
from collections.abc import Iterator

from coalign.config import cores_used, table_for_other_model
from coalign.errors import UserError
from coalign.judging import calibration, known_answers, verdicts
from coalign.judging.judge_model import JudgeModel
from coalign.recipe import log_lines, run_step
from coalign.records import Example, Response, Row, Task, to_row
from coalign.runs.digests import digest_judge
from coalign.runs.open_step import OpenStep, open_step
from coalign.runs.run_folder import base_model_folder


def main(argv: list[str]) -> None:
    """Decide by rules, measure the judge on known answers, and let it decide the rest."""
    step = open_step("judge", argv, ("prepare", "policy", "sample"), lambda c: digest_judge(c.judge, c.model))
    if step is None:
        return
    config, table = step.config, step.config.judge
    tasks = {task.id: task for task in step.read(Task)}
    examples = {(e.task, e.id): e for e in step.read(Example)}
    responses = step.read(Response)
    answers, dropped = verdicts.distinct_answers(responses)
    decided, undecided = verdicts.decide_by_rules(answers, examples, table.gold, tasks)
    known = known_answers.known_answers(tasks, examples, responses, decided.values(), table, config.run.seed)
    numbers = f"{len(responses)} responses, {len(answers)} distinct, {len(undecided)} for the judge"
    step.announce(f"{numbers}; {len(known)} known answers")

    # The known answers come first, so that a judge that is too weak stops the step before the long work.
    judge = make_judge(step)
    asked = verdicts.with_questions(known, tasks, examples, table)
    judge.ask(asked, "known")
    quality, weak = calibration.measure_judge(asked, judge.log_odds, table)
    if weak and not table.allow_weak:
        step.output.close()
        raise UserError(weak)

    num_known = judge.num_scored
    questions = verdicts.with_questions(undecided, tasks, examples, table)
    judge.ask(questions, "responses")
    thresholds = {question: values["threshold"] for question, values in quality.items()}
    judged, too_long = verdicts.decide_by_judge(questions, judge.log_odds, thresholds)
    decided |= judged
    dropped += too_long
    verdicts.require_decided(decided, responses, too_long)
    step.output.write_output("verdicts.jsonl", [to_row(decided[answer]) for answer in answers if answer in decided])
    step.output.write_output("dropped.jsonl", dropped)
    num_asked = judge.num_scored - num_known
    counts = verdicts.count_judging(responses, questions, decided, dropped, len(thresholds), num_asked)
    counts |= {"calibration": quality, "calls_on_known_answers": num_known, "weak": weak is not None}
    log_lines(verdicts.describe_verdicts(counts))
    step.output.commit(counts | {"cores": cores_used(config.generation, config.run)})


def make_judge(step: OpenStep) -> JudgeModel:
    """Return the judge as a function from prompts to log-odds, computed by the step's workers."""
    from coalign.clusters.shards import run_shards
    from coalign.generation.workers import make_score_worker
    from coalign.models.model_folder import load_codec

    config, chosen = step.config, step.config.judge.model
    named = {"sft": step.policy_model(), "base": base_model_folder(config.model, step.needs["prepare"])}
    folder = named.get(chosen, chosen)
    model = config.model if chosen in named else table_for_other_model(config.model)
    codec = load_codec(folder, model, step.output.date)
    make_worker = functools.partial(make_score_worker, folder, model, config.generation, config.run.threads)

    def score(requests: list[Row], name: str) -> Iterator[Row]:
        return run_shards(step.output, requests, make_worker, config.generation, f"judge {name}", name)

    return JudgeModel(codec, config.model.too_long, score)


if __name__ == "__main__":
    run_step(main)
