"""What the steps of a run cost, and which folders they lie in, for metrics.json.

Reads manifests. Knows no metric.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from coalign.config import RunTable
from coalign.runs.run_folder import RunFolder
from coalign.runs.step_folder import StepFolder, read_manifest
from coalign.steps import ROUND_STEPS, STEP_TABLES


def steps_so_far(run: RunTable, arguments: list[str]) -> dict[str, Path]:
    """Return the folders of the steps before eval by name; in a later round also those of the rounds before it."""
    steps = {name: RunFolder(run, arguments).step(name) for name in STEP_TABLES if name not in ROUND_STEPS}
    for number in range(1, run.round + 1):
        folder = RunFolder(run.model_copy(update={"round": number}), arguments)
        suffix = f", round {number}" if run.round > 1 else ""
        steps |= {name + suffix: folder.step(name) for name in ROUND_STEPS if name != "eval"}
    return steps


def describe_steps(steps: dict[str, Path], step: StepFolder, counts: dict[str, Any]) -> dict[str, Any]:
    """Return what metrics.json says about the steps before eval (cost, folders, digests) and about eval itself.

    `counts` are eval's own, with tokens_generated and cores.
    """
    return {
        "cost": cost_rows(steps),
        "steps": {name: str(path) for name, path in steps.items()},
        "lineage": step.lineage,
        "eval_seconds": round(step.spent + time.time() - step.started, 1),
        "eval_counts": {key: counts[key] for key in ("tokens_generated", "cores")},
    }


def cost_rows(steps: dict[str, Path]) -> list[dict[str, Any]]:
    """Return a row per complete step: updates, tokens, wall seconds, core hours; None where its manifest lacks one."""
    rows = []
    for name, folder in steps.items():
        manifest = read_manifest(folder)
        if manifest is None:
            continue
        counts = manifest["counts"]
        cores = counts.get("cores")
        rows.append(
            {
                "step": name,
                "updates": counts.get("updates"),
                "tokens_trained": counts.get("tokens_trained", counts.get("tokens")),
                "tokens_generated": counts.get("tokens_generated"),
                "wall_seconds": manifest.get("wall_seconds"),
                "core_hours": manifest["wall_seconds"] * cores / 3600 if cores else None,
            }
        )
    return rows
