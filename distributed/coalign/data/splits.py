"""Deals instances out to sft, align, dev and test, finds label tasks, applies limits.

Pure text and numbers; knows no files. The instances are read several times and never held in memory. It takes about 30
bytes per instance, twice that while repeats are looked for; and the tasks, and the references of inputs that occur with
different ones.
"""

from __future__ import annotations

import bisect
import dataclasses
from array import array
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from hashlib import sha256
from typing import get_args

import numpy as np

from coalign.answer_form import AnswerForm
from coalign.config import DataTable
from coalign.data.answer_forms import distinct_answers, with_answer_forms
from coalign.data.instances import DroppedInstance, FreeNames, Instance
from coalign.data.spool import equal_places
from coalign.data.task_names import find_named, mark_unseen
from coalign.records import Example, Split, Task
from coalign.text import loose_key, normalise_answer, normalise_input, num_unspaced, unit_hash

SPLITS: tuple[Split, ...] = get_args(Split)
REASONS = ("merged_duplicate", "merged_duplicate", "other_task", "unseen_task_not_test", "over_limit", "over_limit")
MERGED_SAME, MERGED_OTHER, OTHER_TASK, UNSEEN, OVER_LIMIT, OVER_MAX_TASKS = range(len(SPLITS), len(SPLITS) + 6)
MERGED = (MERGED_SAME, MERGED_OTHER)
MIN_INSTANCES_PER_LABEL = 4
MAX_LABEL_WORDS = 5
MAX_LABEL_CHARACTERS = 15  # of a script that writes no spaces


@dataclasses.dataclass(slots=True)
class Prepared:
    """What prepare writes: tasks that have inputs, their examples, and what was left out.

    `fates` has a byte per instance: an index into SPLITS, or len(SPLITS) plus an index into REASONS. `firsts` has the
    row that a merged one repeats, `unions` the references of a row whose repeats have others, `renamed` the id of a row
    whose made id would clash. `forms` holds what counts in the answers, by task.
    """

    tasks: list[Task]
    tasks_dropped: list[DroppedInstance]
    instances: Sequence[Instance]
    fates: bytearray
    firsts: array[int]
    unions: dict[int, tuple[str, ...]]
    renamed: dict[int, str]
    forms: dict[str, AnswerForm]

    def examples(self) -> Iterator[Example]:
        """Yield the examples in the order of the rows."""
        for index, row in enumerate(self.instances):
            if self.fates[index] < len(SPLITS):
                outputs = distinct_answers(self.unions.get(index, row.outputs), self.forms[row.task])
                yield Example(self._id(index, row), row.task, row.input, outputs, SPLITS[self.fates[index]])

    def dropped(self) -> Iterator[DroppedInstance]:
        """Yield the rows left out in their order, then the tasks."""
        if max(self.fates, default=0) >= len(SPLITS):
            for index, row in enumerate(self.instances):
                if self.fates[index] >= len(SPLITS):
                    yield self._describe(index, row)
        yield from self.tasks_dropped

    def reasons(self) -> Counter[str]:
        """Return how many rows and tasks were left out, by reason."""
        counts = Counter(row.reason for row in self.tasks_dropped)
        for fate, number in Counter(self.fates).items():
            if fate >= len(SPLITS):
                counts[REASONS[fate - len(SPLITS)]] += number
        return counts

    def _describe(self, index: int, row: Instance) -> DroppedInstance:
        fate = self.fates[index]
        reason = REASONS[fate - len(SPLITS)]
        if fate in MERGED:
            first = self.instances[self.firsts[index]].place
            kind = "same" if fate == MERGED_SAME else "other"
            return DroppedInstance(reason, row.place, row.id, f"same input as {first}, {kind} references")
        return DroppedInstance(
            reason, row.place, self._id(index, row), "data.max_tasks" if fate == OVER_MAX_TASKS else ""
        )

    def _id(self, index: int, row: Instance) -> str:
        return row.id or self.renamed.get(index) or made_id(row)


def made_id(row: Instance, strict: bool = False) -> str:
    """Return an id made from the task and the input, which does not depend on the order of rows.

    `strict` where another input of the task has the same loose key.
    """
    text = normalise_input(row.input) if strict else loose_key(row.input)
    return f"{row.task}-{sha256(text.encode()).hexdigest()[:16]}"


@dataclasses.dataclass(slots=True)
class _InstanceGroup:
    """The rows of one task in one split; a limit keeps those with the smallest `hashes`."""

    rows: array[int] = dataclasses.field(default_factory=lambda: array("I"))
    hashes: array[float] = dataclasses.field(default_factory=lambda: array("d"))


def split_instances(tasks: Mapping[str, Task], instances: Sequence[Instance], table: DataTable) -> Prepared:
    """Merge repeats, find what counts in answers and labels, split by input text and apply the limits.

    Unseen tasks keep only their test inputs. Raises UserError when data.unseen_tasks, data.only_tasks or
    data.answer_form names something that is no task.
    """
    known = mark_unseen(tasks, table.unseen_tasks)
    known = with_answer_forms(known, instances, table.answer_form)
    forms = {name: task.answer_form for name, task in known.items()}
    chosen = find_named(tasks, table.only_tasks, "data.only_tasks") if table.only_tasks else tasks.keys()
    known = {name: task for name, task in known.items() if name in chosen}
    limits = [table.max_sft_inputs, table.max_align_inputs, table.max_dev_inputs, table.max_test_inputs]
    keys, fates, num_named = array("q"), bytearray(), 0
    groups: dict[tuple[str, int], _InstanceGroup] = defaultdict(_InstanceGroup)
    for index, row in enumerate(instances):
        text = loose_key(row.input)
        keys.append(hash((row.task, text)))
        num_named += bool(row.id)
        split = split_index(text if row.input.strip() else loose_key(row.instruction), table)
        if row.task not in chosen:
            fates.append(OTHER_TASK)
        elif SPLITS[split] != "test" and not known[row.task].seen:
            fates.append(UNSEEN)
        else:
            fates.append(split)
            group = groups[row.task, split]
            group.rows.append(index)
            if limits[split]:
                group.hashes.append(unit_hash("inputs", text))
    firsts, unions, near = merge_repeats(instances, keys, fates, forms)
    answers = (
        (row.task, unions.get(index, row.outputs))
        for index, row in enumerate(instances)
        if fates[index] not in (*MERGED, OTHER_TASK)
    )
    known = find_labels(known, answers, table.max_labels)
    dealt = {name for name, _ in groups}
    without = [
        DroppedInstance("task_without_inputs", task.source, name) for name, task in known.items() if name not in dealt
    ]
    _limit_tasks(groups, table.max_tasks, fates)
    for (_, split), group in groups.items():
        if 0 < limits[split] < len(group.rows):
            _limit_inputs(group, split, limits[split], fates)
    used = {name for name, _ in groups}
    used_tasks = [task for name, task in known.items() if name in used]
    renamed = {index: made_id(instances[index], strict=True) for index in near if not instances[index].id}
    if 0 < num_named < len(instances):
        renamed |= rename_clashes(instances, fates, renamed)
    return Prepared(used_tasks, without, instances, fates, firsts, unions, renamed, forms)


def merge_repeats(
    instances: Sequence[Instance], keys: array[int], fates: bytearray, forms: Mapping[str, AnswerForm]
) -> tuple[array[int], dict[int, tuple[str, ...]], list[int]]:
    """Find rows of the same task and normalised input; mark all but the first as merged in `fates`.

    `keys` has a hash of task and loose key of the input per row. Returns the row that each row repeats (itself if none;
    an empty array when no row repeats another), {row: united references} of those whose repeats have others, and the
    rows that share a loose key with another input of their task.
    """
    firsts: array[int] = array("I")
    unions: dict[int, tuple[str, ...]] = {}
    near: list[int] = []
    for group in sorted(equal_places(keys)):
        firsts = firsts or array("I", range(len(keys)))
        first_of: dict[tuple[str, str], int] = {}  # has one entry, unless inputs are nearly equal or hashes clash
        answers: dict[int, dict[str, str]] = {}
        own: dict[int, set[str]] = {}
        for index in group:
            row = instances[index]
            first = first_of.setdefault((row.task, normalise_input(row.input)), index)
            form = forms[row.task]
            found = {normalise_answer(text, form): text for text in distinct_answers(row.outputs, form)}
            if first == index:
                answers[index], own[index] = found, set(found)
                continue
            firsts[index] = first
            fates[index] = MERGED_SAME if found.keys() == own[first] else MERGED_OTHER
            for answer, output in found.items():
                answers[first].setdefault(answer, output)
        more = (first for first in answers if len(answers[first]) > len(own[first]))
        unions.update((first, tuple(answers[first].values())) for first in more)
        if len(first_of) > 1:
            loose = Counter((task, loose_key(text)) for task, text in first_of)
            near += [first for (task, text), first in first_of.items() if loose[task, loose_key(text)] > 1]
    return firsts, unions, near


def rename_clashes(instances: Sequence[Instance], fates: bytearray, renamed: Mapping[int, str]) -> dict[int, str]:
    """Return {row: new id} of rows without an id whose made id is another row's own; made ids never clash."""
    names = FreeNames(row.id for row, fate in zip(instances, fates, strict=True) if row.id and fate not in MERGED)
    unnamed = ((i, row) for i, row in enumerate(instances) if not row.id and fates[i] not in MERGED)
    made = ((index, renamed.get(index) or made_id(row)) for index, row in unnamed)
    return {index: names.take(name) for index, name in made if name in names}


def find_labels(
    tasks: Mapping[str, Task], answers: Iterable[tuple[str, Sequence[str]]], max_labels: int
) -> dict[str, Task]:
    """Return the tasks, classification tasks with their labels; `answers` are (task, references), one per input.

    A classification task has at most `max_labels` distinct normalised answers, each of MAX_LABEL_WORDS words at most
    (or MAX_LABEL_CHARACTERS where no spaces are written), and MIN_INSTANCES_PER_LABEL instances per label or more on
    average. A label has its most frequent spelling.
    """
    spellings: dict[str, dict[str, Counter[str]]] = defaultdict(dict)
    num_inputs: Counter[str] = Counter()
    free: set[str] = set()
    for task, outputs in answers:
        num_inputs[task] += 1
        if task in free:
            continue
        written = spellings[task]
        for output in outputs:
            written.setdefault(normalise_answer(output, tasks[task].answer_form), Counter())[output] += 1
            if len(output.split()) > MAX_LABEL_WORDS or num_unspaced(output) > MAX_LABEL_CHARACTERS:
                free.add(task)
        if len(written) > max_labels:
            free.add(task)
        if task in free:
            del spellings[task]
    labelled = dict(tasks)
    for name, written in spellings.items():
        if num_inputs[name] >= MIN_INSTANCES_PER_LABEL * len(written):
            labels = (min(counts.items(), key=lambda item: (-item[1], item[0]))[0] for counts in written.values())
            labelled[name] = dataclasses.replace(tasks[name], labels=tuple(sorted(labels)))
    return labelled


def split_index(normalised: str, table: DataTable) -> int:
    """Return the index in SPLITS of a normalised input text, which depends only on the text and the shares."""
    ends = (table.sft_share, table.sft_share + table.align_share, table.sft_share + table.align_share + table.dev_share)
    return bisect.bisect_right(ends, unit_hash(normalised))


def tokenizer_texts(tasks: Iterable[Task], examples: Iterable[Example]) -> Iterator[str]:
    """Yield the texts for training a tokenizer: instructions and labels of seen tasks, sft inputs and outputs."""
    for task in tasks:
        if task.seen:
            yield task.instruction
            yield from task.labels
    for example in examples:
        if example.split == "sft":
            yield example.input
            yield from example.outputs


def _limit_tasks(groups: dict[tuple[str, int], _InstanceGroup], limit: int, fates: bytearray) -> None:
    names = sorted({name for name, _ in groups}, key=lambda name: (unit_hash("tasks", name), name))
    if not limit or len(names) <= limit:
        return
    over = set(names[limit:])
    for key in [key for key in groups if key[0] in over]:
        for index in groups.pop(key).rows:
            if fates[index] not in MERGED:
                fates[index] = OVER_MAX_TASKS


def _limit_inputs(group: _InstanceGroup, split: int, limit: int, fates: bytearray) -> None:
    left = limit
    for place in np.argsort(np.asarray(group.hashes), kind="stable").tolist():
        index = group.rows[place]
        if fates[index] == split:  # not merged
            left -= 1
            if left < 0:
                fates[index] = OVER_LIMIT
