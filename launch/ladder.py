"""The experiment: every arm with every seed, shared steps once, then one table and one figure (see ladder.sh)."""

from __future__ import annotations

import importlib.util
import os
import shlex
import sys
from pathlib import Path

from coalign.commandline import parse_command_line
from coalign.config import Config
from coalign.config_values import table_values
from coalign.errors import UserError
from coalign.evaluation.metrics_file import read_metrics
from coalign.experiment import arms, ladder_result, results
from coalign.experiment.ladder import (
    Ladder,
    StepRun,
    ladder_lines,
    make_ladder,
)
from coalign.experiment.ladder_options import ladder_usage, read_ladder_options
from coalign.experiment.ladder_run import run_all
from coalign.process import derive_seed, free_port
from coalign.recipe import run_step
from coalign.report import experiment_table
from coalign.report.model_card_results import fill_card
from coalign.runs.atomic_files import write_atomic
from coalign.runs.digests import CARD
from coalign.steps import TRAINING_STEPS


def main(argv: list[str]) -> None:
    """Plan the steps, run what is missing, and show the result."""
    if any(word in ("-h", "--help") for word in argv):
        print(ladder_usage())
        return
    options, words = read_ladder_options(argv)
    config = parse_command_line("ladder", words)
    ladder = make_ladder(table_values(config, tuple(Config.model_fields)), options)
    steps = ladder.steps()
    print("\n".join(ladder_lines(ladder, steps)), flush=True)
    if options.dry_run:
        print("\n".join(shlex.join(command(run.step, run.words(words))) for run in steps))
        return
    if importlib.util.find_spec("matplotlib") is None:
        raise UserError("the figure needs matplotlib, which is not installed; pip install -e . (see constraints.txt)")
    run_all(ladder, steps, words, command)
    print("\n".join(show(ladder, steps, config)), flush=True)


def command(step: str, words: list[str]) -> list[str]:
    """Return a step's command; training starts with the words of TRAIN_LAUNCHER, or on one rank without it."""
    launcher = shlex.split(os.environ.get("TRAIN_LAUNCHER", "")) if step in TRAINING_STEPS else []
    port = ["--master_port", str(free_port())] if launcher else []
    return [*(launcher or [sys.executable]), *port, os.path.relpath(Path(__file__).with_name(f"{step}.py")), *words]


def show(ladder: Ladder, steps: list[StepRun], config: Config) -> list[str]:
    """Write the ladder's metrics.json, table.md and figure; return what to print."""
    seed = derive_seed(config.run.seed, "ladder")
    result = results.make_result(ladder, steps, arms.COMPARISONS, config.eval, seed)
    folder = ladder.home / "ladder"
    folder.mkdir(parents=True, exist_ok=True)
    ladder_result.write_result(folder, result)
    for number in ladder.seeds:
        _, metrics = read_metrics(ladder.eval_folder(number))
        for name in filter(lambda name: arms.ARMS[name].result, ladder.arms):  # the base model's card is not ours
            fill_card(Path(ladder.model(name, number)) / "model" / CARD, metrics, name)
    lines = experiment_table.table_lines(result)
    write_atomic(folder / "table.md", "\n".join(lines) + "\n")
    paths = experiment_table.draw(result, folder)
    return [*lines, "", f"table and figure: {folder / 'table.md'}, {', '.join(map(str, paths))}"]


if __name__ == "__main__":
    run_step(main)
