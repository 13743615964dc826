"""One result out of several seeds' evaluations: arms as means with their seeds as points, and paired differences.

Used by launch/ladder.py. A task's number is its mean over the seeds first; intervals are then over tasks (and their
inputs) by the rule of intervals.py, so that seeds are never pooled as if they were inputs. Knows no model.

Shape suffixes: S seeds, T tasks, I inputs, W wordings, B weightings, M columns (arms times metrics).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from coalign.evaluation.grids import EXTREMES
from coalign.evaluation.intervals import MIN_TASKS_BOOTSTRAP, TaskSample, estimate, two_level_bootstrap
from coalign.evaluation.metrics import BoolArray, FloatArray
from coalign.evaluation.scores import CR_METRICS, TaskScores, read_scores, seed_values
from coalign.experiment.arms import ARMS
from coalign.experiment.ladder import Ladder, StepRun
from coalign.records import Row
from coalign.runs.costs import cost_rows
from coalign.runs.step_folder import read_manifest

ANSWERS = ("accuracy", "rouge_l", "worst_wording")
METRICS = ("accuracy", *CR_METRICS, "worst_wording", "rouge_l")
SETS = ("all", "seen", "unseen")


def task_sample(task: TaskScores, columns: Sequence[tuple[str, str]], inputs_I: BoolArray) -> TaskSample:
    """Return the columns (arm, metric) of a task, each the mean over seeds, as a statistic of its inputs' weights."""
    chosen = np.flatnonzero(inputs_I)

    def statistic(weights_BJ: FloatArray) -> FloatArray:
        weights_BI = np.zeros((len(weights_BJ), task.num_inputs))
        weights_BI[:, chosen] = weights_BJ
        values = [[seed_values(s, arm, metric, weights_BI) for s in task.seeds] for arm, metric in columns]
        known_MSB = np.array(values)
        means_MB: FloatArray = np.nanmean(known_MSB, axis=1)
        return means_MB.T

    return TaskSample(len(chosen), statistic)


def points(tasks: Sequence[TaskScores], arm: str, metric: str, seed: int) -> list[float]:
    """Return one seed's number for each task, every input counted once."""
    return [
        float(seed_values(t.seeds[seed], arm, metric, np.full((1, t.num_inputs), 1.0 / t.num_inputs))[0]) for t in tasks
    ]


def task_sets(tasks: Sequence[TaskScores]) -> dict[str, list[int]]:
    """Return the indices of all, seen and unseen tasks."""
    seen = {index for index, task in enumerate(tasks) if task.seen}
    every = range(len(tasks))
    return {"all": [*every], "seen": [i for i in every if i in seen], "unseen": [i for i in every if i not in seen]}


def aggregate(
    tasks: Sequence[TaskScores],
    arms: Sequence[str],
    comparisons: Iterable[tuple[str, str, str]],
    num_resamples: int,
    seed: int,
) -> tuple[dict[str, Any], dict[str, list[Row]]]:
    """Return the arms' means, {arm: {set: {metric: {mean, seeds}}}}, and the paired differences b - a, {set: rows}.

    A row is {a, b, what, metric, mean, low, high, num_tasks, method, seeds}.
    """
    pairs = [(b, a, what) for b, a, what in comparisons if {a, b} <= {*arms}]
    of_arms: dict[str, Any] = {arm: {which: {} for which in SETS} for arm in arms}
    differences: dict[str, list[Row]] = {which: [] for which in SETS}
    for group in (ANSWERS, CR_METRICS):
        inputs = [task.in_cr() if group is CR_METRICS else np.ones(task.num_inputs, bool) for task in tasks]
        chosen = [(task, inputs_I) for task, inputs_I in zip(tasks, inputs, strict=True) if inputs_I.any()]
        group_tasks = [task for task, _ in chosen]
        columns = [(arm, metric) for arm in arms for metric in group]
        samples = [task_sample(task, columns, inputs_I) for task, inputs_I in chosen]
        sets = task_sets(group_tasks)
        large = {which: members for which, members in sets.items() if len(members) >= MIN_TASKS_BOOTSTRAP}
        drawn = dict(zip(large, two_level_bootstrap(samples, [*large.values()], num_resamples, seed), strict=True))
        points_TM = np.array([sample.point() for sample in samples]).reshape(len(samples), len(columns))
        for which, members in sets.items():
            of_seeds = {key: _seed_means([group_tasks[i] for i in members], *key) for key in columns}
            for key in columns:
                mean = estimate(points_TM[members, columns.index(key)])["mean"]
                of_arms[key[0]][which][key[1]] = {"mean": mean, "seeds": of_seeds[key], "num_tasks": len(members)}
            for b, a, what in pairs:
                for metric in group:
                    i, j = columns.index((b, metric)), columns.index((a, metric))
                    # A minimum over wordings is lower in a resample of few inputs: its interval goes by tasks alone.
                    resampled = which in drawn and metric not in EXTREMES
                    moved = drawn[which][:, i] - drawn[which][:, j] if resampled else None
                    found = estimate(points_TM[members, i] - points_TM[members, j], moved)
                    each = [x - y for x, y in zip(of_seeds[b, metric], of_seeds[a, metric], strict=True)]
                    differences[which].append({"a": a, "b": b, "what": what, "metric": metric, **found, "seeds": each})
    order = {(b, a): index for index, (b, a, _) in enumerate(pairs)}
    for rows in differences.values():
        rows.sort(key=lambda row: (order[row["b"], row["a"]], METRICS.index(row["metric"])))
    return of_arms, differences


def _seed_means(tasks: Sequence[TaskScores], arm: str, metric: str) -> list[float]:
    if not tasks:
        return []
    return [float(np.mean(points(tasks, arm, metric, seed))) for seed in range(len(tasks[0].seeds))]


def cost_of(folders: Iterable[Path]) -> Row:
    """Return what steps have used together; `updates` lists every training's own number."""
    rows = cost_rows({str(folder): folder for folder in folders})
    missing = [str(folder) for folder in folders if read_manifest(folder) is None]
    assert not missing, f"incomplete: {missing}"
    return {
        "updates": [row["updates"] for row in rows if row["updates"]],
        "tokens_trained": sum(row["tokens_trained"] or 0 for row in rows),
        "tokens_generated": sum(row["tokens_generated"] or 0 for row in rows),
        "core_hours": sum(row["core_hours"] or 0.0 for row in rows),
        "wall_seconds": sum(row["wall_seconds"] or 0.0 for row in rows),
    }


def mean_cost(costs: Sequence[Row]) -> Row:
    """Return the mean of several seeds' costs."""
    keys = ("tokens_trained", "tokens_generated", "core_hours", "wall_seconds")
    means: Row = {key: float(np.mean([cost[key] for cost in costs])) for key in keys}
    updates = [float(np.mean(numbers)) for numbers in zip(*(cost["updates"] for cost in costs), strict=True)]
    return {"updates": updates, **means}


def make_result(
    ladder: Ladder, steps: Sequence[StepRun], comparisons: Iterable[tuple[str, str, str]], num_resamples: int, seed: int
) -> Row:
    """Return everything that the table and the figure show, the content of the ladder's metrics.json."""
    tasks, left_out = read_scores([ladder.eval_folder(number) for number in ladder.seeds])
    of_arms, differences = aggregate(tasks, ladder.arms, comparisons, num_resamples, seed)
    described = {}
    for name in ladder.arms:
        alone = [[ladder.folder(place, number) for place in ladder.made_from(name)] for number in ladder.seeds]
        cost = mean_cost([cost_of(folders) for folders in alone])
        own = [run for run in steps if run.arm == name and run.seed == ladder.seeds[0]]
        settings = own[-1].arm_settings() if own else {}
        described[name] = {"title": ARMS[name].title, "settings": settings, "metrics": of_arms[name], "cost": cost}
    evals = [run.folder for run in steps if run.step == "eval"]
    return {
        "name": ladder.home.name,
        "seeds": list(ladder.seeds),
        "arms": described,
        "differences": differences,
        "cost": {"together": cost_of([run.folder for run in steps]), "eval": cost_of(evals)},
        "num_tasks": len(tasks),
        "num_seen_tasks": sum(task.seen for task in tasks),
        "num_tasks_in_cr": sum(bool(task.in_cr().any()) for task in tasks),
        "tasks_left_out": left_out,
        "num_bootstrap": num_resamples,
    }
