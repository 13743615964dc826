"""The tasks that a key of the config names.

Pure text; knows no files.
"""

from __future__ import annotations

import dataclasses
import difflib
from collections import defaultdict
from collections.abc import Mapping, Sequence

from coalign.errors import UserError
from coalign.records import Task


def mark_unseen(tasks: Mapping[str, Task], unseen: Sequence[str]) -> dict[str, Task]:
    """Return the tasks, with those that `unseen` names marked as unseen; see `find_named`."""
    named = find_named(tasks, unseen, "data.unseen_tasks")
    return {name: dataclasses.replace(task, seen=False) if name in named else task for name, task in tasks.items()}


def find_named(tasks: Mapping[str, Task], names: Sequence[str], key: str) -> set[str]:
    """Return the ids of the tasks that a key of the config names; a name also covers name#2 and so on.

    Raises UserError for a name that is no task.
    """
    if not names:
        return set()
    bases: dict[str, list[str]] = defaultdict(list)
    for name in tasks:
        bases[name].append(name)
        base, mark, number = name.rpartition("#")
        if mark and number.isdigit():
            bases[base].append(name)
    for name in names:
        if name not in bases:
            near = difflib.get_close_matches(name, list(bases), n=1)
            hint = (
                f"did you mean {near[0]!r}?"
                if near
                else f"the data holds {len(tasks)} tasks, such as {next(iter(tasks))!r}"
            )
            raise UserError(f"{key} names {name!r}, which is no task of the data; {hint}")
    return {member for name in names for member in bases[name]}
