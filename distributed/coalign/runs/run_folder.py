"""Where the steps of a run lie, with borrowed steps and later rounds, and how one is begun.

Knows no engine and nothing of what a step computes.
"""

from __future__ import annotations

import logging
import shlex
from pathlib import Path
from typing import Any

from coalign.config import ModelTable, RunTable
from coalign.errors import UserError
from coalign.process import rank
from coalign.runs.outputs import step_model
from coalign.runs.step_folder import StepFolder, read_manifest, require_complete
from coalign.steps import ROUND_STEPS, STEPS, TRAINING_STEPS

logger = logging.getLogger("coalign")


class RunFolder:
    """Where each step of a run lies, with steps borrowed from other runs and rounds; how a recipe begins a step."""

    def __init__(self, run: RunTable, arguments: list[str]) -> None:
        self.run = run
        self.arguments = [word for word in arguments if not word.startswith("--")]  # without the launcher's and ENCODE
        self.path = Path(run.folder) / run.name

    def step(self, name: str) -> Path:
        """Return the folder of a step: in run.inputs when borrowed, in roundN/ for ROUND_STEPS of a later round."""
        home = Path(self.run.inputs[name]) if name in self.run.inputs else self.path
        return self._in_round(home, name, self.run.round)

    @staticmethod
    def _in_round(home: Path, name: str, number: int) -> Path:
        return home / f"round{number}" / name if number > 1 and name in ROUND_STEPS else home / name

    def policy(self) -> Path:
        """Return the folder of the step whose model this round starts from: sft, or align of the round before."""
        if self.run.round == 1:
            return self.step("sft")
        return self._in_round(self.path, "align", self.run.round - 1)

    def own_steps(self, eval_folder: str = "") -> dict[str, Path]:
        """Return {step: folder} of every step that this run makes itself, in order, without those of run.inputs.

        `eval_folder` is eval.folder, which replaces the run's own.
        """
        folders = {name: self.step(name) for name in STEPS if name not in self.run.inputs}
        if eval_folder:
            folders["eval"] = Path(eval_folder)
        return folders

    def command(self, step: str) -> str:
        """Return the command that makes a step of this run."""
        launcher = "deepspeed" if step in TRAINING_STEPS else "python"
        return shlex.join([launcher, f"launch/{step}.py", *self.arguments])

    def require(self, name: str, folder: Path) -> Path:
        """Return a step's folder; raise UserError naming the command that makes it when it is not complete."""
        step = folder.name
        elsewhere = name in self.run.inputs
        earlier = name == "policy" and self.run.round > 1
        hint = f"the step {step} of the run {folder.parent} (run.inputs)" if elsewhere else self.command(step)
        if earlier:
            words = [word for word in self.arguments if not word.startswith("run.round=")]
            hint = shlex.join(["deepspeed", f"launch/{step}.py", *words, f"run.round={self.run.round - 1}"])
        require_complete(folder, hint)
        return folder

    def begin(
        self,
        name: str,
        settings: dict[str, Any],
        needs: dict[str, Path],
        files: dict[str, str] | None = None,
        folder: Path | None = None,
    ) -> StepFolder | None:
        """Open a step for work after checking what it needs; log that it is complete and return None if so.

        `needs` maps a name to a step folder (missing or stale ones raise UserError naming the command to run). On many
        ranks only rank 0 compares and locks its own folder; the launcher ends the others when it fails.
        """
        if name in self.run.inputs:
            raise UserError(f"run.inputs.{name}={self.run.inputs[name]!r}: a borrowed step is not run again here")
        for label, path in needs.items():
            self.require(label, path)
        step = StepFolder(folder or self.step(name), settings, needs, files)
        if rank() != 0:
            return None if read_manifest(step.path) else step
        if step.open():
            logger.info("%s is complete in %s; nothing to do", name, step.path)
            return None
        return step


def incomplete(folders: dict[str, Path]) -> list[str]:
    """Return the names of the steps that are not complete, in order."""
    return [name for name, folder in folders.items() if read_manifest(folder) is None]


def base_model_folder(model: ModelTable, prepare_folder: Path) -> str:
    """Return the folder or hub name of the model that everything starts from. Raises UserError without one."""
    if model.init == "random":
        return step_model(prepare_folder)
    if not model.path:
        raise UserError(
            'model.path is empty; give a model folder or hub name, or set model.init="random" for untrained weights'
        )
    return model.path
