"""How the data fared before training, for the page: what each step kept and dropped, how well the judge judged.

Knows the steps that a run has left on disk, and no HTML.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from coalign.records import ASTRAY
from coalign.report import figures, run_history
from coalign.report.run_history import StepRecord


def step_title(step: StepRecord) -> str:
    """Return a heading for a step: its stage, and its round beyond the first."""
    names = {
        "sft": "Stage 1: fine-tuning on paraphrases",
        "judge": "Rewards",
        "rank": "Groups for stage 2",
        "align": "Stage 2: consistency alignment",
    }
    part = step.label.rpartition("/")[0]
    return names[step.name] + (f", {part.replace('round', 'round ')}" if part else "")


def data_stories(steps: Sequence[StepRecord]) -> dict[str, list[dict[str, Any]]]:
    """Return what became of the data in each step before training, with an entry per round."""
    return {
        "prepare": [
            {"counts": step.counts, "dropped": run_history.dropped_by_reason(step)}
            for step in run_history.of_step(steps, "prepare")
        ],
        "paraphrase": [
            {
                "counts": step.counts,
                "dropped": run_history.dropped_by_reason(step),
                "kept": run_history.kept_wordings(step),
            }
            for step in run_history.of_step(steps, "paraphrase")
        ],
        "judge": [
            {
                "title": step_title(step),
                "counts": step.counts,
                "quality": judge_rows(step.counts.get("calibration", {})),
                "own": run_history.own_answers(step),
                "figure": figures.reward_figure(step.counts, "Rewards by task"),
            }
            for step in run_history.of_step(steps, "judge")
        ],
        "rank": [
            {
                "title": step_title(step),
                "counts": step.counts,
                "figure": figures.size_figure(step.counts, "Group sizes"),
                "astray": [row for row in run_history.dropped_by_reason(step) if row["reason"] == ASTRAY],
            }
            for step in run_history.of_step(steps, "rank")
        ],
    }


def judge_rows(calibration: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return how well the judge answered what is known: a row per question and source of known answers."""
    sources = (("quality_dev", "dev inputs"), ("quality_audit", "align inputs (audit)"), ("quality", "together"))
    return [
        {"question": question, "source": source, **values[key]}
        for question, values in calibration.items()
        for key, source in sources
        if values.get(key) and (values[key]["num_yes"] or values[key]["num_no"])
    ]
