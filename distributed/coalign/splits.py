"""Deals instances out to sft, align, dev and test, finds label tasks, applies limits, counts words.

Used by launch/prepare.py on what data.read_sources returns. Pure text and numbers; knows no files.
"""

from __future__ import annotations

import bisect
import dataclasses
import difflib
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from hashlib import sha256
from typing import Any, get_args

from coalign.config import DataTable
from coalign.errors import UserError
from coalign.instances import Dropped, FreeNames, Instance
from coalign.records import Example, Split, Task
from coalign.text import normalise_answer, normalise_input, unit_hash

SPLITS: tuple[Split, ...] = get_args(Split)
MIN_INSTANCES_PER_LABEL = 4
MAX_LABEL_WORDS = 5
# Upper ends of the word-length buckets; the last one is open.
BUCKETS = (0, 4, 8, 16, 32, 64, 128, 256, 512, 1024)


@dataclasses.dataclass(slots=True)
class Prepared:
    """What prepare writes: tasks that have inputs, their examples, and what was left out."""

    tasks: list[Task]
    examples: list[Example]
    dropped: list[Dropped]


def split_instances(tasks: Mapping[str, Task], instances: Iterable[Instance], table: DataTable) -> Prepared:
    """Merge repeats, find labels, split by input text and apply the limits.

    Of an unseen task only the test inputs stay. Raises UserError when data.unseen_tasks or data.only_tasks names no
    task.
    """
    dropped: list[Dropped] = []
    known = mark_unseen(tasks, table.unseen_tasks)
    merged = merge_repeats(instances, dropped)
    if table.only_tasks:
        chosen = find_named(tasks, table.only_tasks, "data.only_tasks")
        dropped.extend(Dropped("other_task", row.place, row.id) for row in merged if row.task not in chosen)
        merged = [row for row in merged if row.task in chosen]
        known = {name: task for name, task in known.items() if name in chosen}
    known = find_labels(known, merged, table.max_labels)
    kept: dict[tuple[str, Split], list[Instance]] = defaultdict(list)
    for instance in merged:
        split = choose_split(_split_text(instance), table)
        if split != "test" and not known[instance.task].seen:
            dropped.append(Dropped("unseen_task_not_test", instance.place, instance.id))
        else:
            kept[instance.task, split].append(instance)
    dealt = {name for name, _ in kept}
    dropped.extend(Dropped("task_without_inputs", t.source, t.id) for t in known.values() if t.id not in dealt)
    _limit_tasks(kept, table.max_tasks, dropped)
    limits = dict(
        sft=table.max_sft_inputs, align=table.max_align_inputs, dev=table.max_dev_inputs, test=table.max_test_inputs
    )
    split_of: dict[str, Split] = {}
    for (_, split), group in kept.items():
        split_of.update((instance.id, split) for instance in _limit_inputs(group, limits[split], dropped))
    examples = [
        Example(instance.id, instance.task, instance.input, instance.outputs, split_of[instance.id])
        for instance in merged
        if instance.id in split_of
    ]
    used = {example.task for example in examples}
    return Prepared([task for name, task in known.items() if name in used], examples, dropped)


def mark_unseen(tasks: Mapping[str, Task], unseen: Sequence[str]) -> dict[str, Task]:
    """Return the tasks with those named not seen, see `find_named`."""
    named = find_named(tasks, unseen, "data.unseen_tasks")
    return {name: dataclasses.replace(task, seen=False) if name in named else task for name, task in tasks.items()}


def find_named(tasks: Mapping[str, Task], names: Sequence[str], key: str) -> set[str]:
    """Return the ids of the tasks that a key of the config names; a name also stands for name#2 and so on.

    Raises UserError for a name that is no task.
    """
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


def merge_repeats(instances: Iterable[Instance], dropped: list[Dropped]) -> list[Instance]:
    """Return one instance for each (task, normalised input), with the union of the references, every one with an id.

    An instance without an id gets one made from its task and its input, so that it survives a change of row order.
    """
    firsts: dict[tuple[str, str], Instance] = {}
    unions: dict[tuple[str, str], dict[str, str]] = {}
    for instance in instances:
        key = (instance.task, normalise_input(instance.input))
        first = firsts.setdefault(key, instance)
        if first is instance:
            continue
        answers = {normalise_answer(output): output for output in instance.outputs}
        before = {normalise_answer(output): output for output in first.outputs}
        detail = f"same input as {first.place}, {'same' if answers.keys() == before.keys() else 'other'} references"
        dropped.append(Dropped("merged_duplicate", instance.place, instance.id, detail))
        union = unions.setdefault(key, before)
        for answer, output in answers.items():
            union.setdefault(answer, output)
    names = FreeNames(instance.id for instance in firsts.values() if instance.id)
    merged = []
    for key, instance in firsts.items():
        outputs = tuple(unions[key].values()) if key in unions else instance.outputs
        name = instance.id or names.take(f"{key[0]}-{sha256(key[1].encode()).hexdigest()[:16]}")
        merged.append(instance._replace(outputs=outputs, id=name))
    return merged


def find_labels(tasks: Mapping[str, Task], instances: Iterable[Instance], max_labels: int) -> dict[str, Task]:
    """Return the tasks with the labels of those that are classification.

    A label task has at most `max_labels` different answers (normalised), each of at most 5 words, and at least 4
    instances a label on average. A label is written as it most often is.
    """
    spellings: dict[str, dict[str, Counter[str]]] = defaultdict(dict)
    num_instances: Counter[str] = Counter()
    free: set[str] = set()
    for instance in instances:
        num_instances[instance.task] += 1
        if instance.task in free:
            continue
        answers = spellings[instance.task]
        for output in instance.outputs:
            answers.setdefault(normalise_answer(output), Counter())[output] += 1
            if len(output.split()) > MAX_LABEL_WORDS:
                free.add(instance.task)
        if len(answers) > max_labels:
            free.add(instance.task)
    labelled = dict(tasks)
    for name, answers in spellings.items():
        if name not in free and num_instances[name] >= MIN_INSTANCES_PER_LABEL * len(answers):
            written = (min(counts.items(), key=lambda item: (-item[1], item[0]))[0] for counts in answers.values())
            labelled[name] = dataclasses.replace(tasks[name], labels=tuple(sorted(written)))
    return labelled


def choose_split(text: str, table: DataTable) -> Split:
    """Return the split of an input text: it depends on nothing but the normalised text and the shares."""
    place = unit_hash(normalise_input(text))
    ends = (table.sft_share, table.sft_share + table.align_share, table.sft_share + table.align_share + table.dev_share)
    return SPLITS[bisect.bisect_right(ends, place)]


def tokenizer_texts(tasks: Iterable[Task], examples: Iterable[Example]) -> Iterator[str]:
    """Yield what a tokenizer may be trained on: instructions and labels of seen tasks, sft inputs and outputs."""
    for task in tasks:
        if task.seen:
            yield task.instruction
            yield from task.labels
    for example in examples:
        if example.split == "sft":
            yield example.input
            yield from example.outputs


def count_words(texts: Iterable[str]) -> dict[str, int]:
    """Return the word-length histogram: bucket name ("5-8") -> number of texts, up to the longest text."""
    counts = Counter(bisect.bisect_left(BUCKETS, len(text.split())) for text in texts)
    return {_bucket_name(index): counts[index] for index in range(max(counts, default=-1) + 1)}


def summarise(prepared: Prepared) -> dict[str, Any]:
    """Return the counts of the manifest: tasks, inputs by split, dropped by reason, histograms of words."""
    tasks, examples = prepared.tasks, prepared.examples
    splits = Counter(example.split for example in examples)
    seen = {task.id: task.seen for task in tasks}
    return {
        "tasks": {
            "seen": sum(task.seen for task in tasks),
            "unseen": sum(not task.seen for task in tasks),
            "with_labels": sum(bool(task.labels) for task in tasks),
        },
        "inputs": {split: splits[split] for split in SPLITS},
        "test_inputs_of_unseen_tasks": sum(not seen[example.task] for example in examples),
        "dropped": dict(sorted(Counter(row.reason for row in prepared.dropped).items())),
        "words": {
            "instructions": count_words(task.instruction for task in tasks),
            "inputs": count_words(example.input for example in examples),
            "outputs": count_words(output for example in examples for output in example.outputs),
        },
    }


def describe(counts: Mapping[str, Any]) -> str:
    """Return the counts as lines for people."""
    tasks, inputs = counts["tasks"], counts["inputs"]
    lines = [
        f"tasks: {tasks['seen']} seen, {tasks['unseen']} unseen, {tasks['with_labels']} of them with labels",
        "inputs: "
        + ", ".join(f"{inputs[split]} {split}" for split in SPLITS)
        + f" (of these {counts['test_inputs_of_unseen_tasks']} of unseen tasks)",
        "dropped: " + (", ".join(f"{number} {reason}" for reason, number in counts["dropped"].items()) or "nothing"),
    ]
    for title, histogram in counts["words"].items():
        most = max(histogram.values(), default=1)
        lines.append(f"words in {title}:")
        lines += [f"  {name:>9}  {number:>8}  {'#' * round(40 * number / most)}" for name, number in histogram.items()]
    return "\n".join(lines)


def _split_text(instance: Instance) -> str:
    return instance.input if instance.input.strip() else instance.instruction


def _limit_tasks(kept: dict[tuple[str, Split], list[Instance]], limit: int, dropped: list[Dropped]) -> None:
    names = sorted({name for name, _ in kept}, key=lambda name: (unit_hash("tasks", name), name))
    if not limit or len(names) <= limit:
        return
    over = set(names[limit:])
    for key in [key for key in kept if key[0] in over]:
        dropped.extend(Dropped("over_limit", row.place, row.id, "data.max_tasks") for row in kept.pop(key))


def _limit_inputs(group: list[Instance], limit: int, dropped: list[Dropped]) -> list[Instance]:
    if not limit or len(group) <= limit:
        return group
    order = sorted(group, key=lambda instance: (unit_hash("inputs", normalise_input(instance.input)), instance.id))
    dropped.extend(Dropped("over_limit", instance.place, instance.id) for instance in order[limit:])
    return order[:limit]


def _bucket_name(index: int) -> str:
    if index == len(BUCKETS):
        return f"{BUCKETS[-1] + 1}+"
    first = BUCKETS[index - 1] + 1 if index else 0
    return str(first) if first == BUCKETS[index] else f"{first}-{BUCKETS[index]}"
