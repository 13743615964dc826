"""Read the data, split it by input text, and write tasks.jsonl, examples.jsonl and dropped.jsonl."""

from __future__ import annotations

import itertools
import logging
import tempfile
from collections.abc import Sequence
from pathlib import Path

from coalign.data.answer_forms import describe_answer_forms
from coalign.data.instances import DroppedInstance
from coalign.data.inventory import Inventory, describe_inventory
from coalign.data.sources import digest_sources, read_sources
from coalign.data.splits import split_instances, tokenizer_texts
from coalign.errors import UserError
from coalign.recipe import log_lines, run_step
from coalign.records import to_row
from coalign.runs.open_step import StepCommand
from coalign.runs.step_folder import read_manifest

logger = logging.getLogger("coalign")


def main(argv: list[str]) -> None:
    """Read the sources, split their inputs, and make the random model if the config asks for one."""
    command = StepCommand("prepare", argv)
    config, folder = command.config, command.run.step("prepare")
    digest = digest_sources(config.data)
    left_out: Sequence[DroppedInstance] = ()
    prepared = None
    if read_manifest(folder) is None:
        # Before the step's folder is made, so that invalid data leaves nothing behind.
        sources = config.data.path or ", ".join(source.path for source in config.data.sources)
        command.announce(f"read and split {sources}", with_model=False)
        read = read_sources(config.data, folder_for_rows(folder))
        prepared, left_out = split_instances(read.tasks, read.instances, config.data), read.dropped
        if not prepared.tasks:
            raise UserError("no inputs are left after the split; use more data, or change the shares in [data]")
    step = command.begin(files={"data": digest})
    if step is None:
        return
    assert prepared is not None, "an incomplete step has read its data"
    output, inventory = step.output, Inventory(prepared)
    output.write_output("tasks.jsonl", map(to_row, prepared.tasks))
    output.write_output("examples.jsonl", map(to_row, inventory.examples()))
    output.write_output("dropped.jsonl", (row.to_row() for row in itertools.chain(left_out, prepared.dropped())))
    counts = inventory.counts(left_out)
    log_lines([*describe_inventory(counts).splitlines(), *describe_answer_forms(prepared.tasks)])
    for words in inventory.warnings():
        logger.warning("warning: %s", words)
    for split, number in counts["inputs"].items():
        if not number and (split == "test" or getattr(config.data, f"{split}_share") > 0):
            logger.warning("no inputs fell into %s; the steps that read it will have nothing to do", split)
    if config.model.init == "random" and not (output.path / "model").exists():
        from coalign.models.random_model import make_random_model

        texts = tokenizer_texts(prepared.tasks, prepared.examples())
        make_random_model(output.path / "model", texts, config.model.random, config.run.seed)
    output.commit(counts | {"cores": 1})


def folder_for_rows(step: Path) -> Path | None:
    """Return where to keep rows until they are written: on the run's disk if it is writable, as /tmp may be in memory.

    None means the default temporary folder.
    """
    folder = next(folder for folder in step.absolute().parents if folder.is_dir())
    try:
        tempfile.TemporaryFile(dir=folder).close()
    except OSError:
        return None
    return folder


if __name__ == "__main__":
    run_step(main)
