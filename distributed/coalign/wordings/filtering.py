"""Which wordings a task keeps: `settle` merges files with the model's rewrites and drops what undoes the splits.

Every dropped wording has a reason. Pure functions of texts. Knows no model.
"""

from __future__ import annotations

import dataclasses
import logging
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any

from coalign.config import ParaphraseTable
from coalign.errors import UserError
from coalign.records import Row, Task, Wording
from coalign.text import loose_key
from coalign.wordings.asking import require_end
from coalign.wordings.extraction import parse_cut_off, parse_paraphrase
from coalign.wordings.near_repeats import NearRepeats, repeats, similarity
from coalign.wordings.rewrites import Reason, check_rewrite
from coalign.wordings.wording_files import WordingFiles
from coalign.wordings.wordings import (
    FILE_PREFIX,
    GENERATED,
    ORIGINAL,
    assign_splits,
    bare_text,
    kind_for,
    num_short,
    original_wording,
    without_cr,
)

logger = logging.getLogger("coalign")

# {task: rewrites wanted} -> a model's answers to each task in the order to try, and the tasks too long for its context
Ask = Callable[[dict[str, int]], tuple[Mapping[str, Sequence[Row]], Collection[str]]]


def drop_repeats(
    wordings: Sequence[Wording], task: Task, max_similarity: float
) -> tuple[list[Wording], list[dict[str, Any]]]:
    """Return one task's wordings without those that undo its splits, and rows {task, id, text, reason} of the others.

    First "near_duplicate" drops the later of two equal wordings, and for a seen task any from a file that nearly
    repeats the original. Then "held_out" drops dev wordings that nearly repeat a test wording, and train wordings that
    nearly repeat a dev or test wording. Templates are compared without their fields.
    """
    reasons: dict[str, Reason] = {}
    texts = {wording.id: bare_text(wording) for wording in wordings}
    seen: set[tuple[str, str]] = set()
    for wording in wordings:
        key = (wording.kind, loose_key(wording.text))
        from_file = wording.source.startswith(FILE_PREFIX)
        like_original = from_file and task.seen and repeats(texts[wording.id], [task.instruction], max_similarity)
        if key in seen or like_original:
            reasons[wording.id] = "near_duplicate"
        seen.add(key)
    held_out: list[str] = []
    for split in ("test", "dev", "train"):
        members = [w for w in wordings if w.split == split and w.id not in reasons]
        for wording in members:
            if wording.source != ORIGINAL and repeats(texts[wording.id], held_out, max_similarity):
                reasons[wording.id] = "held_out"
        held_out += [texts[w.id] for w in members if w.id not in reasons]
    dropped = [
        {"task": w.task, "id": w.id, "text": w.text, "reason": reasons[w.id]} for w in wordings if w.id in reasons
    ]
    return [w for w in wordings if w.id not in reasons], dropped


def drop_held_out(
    by_task: Mapping[str, Sequence[Wording]], tasks: Iterable[Task], max_similarity: float
) -> tuple[dict[str, list[Wording]], list[dict[str, Any]], list[str]]:
    """Return the wordings that nearly repeat no held-out one of any task, rows {task, id, text, reason}, and originals.

    A generated dev wording is dropped when it nearly repeats a test wording of any task; a train wording also when it
    nearly repeats a dev wording that stays. Originals always stay: the third result are the seen tasks whose original
    nearly repeats a held-out wording.
    """
    everything = [wording for wordings in by_task.values() for wording in wordings]
    test, dev, train = ([w for w in everything if w.split == split] for split in ("test", "dev", "train"))
    held_out = NearRepeats(max_similarity, map(bare_text, test))
    lost = {(w.task, w.id) for w in dev if w.source == GENERATED and held_out.has_like(bare_text(w))}
    for wording in dev:
        if (wording.task, wording.id) not in lost:
            held_out.add(bare_text(wording))
    lost |= {(w.task, w.id) for w in train if w.source != ORIGINAL and held_out.has_like(bare_text(w))}
    dropped = [
        {"task": w.task, "id": w.id, "text": w.text, "reason": "held_out"} for w in everything if (w.task, w.id) in lost
    ]
    kept = {task: [w for w in wordings if (w.task, w.id) not in lost] for task, wordings in by_task.items()}
    originals = [task.id for task in tasks if task.seen and held_out.has_like(task.instruction)]
    return kept, dropped, originals


@dataclasses.dataclass(frozen=True, slots=True)
class Settled:
    """Which wordings are kept, and why the others are not.

    `by_task` holds each task's wordings with their splits, the original first. `wanted` is the number of rewrites that
    each task needs in addition to files. `dropped` has a row {task, text, reason, ...} per dropped wording. `originals`
    are seen tasks whose own instruction nearly repeats a held-out wording; it is kept.
    """

    by_task: dict[str, list[Wording]]
    wanted: dict[str, int]
    dropped: list[Row]
    originals: list[str]


def check_files(tasks: Sequence[Task], files: WordingFiles, table: ParaphraseTable) -> None:
    """Raise UserError for a wording in a file that takes the id of the task's own instruction for another text."""
    instructions = {task.id: task.instruction for task in tasks}
    for wording in files.wordings:
        instruction = instructions[wording.task]
        if wording.id == ORIGINAL and similarity(wording.text, instruction) < table.max_similarity:
            raise UserError(
                f"{wording.source.removeprefix(FILE_PREFIX)}: task {wording.task!r} has a wording with the id"
                f" {ORIGINAL!r}, which is reserved for the task's own instruction; give it another id"
            )


def settle(
    tasks: Sequence[Task],
    files: WordingFiles,
    table: ParaphraseTable,
    seed: int,
    ask: Ask = lambda _: ({}, ()),
) -> Settled:
    """Decide which wordings every task keeps: its original, those from files, and rewrites among a model's answers.

    `ask` is called once, with the number of rewrites that each task needs beside its files. Raises UserError as
    `check_files` does.
    """
    check_files(tasks, files, table)
    by_task, dropped = _merge_files(tasks, files, table, seed)
    wanted = {task.id: _num_wanted(task, by_task[task.id], table) for task in tasks}
    require_end(sum(wanted.values()), "paraphrase.num_wordings and paraphrase.max_attempts")
    answers, too_long = ask(wanted)
    dropped += [
        {"task": t.id, "text": t.instruction, "reason": "longer_than_context"} for t in tasks if t.id in too_long
    ]
    found = (w for wordings in by_task.values() for w in wordings if w.split != "train")
    held_out = NearRepeats(table.max_similarity, map(bare_text, found))
    for task in tasks:
        from_files, given = by_task[task.id], answers.get(task.id, ())
        accepted, bad = choose_rewrites(task, from_files, given, wanted[task.id], table, held_out)
        dropped += bad
        fixed, together = {wording.id for wording in from_files}, [*from_files, *accepted]
        by_task[task.id] = assign_splits(together, task, table.num_dev, table.num_test, seed, fixed)
    # The rewrites have their splits now: nothing trained on may repeat a held-out rewrite of another task.
    by_task, repeated, originals = drop_held_out(by_task, tasks, table.max_similarity)
    return Settled(by_task, wanted, dropped + repeated, originals)


def _num_wanted(task: Task, from_files: Sequence[Wording], table: ParaphraseTable) -> int:
    """Return how many rewrites a task needs: what its files lack for dev and test, and those to train on."""
    if not table.num_wordings:
        return 0
    missing = sum(num_short(from_files, task, table.num_dev, table.num_test).values())
    return missing + table.num_wordings * task.seen


def _merge_files(
    tasks: Sequence[Task], files: WordingFiles, table: ParaphraseTable, seed: int
) -> tuple[dict[str, list[Wording]], list[dict[str, Any]]]:
    """Return each task's original and its wordings from files, split, and rows {task, id, text, reason} of the rest."""
    by_task: dict[str, list[Wording]] = {task.id: [original_wording(task)] for task in tasks}
    dropped = list(files.dropped)
    for wording in files.wordings:
        if wording.id != ORIGINAL:
            by_task[wording.task].append(wording)
        else:
            dropped.append({"task": wording.task, "id": wording.id, "text": wording.text, "reason": "near_duplicate"})
    with_split: dict[str, set[str]] = defaultdict(set)
    for task_id, id_ in files.with_split:
        with_split[task_id].add(id_)
    for task in tasks:
        fixed = with_split[task.id]
        split = assign_splits(by_task[task.id], task, table.num_dev, table.num_test, seed, fixed)
        by_task[task.id], repeated = drop_repeats(split, task, table.max_similarity)
        dropped += repeated
    by_task, held_out, _ = drop_held_out(by_task, tasks, table.max_similarity)
    return by_task, dropped + held_out


def choose_rewrites(
    task: Task,
    existing: Sequence[Wording],
    answers: Iterable[Mapping[str, Any]],
    wanted: int,
    table: ParaphraseTable,
    held_out: NearRepeats,
) -> tuple[list[Wording], list[dict[str, Any]]]:
    """Return the first `wanted` usable rewrites among a model's answers, and rows {task, text, reason} of bad ones.

    `existing` are the task's wordings from files; for `held_out` see `check_rewrite`. An answer has "text" and
    "finish".
    """
    kept = [bare_text(w) for w in existing if w.split == "train"]
    numbers = (number for number in range(10**9) if f"{GENERATED}:{number}" not in {w.id for w in existing})
    accepted: list[Wording] = []
    dropped: list[dict[str, Any]] = []
    for answer in answers:
        if len(accepted) == wanted:
            break
        cut_off = answer["finish"] == "length"
        rewrite = (parse_cut_off if cut_off else parse_paraphrase)(answer["text"], task.instruction)
        reason = check_rewrite(task.instruction, rewrite, task.labels, kept, held_out, table)
        if reason is None:
            kept.append(rewrite)
            name = f"{GENERATED}:{next(numbers)}"
            accepted.append(Wording(name, task.id, rewrite, kind=kind_for(task), source=GENERATED))
        else:
            why = "cut_off" if cut_off and reason == "empty" else reason
            dropped.append({"task": task.id, "text": rewrite or answer["text"], "reason": why})
    return accepted, dropped


def count_wordings(tasks: Sequence[Task], settled: Settled, table: ParaphraseTable) -> dict[str, Any]:
    """Return the counts of the step: wordings by split and source, dropped ones by reason, and what each task lacks."""
    by_task = settled.by_task
    wordings = [wording for task in tasks for wording in by_task[task.id]]
    short = {t.id: num_short(by_task[t.id], t, table.num_dev, table.num_test, table.num_wordings) for t in tasks}
    return {
        "wordings": len(wordings),
        "splits": dict(Counter(wording.split for wording in wordings)),
        "sources": dict(Counter(wording.source.partition(":")[0] for wording in wordings)),
        "dropped": dict(Counter(row["reason"] for row in settled.dropped)),
        "short": {task: lacks for task, lacks in short.items() if lacks},
        "originals_like_held_out": len(settled.originals),
    }


def log_result(counts: Mapping[str, Any], settled: Settled) -> None:
    """Log the counts, which tasks have too few wordings, and whose instructions nearly repeat held-out ones."""
    logger.info("%d wordings %s; dropped %s", counts["wordings"], counts["splits"], counts["dropped"] or "none")
    by_task, originals = settled.by_task, settled.originals
    if short := counts["short"]:
        worst = sorted(short, key=lambda name: (-sum(short[name].values()), name))[:5]
        listed = "; ".join(f"{name} lacks {short[name]}" for name in worst)
        logger.warning("%d of %d tasks have fewer wordings than requested, worst: %s", len(short), len(by_task), listed)
    if few := without_cr(by_task):
        advice = "the test wordings that CR needs; raise paraphrase.num_test or add files of wordings"
        logger.warning("%d of %d tasks lack %s: %s", len(few), len(by_task), advice, ", ".join(few[:5]))
    if originals:
        first = ", ".join(originals[:5])
        logger.warning("%d instructions of seen tasks nearly repeat a held-out wording: %s", len(originals), first)
