"""Step 8: greedy answers of every model to held-out inputs under held-out wordings; metrics.json and report.html."""

from __future__ import annotations

import functools
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from coalign.clusters.shards import run_shards
from coalign.config import Config, cores_used, table_for_other_model
from coalign.config_values import changed_values
from coalign.evaluation import agreement as agreeing
from coalign.evaluation import requests as evaluation
from coalign.evaluation import tested_models
from coalign.evaluation.metrics_schema import EvalCounts, complete
from coalign.evaluation.summary import summarise
from coalign.recipe import run_step
from coalign.records import Example, Row, Task, read_records, to_row
from coalign.report import model_card_results
from coalign.report.model_cards import model_labels
from coalign.report.page import write_results
from coalign.runs import costs, outputs
from coalign.runs.open_step import StepCommand
from coalign.runs.step_folder import StepFolder, installed_versions
from coalign.steps import STEP_TABLES, TRAINING_STEPS
from coalign.wordings.asking import Pair, Request, build_requests, require_requests


def main(argv: list[str]) -> None:
    """Run the step."""
    command = StepCommand("eval", argv)
    config, run, table = command.config, command.run, command.config.eval
    agreement = agreeing.parse_agreement(table.agreement)
    trained = command.find(TRAINING_STEPS)
    read = ["prepare"] if table.wordings_file else ["prepare", "paraphrase"]
    needs = command.require(dict.fromkeys([*read, *(value for value in table.models.values() if value in trained)]))
    tasks = read_records(Task, outputs.step_output(needs["prepare"], "tasks.jsonl"))
    wordings, dropped, files = evaluation.held_out_wordings(table, run.step("paraphrase"), tasks)
    folders = tested_models.find_models(config.model, table.models, trained, needs["prepare"])
    own = {name for name, value in table.models.items() if value in trained}
    judge_folder, digests = tested_models.check_models(folders, own, agreement.folder)
    examples = read_records(Example, outputs.step_output(needs["prepare"], "examples.jsonl"))
    pairs, unfit = evaluation.plan_pairs(tasks, examples, wordings, table)
    if (opened := command.begin(needs, files | digests, Path(table.folder) if table.folder else None)) is None:
        return
    step = opened.output
    command.announce(f"{len(pairs)} answers by each of {', '.join(folders)}")

    answered, dropped = {}, [*dropped, *unfit]
    judge = make_judge(config, step, judge_folder, dropped) if judge_folder else None
    if judge:  # before the long work: one that is too weak stops the step
        judge.measure(agreeing.known_pairs(tasks, examples, table.split, config.run.seed), table)
    for index, (name, folder) in enumerate(folders.items()):
        answered[name], too_long = ask_model(config, step, f"{index}-{name}", folder, pairs)
        dropped += [row | {"model": name} for row in too_long]
    found = summarise(tasks, pairs, answered, table, config.run.seed, agreement.decider(judge))
    dropped += found.dropped
    counts = evaluation.count_models(found.summary, answered, pairs, cores_used(config.generation, config.run))
    metrics = complete(
        found.summary,
        **costs.describe_steps(costs.steps_so_far(config.run, argv), step),
        eval_counts=EvalCounts(tokens_generated=counts["tokens_generated"], cores=counts["cores"]),
        agreement_judge=judge.result() if judge else None,
        run=config.run.name,
        sources=table.models,
        labels=model_labels(run, table.models),
        dropped=dict(Counter(row["reason"] for row in dropped)),
        settings=changed_values(config, STEP_TABLES["eval"]),
        versions=installed_versions(),
    )
    step.write_output("scores.jsonl", found.scores)
    step.write_output("dropped.jsonl", dropped)
    step.write_output("answers.jsonl", ({"model": n} | to_row(a) for n, o in answered.items() for a in o.answers))
    print("\n".join(write_results(step.path, metrics)), flush=True)
    step.commit(counts | {"dropped": metrics.dropped})
    model_card_results.add_results(run, table, metrics)


def ask_model(
    config: Config, step: StepFolder, name: str, folder: str, pairs: list[Pair]
) -> tuple[evaluation.ModelOutput, list[Row]]:
    """Return everything that one model said, and the rows too long for its context."""
    from coalign.generation import workers
    from coalign.models import model_folder

    table, settings = config.eval, config.generation
    model = tested_models.model_table(table.models[name.partition("-")[2]], config.model)
    codec, room = model_folder.load_codec(folder, model, step.date), model.answer_tokens(table.max_new_tokens)
    requests, left_out = build_requests(pairs, codec, model.too_long, room, lambda _: [0])

    def generate(what: str, asked: list[Request], mode: str, temperature: float, shard_size: int) -> Iterator[Row]:
        used = settings.model_copy(update={"mode": mode, "shard_size": shard_size or settings.shard_size})
        sampling = workers.Sampling(room, temperature=temperature)
        worker = functools.partial(workers.make_generate_worker, folder, model, used, sampling, config.run.threads)
        shards, rows = re.sub(r"[^\w.-]", "_", f"{name}-{what}"), [request.to_row() for request in asked]
        return run_shards(step, rows, worker, used, f"eval {name.partition('-')[2]} {what}", shards)

    rows = [evaluation.too_long_row(pair, num_tokens) for pair, num_tokens in left_out]
    require_requests(requests, rows, f"prompt of {name.partition('-')[2]}", "eval.max_new_tokens")
    return evaluation.collect_answers(requests, table, settings, config.run.seed, generate), rows


def make_judge(config: Config, step: StepFolder, folder: str, dropped: list[Row]) -> agreeing.JudgeOfAgreement:
    """Return the judge of agreement, computed by the step's workers; pairs that are too long go into `dropped`."""
    from coalign.generation import workers
    from coalign.models import model_folder

    model = table_for_other_model(config.model)
    worker = functools.partial(workers.make_score_worker, folder, model, config.generation, config.run.threads)

    def score(requests: list[Row], name: str) -> Iterator[Row]:
        return run_shards(step, requests, worker, config.generation, f"eval {name}", name)

    return agreeing.JudgeOfAgreement(model_folder.load_codec(folder, model, step.date), model.too_long, score, dropped)


if __name__ == "__main__":
    run_step(main)
