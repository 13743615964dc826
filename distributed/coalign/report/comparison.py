"""Several runs side by side: a column per run and model, the settings that differ, paired differences by task.

Two runs are compared by pairs only on tasks that were evaluated on the same inputs, gold
answers and wordings: their metrics.json hold a digest of them. Knows no model.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from coalign.evaluation.grids import EXTREMES
from coalign.evaluation.intervals import MIN_TASKS_BOOTSTRAP, TaskSample, estimate, two_level_bootstrap
from coalign.evaluation.metrics import FloatArray
from coalign.evaluation.metrics_rows import TaskMetrics, TaskRow
from coalign.evaluation.metrics_schema import Estimate, Metrics
from coalign.evaluation.scores import CR_METRICS, TaskScores, read_scores, seed_values
from coalign.process import derive_seed
from coalign.report import charts, run_history, svg
from coalign.report.charts import Dot
from coalign.report.figures import Figure, dots_in_words
from coalign.report.formatting import names_of
from coalign.report.page import environment
from coalign.runs.atomic_files import write_atomic
from coalign.steps import STEP_TABLES

COMPARE = "compare.html"
ROWS = names_of("accuracy", "cr", "corrected_cr", "mcr", "worst_wording")
MAX_TASKS = 300  # shown of a pair of runs
UNKNOWN = "unknown"
SharedTasks = list[tuple[TaskRow, TaskRow]]  # of both runs, each task that has the same items in both
_OWN = ("run.name", "run.folder", "eval.folder")  # differ between any two runs


@dataclasses.dataclass(frozen=True, slots=True)
class Run:
    """A run to compare: what to call it, its eval folder and metrics."""

    name: str
    folder: Path
    metrics: Metrics


def name_runs(found: dict[str, tuple[Path, Metrics]]) -> list[Run]:
    """Return the runs by their own names, or by the paths as given where two have the same name."""
    names = [metrics.run or given for given, (_, metrics) in found.items()]
    same = len(set(names)) < len(names)
    return [
        Run(given if same else name, folder, metrics)
        for name, (given, (folder, metrics)) in zip(names, found.items(), strict=True)
    ]


def write_comparison(path: Path, runs: Sequence[Run]) -> Path:
    """Write the page and return its path."""
    write_atomic(path, render_comparison(runs))
    return path


def render_comparison(runs: Sequence[Run]) -> str:
    """Return the page: one file, no network, every text escaped."""
    return (
        environment()
        .get_template("compare.html.j2")
        .render(
            runs=runs,
            models=[],
            rows=ROWS,
            labels={run.name: {name: run.metrics.label(name) for name in run.metrics.models} for run in runs},
            figures=[
                _figure(runs, key, title) for key, title in (("cr", "Consistency (CR)"), ("accuracy", "Accuracy"))
            ],
            settings=setting_rows(runs),
            missing={
                run.name: missing for run in runs if (missing := run_history.find_steps(run.folder, run.metrics)[1])
            },
            pairs=[compare_pair(runs[0], other) for other in runs[1:]],
        )
    )


def _figure(runs: Sequence[Run], key: str, title: str) -> Figure:
    dots = []
    short = charts.told_apart((run.name for run in runs), 14)
    for index, run in enumerate(runs):
        for name, model in run.metrics.models.items():
            one = model.all.of(key)
            colour = svg.SERIES[index % len(svg.SERIES)]
            title_of = f"{short[run.name]} · {run.metrics.label(name)}"
            dots.append(Dot(title_of, one.mean, one.low, one.high, colour))
    caption = "Bar: 95 % interval of the model by itself; for a difference read the paired ones below."
    return Figure(title, caption, charts.interval_dots(dots, f"{title}: {dots_in_words(dots)}"))


def setting_rows(runs: Sequence[Run]) -> list[tuple[str, list[str]]]:
    """Return the settings that are not the same in all runs, with every run's value as JSON, or UNKNOWN."""
    of_run = []
    defaults: dict[str, Any] = {}
    for run in runs:
        steps, missing = run_history.find_steps(run.folder, run.metrics)
        changed = run_history.changed_settings(steps, run.metrics)
        defaults |= {one.key: one.default for one in changed}
        of_run.append(({one.key: one.usual for one in changed}, _unknown_tables(steps, missing)))
    rows = []
    for key, default in defaults.items():
        table = key.partition(".")[0]
        texts = [
            UNKNOWN if key not in values and table in unknown else _as_json(values.get(key, default))
            for values, unknown in of_run
        ]
        rows.append((key, texts))
    return [(key, texts) for key, texts in rows if key not in _OWN and len({*texts}) > 1]


def _as_json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, sort_keys=True)


def _unknown_tables(steps: Sequence[run_history.StepRecord], missing: Sequence[str]) -> set[str]:
    """Return the tables that only steps have had whose folders are gone."""
    gone = {line.partition(":")[0].rpartition("/")[2] for line in missing}
    known = {table for step in ("eval", *(step.name for step in steps)) for table in STEP_TABLES[step]}
    return {table for name in gone for table in STEP_TABLES.get(name, ())} - known


@dataclasses.dataclass(frozen=True, slots=True)
class ModelDifference:
    """How a model of the second run differs from one of the first, by metric of ROWS."""

    name: str
    estimates: dict[str, Estimate]


@dataclasses.dataclass(frozen=True, slots=True)
class TaskPair:
    """A task's metrics under the last model of the first run and of the second."""

    task: str
    before: TaskMetrics
    after: TaskMetrics


@dataclasses.dataclass(frozen=True, slots=True)
class RunPair:
    """The paired differences second - first of two runs, or why there are none.

    `method` says which intervals they have; `last` names the models that `tasks` are of.
    """

    title: str
    why_not: str = ""
    note: str = ""
    method: str = ""
    models: tuple[ModelDifference, ...] = ()
    last: str = ""
    tasks: tuple[TaskPair, ...] = ()


def compare_pair(first: Run, second: Run) -> RunPair:
    """Return the paired differences second - first by model and task."""
    title = f"{second.name} − {first.name}"
    a, b = first.metrics, second.metrics
    for what, ours, theirs in (("splits", a.split, b.split), ("agreements", a.agreement, b.agreement)):
        if ours != theirs:
            return RunPair(title, f"they were evaluated with different {what} ({ours} and {theirs})")
    rows = shared_tasks(a, b)
    if not rows:
        return RunPair(title, _why_nothing_shared(a, b))
    names = [(name, name) for name in a.models if name in b.models]
    names = names or [(list(a.models)[-1], list(b.models)[-1])]
    drawn, method = resampled_differences(first, second, rows, names)
    one, other = names[-1]
    return RunPair(
        title,
        note=f"{len(rows)} of {len(a.per_task)} and {len(b.per_task)} tasks have the same items.",
        method=method,
        models=tuple(_model_difference(a, b, rows, pair, drawn) for pair in names),
        last=_both(a, one, b, other),
        tasks=tuple(TaskPair(x.task, x.models[one], y.models[other]) for x, y in rows[:MAX_TASKS]),
    )


def _model_difference(
    a: Metrics, b: Metrics, rows: SharedTasks, names: tuple[str, str], drawn: dict[tuple[str, str, str], FloatArray]
) -> ModelDifference:
    one, other = names
    estimates = {}
    for key in ROWS:
        values = [(x.models[one].of(key), y.models[other].of(key)) for x, y in rows]
        found = [after - before for before, after in values if before is not None and after is not None]
        estimates[key] = estimate(np.array(found, float), drawn.get((one, other, key)))
    return ModelDifference(_both(a, one, b, other), estimates)


def _both(a: Metrics, one: str, b: Metrics, other: str) -> str:
    names = a.label(one), b.label(other)
    return names[0] if names[0] == names[1] else f"{names[1]} − {names[0]}"


def resampled_differences(
    first: Run, second: Run, rows: SharedTasks, names: Sequence[tuple[str, str]]
) -> tuple[dict[tuple[str, str, str], FloatArray], str]:
    """Return the bootstrapped differences of each pair of models and metric, and which intervals the page has.

    Inputs and tasks are drawn as in eval, the same ones for both runs. A minimum over wordings is not drawn: it is
    lower in a resample of few inputs.
    """
    by_t = "t intervals on task means (none under 6 tasks)"
    if len(rows) < MIN_TASKS_BOOTSTRAP:
        return {}, by_t
    if not all((run.folder / "scores.jsonl").is_file() for run in (first, second)):
        return {}, f"{by_t}: a bootstrap needs scores.jsonl beside both metrics.json"
    scores = {
        task.task: task
        for task in read_scores([first.folder, second.folder], [{a for a, _ in names}, {b for _, b in names}])[0]
    }
    tasks = [scores[x.task] for x, _ in rows if x.task in scores]
    sizes = [x.num_inputs for x, _ in rows]
    if [task.num_inputs for task in tasks] != sizes:
        return {}, f"{by_t}: the inputs in both scores.jsonl are not the same"
    drawn: dict[tuple[str, str, str], FloatArray] = {}
    for group in (CR_METRICS, tuple(key for key in ROWS if key not in (*CR_METRICS, *EXTREMES))):
        columns = [(one, other, key) for one, other in names for key in group]
        samples = [sample for task in tasks if (sample := _difference_sample(task, columns)).num_inputs]
        if len(samples) >= MIN_TASKS_BOOTSTRAP:
            seed = derive_seed(first.metrics.settings.get("run.seed", 0), "bootstrap")
            sets = [range(len(samples))]
            (values_BM,) = two_level_bootstrap(samples, sets, first.metrics.num_bootstrap, seed)
            drawn |= dict(zip(columns, values_BM.T, strict=True))
    words = "a bootstrap over tasks, then inputs; t intervals for the worst wording and where under 20 tasks count"
    return drawn, words


def _difference_sample(task: TaskScores, columns: Sequence[tuple[str, str, str]]) -> TaskSample:
    """Return the differences (model, model, metric) of a task as a statistic of the weights of its inputs."""
    consistent = columns[0][2] in CR_METRICS
    chosen = np.flatnonzero(task.in_cr() if consistent else np.ones(task.num_inputs, bool))

    def statistic(weights_BJ: FloatArray) -> FloatArray:
        weights_BI = np.zeros((len(weights_BJ), task.num_inputs))
        weights_BI[:, chosen] = weights_BJ
        first, second = task.seeds
        columns_MB = [
            seed_values(second, other, key, weights_BI) - seed_values(first, one, key, weights_BI)
            for one, other, key in columns
        ]
        return np.array(columns_MB).T

    return TaskSample(len(chosen), statistic)


def shared_tasks(a: Metrics, b: Metrics) -> SharedTasks:
    """Return the rows of both runs of each task that was evaluated on the same items in both."""
    of_task = {row.task: row for row in b.per_task}
    both = [(row, of_task[row.task]) for row in a.per_task if row.task in of_task]
    return [(x, y) for x, y in both if x.items is not None and x.items == y.items]


def _why_nothing_shared(a: Metrics, b: Metrics) -> str:
    if not {row.task for row in a.per_task} & {row.task for row in b.per_task}:
        return "they have no task in common"
    if any(row.items is None for row in (*a.per_task, *b.per_task)):
        return "one of them was evaluated by an older version, which kept no digest of the items; run its eval again"
    return "none of their common tasks was evaluated on the same inputs, gold answers and wordings"
