"""scores.jsonl of one or several evaluations."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from coalign.errors import UserError
from coalign.evaluation import metrics
from coalign.evaluation.metrics import BoolArray, FloatArray
from coalign.records import Row, read_rows
from coalign.runs.outputs import step_output

LARGEST = 1e300  # a number beyond it is none of ours
CR_METRICS = ("cr", "corrected_cr", "mcr")


@dataclasses.dataclass(frozen=True, slots=True)
class SeedScores:
    """One seed's scores of a task; by arm `right` (I, W) and the other metrics by input, NaN where there is none.

    Inputs stand in one order for all seeds; wordings are a seed's own.
    """

    present: BoolArray
    right: dict[str, BoolArray]
    by_input: dict[str, dict[str, FloatArray]]


@dataclasses.dataclass(frozen=True, slots=True)
class TaskScores:
    """A task that every seed has."""

    task: str
    seen: bool
    num_inputs: int
    seeds: tuple[SeedScores, ...]

    def in_cr(self) -> BoolArray:
        """Return which inputs enter CR in some seed; none unless every seed has one."""
        known = [~np.isnan(next(iter(scores.by_input.values()))["cr"]) for scores in self.seeds]
        some_I: BoolArray = np.any(known, axis=0) & all(known_I.any() for known_I in known)
        return some_I


def read_scores(folders: Sequence[Path], models: Sequence[Collection[str]]) -> tuple[list[TaskScores], list[str]]:
    """Return the scores of the tasks that every seed's eval folder has, and the names of the others.

    `models` are those that each folder must have scores of. Raises UserError for a folder whose eval did not write
    scores.jsonl, or whose file is damaged or lacks a model.
    """
    found: list[dict[str, list[Row]]] = []
    for folder, needed in zip(folders, models, strict=True):
        if not (folder / "scores.jsonl").is_file():
            raise UserError(f"{folder} has no scores.jsonl; remove it and run its eval step again")
        by_task: dict[str, list[Row]] = {}
        arms: set[str] = set()
        for number, row in read_rows(step_output(folder, "scores.jsonl")):
            arms = arms or {*_object(row.get("models"))}
            if not _is_score(row, arms):
                place = f"{folder / 'scores.jsonl'}, line {number}"
                raise UserError(f"{place} is not what eval writes; remove {folder} and run eval again")
            by_task.setdefault(row["task"], []).append(row)
        if not by_task or (missing := sorted({*needed} - arms)):
            lacks = f"lacks the model {missing[0]!r}" if by_task else "is empty"
            raise UserError(f"{folder / 'scores.jsonl'} {lacks}; remove {folder} and run eval again")
        found.append(by_task)
    everywhere = [task for task in found[0] if all(task in by_task for by_task in found)]
    left_out = sorted({task for by_task in found for task in by_task} - {*everywhere})
    return [_task_scores(task, [by_task[task] for by_task in found]) for task in everywhere], left_out


def _is_score(row: Row, arms: set[str]) -> bool:
    """Return whether a row has the form of eval's scores, for the same models as the rows before."""
    wordings, models = row.get("wordings"), _object(row.get("models"))
    if not isinstance(row.get("task"), str) or not isinstance(row.get("example"), str) or "seen" not in row:
        return False
    if not isinstance(wordings, list) or not all(isinstance(name, str) for name in wordings) or models.keys() != arms:
        return False
    return bool(arms) and all(
        isinstance(right := _object(values).get("right"), list)
        and len(right) == len(wordings)
        and all(one in (0, 1) for one in right)
        and all(_is_number(values.get(key, "")) for key in (*CR_METRICS, "rouge_l"))
        for values in models.values()
    )


def _object(value: object) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _is_number(value: object) -> bool:
    """Return whether a value is null or a number that a float can hold."""
    return value is None or (isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < LARGEST)


def _task_scores(task: str, by_seed: Sequence[Sequence[Row]]) -> TaskScores:
    names = dict.fromkeys(row["example"] for rows in by_seed for row in rows)
    place = {name: index for index, name in enumerate(names)}
    seeds = tuple(_seed_scores(rows, place) for rows in by_seed)
    return TaskScores(task, bool(by_seed[0][0]["seen"]), len(place), seeds)


def _seed_scores(rows: Sequence[Row], place: Mapping[str, int]) -> SeedScores:
    column = {w: i for i, w in enumerate(dict.fromkeys(w for row in rows for w in row["wordings"]))}
    shape = (len(place), len(column))
    arms = list(rows[0]["models"])
    present_IW = np.zeros(shape, bool)
    right = {arm: np.zeros(shape, bool) for arm in arms}
    by_input = {arm: {key: np.full(len(place), np.nan) for key in (*CR_METRICS, "rouge_l")} for arm in arms}
    for row in rows:
        i, columns = place[row["example"]], [column[w] for w in row["wordings"]]
        present_IW[i, columns] = True
        for arm, values in row["models"].items():
            right[arm][i, columns] = np.array(values["right"], bool)
            for key, values_I in by_input[arm].items():
                values_I[i] = np.nan if values[key] is None else values[key]
    for arm in arms:
        by_input[arm]["accuracy"] = metrics.mean_over_wordings(right[arm], present_IW)
    return SeedScores(present_IW, right, by_input)


def weighted_mean(weights_BI: FloatArray, values_I: FloatArray) -> FloatArray:
    """Return the mean over the inputs that have a value, under each weighting; NaN where none has weight."""
    known_I = ~np.isnan(values_I)
    total_B = weights_BI @ np.where(known_I, values_I, 0.0)
    weight_B = weights_BI @ known_I.astype(float)
    result: FloatArray = np.divide(total_B, weight_B, out=np.full(len(total_B), np.nan), where=weight_B > 0)
    return result


def seed_values(scores: SeedScores, arm: str, metric: str, weights_BI: FloatArray) -> FloatArray:
    """Return one seed's number for a task under each weighting of its inputs."""
    if metric != "worst_wording":
        return weighted_mean(weights_BI, scores.by_input[arm][metric])
    accuracy_BW = metrics.wording_accuracy(scores.right[arm], scores.present, weights_BI)
    worst_B, _ = metrics.worst_and_spread(accuracy_BW)
    return np.where(np.isinf(worst_B), np.nan, worst_B)
