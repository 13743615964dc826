"""Print what a run needs before anything runs: memory, disk, tokens, hours; refuse a run that can't fit.

The numbers come from formulas, for the GPUs that the options or the config name; no device is looked at.
"""

from __future__ import annotations

from pathlib import Path

from coalign.commandline import DEFAULT_CONFIG, load
from coalign.errors import UserError
from coalign.planning import machine, plan_text
from coalign.planning import plan as planning
from coalign.recipe import run_step


def main(argv: list[str]) -> None:
    """Print the plan, or the sizing table."""
    if any(word in ("-h", "--help") for word in argv):
        print(machine.plan_usage())
        return
    options, words = machine.read_machine_options(argv)
    if options.table:
        print("\n".join(plan_text.sizing_lines()))
        return
    files = [word for word in words if "=" not in word]
    if len(files) > 1:
        raise UserError(f"one config file was expected, not {len(files)}: {' '.join(files)}")
    # Not parse_command_line: a plan for vLLM can be made where vLLM is not installed.
    config = load(Path(files[0]) if files else DEFAULT_CONFIG, [word for word in words if "=" in word])
    plan = planning.make_plan(config, options)
    print("\n".join(plan_text.plan_lines(plan)), flush=True)
    if complaint := planning.complaint_of_plan(plan):
        raise UserError(f"this plan cannot fit: {complaint}")


if __name__ == "__main__":
    run_step(main)
