"""What a script asks before it starts anything: whether the config is valid, which steps to run, how many workers.

    python launch/remaining.py local [CONFIG.toml] [key=value ...]      # for launch/local.sh
    python launch/remaining.py ladder [CONFIG.toml] [key=value ...]     # for launch/ladder.sh

Prints on one line the steps that the run makes itself (not for a ladder), and on the next the number of workers that a
private Ray cluster must hold: 0 when no step is left that needs one, or when another cluster is named.
"""

from __future__ import annotations

import sys

try:
    from coalign.clusters.ray_connection import ray_address
    from coalign.commandline import parse_command_line
    from coalign.config import Config
    from coalign.config_values import table_values
    from coalign.errors import UserError
    from coalign.experiment.ladder import make_ladder
    from coalign.experiment.ladder_options import read_ladder_options
    from coalign.recipe import run_step
    from coalign.runs.run_folder import RunFolder, incomplete
    from coalign.runs.step_folder import read_manifest
    from coalign.steps import GENERATING_STEPS
except ModuleNotFoundError as error:
    sys.exit(f"error: {error}; set up the environment first: make setup")


def main(argv: list[str]) -> None:
    """Print the steps and the number of workers. Raises UserError for an invalid config of a pipeline."""
    script, *words = argv or [""]
    if script in ("-h", "--help"):
        print(__doc__)
        return
    if script not in ("local", "ladder"):
        raise UserError(f"{script!r} is no script that asks this; see python launch/remaining.py --help")
    if script == "ladder":
        print(workers_of_ladder(words))
        return
    config = parse_command_line(script, words)
    folders = RunFolder(config.run, []).own_steps(config.eval.folder)
    left = {*incomplete(folders)}
    if not config.paraphrase.num_wordings:
        left.discard("paraphrase")  # it needs no workers then
    print(*folders)
    print(private_workers(config, bool(left & {*GENERATING_STEPS})))


def workers_of_ladder(words: list[str]) -> int:
    """Return the workers of a ladder's private cluster; 0 for invalid words, which ladder.py reports."""
    try:
        if {"-h", "--help"} & {*words}:
            return 0
        options, rest = read_ladder_options(words)
        config = parse_command_line("ladder", rest)
        ladder = make_ladder(table_values(config, tuple(Config.model_fields)), options)
    except UserError:
        return 0
    left = any(read_manifest(step.folder) is None for step in ladder.steps())
    return private_workers(config, left and not options.dry_run)


def private_workers(config: Config, needed: bool) -> int:
    """Return the workers that a private Ray cluster must hold."""
    return config.generation.workers if needed and not ray_address(config.generation) else 0


if __name__ == "__main__":
    run_step(main)
