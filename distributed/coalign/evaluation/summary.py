"""Everything that eval reports, the content of metrics.json: means with intervals, differences, tables, noise floors.

Knows no model and no file.

Shape suffixes: I inputs, W wordings or repeats.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Sequence

import numpy as np

from coalign.config import EvalTable
from coalign.evaluation import metrics
from coalign.evaluation.cases import ModelAnswers, count_failures, pick_cases
from coalign.evaluation.estimates import estimate_models
from coalign.evaluation.grids import (
    Grid,
    Vocabulary,
    against_constant_answers,
    agreeing_pairs,
    build_grids,
    by_key,
    consistency_columns,
    repeat_codes,
    score_answers,
)
from coalign.evaluation.metrics import ABSENT, Decide, IntArray
from coalign.evaluation.metrics_schema import AnswerCounts, ModelMetrics, ModesAgree, NoiseFloor, NoiseFloors, Summary
from coalign.evaluation.requests import NOISE_TEMPERATURE, ModelOutput
from coalign.evaluation.result_rows import Results, most_inconsistent, per_input_rows, per_task_rows, per_wording_rows
from coalign.process import derive_seed
from coalign.records import Response, Row, Task
from coalign.wordings.asking import Pair
from coalign.wordings.wordings import MIN_WORDINGS

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
class Evaluation:
    """What eval makes of the answers: the summary, the rows of scores.jsonl, and the pairs dropped.

    A pair of input and wording is dropped when some models have answered it and others have not.
    """

    summary: Summary
    scores: list[Row]
    dropped: list[Row]


def noise_floor(codes: dict[str, IntArray], agreeing: IntArray | None) -> NoiseFloor:
    """Return CR and MCR among repeats of one wording, macro over inputs then tasks (None without repeats)."""
    cr, mcr = [], []
    for codes_IW in codes.values():
        present_IW = codes_IW != ABSENT
        agree_IWW = metrics.agreement_matrix(codes_IW, agreeing)
        cr.append(float(np.mean(metrics.consistency_rate(agree_IWW, present_IW))))
        mcr.append(float(np.mean(metrics.largest_cluster_share(agree_IWW, present_IW))))
    shapes = [codes_IW.shape for codes_IW in codes.values()]
    return NoiseFloor(
        cr=float(np.mean(cr)) if cr else None,
        mcr=float(np.mean(mcr)) if mcr else None,
        num_inputs=sum(shape[0] for shape in shapes),
        num_repeats=max((shape[1] for shape in shapes), default=0),
        num_tasks=len(codes),
    )


def modes_agree(answers: Sequence[Response], other: Sequence[Response]) -> ModesAgree:
    """Return the share of answers whose text is the same in the other generation mode."""
    known = by_key(answers)
    keys = [(r.task, r.example, r.wording) for r in other]
    equal = [known[key].text == r.text for key, r in zip(keys, other, strict=True) if key in known]
    return ModesAgree(share=sum(equal) / len(equal) if equal else None, num_answers=len(equal))


def count_answers(answers: Sequence[Response]) -> AnswerCounts:
    """Return how many answers there are, and how many agree with nothing, by reason."""
    reasons = Counter(
        "cut_off" if r.finish != "stop" else "foreign_vocabulary" if r.canonical is None else "empty"
        for r in answers
        if metrics.answer_key(r.canonical, r.finish) is None
    )
    return AnswerCounts(
        answers=len(answers),
        tokens=sum(r.num_tokens for r in answers),
        empty=reasons["empty"],
        cut_off=reasons["cut_off"],
        foreign_vocabulary=reasons["foreign_vocabulary"],
    )


def summarise(
    tasks: Sequence[Task],
    pairs: Sequence[Pair],
    outputs: dict[str, ModelOutput],
    table: EvalTable,
    seed: int,
    decide: Decide | None = None,
) -> Evaluation:
    """Return what eval makes of the answers.

    `decide` returns which pairs of different answers (in normal form) agree; without it only equal ones do.
    """
    grids, dropped = build_grids(tasks, pairs, outputs)
    results = score_models(grids, outputs, MIN_WORDINGS[table.split], seed, decide)
    return Evaluation(_summary_of(results, outputs, table, seed), per_input_rows(results), dropped)


def _summary_of(results: Results, outputs: dict[str, ModelOutput], table: EvalTable, seed: int) -> Summary:
    grids, last = results.grids, results.names[-1]
    estimated, differences = estimate_models(results, table.num_bootstrap, seed)
    shown = {name: _answers_of(results, name, output) for name, output in outputs.items()}
    per_task = per_task_rows(results)
    accuracy = {name: [row.models[name].accuracy for row in per_task] for name in results.names}
    return Summary(
        models={
            name: ModelMetrics(
                **estimated[name],
                noise=NoiseFloors(**{kind: floors[name] for kind, floors in results.noise.items()}),
                modes_agree=modes_agree(output.answers, output.other_mode),
                counts=count_answers(output.answers),
            )
            for name, output in outputs.items()
        },
        differences=differences["all"],
        differences_seen=differences["seen"],
        differences_unseen=differences["unseen"],
        constant_answer=against_constant_answers(grids, accuracy),
        failures=count_failures(grids, shown),
        cases=tuple(pick_cases(grids, shown, results.min_wordings, results.agreeing)),
        per_task=tuple(per_task),
        per_wording=tuple(per_wording_rows(results)),
        most_inconsistent=tuple(most_inconsistent(results, last, outputs[last].answers)),
        split=table.split,
        agreement=table.agreement,
        min_wordings=results.min_wordings,
        num_bootstrap=table.num_bootstrap,
        noise_temperature=NOISE_TEMPERATURE,
        definitions=DEFINITIONS,
        num_tasks=len(grids),
        num_seen_tasks=sum(grid.task.seen for grid in grids),
        num_tasks_in_cr=len(results.eligible),
        num_inputs=sum(len(grid.examples) for grid in grids),
        num_pairs=int(sum(grid.present.sum() for grid in grids)),
    )


def _answers_of(results: Results, name: str, output: ModelOutput) -> ModelAnswers:
    columns = dict(zip(results.eligible, results.columns[name], strict=True))
    return ModelAnswers(by_key(output.answers), results.scored[name], columns)


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
    forms = {grid.task.id: grid.task.answer_form for grid in grids}
    repeats = {
        "neighbours": {name: repeat_codes(output.neighbours, vocabulary, forms) for name, output in outputs.items()},
        "temperature": {name: repeat_codes(output.samples, vocabulary, forms) for name, output in outputs.items()},
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
