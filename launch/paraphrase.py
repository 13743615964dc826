"""Step 2: wordings of every instruction, from files and from the model. Reads prepare; writes wordings.jsonl."""

from __future__ import annotations

import functools
import logging
from collections import defaultdict
from pathlib import Path
from typing import Any

from coalign.clusters.worker_pool import close_pools
from coalign.commandline import parse_command_line
from coalign.config import Config, cores_used
from coalign.config_values import changed_values, table_values
from coalign.process import derive_seed
from coalign.prompts import NUM_VARIANTS, paraphrase_prompt
from coalign.recipe import announce, run_step, set_up_logging
from coalign.records import Task, read_records, to_row
from coalign.runs.digests import digest_file, digest_model_files
from coalign.runs.encode_ahead import encode_ahead
from coalign.runs.run_folder import RunFolder, base_model_folder
from coalign.runs.step_folder import StepFolder, require_complete
from coalign.steps import STEP_TABLES
from coalign.wordings import filtering, rewrites
from coalign.wordings.wording_files import read_wordings
from coalign.wordings.wordings import assign_splits, num_short

logger = logging.getLogger("coalign")


def main(argv: list[str]) -> None:
    """Merge wordings from files with the model's rewrites, split them, drop bad ones with a reason."""
    config = parse_command_line("paraphrase", argv)
    set_up_logging(config.log.level)
    table, run = config.paraphrase, RunFolder(config.run, argv)
    prepared = run.require("prepare", run.step("prepare"))
    tasks = read_records(Task, prepared / "tasks.jsonl")
    # The files are read before the step begins: a mistake in one leaves nothing behind that remembers its digest.
    digests = {path: digest_file(Path(path)) for path in table.files if Path(path).is_file()}
    files = read_wordings(table.files, {task.id: task for task in tasks})
    by_task, dropped = filtering.merge_files(tasks, files, table, config.run.seed)
    model_files = digest_model_files(config.model) if table.num_wordings else {}
    settings = table_values(config, STEP_TABLES["paraphrase"], with_neutral=False)
    step = run.begin("paraphrase", settings, {"prepare": prepared}, files=digests | model_files)
    if step is None:
        return
    wanted: dict[str, int] = {}
    for task in tasks:
        missing = sum(num_short(by_task[task.id], task, table.num_dev, table.num_test).values())
        wanted[task.id] = missing + table.num_wordings * task.seen if table.num_wordings else 0
    total = sum(wanted.values())
    plan = f"{len(files.wordings)} wordings from files, {total} rewrites wanted from the model for {len(tasks)} tasks"
    announce("paraphrase", changed_values(config, STEP_TABLES["paraphrase"]), plan, total > 0)
    answers, too_long = generate(config, step, prepared, tasks, wanted) if total else ({}, [])
    dropped += too_long
    held_out = filtering.held_out_texts(by_task, table.max_similarity)
    for task in tasks:
        from_files = by_task[task.id]
        accepted, bad = filtering.choose_rewrites(
            task, from_files, answers.get(task.id, []), wanted[task.id], table, held_out
        )
        dropped += bad
        fixed = {wording.id for wording in from_files}
        together = [*from_files, *accepted]
        by_task[task.id] = assign_splits(together, task, table.num_dev, table.num_test, config.run.seed, fixed)
    # Now that the rewrites have their splits: what is trained on must not repeat what another task's rewrites ask.
    by_task, repeated, originals = filtering.drop_held_out(by_task, tasks, table.max_similarity)
    dropped += repeated
    step.write_output("wordings.jsonl", (to_row(wording) for task in tasks for wording in by_task[task.id]))
    step.write_output("dropped.jsonl", dropped)
    counts = filtering.summarise(tasks, by_task, dropped, table)
    logger.info("%d wordings %s; dropped %s", counts["wordings"], counts["splits"], counts["dropped"] or "none")
    filtering.warn_of_gaps(counts, by_task, originals)
    counts |= {
        "originals_like_held_out": len(originals),
        "tokens_generated": sum(answer["num_tokens"] for given in answers.values() for answer in given),
        "cores": cores_used(config.generation, config.run) if total else 1,
    }
    step.commit(counts)
    inputs = require_complete(prepared, run.command("prepare"))["counts"]["inputs"][config.sft.split]
    encode_ahead(
        Path(__file__).with_name("sft.py"), run, config.sft.num_drawn(inputs, config.sft.batch_rows), close_pools
    )


def generate(
    config: Config, step: StepFolder, prepared: Path, tasks: list[Task], wanted: dict[str, int]
) -> tuple[dict[str, list[dict[str, Any]]], list[dict[str, Any]]]:
    """Return each task's answers in the order in which they are tried, and rows for tasks too long for the context."""
    from coalign.clusters.shards import run_shards
    from coalign.generation.workers import Sampling, make_generate_worker
    from coalign.models.codec import Codec, check_lengths
    from coalign.models.model_folder import load_tokenizer

    table = config.paraphrase
    folder = base_model_folder(config.model, prepared)
    codec = Codec(load_tokenizer(folder, config.model), config.model)
    requests: list[dict[str, Any]] = []
    for task in (task for task in tasks if wanted[task.id]):
        labels = rewrites.labels_in(task.instruction, task.labels)
        attempts = table.max_attempts * wanted[task.id]
        for variant in range(min(NUM_VARIANTS, attempts)):
            numbers = range(len(range(variant, attempts, NUM_VARIANTS)))
            seeds = [derive_seed(config.run.seed, "paraphrase", task.id, str(variant), i) for i in numbers]
            prompt_ids = codec.encode_prompt(paraphrase_prompt(task.instruction, labels, variant))
            requests.append({"task": task.id, "variant": variant, "prompt_ids": prompt_ids, "seeds": seeds})
    lengths = ((row["task"], len(row["prompt_ids"]) + table.max_new_tokens) for row in requests)
    long_tasks = check_lengths(lengths, codec.max_tokens, config.model.too_long)
    too_long = [
        {"task": t.id, "text": t.instruction, "reason": "longer_than_context"} for t in tasks if t.id in long_tasks
    ]
    sampling = Sampling(table.max_new_tokens, temperature=table.temperature, top_p=table.top_p)
    options = (folder, config.model, config.generation, sampling, config.run.threads)
    worker = functools.partial(make_generate_worker, *options)
    fitting = [row for row in requests if row["task"] not in long_tasks]
    by_variant: dict[str, list[list[dict[str, Any]]]] = defaultdict(list)
    for row in run_shards(step, fitting, worker, config.generation, "paraphrase"):
        by_variant[row["task"]].append(row["answers"])
    return {task: filtering.take_turns(answers) for task, answers in by_variant.items()}, too_long


if __name__ == "__main__":
    run_step(main)
