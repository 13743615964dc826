"""The declared form of the rows in metrics.json: tasks, wordings, single inputs, failures, the judge of agreement.

What a report shows beside the means of metrics_schema.py. Knows no model and computes nothing.
"""

from __future__ import annotations

import dataclasses
from typing import Literal

AnswerKind = Literal["right", "another", "wrong_type", "cut_off", "empty"]
Outcome = Literal["always_right", "always_wrong_alike", "inconsistent", "mixed"]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class TaskMetrics:
    """A model's metrics on one task: means over its inputs, defined as in SetMetrics.

    Those from `cr` to `mixed` are null for a task that does not enter CR.
    """

    cr: float | None
    """Consistency rate, a share."""
    mcr: float | None
    """Share of wordings in the largest cluster of agreeing answers."""
    corrected_cr: float | None
    """(CR - e) / (1 - e), at most 1."""
    expected_cr: float | None
    """e, a share."""
    always_right: float | None
    """Share of inputs."""
    always_wrong_alike: float | None
    """Share of inputs."""
    inconsistent: float | None
    """Share of inputs."""
    mixed: float | None
    """Share of inputs."""
    accuracy: float
    """Share of correct answers, mean over inputs of the mean over wordings."""
    rouge_l: float
    """ROUGE-L F, a share."""
    rouge_1: float
    """ROUGE-1 F, a share."""
    worst_wording: float
    """Accuracy of the least accurate wording."""
    spread: float
    """Accuracy of the most accurate wording minus `worst_wording`."""

    def of(self, metric: str) -> float | None:
        """Return the value of a metric by its name."""
        found: float | None = getattr(self, metric)
        return found


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class TaskRow:
    """A task: its size and every model's metrics."""

    task: str
    """The task's id."""
    seen: bool
    """Whether it has inputs in training."""
    num_inputs: int
    """Inputs asked."""
    num_inputs_in_cr: int
    """Inputs that enter CR."""
    num_wordings: int
    """Wordings asked under."""
    items: str | None = None
    """Digest of inputs, gold answers and wordings: two runs are compared by pairs where it is the same."""
    models: dict[str, TaskMetrics]
    """By model."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class WordingMetrics:
    """A model's answers under one wording."""

    accuracy: float
    """Share of inputs answered correctly."""
    rouge_l: float
    """Mean ROUGE-L F over inputs, a share."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class WordingRow:
    """A wording of a task and how every model fares under it."""

    task: str
    """The task's id."""
    wording: str
    """The wording's id."""
    text: str
    """Its text."""
    kind: str
    """prefix (stands before the input) or template (renders the whole prompt)."""
    source: str
    """Where it comes from: original, model or file:NAME."""
    num_inputs: int
    """Inputs that it fits."""
    models: dict[str, WordingMetrics]
    """By model."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class CaseAnswer:
    """An answer to one input under one wording."""

    text: str
    """The answer, shortened to 400 characters."""
    canonical: str | None
    """The answer in the words of the gold answers; null where these are its own words."""
    kind: AnswerKind
    """Right, or which kind of failure (cases.KINDS)."""
    cluster: int | None
    """Number of the answers that it agrees with, the same for every model of the case; null: agrees with nothing."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class CaseModel:
    """A model's answers to one input."""

    cr: float | None
    """CR of the input, a share; null for an input that does not enter CR."""
    mcr: float | None
    """Share of wordings in the largest cluster; null as `cr`."""
    outcome: Outcome | None
    """Which of the four outcomes the input is; null as `cr`."""
    num_right: int
    """Wordings answered correctly."""
    answers: tuple[CaseAnswer, ...]
    """An answer per wording, in the order of the case's `wordings`."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """An input with every model's answers under each wording."""

    task: str
    """The task's id."""
    example: str
    """The input's id."""
    input: str
    """Its text, shortened to 1500 characters."""
    golds: tuple[str, ...]
    """Its gold answers, each shortened to 400 characters."""
    wordings: tuple[str, ...]
    """Ids of the wordings that it was asked under."""
    models: dict[str, CaseModel]
    """By model."""
    chosen: Literal["change", "inconsistent", "sample"]
    """Why it is shown: changed most from the first to the last model, least consistent, or drawn by hash."""
    change: float
    """|change in CR| + |change in the share of right answers| from the first to the last model, from 0 to 2."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class KindCounts:
    """Answers by kind; every answer is counted once."""

    right: int
    """Answers that equal a gold answer."""
    another: int
    """Whole answers that are none of the gold ones."""
    wrong_type: int
    """Answers of another kind than was asked for (no label of the task, or a label of another wording)."""
    cut_off: int
    """Answers that reached eval.max_new_tokens."""
    empty: int
    """Answers of white space or punctuation alone."""

    def of(self, kind: str) -> int:
        """Return the count of a kind by its name."""
        found: int = getattr(self, kind)
        return found

    @property
    def total(self) -> int:
        """Return how many answers there are."""
        return self.right + self.another + self.wrong_type + self.cut_off + self.empty


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class TaskFailures:
    """Answers to one task by kind."""

    task: str
    """The task's id."""
    num_labels: int
    """Size of its label set, 0 for free generation."""
    models: dict[str, KindCounts]
    """By model."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Failures:
    """How many answers are right, and of which kind the others are."""

    definitions: dict[str, str]
    """By kind: what it means, as the report shows it."""
    models: dict[str, KindCounts]
    """By model, over all tasks."""
    per_task: tuple[TaskFailures, ...]
    """By task."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class InconsistentAnswer:
    """An answer to an inconsistent input."""

    wording: str
    """The wording's id."""
    wording_text: str
    """Its text."""
    text: str
    """The answer as it was given."""
    canonical: str | None
    """The answer in the words of the gold answers; null when it is in those of another wording."""
    finish: str
    """stop, or length for an answer that was cut off."""
    correct: bool
    """Whether it equals a gold answer."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class InconsistentInput:
    """An input to which one model gave answers that disagree."""

    model: str
    """Name of the model."""
    cr: float
    """CR of the input, a share below 1."""
    mcr: float
    """Share of wordings in the largest cluster."""
    task: str
    """The task's id."""
    example: str
    """The input's id."""
    input: str
    """Its text."""
    golds: tuple[str, ...]
    """Its gold answers."""
    answers: tuple[InconsistentAnswer, ...]
    """An answer per wording."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class AgreementJudge:
    """How well the judge of agreement answers, on pairs whose verdict is known, and what it decided.

    A score is the lower log P(yes) - log P(no) of both orders of a pair. The threshold is fitted on other known pairs.
    """

    threshold: float
    """Score from which two answers agree, in nats."""
    fitted: bool
    """Whether the threshold was fitted; with too few known pairs it is 0."""
    num_alike: int
    """Known pairs that mean the same: gold answers of one input, or a gold answer and a sentence that gives it."""
    num_unlike: int
    """Known pairs that do not: gold answers of different inputs, or different labels."""
    balanced_accuracy: float | None
    """Mean of the shares judged rightly among both kinds; null without one of them. So are the next three."""
    auc: float | None
    """Probability that a pair that means the same scores above one that does not; ties are 1/2."""
    unlike_called_alike: float | None
    """Share of the unlike pairs that the judge calls the same."""
    alike_called_unlike: float | None
    """Share of the pairs that mean the same and that the judge calls different."""
    num_pairs: int
    """Pairs of different answers that the judge was asked about."""
    num_agreeing: int
    """Pairs among them that agree."""
    order_decides: float | None
    """Share of these pairs whose verdict differs with the order; they count as not agreeing. Null without pairs."""
