"""The inputs as the page shows them: a row per wording, a cell per model, what differs from the usual answer.

Knows the cases of metrics.json and no HTML.
"""

from __future__ import annotations

import dataclasses
import difflib
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Literal

from coalign.evaluation.metrics_rows import AnswerKind, Case, CaseAnswer, CaseModel, Outcome
from coalign.evaluation.metrics_schema import Metrics
from coalign.report.formatting import shorten

MAX_WORDING = 240  # characters
MAX_ROWS, MIN_ROWS = 60, 20  # wordings of an input, on a page of all inputs and of few
OUTCOME_LETTERS: dict[Outcome | None, str] = {
    "always_right": "r",
    "always_wrong_alike": "w",
    "inconsistent": "i",
    "mixed": "m",
    None: "n",
}
OUTCOME_NAMES = {
    "r": "always right",
    "w": "always wrong alike",
    "i": "inconsistent",
    "m": "agree, some right",
    "n": "too few wordings",
}

_WORD = re.compile(r"\s*\S+\s*")  # blanks go with words: alone they would all match each other


@dataclasses.dataclass(frozen=True, slots=True)
class AnswerCell:
    """A model's answer under one wording: its letter, its pieces with whether each differs from the usual answer.

    `unusual` answers differ from the one that most wordings got, `changed` ones from the model before.
    """

    letter: str
    kind: AnswerKind
    canonical: str | None
    unusual: bool
    changed: bool
    pieces: list[tuple[str, bool]]


@dataclasses.dataclass(frozen=True, slots=True)
class AnswerRow:
    """A wording of an input and every model's answer."""

    text: str
    cells: list[AnswerCell]


@dataclasses.dataclass(frozen=True, slots=True)
class ShownCase:
    """An input as the page shows it: its case, its rows, and a letter per model for the outcome."""

    case: Case
    rows: list[AnswerRow]
    outcomes: str

    @property
    def first(self) -> CaseModel:
        """Return the answers of the first model."""
        return next(iter(self.case.models.values()))

    @property
    def last(self) -> CaseModel:
        """Return the answers of the last model."""
        return list(self.case.models.values())[-1]


def scaled_cases(cases: Sequence[ShownCase], scale: float) -> list[ShownCase]:
    """Return a share of the inputs, the first ones of each kind that was chosen, with as many rows as fit."""
    kinds = Counter(shown.case.chosen for shown in cases)
    left = {kind: max(1, int(count * scale)) for kind, count in kinds.items()}
    max_rows = max(MIN_ROWS, int(MAX_ROWS * scale))
    kept = []
    for shown in cases:
        left[shown.case.chosen] -= 1
        if left[shown.case.chosen] >= 0:
            kept.append(dataclasses.replace(shown, rows=telling_rows(shown.rows, max_rows)))
    return kept


def telling_rows(rows: Sequence[AnswerRow], limit: int) -> list[AnswerRow]:
    """Return the rows; of too many those with the most unusual answers, the most first."""
    if len(rows) <= limit:
        return list(rows)
    return sorted(rows, key=lambda row: -sum(cell.unusual for cell in row.cells))[:limit]


def chosen_words(cases: Sequence[Case], first: str, last: str) -> str:
    """Return which inputs are shown one by one, in order, as far as there are any of a kind."""
    kinds = {case.chosen for case in cases}
    words: Mapping[Literal["change", "inconsistent", "sample"], str] = {
        "change": f"those that changed most from {first} to {last}",
        "inconsistent": f"those on which {last} is least consistent",
        "sample": "others in hash order, one task after another",
    }
    return ", then ".join(text for kind, text in words.items() if kind in kinds)


def case_values(metrics: Metrics) -> list[ShownCase]:
    """Return the inputs as the page shows them: a row per wording, a cell per model, differences marked."""
    texts = {(row.task, row.wording): shorten(row.text, MAX_WORDING) for row in metrics.per_wording}
    found = []
    for case in metrics.cases:
        models = list(case.models.values())
        usual = [_usual_answer(model.answers) for model in models]
        rows = []
        for place, wording in enumerate(case.wordings):
            answers = [model.answers[place] for model in models]
            before = [answers[0], *answers]
            cells = [_cell(*one) for one in zip(answers, before, usual, strict=False)]
            rows.append(AnswerRow(texts[case.task, wording], cells))
        found.append(ShownCase(case, rows, "".join(OUTCOME_LETTERS[model.outcome] for model in models)))
    return found


def _cell(answer: CaseAnswer, before: CaseAnswer, usual: tuple[int | None, str]) -> AnswerCell:
    return AnswerCell(
        letter=letter_of(answer.cluster),
        kind=answer.kind,
        canonical=answer.canonical,
        unusual=answer.cluster is None or answer.cluster != usual[0],
        changed=(answer.cluster, answer.kind) != (before.cluster, before.kind),
        pieces=differences(answer.text, usual, answer.cluster is None),
    )


def _usual_answer(answers: Sequence[CaseAnswer]) -> tuple[int | None, str]:
    """Return the number and the text of the answer that most wordings got; (None, "") where none agrees."""
    counts = Counter(answer.cluster for answer in answers if answer.cluster is not None)
    if not counts:
        return None, ""
    cluster = max(counts, key=lambda number: (counts[number], -number))
    return cluster, next(answer.text for answer in answers if answer.cluster == cluster)


def letter_of(cluster: int | None) -> str:
    """Return the mark of an answer: the same letter for answers that agree, a dash for one that agrees with nothing."""
    if cluster is None:
        return "–"
    return chr(ord("A") + cluster % 26) + (str(cluster // 26) if cluster >= 26 else "")


def differences(text: str, usual: tuple[int | None, str], silent: bool) -> list[tuple[str, bool]]:
    """Return a text in pieces, each with whether it differs from the usual answer, word by word.

    An empty piece that differs marks a place where the usual answer has words and this one has none.
    """
    if not text or silent or usual[0] is None:
        return [(text, False)]
    words, others = _WORD.findall(text), _WORD.findall(usual[1])
    bare, others = [word.strip() for word in words], [word.strip() for word in others]
    matcher = difflib.SequenceMatcher(None, bare, others, autojunk=False)
    return [("".join(words[start:end]), what != "equal") for what, start, end, _, _ in matcher.get_opcodes()]
