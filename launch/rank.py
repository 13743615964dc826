"""Turn verdicts into groups: rank/groups.jsonl holds, under each wording, the ranked responses to an input."""

from __future__ import annotations

import logging
from pathlib import Path

from coalign.commandline import parse_command_line
from coalign.config_values import changed_values, table_values
from coalign.errors import UserError
from coalign.judging import groups as ranking
from coalign.recipe import announce, run_step, set_up_logging
from coalign.records import Example, Response, Verdict, Wording, read_records, to_row
from coalign.runs.encode_ahead import encode_ahead
from coalign.runs.run_folder import RunFolder
from coalign.runs.step_folder import read_manifest
from coalign.steps import STEP_TABLES

logger = logging.getLogger("coalign")


def main(argv: list[str]) -> None:
    """Run the step."""
    config = parse_command_line("rank", argv)
    set_up_logging(config.log.level)
    run = RunFolder(config.run, argv)
    needs = {name: run.step(name) for name in ("prepare", "paraphrase", "sample", "judge")}
    judged = read_manifest(needs["judge"])
    gold = judged is None or bool(judged["config"]["judge.gold"])  # begin refuses when there is no judge step
    ranking.require_gold(config.rank, gold)
    step = run.begin("rank", table_values(config, STEP_TABLES["rank"], with_neutral=False), needs)
    if step is None:
        return

    examples = {(e.task, e.id): e for e in read_records(Example, needs["prepare"] / "examples.jsonl")}
    wordings = {(w.task, w.id): w for w in read_records(Wording, needs["paraphrase"] / "wordings.jsonl")}
    responses = read_records(Response, needs["sample"] / "responses.jsonl")
    verdicts = read_records(Verdict, needs["judge"] / "verdicts.jsonl")
    plan = f"{len(responses)} responses, {len(verdicts)} verdicts {'with' if gold else 'without'} gold answers"
    announce("rank", changed_values(config, STEP_TABLES["rank"]), plan, False)

    groups, dropped, counts = ranking.make_groups(
        responses, verdicts, examples, wordings, config.rank, gold, config.run.seed
    )
    step.write_output("dropped.jsonl", dropped)
    if not groups:
        step.close()
        raise UserError(ranking.explain_no_groups(counts))
    step.write_output("groups.jsonl", map(to_row, groups))
    for line in ranking.describe_groups(counts):
        logger.info("%s", line)
    step.commit(counts | {"cores": 1})
    encode_ahead(Path(__file__).with_name("align.py"), run, len(groups))


if __name__ == "__main__":
    run_step(main)
