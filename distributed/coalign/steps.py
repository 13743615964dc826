"""TODO steps"""

from __future__ import annotations

# The tables that decide a step's result; --help prints these, and the step's manifest holds their digest.
STEP_TABLES: dict[str, tuple[str, ...]] = {
    "prepare": ("run", "data", "model"),
    "paraphrase": ("run", "paraphrase", "model", "generation"),
    "sft": ("run", "sft", "model", "train"),
    "sample": ("run", "sample", "model", "generation"),
    "judge": ("run", "judge", "model", "generation"),
    "rank": ("run", "rank"),
    "align": ("run", "align", "model", "train"),
    "eval": ("run", "eval", "model", "generation"),
}


ROUND_STEPS = ("sample", "judge", "rank", "align", "eval")


TRAINING_STEPS = ("sft", "align")


GENERATING = ("paraphrase", "sample", "judge", "eval")


ENCODE = "--encode"  # the one option of the training steps
