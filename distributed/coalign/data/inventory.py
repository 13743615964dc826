"""Counts what prepare made: tasks, inputs by split, rows left out by reason, lengths in words.

Pure numbers and text, for the manifest and for people; knows no files.
"""

from __future__ import annotations

import bisect
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from coalign.data.instances import DroppedInstance
from coalign.data.splits import SPLITS, Prepared
from coalign.records import Example
from coalign.text import num_unspaced, words

# Upper ends of the buckets of lengths in words; one more bucket is open.
BUCKETS = (0, 4, 8, 16, 32, 64, 128, 256, 512, 1024)


def count_words(texts: Iterable[str]) -> dict[str, int]:
    """Return a histogram of lengths in words: {bucket name such as "5-8": number of texts}, up to the longest text."""
    return _histogram(Counter(map(_bucket, texts)))


class Inventory:
    """Counts the examples of prepare while they are written, for the manifest."""

    def __init__(self, prepared: Prepared) -> None:
        self.prepared = prepared
        self._splits: Counter[str] = Counter()
        self._inputs: Counter[int] = Counter()
        self._outputs: Counter[int] = Counter()
        self._num_unseen = 0
        self._of_task: Counter[str] = Counter()

    def examples(self) -> Iterator[Example]:
        """Yield the examples and count them."""
        unseen = {task.id for task in self.prepared.tasks if not task.seen}
        for example in self.prepared.examples():
            self._splits[example.split] += 1
            self._of_task[example.task] += 1
            self._num_unseen += example.task in unseen
            self._inputs[_bucket(example.input)] += 1
            self._outputs.update(map(_bucket, example.outputs))
            yield example

    def warnings(self) -> Iterator[str]:
        """Yield what makes the method unlikely to work with these data. The examples must have been read to the end."""
        single = sum(number == 1 for number in self._of_task.values())
        if 2 * single > len(self._of_task) > 1:
            yield (
                f"{single} of {len(self._of_task)} tasks have a single input: the method needs many inputs under one"
                " instruction, and rows whose instructions all differ (as in Alpaca) can't teach or show consistency;"
                " put what differs into the input"
            )
        repeated = self.prepared.reasons()["merged_duplicate"]
        if 2 * repeated > len(self.prepared.instances):
            yield (
                f"{repeated} of {len(self.prepared.instances)} rows repeat the instruction and input of another"
                " (merged_duplicate); if their inputs differ, they must be under the key input"
            )

    def counts(self, left_out: Iterable[DroppedInstance] = ()) -> dict[str, Any]:
        """Return the numbers of tasks, inputs by split and rows dropped by reason, and histograms of words.

        `left_out` are the rows that were dropped before the split. The examples must have been read to the end.
        """
        tasks = self.prepared.tasks
        dropped = self.prepared.reasons() + Counter(row.reason for row in left_out)
        return {
            "tasks": {
                "seen": sum(task.seen for task in tasks),
                "unseen": sum(not task.seen for task in tasks),
                "with_labels": sum(bool(task.labels) for task in tasks),
            },
            "inputs": {split: self._splits[split] for split in SPLITS},
            "test_inputs_of_unseen_tasks": self._num_unseen,
            "dropped": dict(sorted(dropped.items())),
            "words": {
                "instructions": count_words(task.instruction for task in tasks),
                "inputs": _histogram(self._inputs),
                "outputs": _histogram(self._outputs),
            },
        }


def describe_inventory(counts: Mapping[str, Any]) -> str:
    """Return the counts as text for people, several lines."""
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


def _bucket(text: str) -> int:
    return bisect.bisect_left(BUCKETS, len(words(text) if num_unspaced(text) else text.split()))


def _histogram(counts: Mapping[int, int]) -> dict[str, int]:
    return {_bucket_name(index): counts.get(index, 0) for index in range(max(counts, default=-1) + 1)}


def _bucket_name(index: int) -> str:
    if index == len(BUCKETS):
        return f"{BUCKETS[-1] + 1}+"
    first = BUCKETS[index - 1] + 1 if index else 0
    return str(first) if first == BUCKETS[index] else f"{first}-{BUCKETS[index]}"
