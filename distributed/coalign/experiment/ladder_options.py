"""The words of launch/ladder.sh beside the config: which arms, which seeds, a dry run; and its --help.

Knows the arms by name and no file.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from coalign.errors import UserError
from coalign.experiment.arms import ARMS


@dataclasses.dataclass(frozen=True, slots=True)
class LadderOptions:
    """What the words of a ladder say beside the config; empty means all arms, and three seeds from run.seed on."""

    arms: tuple[str, ...] = ()
    seeds: tuple[int, ...] = ()
    dry_run: bool = False


def read_ladder_options(argv: Sequence[str]) -> tuple[LadderOptions, list[str]]:
    """Return the options and the words that are left. Raises UserError."""
    found: dict[str, str] = {}
    words, rest = [], list(argv)
    while rest:
        option, equals, value = rest.pop(0).partition("=")
        if option in ("--arms", "--seeds"):
            if not equals and not rest:
                raise UserError(
                    f"{option} takes a list, such as {option} {'cat,sft_ia' if 'arms' in option else '0,1'}"
                )
            found[option] = value if equals else rest.pop(0)
        elif option == "--dry-run":
            found[option] = "yes"
        else:
            words.append(option + equals + value)
    chosen = _list_of(found.get("--arms", ""))
    wrong = [name for name in chosen if name not in ARMS]
    if wrong or ("--arms" in found and not chosen):
        raise UserError(
            f"--arms {found['--arms']}: {wrong[0] if wrong else ''!r} is no arm; choose among {', '.join(ARMS)}"
        )
    seeds = _list_of(found.get("--seeds", ""))
    if not all(text.isdecimal() for text in seeds) or ("--seeds" in found and not seeds):
        raise UserError(f"--seeds {found['--seeds']}: whole numbers from 0 on were expected, such as --seeds 0,1,2")
    numbers = tuple(dict.fromkeys(map(int, seeds)))
    return LadderOptions(tuple(name for name in ARMS if name in chosen), numbers, "--dry-run" in found), words


def _list_of(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


def ladder_usage() -> str:
    """Return what --help prints."""
    width = max(map(len, ARMS))
    listed = "\n".join(f"  {arm.name:{width}}  {arm.title}" for arm in ARMS.values())
    return f"""usage: bash launch/ladder.sh [CONFIG.toml] [key=value ...] [--arms A,B] [--seeds 0,1,2] [--dry-run]

Runs the experiment of arms in runs/NAME (run.folder, run.name): every arm with every seed, steps that arms share once,
and writes runs/NAME/ladder/: table.md, figure.svg, figure.png, metrics.json. A complete step is skipped;
after an interruption the same command continues where it stopped. Without a config: configs/tiny.toml. The settings
are those of the steps and apply to every arm.

  --arms A,B        some arms only, and the steps they need (default: all)
  --seeds 0,1,2     the seeds (default: three, from run.seed on)
  --dry-run         print the plan and the commands, start nothing
  RANKS=N           training processes, as for launch/local.sh; OMP_NUM_THREADS and VENV too

Arms:
{listed}

Exit status: 0 done, 2 invalid input or settings (the message is above), 1 any other failure."""
