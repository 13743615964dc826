"""The arms of an experiment and the steps that make them: a list of runs with settings and inputs, pure data.

An arm differs from `cat` (or from `sft_ia`) in the settings written beside its name and in
nothing else; a step that two arms have in common is planned once. Knows no model and starts nothing.
"""

from __future__ import annotations

import dataclasses
from typing import Any


@dataclasses.dataclass(frozen=True, slots=True)
class Arm:
    """One arm: the step whose model it is ("" for the base model), the steps of its own and what they set.

    Everything else is borrowed. `run` is the run that holds its steps, when that is another arm's.
    """

    name: str
    title: str
    result: str
    own: tuple[str, ...] = ()
    settings: tuple[tuple[str, Any], ...] = ()
    run: str = ""


_RANKED = ("rank", "align")
_JUDGED = ("judge", *_RANKED)
_SAMPLED = ("sample", *_JUDGED)

ARMS = {
    arm.name: arm
    for arm in (
        Arm("base", "base model", ""),
        Arm("sft", "SFT, original wordings", "sft", ("sft",), (("sft.wordings", "original"),)),
        Arm("sft_ia", "SFT (IA)", "sft", ("paraphrase", "sft")),
        Arm("sft_ia_more", "SFT (IA), as many more updates", "sft", ("sft",)),
        Arm("sft_gold", "+ SFT on gold of the align inputs", "align", _RANKED, (("rank.rewards", "gold"),)),
        Arm("cat", "+ CAT (self-reward)", "align", _SAMPLED),
        Arm(
            "cat_no_gold",
            "+ CAT, no gold answers",
            "align",
            _JUDGED,
            # Without gold answers a weak judge is part of what is measured, no reason to stop all other arms.
            (("judge.gold", False), ("judge.allow_weak", True)),
        ),
        Arm("cat_lambda0", "+ CAT, lambda 0", "align", ("align",), (("align.rank_weight", 0.0),)),
        Arm("cat_permuted", "+ CAT, permuted rewards", "align", _RANKED, (("rank.rewards", "permuted"),)),
        Arm("cat_exact", "+ CAT, exact match only", "align", _RANKED, (("rank.rewards", "exact"),)),
        Arm("cat_no_type", "+ CAT, no type question", "align", _JUDGED, (("judge.type_question", False),)),
        Arm("cat_own", "+ CAT, own wordings only", "align", _RANKED, (("rank.pool", "own"),)),
        Arm("cat_round2", "+ CAT, second round", "align", _SAMPLED, (("run.round", 2),), run="cat"),
    )
}

# (b, a, what b - a tells)
COMPARISONS = (
    ("sft_ia", "sft", "what the paraphrases add to stage 1"),
    ("cat", "sft_ia", "what stage 2 adds"),
    ("cat", "sft_ia_more", "stage 2 against as many more updates of stage 1"),
    ("cat", "sft_gold", "stage 2 against the gold answers of the same inputs"),
    ("cat", "cat_permuted", "what it matters which answer has which reward"),
    ("cat", "cat_lambda0", "what the ranking term adds"),
    ("cat", "cat_exact", "what the judge adds to exact match"),
    ("cat", "cat_no_type", "what the question about the type adds"),
    ("cat", "cat_own", "what answers to other wordings add"),
    ("cat_no_gold", "sft_ia", "stage 2 without gold answers"),
    ("cat_round2", "cat", "what a second round adds"),
)
