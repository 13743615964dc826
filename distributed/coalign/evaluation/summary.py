"""Everything that eval reports, the content of metrics.json: means with intervals, differences, tables, noise floors.

Used by launch/eval.py. Knows no model and no file.

Shape suffixes: I inputs, W wordings or repeats, T tasks.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from coalign.config import EvalTable
from coalign.evaluation import metrics
from coalign.evaluation.cases import ModelAnswers, count_failures, pick_cases
from coalign.evaluation.grids import (
    ANSWERS,
    CONSISTENCY,
    EXTREMES,
    Grid,
    Vocabulary,
    against_constant_answers,
    agreeing_pairs,
    answer_sample,
    build_grids,
    by_key,
    consistency_columns,
    consistency_sample,
    repeat_codes,
    score_answers,
)
from coalign.evaluation.intervals import MIN_TASKS_BOOTSTRAP, SHARE, TaskSample, estimate, two_level_bootstrap
from coalign.evaluation.metrics import ABSENT, Decide, IntArray
from coalign.evaluation.requests import NOISE_TEMPERATURE, ModelOutput
from coalign.evaluation.result_rows import Results, most_inconsistent, per_input_rows, per_task_rows, per_wording_rows
from coalign.process import derive_seed
from coalign.records import Response, Task
from coalign.wordings.asking import Pair
from coalign.wordings.wordings import MIN_WORDINGS

COMPARED = ("cr", "corrected_cr", "mcr", "accuracy", "rouge_l", "worst_wording")
LIMITS = {"corrected_cr": (-math.inf, 1.0)}  # all others are shares

DEFINITIONS = {
    "cr": "agreeing unordered pairs of answers / all pairs of wordings",
    "mcr": "largest agreeing cluster of answers / wordings",
    "expected_cr": "e: CR expected if every answer were drawn independently from the task's own answer frequencies",
    "corrected_cr": "(CR - e) / (1 - e), by task; 0 where e = 1",
    "always_right": "share of inputs whose answers are all correct",
    "always_wrong_alike": "share of inputs whose answers are all wrong and all agree",
    "inconsistent": "share of inputs that are not always right and where some pair of answers disagrees",
    "mixed": "the rest: all answers agree, some correct and some not (only with an agreement wider than exact)",
    "constant_answer": "accuracy of each task's most frequent gold answer, and how far every model is above it",
    "accuracy": "normalised exact match with any gold answer; empty and cut-off answers are wrong",
    "rouge_l": "ROUGE-L F, highest over the gold answers",
    "rouge_1": "ROUGE-1 F, highest over the gold answers",
    "worst_wording": "accuracy of the task's least accurate wording",
    "spread": "accuracy of the task's most accurate wording minus that of its least accurate one",
}


@dataclasses.dataclass(frozen=True, slots=True)
class Estimates:
    """Estimates of one group of metrics over one set of tasks: by model, and the paired differences b - a."""

    models: dict[str, dict[str, Any]]
    differences: list[dict[str, Any]]


def estimate_columns(
    samples: Sequence[TaskSample],
    sets: dict[str, list[int]],
    names: Sequence[str],
    group: tuple[str, ...],
    num_resamples: int,
    seed: int,
) -> dict[str, Estimates]:
    """Return the macro means and paired differences of a group of metrics for every set of task indices."""
    points_TM = np.array([sample.point() for sample in samples]).reshape(len(samples), len(names) * len(group))
    large = [name for name, members in sets.items() if len(members) >= MIN_TASKS_BOOTSTRAP]
    resampled = dict(
        zip(large, two_level_bootstrap(samples, [sets[name] for name in large], num_resamples, seed), strict=True)
    )
    results = {}
    for set_name, members in sets.items():
        points = points_TM[members]
        draws = resampled.get(set_name)
        column = {pair: index for index, pair in enumerate(itertools.product(names, group))}

        def one(index: int, minus: int | None = None, points: Any = points, draws: Any = draws) -> dict[str, Any]:
            metric = group[index % len(group)]
            drawn = draws is not None and metric not in EXTREMES
            if minus is None:
                return estimate(points[:, index], draws[:, index] if drawn else None, LIMITS.get(metric, SHARE))
            moved = draws[:, index] - draws[:, minus] if drawn else None
            return estimate(points[:, index] - points[:, minus], moved)

        results[set_name] = Estimates(
            {name: {metric: one(column[name, metric]) for metric in group} for name in names},
            [
                {"a": a, "b": b, "metric": metric, **one(column[b, metric], column[a, metric])}
                for a, b in itertools.combinations(names, 2)
                for metric in COMPARED
                if metric in group
            ],
        )
    return results


def noise_floor(codes: dict[str, IntArray], agreeing: IntArray | None) -> dict[str, Any]:
    """Return CR and MCR among repeats of one wording, macro over inputs then tasks (null without repeats)."""
    cr, mcr = [], []
    for codes_IW in codes.values():
        present_IW = codes_IW != ABSENT
        agree_IWW = metrics.agreement_matrix(codes_IW, agreeing)
        cr.append(float(np.mean(metrics.consistency_rate(agree_IWW, present_IW))))
        mcr.append(float(np.mean(metrics.largest_cluster_share(agree_IWW, present_IW))))
    shapes = [codes_IW.shape for codes_IW in codes.values()]
    return {
        "cr": float(np.mean(cr)) if cr else None,
        "mcr": float(np.mean(mcr)) if mcr else None,
        "num_inputs": sum(shape[0] for shape in shapes),
        "num_repeats": max((shape[1] for shape in shapes), default=0),
        "num_tasks": len(codes),
    }


def modes_agree(answers: Sequence[Response], other: Sequence[Response]) -> dict[str, Any]:
    """Return the share of answers whose text is the same in the other generation mode."""
    known = by_key(answers)
    keys = [(r.task, r.example, r.wording) for r in other]
    equal = [known[key].text == r.text for key, r in zip(keys, other, strict=True) if key in known]
    return {"share": sum(equal) / len(equal) if equal else None, "num_answers": len(equal)}


def count_answers(answers: Sequence[Response]) -> dict[str, int]:
    """Return how many answers there are, and how many agree with nothing, by reason."""
    reasons = Counter(
        "cut_off" if r.finish != "stop" else "foreign_vocabulary" if r.canonical is None else "empty"
        for r in answers
        if metrics.answer_key(r.canonical, r.finish) is None
    )
    tokens = sum(r.num_tokens for r in answers)
    return {"answers": len(answers), "tokens": tokens} | {
        reason: reasons[reason] for reason in ("empty", "cut_off", "foreign_vocabulary")
    }


def summarise(
    tasks: Sequence[Task],
    pairs: Sequence[Pair],
    outputs: dict[str, ModelOutput],
    table: EvalTable,
    seed: int,
    decide: Decide | None = None,
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Return the content of metrics.json and the pairs dropped since not every model has answered them.

    Its "per_input" goes to a file of its own, scores.jsonl.

    `decide` tells which pairs of different answers (in normal form) agree; without it only equal ones do.
    """
    grids, dropped = build_grids(tasks, pairs, outputs)
    results = score_models(grids, outputs, MIN_WORDINGS[table.split], seed, decide)
    content = _estimates(results, table.num_bootstrap, seed)
    for name, output in outputs.items():
        content["models"][name] |= {
            "noise": {kind: results.noise[kind][name] for kind in results.noise},
            "modes_agree": modes_agree(output.answers, output.other_mode),
            "counts": count_answers(output.answers),
        }
    shown = {
        name: ModelAnswers(
            by_key(output.answers),
            results.scored[name],
            dict(zip(results.eligible, results.columns[name], strict=True)),
        )
        for name, output in outputs.items()
    }
    per_task = per_task_rows(results)
    accuracy = {name: [row["models"][name]["accuracy"] for row in per_task] for name in results.names}
    content |= {
        "constant_answer": against_constant_answers(grids, accuracy),
        "failures": count_failures(grids, shown),
        "cases": pick_cases(grids, shown, results.min_wordings, results.agreeing),
        "per_task": per_task,
        "per_wording": per_wording_rows(results),
        "per_input": per_input_rows(results),
        "most_inconsistent": most_inconsistent(results, results.names[-1], outputs[results.names[-1]].answers),
        "split": table.split,
        "agreement": table.agreement,
        "min_wordings": results.min_wordings,
        "num_bootstrap": table.num_bootstrap,
        "noise_temperature": NOISE_TEMPERATURE,
        "definitions": DEFINITIONS,
        "num_tasks": len(grids),
        "num_seen_tasks": sum(grid.task.seen for grid in grids),
        "num_tasks_in_cr": len(results.eligible),
        "num_inputs": sum(len(grid.examples) for grid in grids),
        "num_pairs": int(sum(grid.present.sum() for grid in grids)),
    }
    return content, dropped


def score_models(
    grids: list[Grid], outputs: dict[str, ModelOutput], min_wordings: int, seed: int, decide: Decide | None
) -> Results:
    """Score every model's answers, settling once which answers agree."""
    vocabulary = Vocabulary()
    names = list(outputs)
    scored = {}
    for name, output in outputs.items():
        answers = by_key(output.answers)
        scored[name] = [score_answers(grid, answers, vocabulary) for grid in grids]
    repeats = {
        "neighbours": {name: repeat_codes(output.neighbours, vocabulary) for name, output in outputs.items()},
        "temperature": {name: repeat_codes(output.samples, vocabulary) for name, output in outputs.items()},
    }
    enough = [grid.eligible(min_wordings) for grid in grids]
    eligible = [index for index, enough_I in enumerate(enough) if enough_I.any()]
    expected = {
        (name, i): metrics.expected_agreement(
            scored[name][i].codes[enough[i]], derive_seed(seed, "expected", grids[i].task.id)
        )
        for name in names
        for i in eligible
    }
    matrices = [scored[name][i].codes[enough[i]] for name in names for i in eligible]
    matrices += [codes_IW for floor in repeats.values() for by_task in floor.values() for codes_IW in by_task.values()]
    agreeing = agreeing_pairs(matrices, list(expected.values()), vocabulary, decide)
    columns = {
        name: [consistency_columns(scored[name][i], enough[i], expected[name, i], agreeing) for i in eligible]
        for name in names
    }
    noise = {
        kind: {name: noise_floor(codes, agreeing) for name, codes in floor.items()} for kind, floor in repeats.items()
    }
    return Results(names, grids, scored, min_wordings, eligible, columns, noise, agreeing)


def _estimates(results: Results, num_resamples: int, seed: int) -> dict[str, Any]:
    """Return models.NAME.{metric, seen, unseen} and the three lists of differences."""
    samples = [
        answer_sample(grid, [results.scored[name][index] for name in results.names])
        for index, grid in enumerate(results.grids)
    ]
    consistency = [
        consistency_sample([results.columns[name][position] for name in results.names])
        for position in range(len(results.eligible))
    ]
    seen = [grid.task.seen for grid in results.grids]
    groups = []
    for group, ones, indices in ((CONSISTENCY, consistency, results.eligible), (ANSWERS, samples, range(len(seen)))):
        sets = {
            "all": list(range(len(ones))),
            "seen": [position for position, index in enumerate(indices) if seen[index]],
            "unseen": [position for position, index in enumerate(indices) if not seen[index]],
        }
        groups.append(estimate_columns(ones, sets, results.names, group, num_resamples, derive_seed(seed, "bootstrap")))
    models: dict[str, Any] = {}
    for name in results.names:
        by_set = {which: groups[0][which].models[name] | groups[1][which].models[name] for which in groups[0]}
        models[name] = {**by_set["all"], "seen": by_set["seen"], "unseen": by_set["unseen"]}
    differences = {which: groups[0][which].differences + groups[1][which].differences for which in groups[0]}
    order = {pair: index for index, pair in enumerate(itertools.combinations(results.names, 2))}
    for rows in differences.values():
        rows.sort(key=lambda row: (order[row["a"], row["b"]], COMPARED.index(row["metric"])))
    return {
        "models": models,
        "differences": differences["all"],
        "differences_seen": differences["seen"],
        "differences_unseen": differences["unseen"],
    }
