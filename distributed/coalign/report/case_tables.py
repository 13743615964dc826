"""The inputs as the page shows them one by one: a row a wording, a cell a model, what differs from the usual answer.

Used by page.py. Knows the cases of metrics.json and no HTML.
"""

from __future__ import annotations

import difflib
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from coalign.report.formatting import shorten

MAX_WORDING = 240  # characters
MAX_ROWS, MIN_ROWS = 60, 20  # wordings of an input, on a page of all inputs and of few
OUTCOME_LETTERS = {"always_right": "r", "always_wrong_alike": "w", "inconsistent": "i", "mixed": "m", None: "n"}
OUTCOME_NAMES = {
    "r": "always right",
    "w": "always wrong alike",
    "i": "inconsistent",
    "m": "agree, some right",
    "n": "too few wordings",
}

Metrics = Mapping[str, Any]
_WORD = re.compile(r"\s*\S+\s*")  # blanks go with words: alone they would all match each other


def scaled_cases(cases: Sequence[dict[str, Any]], scale: float) -> list[dict[str, Any]]:
    """Return a share of the inputs, of each kind that was chosen the first ones, and of their rows so many as fit."""
    kinds = Counter(case["chosen"] for case in cases)
    left = {kind: max(1, int(count * scale)) for kind, count in kinds.items()}
    max_rows = max(MIN_ROWS, int(MAX_ROWS * scale))
    shown = []
    for case in cases:
        left[case["chosen"]] -= 1
        if left[case["chosen"]] >= 0:
            shown.append(case | {"rows": telling_rows(case["rows"], max_rows)})
    return shown


def telling_rows(rows: Sequence[dict[str, Any]], limit: int) -> list[dict[str, Any]]:
    """Return the rows, of too many those with the most unusual answers, in the order of how many these are."""
    if len(rows) <= limit:
        return list(rows)
    return sorted(rows, key=lambda row: -sum(cell["unusual"] for cell in row["cells"]))[:limit]


def chosen_words(cases: Sequence[Mapping[str, Any]], first: str, last: str) -> str:
    """Return which inputs are shown one by one, in order, as far as there are any of a kind."""
    kinds = {case["chosen"] for case in cases}
    words = {
        "change": f"those that changed most from {first} to {last}",
        "inconsistent": f"those on which {last} is least consistent",
        "sample": "others in hash order, a task after another",
    }
    return ", then ".join(text for kind, text in words.items() if kind in kinds)


def case_values(metrics: Metrics) -> list[dict[str, Any]]:
    """Return the inputs as the page shows them: a row a wording, a cell a model, differences marked."""
    texts = {(row["task"], row["wording"]): shorten(row["text"], MAX_WORDING) for row in metrics["per_wording"]}
    found = []
    for case in metrics.get("cases", []):
        models = list(case["models"].values())
        usual = [_usual_answer(model["answers"]) for model in models]
        rows = []
        for place, wording in enumerate(case["wordings"]):
            cells = []
            for index, model in enumerate(models):
                answer = model["answers"][place]
                before = models[index - 1]["answers"][place] if index else answer
                cells.append(
                    {
                        **answer,
                        "letter": letter_of(answer["cluster"]),
                        "unusual": answer["cluster"] is None or answer["cluster"] != usual[index][0],
                        "pieces": differences(answer["text"], usual[index], answer["cluster"] is None),
                        "changed": (answer["cluster"], answer["kind"]) != (before["cluster"], before["kind"]),
                    }
                )
            rows.append({"text": texts[case["task"], wording], "cells": cells})
        found.append(
            {
                **case,
                "rows": rows,
                "first": models[0],
                "last": models[-1],
                "outcomes": "".join(OUTCOME_LETTERS[model["outcome"]] for model in models),
            }
        )
    return found


def _usual_answer(answers: Sequence[Mapping[str, Any]]) -> tuple[int | None, str]:
    """Return the number and the text of the answer that most wordings got; (None, "") where none agrees."""
    counts = Counter(answer["cluster"] for answer in answers if answer["cluster"] is not None)
    if not counts:
        return None, ""
    cluster = max(counts, key=lambda number: (counts[number], -number))
    return cluster, next(answer["text"] for answer in answers if answer["cluster"] == cluster)


def letter_of(cluster: int | None) -> str:
    """Return the mark of an answer: the same letter for answers that agree, a dash for one that agrees with nothing."""
    if cluster is None:
        return "–"
    return chr(ord("A") + cluster % 26) + (str(cluster // 26) if cluster >= 26 else "")


def differences(text: str, usual: tuple[int | None, str], silent: bool) -> list[tuple[str, bool]]:
    """Return a text in pieces, each with whether it differs from the usual answer, word by word.

    A piece that differs and is empty stands where the usual answer has words and this one has none.
    """
    if not text or silent or usual[0] is None:
        return [(text, False)]
    words, others = _WORD.findall(text), _WORD.findall(usual[1])
    bare, others = [word.strip() for word in words], [word.strip() for word in others]
    matcher = difflib.SequenceMatcher(None, bare, others, autojunk=False)
    return [("".join(words[start:end]), what != "equal") for what, start, end, _, _ in matcher.get_opcodes()]
