"""The eight steps by name, in order: which settings decide them, which train, which run workers, which repeat by round.

Pure names; every other list of steps in the project is one of these.
"""

from __future__ import annotations

# In order. The tables that decide a step's result: --help prints these, and the step's manifest holds their digest.
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
STEPS = tuple(STEP_TABLES)
TRAINING_STEPS = ("sft", "align")  # run by DeepSpeed ranks
GENERATING_STEPS = tuple(step for step, tables in STEP_TABLES.items() if "generation" in tables)  # run by workers
ROUND_STEPS = ("sample", "judge", "rank", "align", "eval")  # done once per round
ENCODE = "--encode"  # the one option of the training steps
