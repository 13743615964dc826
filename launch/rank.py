"""Turn verdicts into groups: rank/groups.jsonl holds the ranked responses to an input under each of its wordings."""

from __future__ import annotations

from pathlib import Path

from coalign.errors import UserError
from coalign.judging import groups
from coalign.judging.best_answer import RankRules
from coalign.recipe import log_lines, run_step
from coalign.records import Example, Response, Task, Verdict, Wording, to_row
from coalign.runs.encode_ahead import encode_ahead
from coalign.runs.open_step import StepCommand
from coalign.runs.step_folder import read_manifest


def main(argv: list[str]) -> None:
    """Group the judged responses, and encode the groups if there are many."""
    command = StepCommand("rank", argv)
    table = command.config.rank
    judged = read_manifest(command.run.step("judge"))
    gold = judged is None or bool(judged["config"]["judge.gold"])  # without a judge step `begin` raises
    groups.require_gold(table, gold)
    step = command.begin(("prepare", "paraphrase", "sample", "judge"))
    if step is None:
        return

    examples = {(e.task, e.id): e for e in step.read(Example)}
    wordings = {(w.task, w.id): w for w in step.read(Wording)}
    responses, verdicts = step.read(Response), step.read(Verdict)
    answers = "with gold answers" if gold else "without gold answers"
    step.announce(f"{len(responses)} responses, {len(verdicts)} verdicts {answers}", with_model=False)

    forms = {task.id: task.answer_form for task in step.read(Task)}
    rules = RankRules(table, gold, command.config.run.seed, forms)
    made, dropped, counts = groups.make_groups(responses, verdicts, examples, wordings, rules)
    step.output.write_output("dropped.jsonl", dropped)
    if not made:
        step.output.close()
        raise UserError(groups.explain_no_groups(counts))
    step.output.write_output("groups.jsonl", map(to_row, made))
    log_lines(groups.describe_groups(counts))
    step.output.commit(counts | {"cores": 1})
    encode_ahead(Path(__file__).with_name("align.py"), step.run, len(made))


if __name__ == "__main__":
    run_step(main)
