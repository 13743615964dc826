"""An experiment: every step of its arms once."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from coalign.commandline import toml_value
from coalign.config import EvalTable, JudgeTable, RankTable, RunTable, SftTable
from coalign.errors import UserError
from coalign.experiment.arms import ARMS
from coalign.experiment.ladder_options import LadderOptions
from coalign.runs.run_folder import RunFolder
from coalign.runs.step_folder import read_manifest
from coalign.steps import STEP_TABLES, STEPS

Settings = dict[str, Any]


StepPlace = tuple[str, str]  # (arm that owns a step, step); the arm "" owns what all seeds share


PIPELINE = STEPS[:-1]  # eval is done once for all arms of a seed


OWNERS = {"prepare": "", "paraphrase": "sft_ia", "sft": "sft_ia"}  # of what an arm has not of its own; the rest: cat


UPDATES = "as many updates as cat"  # in place of their number while it isn't known


MORE_SEED = 1000  # added to the seed of sft_ia_more: its rows and wordings are drawn anew, not those of stage 1 again


# What arms set, with the value that all others have: another one in the config would make them what they are not.
OF_THE_ARMS: Settings = {
    f"{name}.{key}": getattr(table, key)
    for name, table, keys in (
        ("run", RunTable(), ("inputs", "round")),
        ("sft", SftTable(), ("wordings", "split")),
        ("judge", JudgeTable(), ("gold", "type_question")),
        ("rank", RankTable(), ("rewards", "pool")),
        ("eval", EvalTable(), ("models", "folder")),
    )
    for key in keys
}


@dataclasses.dataclass(frozen=True, slots=True)
class StepRun:
    """One step to be run: where its result lies, what is set beyond the user's own words, which arms need it.

    `updates_of` is the training step whose number of updates takes the place of UPDATES.
    """

    arm: str
    seed: int | None
    step: str
    folder: Path
    settings: Settings
    arms: tuple[str, ...]
    updates_of: Path | None = None

    def words(self, common: Sequence[str] = ()) -> list[str]:
        """Return the words of the step's command: those common to all steps, and its own settings over them."""
        known = read_manifest(self.updates_of) if self.updates_of else None
        updates = known["counts"]["updates"] if known else UPDATES
        values = {key: updates if value == UPDATES else value for key, value in self.settings.items()}
        kept = [word for word in common if word.partition("=")[0] not in values]
        return [*kept, *(f"{key}={toml_value(value)}" for key, value in values.items())]

    def arm_settings(self) -> Settings:
        """Return what makes the arm, as TOML: not where things lie, and not the seed that all have."""
        values = {key: value for key, _, value in (word.partition("=") for word in self.words())}
        common = {"run.folder", "run.name", "run.inputs"} | {
            key for key in ("run.seed",) if values[key] == str(self.seed)
        }
        return {key: value for key, value in values.items() if key not in common}

    def title(self, arms: Sequence[str]) -> str:
        """Return a few words for the progress line."""
        where = "all seeds" if self.seed is None else f"seed {self.seed}"
        number = f" (arm {arms.index(self.arm) + 1} of {len(arms)})" if self.arm in arms else ""
        return f"{where}, {self.arm or 'all arms'}{number}, {self.step}"


@dataclasses.dataclass(frozen=True, slots=True)
class Ladder:
    """An experiment: arms and seeds in the order of the table, in the folder `home`."""

    home: Path
    arms: tuple[str, ...]
    seeds: tuple[int, ...]
    prepare_seed: int
    updates: int  # of stage 2; 0: as many as the groups of cat give
    batch_items: int

    def run_folder(self, arm: str, seed: int) -> Path:
        """Return the run that holds an arm's own steps."""
        return self.home if not arm else self.home / f"seed{seed}" / (ARMS[arm].run or arm)

    def folder(self, place: StepPlace, seed: int) -> Path:
        """Return the folder of a step."""
        arm, step = place
        number = dict(ARMS[arm].settings).get("run.round", 1) if arm else 1
        return self.run_folder(arm, seed) / (f"round{number}" if number > 1 else "") / step

    def model(self, arm: str, seed: int) -> str:
        """Return what eval.models says for an arm."""
        return str(self.folder((arm, ARMS[arm].result), seed)) if ARMS[arm].result else "base"

    def eval_folder(self, seed: int) -> Path:
        """Return where a seed's arms are evaluated together; a choice of arms has a folder of its own."""
        chosen = "" if self.arms == tuple(ARMS) else f"_{'-'.join(self.arms)}"
        return self.home / f"seed{seed}" / f"eval{chosen}"

    def made_from(self, arm: str) -> tuple[StepPlace, ...]:
        """Return every step that an arm would take if it were alone, in order."""
        this = ARMS[arm]
        last = PIPELINE.index(this.result or "prepare")
        before: tuple[StepPlace, ...] = ()
        if this.run:
            before = self.made_from(this.run)
        elif arm == "sft_ia_more":
            before = self.made_from("sft_ia")
        places = [(arm if s in this.own else OWNERS.get(s, "cat"), s) for s in PIPELINE[: last + 1]]
        return tuple(dict.fromkeys((*before, *places)))

    def needs(self, arm: str) -> tuple[StepPlace, ...]:
        """Return every step that must be run for an arm: where cat decides the number of updates, cat's as well."""
        counted = not self.updates and arm != "sft_ia" and ("align" in ARMS[arm].own or arm == "sft_ia_more")
        return tuple(dict.fromkeys((*(self.made_from("cat") if counted else ()), *self.made_from(arm))))

    def settings(self, place: StepPlace, seed: int) -> tuple[Settings, Path | None]:
        """Return what a step of an arm sets, and the step whose updates it takes over."""
        arm = place[0]
        if not arm:
            return {
                "run.folder": str(self.home.parent),
                "run.name": self.home.name,
                "run.seed": self.prepare_seed,
            }, None
        this, run = ARMS[arm], self.run_folder(arm, seed)
        borrowed = [s for s in PIPELINE[: PIPELINE.index(this.result)] if s not in this.own]
        inputs = {s: str(self.run_folder(OWNERS.get(s, "cat"), seed)) for s in borrowed}
        settings: Settings = {"run.folder": str(run.parent), "run.name": run.name, "run.seed": seed}
        settings |= {"run.inputs": inputs} | dict(this.settings)
        cat = self.folder(("cat", "align"), seed)
        if arm == "sft_ia_more":
            settings |= {
                "run.seed": seed + MORE_SEED,
                "model.init": "pretrained",
                "model.path": f"{self.model('sft_ia', seed)}/model",
                "sft.batch_rows": self.batch_items,
                "sft.epochs": 0.0,
                "sft.max_steps": self.updates or UPDATES,
            }
        elif not self.updates and arm != "cat" and "align" in this.own:
            settings |= {"align.epochs": 0.0, "align.max_steps": UPDATES}
        return settings, cat if UPDATES in settings.values() else None

    def steps(self) -> list[StepRun]:
        """Return every step once, in an order in which each finds what it reads, seed by seed."""
        runs = [self._step(("", "prepare"), None, self.arms)]
        for seed in self.seeds:
            users: dict[StepPlace, list[str]] = {("sft_ia", "paraphrase"): []}  # eval asks under its wordings
            for arm in self.arms:
                for place in self.needs(arm):
                    users.setdefault(place, []).append(arm)
            del users["", "prepare"]
            runs += [self._step(place, seed, tuple(arms)) for place, arms in users.items()]
            runs.append(self._eval(seed))
        return runs

    def _step(self, place: StepPlace, seed: int | None, arms: tuple[str, ...]) -> StepRun:
        settings, updates_of = self.settings(place, seed or 0)
        return StepRun(place[0], seed, place[1], self.folder(place, seed or 0), settings, arms, updates_of)

    def _eval(self, seed: int) -> StepRun:
        folder = self.eval_folder(seed)
        settings: Settings = {
            "run.folder": str(self.home),
            "run.name": f"seed{seed}",
            "run.seed": seed,
            "run.inputs": {"prepare": str(self.home), "paraphrase": str(self.run_folder("sft_ia", seed))},
            "eval.models": {arm: self.model(arm, seed) for arm in self.arms},
            "eval.folder": str(folder),
        }
        return StepRun("", seed, "eval", folder, settings, self.arms)


def make_ladder(values: Settings, options: LadderOptions) -> Ladder:
    """Return the experiment that a flat config asks for.

    Raises UserError for a setting that the arms differ in: with another value they would not be what their names say.
    """
    for key, expected in OF_THE_ARMS.items():
        if values[key] != expected:
            raise UserError(f"{key}={toml_value(values[key])}: the arms of a ladder set {key} themselves; leave it out")
    if not values["align.rank_weight"]:
        raise UserError("align.rank_weight=0 is the arm cat_lambda0; the other arms need a weight above 0")
    first = values["run.seed"]
    return Ladder(
        home=Path(values["run.folder"]) / values["run.name"],
        arms=options.arms or tuple(ARMS),
        seeds=options.seeds or (first, first + 1, first + 2),
        prepare_seed=first,
        updates=values["align.max_steps"],
        batch_items=values["align.batch_groups"],
    )


def is_current(folder: Path, settings: Settings, run: RunFolder, files: dict[str, str], models: dict[str, str]) -> bool:
    """Return whether a step is complete with these settings and with the results that its inputs have now.

    Where it is not, or where it has read what isn't known here, the step itself knows what to do or to say. `files`
    holds the digests that files beside the run have now, by the names of StepFolder; `models` is eval.models.
    """
    manifest = read_manifest(folder)
    if manifest is None or manifest["config"] != json.loads(json.dumps(settings)):
        return False
    for name, digest in manifest["inputs"].items():
        now = None
        if name in STEP_TABLES or name == "policy":
            now = (read_manifest(run.policy() if name == "policy" else run.step(name)) or {}).get("digest")
        elif name in files:
            now = files[name]
        elif name.startswith("model ") and models.get(name[6:]) == "base":
            now = files.get("model.path")
        elif name.startswith("model "):
            now = (read_manifest(Path(models[name[6:]])) or {}).get("outputs", {}).get("model")
        if now != digest:
            return False
    return True


def remaining_seconds(done: Sequence[tuple[str, float]], todo: Sequence[str]) -> float | None:
    """Return how long the steps still to do will take, going by those of the same name; None when nothing is known."""
    if not done:
        return None
    mean = sum(seconds for _, seconds in done) / len(done)
    same = {step: [seconds for name, seconds in done if name == step] for step in todo}
    return sum(sum(same[step]) / len(same[step]) if same[step] else mean for step in todo)


def ladder_lines(ladder: Ladder, steps: Sequence[StepRun]) -> list[str]:
    """Return what is going to be done, for people: every arm with its settings, and what several arms share."""
    lines = [f"{len(ladder.arms)} arms, seeds {', '.join(map(str, ladder.seeds))}: {len(steps)} steps in {ladder.home}"]
    width = max(map(len, ladder.arms))
    for name in ladder.arms:
        arm = ARMS[name]
        own = " ".join(arm.own) or "nothing to train"
        changed = ", ".join(f"{key}={toml_value(value)}" for key, value in arm.settings)
        lines.append(f"  {name:{width}}  {arm.title}: {own}{f' with {changed}' if changed else ''}")
    shared = [run for run in steps if run.seed in (None, ladder.seeds[0]) and len(run.arms) > 1]
    lines.append("run once and shared:")
    for run in shared:
        times = "for all seeds" if run.seed is None else "per seed"
        lines.append(f"  {run.step} of {run.arm or 'all arms'}, once {times}: {len(run.arms)} arms")
    return lines
