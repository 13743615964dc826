"""What eval has found as rows: of each task, input and wording, and the inputs answered least consistently.

summary.py estimates from the same results. Knows no model and no file.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from coalign.evaluation.cases import items_digest
from coalign.evaluation.grids import ANSWERS, CONSISTENCY, Grid, Scored, answer_sample, by_key
from coalign.evaluation.metrics import FloatArray, IntArray
from coalign.evaluation.metrics_rows import (
    InconsistentAnswer,
    InconsistentInput,
    TaskMetrics,
    TaskRow,
    WordingMetrics,
    WordingRow,
)
from coalign.evaluation.metrics_schema import NoiseFloor
from coalign.records import Response
from coalign.text import unit_hash

PER_INPUT = ("cr", "corrected_cr", "mcr")
NUM_INCONSISTENT = 20


@dataclasses.dataclass(frozen=True, slots=True)
class Results:
    """What the tables are made from: grids and, by model, the answers to each grid.

    `columns` hold the consistency metrics of the grids in `eligible` only, the ones that enter CR; `agreeing` are the
    keys of the pairs of different answers that agree.
    """

    names: list[str]
    grids: list[Grid]
    scored: dict[str, list[Scored]]
    min_wordings: int
    eligible: list[int]
    columns: dict[str, list[dict[str, FloatArray]]]
    noise: dict[str, dict[str, NoiseFloor]]
    agreeing: IntArray | None


def per_task_rows(results: Results) -> list[TaskRow]:
    """Return for each task its size and every model's metrics (null for a task that doesn't enter CR)."""
    rows = []
    for index, grid in enumerate(results.grids):
        position = results.eligible.index(index) if index in results.eligible else None
        models = {}
        for name in results.names:
            point_M = answer_sample(grid, [results.scored[name][index]]).point()
            values: dict[str, Any] = dict.fromkeys(CONSISTENCY)
            if position is not None:
                values = {key: float(np.mean(v)) for key, v in results.columns[name][position].items()}
            answers: dict[str, Any] = dict(zip(ANSWERS, map(float, point_M), strict=True))
            models[name] = TaskMetrics(**values, **answers)
        rows.append(
            TaskRow(
                task=grid.task.id,
                seen=grid.task.seen,
                num_inputs=len(grid.examples),
                num_inputs_in_cr=int(grid.eligible(results.min_wordings).sum()),
                num_wordings=len(grid.wordings),
                items=items_digest(grid),
                models=models,
            )
        )
    return rows


def per_input_rows(results: Results) -> list[dict[str, Any]]:
    """Return for each input what every model's answers are worth: from these the intervals can be made again.

    `right` says for each of the row's wordings whether the answer is correct; the consistency metrics are null for an
    input that doesn't enter CR.
    """
    rows = []
    for index, grid in enumerate(results.grids):
        position = results.eligible.index(index) if index in results.eligible else None
        enough = np.flatnonzero(grid.eligible(results.min_wordings)).tolist()
        for row, example in enumerate(grid.examples):
            fits_W = grid.present[row]
            models: dict[str, dict[str, Any]] = {}
            for name in results.names:
                scored = results.scored[name][index]
                values: dict[str, Any] = dict.fromkeys(PER_INPUT)
                if position is not None and row in enough:
                    columns = results.columns[name][position]
                    values = {key: float(columns[key][enough.index(row)]) for key in PER_INPUT}
                values["rouge_l"] = float(scored.rouge_l[row, fits_W].mean())
                models[name] = values | {"right": [int(x) for x in scored.correct[row, fits_W]]}
            fitting = [grid.wordings[column].id for column in np.flatnonzero(fits_W)]
            where = {"task": grid.task.id, "seen": grid.task.seen, "example": example.id, "wordings": fitting}
            rows.append(where | {"models": models})
    return rows


def per_wording_rows(results: Results) -> list[WordingRow]:
    """Return for each wording its text and every model's accuracy and ROUGE-L over the inputs that it fits."""
    rows = []
    for index, grid in enumerate(results.grids):
        for column, wording in enumerate(grid.wordings):
            fits_I = grid.present[:, column]
            rows.append(
                WordingRow(
                    task=grid.task.id,
                    wording=wording.id,
                    text=wording.text,
                    kind=wording.kind,
                    source=wording.source,
                    num_inputs=int(fits_I.sum()),
                    models={
                        name: WordingMetrics(
                            accuracy=float(results.scored[name][index].correct[fits_I, column].mean()),
                            rouge_l=float(results.scored[name][index].rouge_l[fits_I, column].mean()),
                        )
                        for name in results.names
                    },
                )
            )
    return rows


def most_inconsistent(
    results: Results, name: str, answers: Sequence[Response], limit: int = NUM_INCONSISTENT
) -> list[InconsistentInput]:
    """Return the inputs with the lowest CR, then MCR, then in hash order, with the model's answers to each wording."""
    ranked = []
    for position, index in enumerate(results.eligible):
        grid = results.grids[index]
        column = results.columns[name][position]
        rows = np.flatnonzero(grid.eligible(results.min_wordings))
        for row, cr, mcr in zip(rows, column["cr"], column["mcr"], strict=True):
            if cr < 1.0:
                order = unit_hash("inconsistent", grid.task.id, grid.examples[row].id)
                ranked.append((float(cr), float(mcr), order, index, int(row)))
    of = by_key(answers)
    rows_out = []
    for cr, mcr, _, index, place in sorted(ranked)[:limit]:
        grid = results.grids[index]
        example = grid.examples[place]
        rows_out.append(
            InconsistentInput(
                model=name,
                cr=cr,
                mcr=mcr,
                task=grid.task.id,
                example=example.id,
                input=example.input,
                golds=example.outputs,
                answers=tuple(_answers_of(grid, results.scored[name][index], place, of)),
            )
        )
    return rows_out


def _answers_of(
    grid: Grid, scored: Scored, row: int, answers: dict[tuple[str, str, str], Response]
) -> Iterator[InconsistentAnswer]:
    for column in np.flatnonzero(grid.present[row]):
        wording = grid.wordings[column]
        answer = answers[grid.task.id, grid.examples[row].id, wording.id]
        yield InconsistentAnswer(
            wording=wording.id,
            wording_text=wording.text,
            text=answer.text,
            canonical=answer.canonical,
            finish=answer.finish,
            correct=bool(scored.correct[row, column]),
        )
