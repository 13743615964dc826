"""The declared form of metrics.json: what eval reports of models and sets of tasks, and which steps it rests on.

Every field says its unit, its range and where its definition is; docs/results-format.md is generated from these texts.
The rows by task, wording and input are in metrics_rows.py. Knows no model and computes nothing.

A share is a number from 0 to 1. "Mean over tasks" is the mean of the tasks' own values, each a mean over inputs. `null`
on disk is None here. A field with a default is missing in files of version 0 (before versions were written).
"""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

from coalign.evaluation.metrics_rows import AgreementJudge, Case, Failures, InconsistentInput, TaskRow, WordingRow
from coalign.evaluation.typed_json import FLAT
from coalign.runs.costs import StepCost

TASK_SETS = ("all", "seen", "unseen")  # of tasks: seen in training or not


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """A mean over tasks with its 95 % interval (intervals.estimate)."""

    mean: float | None
    """Mean of the tasks' values, or of their paired differences; null without a task."""
    low: float | None
    """Lower end of the interval; null where there is none (under 6 tasks)."""
    high: float | None
    """Upper end of the interval; null where there is none. The interval of a share is cut at 0 and 1."""
    num_tasks: int
    """Tasks that the mean is over."""
    method: Literal["bootstrap", "t", "none"]
    """How the interval was made: two-level bootstrap over tasks, then inputs (20 tasks and more), Student's t on task
    values (6 tasks and more; always for the worst wording, the spread and the constant answer), or no interval."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class SetMetrics:
    """A model's metrics over one set of tasks. Those from `cr` to `mixed` are over the tasks that enter CR."""

    cr: Estimate
    """Consistency rate, a share: agreeing unordered pairs of answers to an input / all pairs of its wordings."""
    mcr: Estimate
    """Share of wordings in the largest cluster of agreeing answers to an input."""
    corrected_cr: Estimate
    """(CR - e) / (1 - e) by task, at most 1; 0 where e = 1. Below 0: less consistent than independent answers."""
    expected_cr: Estimate
    """e, a share: CR expected if every answer were drawn independently from the task's own answer frequencies, the sum
    over answers a of p_a^2, plus 2 p_a p_b for each pair of different answers that agree."""
    always_right: Estimate
    """Share of inputs whose answers are all correct. This and the next three sum to 1."""
    always_wrong_alike: Estimate
    """Share of inputs whose answers are all wrong and all agree."""
    inconsistent: Estimate
    """Share of inputs that are not always right and where some pair of answers disagrees."""
    mixed: Estimate
    """Share of inputs where all answers agree, some correct and some not (0 when agreement is exact)."""
    accuracy: Estimate
    """Share of answers that equal a gold answer after normalising; empty and cut-off answers are wrong."""
    rouge_l: Estimate
    """ROUGE-L F, a share: the highest over the gold answers."""
    rouge_1: Estimate
    """ROUGE-1 F, a share: the highest over the gold answers."""
    worst_wording: Estimate
    """Accuracy of the task's least accurate wording, a share."""
    spread: Estimate
    """Accuracy of the task's most accurate wording minus that of its least accurate one, from 0 to 1."""

    def of(self, metric: str) -> Estimate:
        """Return the estimate of a metric by its name."""
        found: Estimate = getattr(self, metric)
        return found


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class NoiseFloor:
    """CR of one and the same wording asked several times: how consistent repeated answers are without any change."""

    cr: float | None
    """CR among the repeats, a share: mean over inputs, then over tasks; null without repeats."""
    mcr: float | None
    """Share of repeats in the largest cluster, mean as for `cr`; null without repeats."""
    num_inputs: int
    """Inputs that were asked again."""
    num_repeats: int
    """Answers to each of them."""
    num_tasks: int
    """Tasks of these inputs."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class NoiseFloors:
    """Both noise floors of a model."""

    neighbours: NoiseFloor
    """Greedy answers, each repeat computed among other requests of a batch."""
    temperature: NoiseFloor
    """Answers sampled at `noise_temperature`."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ModesAgree:
    """How often both generation modes (fast and exact) give the same text."""

    share: float | None
    """Share of answers with the same text in the other mode; null where the other mode was not asked (vLLM)."""
    num_answers: int
    """Answers compared."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class AnswerCounts:
    """How many answers a model gave, and how many of them agree with nothing, by reason."""

    answers: int
    """Greedy answers, one per pair of input and wording."""
    tokens: int
    """Tokens generated for them."""
    empty: int
    """Answers of white space or punctuation alone."""
    cut_off: int
    """Answers that reached eval.max_new_tokens."""
    foreign_vocabulary: int
    """Answers in the words of another wording's answer map."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ModelMetrics:
    """What is known of one model. On disk the metrics over all tasks stand directly in the model's object."""

    all: SetMetrics = dataclasses.field(metadata=FLAT)
    """Metrics over all tasks."""
    seen: SetMetrics
    """Metrics over the tasks that have inputs in training."""
    unseen: SetMetrics
    """Metrics over the tasks that are kept out of training."""
    noise: NoiseFloors
    """CR of one wording asked again."""
    modes_agree: ModesAgree
    """Agreement of the generation modes."""
    counts: AnswerCounts
    """Answers and tokens."""

    def over(self, which: str) -> SetMetrics:
        """Return the metrics over one of TASK_SETS."""
        found: SetMetrics = getattr(self, which)
        return found


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """A paired difference b - a of two models in one metric. The keys of its estimate stand beside `a` and `b`."""

    a: str
    """Name of the model that is subtracted."""
    b: str
    """Name of the other model, which comes later in `models`."""
    metric: str
    """Name of a field of SetMetrics: cr, corrected_cr, mcr, accuracy, rouge_l or worst_wording."""
    estimate: Estimate = dataclasses.field(metadata=FLAT)
    """Mean over tasks of the task's value for b minus that for a, from -1 to 1 for shares."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ConstantAnswer:
    """What always giving a task's most frequent gold answer would reach. Its intervals are t intervals over tasks."""

    accuracy: Estimate
    """Accuracy of that answer, a share (grids.constant_accuracy)."""
    differences: dict[str, Estimate]
    """By model: its accuracy minus that of the constant answer, paired by task, from -1 to 1."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class EvalCounts:
    """What eval itself has used."""

    tokens_generated: int
    """Tokens generated for all models, repeats and the noise floors' other requests included."""
    cores: int
    """CPU cores kept busy."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Summary:
    """What eval computes from the answers, without the run around it."""

    models: dict[str, ModelMetrics]
    """By name in eval.models, in its order: the first is compared as "before", the last as "after"."""
    differences: tuple[Difference, ...]
    """Paired differences over all tasks, by pair of models, then by metric."""
    differences_seen: tuple[Difference, ...]
    """The same over seen tasks."""
    differences_unseen: tuple[Difference, ...]
    """The same over unseen tasks."""
    constant_answer: ConstantAnswer | None = None
    """Comparison with the best constant answer."""
    failures: Failures | None = None
    """Answers by kind."""
    cases: tuple[Case, ...] = ()
    """Inputs to look at one by one, 240 at most (cases.pick_cases)."""
    per_task: tuple[TaskRow, ...]
    """Every task with answers."""
    per_wording: tuple[WordingRow, ...]
    """Every wording of every task."""
    most_inconsistent: tuple[InconsistentInput, ...]
    """Inputs with the lowest CR under the last model, 20 at most, the lowest first."""
    split: str
    """Split of inputs and wordings: test or dev (eval.split)."""
    agreement: str
    """When two answers agree: exact, rouge_l>=X or the folder of a judge (eval.agreement)."""
    min_wordings: int
    """Wordings that an input needs to enter CR."""
    num_bootstrap: int
    """Resamples of the bootstrap (eval.num_bootstrap)."""
    noise_temperature: float
    """Temperature of the second noise floor."""
    definitions: dict[str, str]
    """By metric: its definition in a few words, as the report shows it."""
    num_tasks: int
    """Tasks with answers."""
    num_seen_tasks: int
    """Those of them with inputs in training."""
    num_tasks_in_cr: int
    """Tasks in which some input has at least `min_wordings` answered wordings."""
    num_inputs: int
    """Inputs asked."""
    num_pairs: int
    """Pairs of input and wording that every model has answered."""

    def differences_over(self, which: str) -> tuple[Difference, ...]:
        """Return the paired differences over one of TASK_SETS."""
        found: tuple[Difference, ...] = getattr(self, "differences" if which == "all" else f"differences_{which}")
        return found


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Metrics(Summary):
    """The content of metrics.json: eval's summary, and which run, steps and settings it is of."""

    cost: tuple[StepCost, ...] = ()
    """What each step before eval has used."""
    steps: dict[str, str] = dataclasses.field(default_factory=dict)
    """Folders of the steps before eval, by name; in a later round by "NAME, round N"."""
    lineage: dict[str, str] | None = None
    """SHA-256 digests of the steps that the result was made from, by label (sft, round2/align)."""
    eval_seconds: float | None = None
    """Wall-clock seconds of eval, earlier attempts included."""
    eval_counts: EvalCounts | None = None
    """What eval itself has used."""
    agreement_judge: AgreementJudge | None = None
    """How well the judge of agreement judges; null where agreement is exact or by ROUGE-L."""
    run: str = ""
    """Name of the run (run.name)."""
    sources: dict[str, str] = dataclasses.field(default_factory=dict)
    """By model: what eval.models says it is: base, a step, a folder or a name on the hub."""
    labels: dict[str, str] = dataclasses.field(default_factory=dict)
    """By model: what reports call it; a model without a label is called by its name."""
    dropped: dict[str, int] = dataclasses.field(default_factory=dict)
    """By reason: rows left out of eval, as they are in dropped.jsonl."""
    settings: dict[str, Any] = dataclasses.field(default_factory=dict)
    """Settings of eval's tables that differ from the built-in defaults, by table.key."""
    versions: dict[str, str] = dataclasses.field(default_factory=dict)
    """Versions of Python, coalign and the packages it builds on, by name."""

    def label(self, name: str) -> str:
        """Return what to call a model: its label, or its name in eval.models."""
        return self.labels.get(name, name)


def complete(summary: Summary, **of_run: Any) -> Metrics:
    """Return the content of metrics.json: a summary with the fields of Metrics that say which run it is of."""
    return Metrics(**{field.name: getattr(summary, field.name) for field in dataclasses.fields(Summary)}, **of_run)
