"""How a recipe begins: from the words of its command to a step folder that is open for work.

    step = open_step("sample", argv, ("prepare", "paraphrase", "policy"))
    if step is None:
        return  # it is complete, and the log says so

prepare, paraphrase and rank check their input before the folder is made, so that invalid input leaves nothing behind.
They take the two halves: `StepCommand(name, argv)`, then its `begin`. Knows no engine.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from pathlib import Path

from coalign.commandline import parse_command_line
from coalign.config import Config
from coalign.config_values import changed_values, table_values
from coalign.recipe import announce, exit_with_launcher, set_up_logging
from coalign.records import Example, Group, Record, Response, Task, Verdict, Wording, read_records
from coalign.runs.outputs import step_model, step_output
from coalign.runs.run_folder import RunFolder
from coalign.runs.step_folder import StepFolder
from coalign.steps import STEP_TABLES, TRAINING_STEPS

# Which step writes each kind of record, and where.
FILES = {
    Task: ("prepare", "tasks.jsonl"),
    Example: ("prepare", "examples.jsonl"),
    Wording: ("paraphrase", "wordings.jsonl"),
    Response: ("sample", "responses.jsonl"),
    Verdict: ("judge", "verdicts.jsonl"),
    Group: ("rank", "groups.jsonl"),
}


class StepCommand:
    """The command of one step: its checked config and the folder of its run. Changes nothing on disk.

    Raises UserError for invalid words or an invalid config, and SystemExit after --help.
    """

    def __init__(self, name: str, argv: list[str]) -> None:
        self.name = name
        self.config: Config = parse_command_line(name, argv)
        set_up_logging(self.config.log.level)
        if name in TRAINING_STEPS:
            exit_with_launcher()
        self.run = RunFolder(self.config.run, argv)

    def find(self, names: Iterable[str]) -> dict[str, Path]:
        """Return the folders of steps by name; "policy" is the step whose model this round starts from."""
        return {name: self.run.policy() if name == "policy" else self.run.step(name) for name in names}

    def require(self, names: Iterable[str]) -> dict[str, Path]:
        """Return the folders of complete steps; raise UserError naming the command that makes a missing one."""
        return {name: self.run.require(name, folder) for name, folder in self.find(names).items()}

    def begin(
        self, needs: Iterable[str] = (), files: dict[str, str] | None = None, folder: Path | None = None
    ) -> OpenStep | None:
        """Open the step for work; log that it is complete and return None if so. See RunFolder.begin.

        `needs` are the names of the steps that it reads; `files` maps a name to the digest of anything else.
        """
        found = self.find(needs)
        settings = table_values(self.config, STEP_TABLES[self.name], with_neutral=False)
        output = self.run.begin(self.name, settings, found, files, folder)
        return None if output is None else OpenStep(self, found, output)

    def announce(self, plan: str, with_model: bool = True) -> None:
        """Log the settings that differ from the defaults, the devices of a step with a model, and the plan."""
        announce(self.name, changed_values(self.config, STEP_TABLES[self.name]), plan, with_model)


@dataclasses.dataclass(frozen=True)
class OpenStep:
    """A step that is open for work: its command, the folders of the steps that it needs, and its own to write to."""

    command: StepCommand
    needs: dict[str, Path]
    output: StepFolder

    @property
    def config(self) -> Config:
        """Return the whole configuration."""
        return self.command.config

    @property
    def run(self) -> RunFolder:
        """Return the folder of the run."""
        return self.command.run

    def announce(self, plan: str, with_model: bool = True) -> None:
        """Log the settings that differ from the defaults, the devices of a step with a model, and the plan."""
        self.command.announce(plan, with_model)

    def read(self, kind: type[Record], **wanted: str) -> list[Record]:
        """Return the records of a kind that a needed step has written; `wanted` are values that each must have.

        Raises UserError when the file is not what that step wrote.
        """
        step, name = FILES[kind]
        return read_records(kind, step_output(self.needs[step], name), **wanted)

    def policy_model(self) -> str:
        """Return the model folder that this round starts from. Raises UserError when it is not what its step wrote."""
        return step_model(self.needs["policy"])


def open_step(
    name: str, argv: list[str], needs: Iterable[str], files_of: Callable[[Config], dict[str, str]] = lambda _: {}
) -> OpenStep | None:
    """Open a step for work; log that it is complete and return None if so.

    `needs` are the steps that it reads; `files_of` returns {name: digest} of other files that the config names. Raises
    UserError for an invalid command, a missing or stale step, or a folder that another process writes to.
    """
    command = StepCommand(name, argv)
    return command.begin(needs, files_of(command.config))
