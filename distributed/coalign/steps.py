"""The eight steps by name, in order: their settings; which train, run workers or repeat.

Pure names. Every list of steps in the project comes from here.
"""

from __future__ import annotations

# In order, with the tables that decide each result: --help prints them, and the manifest holds their values.
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
ENCODE = "--encode"  # an option of the training steps: write the token ids that training reads, and stop
