"""What counts when a task's answers are compared: the setting, else what its gold answers differ by.

Pure text; knows no files.
"""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence

from coalign.answer_form import COUNTED, AnswerForm, counted_in, normalise_answer
from coalign.config import AnswerFormTable
from coalign.data.instances import Instance
from coalign.data.task_names import find_named
from coalign.records import Task

MAX_SPELLINGS = 1000  # of a task's gold answers; one with more has too many for two of them to tell anything
MAX_CHARACTERS = 200  # of a gold answer that is looked at
EVERY_TASK = "*"


def with_answer_forms(
    tasks: Mapping[str, Task], instances: Iterable[Instance], tables: Mapping[str, AnswerFormTable]
) -> dict[str, Task]:
    """Return the tasks with what counts in their answers.

    `tables` is data.answer_form by task name and "*"; raises UserError for a name that is no task. What it leaves open
    is told from the gold answers: case or lines count where two of them differ by nothing else. Gold answers of one
    input are spellings of one answer and tell nothing.
    """
    by_task = {
        task: table
        for name, table in tables.items()
        for task in ([EVERY_TASK] if name == EVERY_TASK else find_named(tasks, [name], "data.answer_form"))
    }
    spellings: dict[str, set[str]] = defaultdict(set)
    same: dict[str, set[str]] = defaultdict(set)
    for row in instances:
        written = spellings[row.task]
        if len(written) <= MAX_SPELLINGS:
            written.update(output for output in row.outputs if len(output) <= MAX_CHARACTERS)
        if len(row.outputs) > 1:
            keys = [normalise_answer(output) for output in row.outputs]
            same[row.task].update(key for key in keys if keys.count(key) > 1)
    found = {}
    for name, task in tasks.items():
        written = spellings[name] if len(spellings[name]) <= MAX_SPELLINGS else set()
        telling = [text for text in written if normalise_answer(text) not in same[name]] if same[name] else written
        found[name] = dataclasses.replace(task, answer_form=_chosen(counted_in(telling), name, by_task))
    return found


def _chosen(told: AnswerForm, task: str, tables: Mapping[str, AnswerFormTable]) -> AnswerForm:
    chosen = {name: name in told for name in COUNTED}
    for key in (EVERY_TASK, task):
        if key in tables:
            chosen |= tables[key].model_dump(exclude_unset=True)
    return tuple(name for name in COUNTED if chosen[name])


def distinct_answers(outputs: Sequence[str], form: AnswerForm) -> tuple[str, ...]:
    """Return gold answers without those that equal an earlier one."""
    if len(outputs) < 2:
        return tuple(outputs)
    distinct: dict[str, str] = {}
    for output in outputs:
        distinct.setdefault(normalise_answer(output, form), output)
    return tuple(distinct.values())


def describe_answer_forms(tasks: Iterable[Task]) -> list[str]:
    """Return a printable line for each thing that counts in some task, with the first tasks' names."""
    names: dict[str, list[str]] = defaultdict(list)
    for task in tasks:
        for counted in task.answer_form:
            names[counted].append(task.id)
    what = {"case": "case counts", "space": "line breaks and blanks count", "numbers": "1,000 and 1000 differ"}
    return [
        f"{what[counted]} when answers are compared (data.answer_form): {', '.join(found[:5])}"
        + (f" and {len(found) - 5} more tasks" if len(found) > 5 else "")
        for counted, found in names.items()
    ]
