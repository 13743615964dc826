"""Whether two answers mean the same, by a judge: the questions, how well it answers them, and what it said.

The judge is asked in both orders, and only what it says in both counts. Before it decides anything it is measured on
pairs of answers whose verdict is known. Knows no model: it is given a codec and a function that scores requests.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal

from coalign.config import EvalTable
from coalign.errors import UserError
from coalign.evaluation.metrics import Decide, rouge_l_agrees
from coalign.evaluation.metrics_rows import AgreementJudge
from coalign.judging.calibration import MIN_ROWS_TO_FIT, complaint_of_quality, fit_threshold, measure
from coalign.judging.known_answers import wrong_answer
from coalign.prompts import NO, YES, same_answer_question
from coalign.records import Example, Row, Task
from coalign.text import normalise_answer, unit_hash
from coalign.wordings.asking import PromptCodec, fits

MAX_KNOWN_INPUTS = 200  # half of them fit the threshold, the other half measure
_ROUGE_L = re.compile(r"rouge_l\s*>=\s*(\S+)")

logger = logging.getLogger("coalign")

AnswerPair = tuple[str, str]  # two answers in normal form, which differ
# (requests {"pair", "prompt_ids", "continuations"}, name of their shards) -> the same rows with "pair" and "logps"
Score = Callable[[list[Row], str], Iterable[Row]]


@dataclasses.dataclass(frozen=True, slots=True)
class KnownPair:
    """Two different answers in normal form of which it is known whether they mean the same."""

    answers: AnswerPair
    same: bool
    part: Literal["fit", "check"]


def known_pairs(tasks: Iterable[Task], examples: Sequence[Example], split: str, seed: int) -> list[KnownPair]:
    """Return pairs that mean the same and pairs that do not, of at most MAX_KNOWN_INPUTS inputs outside a split.

    Alike are two gold answers of an input; or, where it has one, that answer and a sentence that gives it. Unlike are
    a gold answer and another label or the gold answer of another input, put in the same way.
    """
    known_tasks = {task.id: task for task in tasks}
    usable = [example for example in examples if example.split != split and example.task in known_tasks]
    golds: dict[str, list[str]] = {}
    for example in usable:
        golds.setdefault(example.task, []).extend(example.outputs)
    chosen = sorted(usable, key=lambda e: unit_hash(str(seed), "agreement", e.task, e.id))[:MAX_KNOWN_INPUTS]
    known: list[KnownPair] = []
    for index, example in enumerate(chosen):
        part: Literal["fit", "check"] = "check" if index % 2 else "fit"
        first, form = example.outputs[0], known_tasks[example.task].answer_form
        others = [gold for gold in example.outputs if normalise_answer(gold, form) != normalise_answer(first, form)]
        wrong = wrong_answer(known_tasks[example.task], example, golds[example.task], seed)
        found = [(others[0] if others else _sentence(first), True)]
        if wrong is not None:
            found.append((wrong if others else _sentence(wrong), False))
        for second, same in found:
            answers = normalise_answer(first, form), normalise_answer(second, form)
            if all(answers) and answers[0] != answers[1]:
                known.append(KnownPair(answers, same, part))
    return known


def _sentence(answer: str) -> str:
    return f"The answer is {answer}"


def judge_requests(
    pairs: Sequence[AnswerPair], codec: PromptCodec, too_long: str
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Return two requests per pair: score yes and no after the question whether A and B mean the same, and B and A.

    A pair whose prompt exceeds the judge's context gets none but a row in the second list, and counts as not agreeing;
    UserError when `too_long` is "error".
    """
    verdicts = [codec.encode_plain(YES), codec.encode_plain(NO)]
    longest = max(map(len, verdicts))
    requests: list[dict[str, Any]] = []
    dropped: list[dict[str, Any]] = []
    for index, pair in enumerate(pairs):
        prompts = [codec.encode_prompt(same_answer_question(*order)) for order in (pair, pair[::-1])]
        num_tokens = max(map(len, prompts))
        what = f"eval.agreement: the question whether {pair[0][:40]!r} and {pair[1][:40]!r} mean the same"
        if fits(num_tokens + longest, codec.max_tokens, too_long, what, "count such pairs as not agreeing", "judge"):
            requests += [{"pair": index, "prompt_ids": ids, "continuations": verdicts} for ids in prompts]
        else:
            dropped.append({"reason": "too_long_for_judge", "answers": list(pair), "num_tokens": num_tokens})
    if dropped:
        logger.warning(
            "%d of %d pairs of answers exceed the context of the judge of agreement (%d tokens) and count as not"
            " agreeing",
            len(dropped),
            len(pairs),
            codec.max_tokens,
        )
    return requests, dropped


def read_scores(rows: Iterable[Row], num_pairs: int) -> list[tuple[float, ...]]:
    """Return for each pair log P(yes) - log P(no) in either order, in nats; () for a pair that was not asked about."""
    found: list[tuple[float, ...]] = [()] * num_pairs
    for row in rows:
        found[row["pair"]] += (row["logps"][0] - row["logps"][1],)
    return found


class JudgeOfAgreement:
    """Says which pairs of answers mean the same: `measure` first, then `decide`, then `result`."""

    def __init__(self, codec: PromptCodec, too_long: str, score: Score, dropped: list[Row]) -> None:
        self.codec, self.too_long, self.score, self.dropped = codec, too_long, score, dropped
        self.threshold = 0.0
        self._measured: dict[str, Any] = {}
        self._num_pairs = self._num_agreeing = self._num_order = 0

    def _ask(self, pairs: Sequence[AnswerPair], name: str) -> tuple[list[tuple[float, ...]], list[Row]]:
        requests, too_long = judge_requests(pairs, self.codec, self.too_long)
        return read_scores(self.score(requests, name), len(pairs)), too_long

    def measure(self, known: Sequence[KnownPair], table: EvalTable) -> None:
        """Fit the threshold on a half of the known pairs, measure on the other half, and log how well it judges.

        Raises UserError for a judge that is too weak, or that can't be measured, unless eval.allow_weak is set.
        """
        scores, _ = self._ask([pair.answers for pair in known], "agreement-known")
        samples: dict[tuple[str, bool], list[float]] = {
            (part, same): [min(s) for p, s in zip(known, scores, strict=True) if s and (p.part, p.same) == (part, same)]
            for part in ("fit", "check")
            for same in (True, False)
        }
        fit = samples["fit", True], samples["fit", False]
        self.threshold = fit_threshold(*fit)
        quality = measure(samples["check", True], samples["check", False], self.threshold)
        self._measured = {
            "threshold": self.threshold,
            "fitted": min(map(len, fit)) >= MIN_ROWS_TO_FIT,
            "num_alike": quality["num_yes"],
            "num_unlike": quality["num_no"],
            "balanced_accuracy": quality["balanced_accuracy"],
            "auc": quality["auc"],
            "unlike_called_alike": quality["false_correct"],
            "alike_called_unlike": quality["false_incorrect"],
        }
        logger.info("judge of agreement: %s", describe_judge(self.result()))
        complaint = weakness(self._measured, table)
        if complaint and not table.allow_weak:
            raise UserError(
                f"eval.agreement={table.agreement!r}: {complaint}; use the folder of a stronger model, rouge_l>=0.7 or"
                " exact, or set eval.allow_weak=true to continue with this judge; finished scores are kept"
            )
        if complaint:
            logger.warning("continuing with a weak judge of agreement (eval.allow_weak=true): %s", complaint)

    def decide(self, pairs: list[AnswerPair]) -> list[bool]:
        """Return for each pair whether yes scores high enough in both orders; one that is too long does not agree."""
        scores, too_long = self._ask(pairs, "agreement")
        self.dropped += too_long
        agreeing = [bool(found) and min(found) >= self.threshold for found in scores]
        asked = [found for found in scores if found]
        self._num_pairs, self._num_agreeing = len(asked), sum(agreeing)
        self._num_order = sum((min(found) >= self.threshold) != (max(found) >= self.threshold) for found in asked)
        return agreeing

    def result(self) -> AgreementJudge:
        """Return what metrics.json says of the judge."""
        order = self._num_order / self._num_pairs if self._num_pairs else None
        return AgreementJudge(
            **self._measured, num_pairs=self._num_pairs, num_agreeing=self._num_agreeing, order_decides=order
        )


def weakness(quality: Mapping[str, Any], table: EvalTable) -> str | None:
    """Return what is wrong with a judge of agreement, None when it judges well enough."""
    known = f"{quality['num_alike']} pairs that mean the same and {quality['num_unlike']} that do not"
    needed = f"both kinds are needed of inputs outside the {table.split} split; use more data"
    return complaint_of_quality(quality, known, needed, "eval.min_quality", table.min_quality)


def describe_judge(judge: AgreementJudge) -> str:
    """Return how well a judge of agreement judges, and how often its verdict depends on the order, as a clause."""
    share = {
        "balanced accuracy": judge.balanced_accuracy,
        "unlike answers called the same": judge.unlike_called_alike,
        "equal ones called different": judge.alike_called_unlike,
    }
    numbers = ", ".join(f"{name} {value:.2f}" for name, value in share.items() if value is not None)
    order = "" if judge.order_decides is None else f"; of {judge.num_pairs:,} pairs {judge.order_decides:.2f} by order"
    known = f"on {judge.num_alike} pairs of equal and {judge.num_unlike} of unlike meaning"
    return f"asked in both orders, {known} {numbers or 'not measured'}{order}"


@dataclasses.dataclass(frozen=True, slots=True)
class Agreement:
    """When two answers count as the same, beside having the same normal form."""

    kind: Literal["exact", "rouge_l", "judge"]
    threshold: float = 1.0
    folder: str = ""

    def decider(self, judge: JudgeOfAgreement | None) -> Decide | None:
        """Return the function that decides which pairs of different answers agree; None where only equal ones do."""
        if self.kind == "rouge_l":
            return functools.partial(rouge_l_agrees, threshold=self.threshold)
        return judge.decide if judge else None


def parse_agreement(text: str) -> Agreement:
    """Read eval.agreement: `exact`, `rouge_l>=X` with 0 < X <= 1, else a folder. Raises UserError for a bad X."""
    if text.strip() == "exact":
        return Agreement("exact")
    if not text.strip().startswith("rouge_l"):
        return Agreement("judge", folder=text)
    match = _ROUGE_L.fullmatch(text.strip())
    try:
        threshold = float(match[1]) if match else -1.0
    except ValueError:
        threshold = -1.0
    if not 0.0 < threshold <= 1.0:
        raise UserError(f"eval.agreement={text!r}: a threshold over 0 and up to 1 was expected; use rouge_l>=0.7")
    return Agreement("rouge_l", threshold=threshold)
