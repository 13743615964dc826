"""Write wordings.jsonl: wordings of every instruction, from files and from the model."""

from __future__ import annotations

import functools
from pathlib import Path

from coalign.clusters.worker_pool import close_pools
from coalign.config import cores_used
from coalign.recipe import run_step
from coalign.records import Row, Task, read_records, to_row
from coalign.runs.digests import digest_file, digest_model_files
from coalign.runs.encode_ahead import encode_ahead
from coalign.runs.open_step import OpenStep, StepCommand
from coalign.runs.outputs import step_output
from coalign.runs.run_folder import base_model_folder
from coalign.runs.step_folder import read_manifest
from coalign.wordings import filtering
from coalign.wordings.asking import check_lengths
from coalign.wordings.rewrites import answers_in_turn, rewrite_requests
from coalign.wordings.wording_files import read_wordings


def main(argv: list[str]) -> None:
    """Merge wordings from files with the model's rewrites, split them, and drop bad ones with a reason."""
    command = StepCommand("paraphrase", argv)
    config, table = command.config, command.config.paraphrase
    prepared = command.require(["prepare"])["prepare"]
    tasks = read_records(Task, step_output(prepared, "tasks.jsonl"))
    # Before the step's folder is made, so that an invalid file leaves nothing behind that holds its digest.
    digests = {path: digest_file(Path(path)) for path in table.files if Path(path).is_file()}
    files = read_wordings(table.files, {task.id: task for task in tasks}, step_output(prepared, "examples.jsonl"))
    filtering.check_files(tasks, files, table)
    files_of_model = digest_model_files(config.model) if table.num_wordings else {}
    if (step := command.begin(["prepare"], digests | files_of_model)) is None:
        return
    answers: dict[str, list[Row]] = {}

    def ask(wanted: dict[str, int]) -> tuple[dict[str, list[Row]], set[str]]:
        total, given = sum(wanted.values()), f"{len(files.wordings)} wordings from files"
        step.announce(f"{given}, {total} rewrites to ask the model for, {len(tasks)} tasks", with_model=total > 0)
        found = ask_for_rewrites(step, tasks, wanted) if total else ({}, set())
        answers.update(found[0])
        return found

    settled = filtering.settle(tasks, files, table, config.run.seed, ask)
    step.output.write_output("wordings.jsonl", (to_row(w) for task in tasks for w in settled.by_task[task.id]))
    step.output.write_output("dropped.jsonl", settled.dropped)
    counts = filtering.count_wordings(tasks, settled, table)
    filtering.log_result(counts, settled)
    counts["tokens_generated"] = sum(answer["num_tokens"] for given in answers.values() for answer in given)
    step.output.commit(counts | {"cores": cores_used(config.generation, config.run) if answers else 1})
    inputs = (read_manifest(prepared) or {})["counts"]["inputs"][config.sft.split]
    num_drawn = config.sft.num_drawn(inputs, config.sft.batch_rows)
    encode_ahead(Path(__file__).with_name("sft.py"), step.run, num_drawn, close_pools)


def ask_for_rewrites(
    step: OpenStep, tasks: list[Task], wanted: dict[str, int]
) -> tuple[dict[str, list[Row]], set[str]]:
    """Return {task: the model's answers, in the order to try}, and the tasks whose instruction exceeds the context."""
    from coalign.clusters.shards import run_shards
    from coalign.generation.workers import Sampling, make_generate_worker
    from coalign.models.model_folder import load_codec

    config, table = step.config, step.config.paraphrase
    folder = base_model_folder(config.model, step.needs["prepare"])
    codec = load_codec(folder, config.model, step.output.date)
    requests = rewrite_requests(tasks, wanted, table, codec, config.run.seed)
    sampling = Sampling(config.model.answer_tokens(table.max_new_tokens), table.temperature, table.top_p)
    lengths = ((row["task"], len(row["prompt_ids"]) + sampling.max_new_tokens) for row in requests)
    too_long = check_lengths(lengths, codec.max_tokens, config.model.too_long)
    requests = [row for row in requests if row["task"] not in too_long]
    options = (folder, config.model, config.generation, sampling, config.run.threads)
    worker = functools.partial(make_generate_worker, *options)
    return answers_in_turn(run_shards(step.output, requests, worker, config.generation, "paraphrase")), too_long


if __name__ == "__main__":
    run_step(main)
