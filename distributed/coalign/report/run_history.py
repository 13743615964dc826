"""What the steps of a run have left on disk, for the report: counts, examples of what was dropped, curves, settings.

A step's folder counts only when its manifest has the digest that eval has recorded,
so that a page never shows a step that was run again since. Knows no model and draws nothing.
"""

from __future__ import annotations

import dataclasses
import json
import shlex
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from coalign.commandline import toml_value
from coalign.config_values import default_values
from coalign.errors import UserError
from coalign.evaluation.metrics_schema import Metrics
from coalign.records import Row, read_rows
from coalign.runs.costs import StepCost
from coalign.runs.digests import digest_outputs
from coalign.runs.step_folder import label_of, read_manifest
from coalign.steps import STEP_TABLES, TRAINING_STEPS
from coalign.text import unit_hash

NUM_EXAMPLES = 3  # of every reason for which something was dropped
MAX_POINTS = 150  # of a curve; more updates are averaged in as many bins
JUDGED = ("correct", "item_count", "type")  # rules by which the model itself has decided, see judging.py
_PLACES = ("run.folder", "run.name", "run.inputs", "run.round", "eval.folder")


@dataclasses.dataclass(frozen=True, slots=True)
class StepRecord:
    """A complete step: its label (sft, round2/align), where it lies and its manifest."""

    label: str
    folder: Path
    manifest: Row

    @property
    def name(self) -> str:
        """Return the step without its round."""
        return self.label.rpartition("/")[2]

    @property
    def counts(self) -> Row:
        """Return what the step has counted."""
        counts: Row = self.manifest["counts"]
        return counts


def find_steps(folder: Path, metrics: Metrics) -> tuple[list[StepRecord], list[str]]:
    """Return the steps that the results in an eval folder were made from, and a line for each that is missing.

    They are looked for beside the eval folder and where eval has found them. Without the digests of an older
    metrics.json those of eval's manifest count.
    """
    root = folder.resolve().parent
    root = root.parent if root.name.startswith("round") and root.name[5:].isdigit() else root
    lineage = metrics.lineage
    if lineage is None:
        lineage = (_manifest(folder) or {}).get("lineage", {})
    known = {label_of(Path(place)): Path(place) for place in metrics.steps.values()}
    found, missing = [], []
    for label, digest in sorted(lineage.items(), key=lambda pair: _order(pair[0])):
        there = [place for place in (root / label, known.get(label)) if place is not None and place.is_dir()]
        manifests = [(place, _manifest(place)) for place in there]
        whole = [(place, manifest) for place, manifest in manifests if manifest and manifest.get("digest") == digest]
        if whole:
            found.append(StepRecord(label, *whole[0]))
        elif there:
            missing.append(f"{label}: what lies in {there[0]} is not what these results were made from")
        else:
            missing.append(f"{label}: its folder is not here")
    return found, missing


def _manifest(folder: Path) -> Row | None:
    try:
        return read_manifest(folder)
    except UserError:
        return None


def own_step(folder: Path) -> StepRecord | None:
    """Return eval's own step; while it isn't complete, with what it has read and written so far."""
    manifest = _manifest(folder)
    if manifest is None:
        try:
            inputs = json.loads((folder / "config.json").read_text(encoding="utf-8"))["inputs"]
        except (OSError, ValueError, KeyError, TypeError):
            return None
        manifest = {"inputs": inputs, "outputs": digest_outputs(folder), "counts": {}}
    return StepRecord("eval", folder, manifest)


def _order(label: str) -> tuple[str, int]:
    part, _, name = label.rpartition("/")
    return part, list(STEP_TABLES).index(name) if name in STEP_TABLES else len(STEP_TABLES)


def made_elsewhere(metrics: Metrics) -> dict[str, str]:
    """Return {model: folder} of the models that were read from the training steps of other runs."""
    paths = {name: value for name, value in metrics.sources.items() if value not in TRAINING_STEPS}
    return {name: value for name, value in paths.items() if Path(value).name in TRAINING_STEPS}


def of_step(steps: Sequence[StepRecord], name: str) -> list[StepRecord]:
    """Return the steps of one name, of every round."""
    return [step for step in steps if step.name == name]


def dropped_by_reason(step: StepRecord) -> list[Row]:
    """Return for each reason how much was dropped, with a few examples: {reason, count, examples}."""
    counts: dict[str, int] = defaultdict(int)
    examples: dict[str, list[Row]] = defaultdict(list)
    path = step.folder / "dropped.jsonl"
    for _, row in read_rows(path) if path.is_file() else ():
        reason = str(row.get("reason", "?"))
        counts[reason] += 1
        if len(examples[reason]) < NUM_EXAMPLES and row.get("text"):
            examples[reason].append(row)
    return [
        {"reason": reason, "count": count, "examples": examples[reason]}
        for reason, count in sorted(counts.items(), key=lambda pair: -pair[1])
    ]


def kept_wordings(step: StepRecord) -> list[Row]:
    """Return a few of the wordings that the model wrote and that were kept, in hash order, each of another task."""
    path = step.folder / "wordings.jsonl"
    rows = [row for _, row in read_rows(path)] if path.is_file() else []
    written = [row for row in rows if row.get("source") == "model"]
    first_of: dict[str, Row] = {}
    for row in sorted(written, key=lambda row: unit_hash("kept", row["task"], row["text"])):
        first_of.setdefault(row["task"], row)
    return list(first_of.values())[:NUM_EXAMPLES]


def own_answers(step: StepRecord) -> Row | None:
    """Return how many of the model's own answers that equal no gold answer were judged, and how many got reward 2.

    None without gold answers: which ones equal them is then not known.
    """
    rules, rewards = step.counts.get("rules", {}), step.counts.get("rewards", {})
    judged = sum(rules.get(rule, 0) for rule in JUDGED)
    if not step.manifest["config"].get("judge.gold") or not judged:
        return None
    return {"judged": judged, "correct": rewards["2"] - rules.get("exact_match", 0)}


def training_curves(step: StepRecord) -> dict[str, dict[str, list[tuple[float, float]]]]:
    """Return {"train" | "dev": {quantity: [(update, value), ...]}}, long curves averaged in MAX_POINTS bins."""
    path = step.folder / "metrics.jsonl"
    found: dict[str, dict[str, list[tuple[float, float]]]] = {"train": defaultdict(list), "dev": defaultdict(list)}
    for _, row in read_rows(path) if path.is_file() else ():
        for key, value in row.items():
            if row.get("kind") in found and key not in ("kind", "step") and isinstance(value, int | float):
                found[row["kind"]][key].append((float(row["step"]), float(value)))
    return {kind: {key: thinned(points) for key, points in of.items()} for kind, of in found.items()}


def thinned(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Return at most MAX_POINTS points, each the mean over as many neighbours."""
    size = -(-len(points) // MAX_POINTS) or 1
    bins = [points[start : start + size] for start in range(0, len(points), size)]
    return [(sum(x for x, _ in one) / len(one), sum(y for _, y in one) / len(one)) for one in bins]


@dataclasses.dataclass(frozen=True, slots=True)
class Setting:
    """A key that some step had at another value than the default: {value as JSON: labels of the steps}."""

    key: str
    default: Any
    values: dict[str, list[str]]

    @property
    def usual(self) -> Any:
        """Return the value that most steps had."""
        return json.loads(max(self.values, key=lambda text: len(self.values[text])))


def changed_settings(steps: Sequence[StepRecord], metrics: Metrics) -> list[Setting]:
    """Return the settings of all steps that differ from the built-in defaults, with those of eval.

    Manifests hold the keys that decide a result; eval's own metrics the others of its tables as well.
    """
    defaults = default_values()
    of_label: dict[str, Row] = {step.label: step.manifest["config"] for step in steps}
    of_label["eval"] = metrics.settings
    for step in of_step(steps, "judge"):
        if step.counts.get("weak"):  # neutral, so in no manifest, but without it the step would have stopped
            of_label[step.label] = {**of_label[step.label], "judge.allow_weak": True}
    values: dict[str, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    for label, config in of_label.items():
        for key, value in config.items():
            if key in defaults:
                values[key][json.dumps(value, ensure_ascii=False, sort_keys=True)].append(label)
    changed = [
        Setting(key, defaults[key], dict(found))
        for key, found in values.items()
        if any(json.loads(text) != defaults[key] for text in found)
    ]
    order = {key: place for place, key in enumerate(defaults)}
    return sorted(changed, key=lambda setting: order[setting.key])


def config_file(settings: Sequence[Setting]) -> str:
    """Return the settings as a TOML file that the recipes take."""
    tables: dict[str, list[str]] = defaultdict(list)
    for setting in settings:
        table, _, key = setting.key.rpartition(".")
        if setting.key != "run.round":
            tables[table].append(f"{key} = {toml_value(setting.usual)}")
    return "\n\n".join("\n".join([f"[{table}]", *lines]) for table, lines in tables.items())


def commands(steps: Sequence[StepRecord], settings: Sequence[Setting], metrics: Metrics) -> list[str]:
    """Return the command of every step, to be given the settings as run.toml; steps of other runs are named."""
    borrowed = metrics.settings.get("run.inputs", {})
    last_round = metrics.settings.get("run.round", 1)
    ranks = {step.label: step.counts.get("ranks") for step in steps}
    lines = []
    for label in [*(step.label for step in steps), f"round{last_round}/eval" if last_round > 1 else "eval"]:
        part, _, name = label.rpartition("/")
        if name in borrowed:
            lines.append(f"# {label} was taken from the run {borrowed[name]}")
            continue
        launcher = ["deepspeed"] if name in TRAINING_STEPS else ["python"]
        launcher += ["--num_gpus", str(ranks[label])] if name in TRAINING_STEPS and ranks[label] else []
        words = [*launcher, f"launch/{name}.py", "run.toml"]
        words += [f"run.round={part[5:]}"] if part else []
        here = "eval" if name == "eval" else label
        for setting in settings:
            own = next((text for text, labels in setting.values.items() if here in labels), None)
            if own is not None and setting.key not in _PLACES and json.loads(own) != setting.usual:
                words.append(f"{setting.key}={toml_value(json.loads(own))}")
        lines.append(shlex.join(words))
    return lines


@dataclasses.dataclass(frozen=True, slots=True)
class FinishedStep:
    """What a step has used, and when it was finished (None where that isn't known)."""

    cost: StepCost
    finished: str | None


def times(steps: Sequence[StepRecord], metrics: Metrics, own: StepRecord | None = None) -> list[FinishedStep]:
    """Return what each step has used, as eval recorded it, and when it was finished where its folder is here.

    Eval's own row is from metrics.json, of older ones from its manifest, `own`.
    """
    finished = {step.label: step.manifest.get("finished") for step in steps}
    rows = []
    for cost in metrics.cost:
        name, _, number = cost.step.partition(", round ")
        label = f"round{number}/{name}" if number not in ("", "1") else name
        rows.append(FinishedStep(cost, finished.get(label)))
    if metrics.eval_seconds is not None:
        finished_at = own.manifest.get("finished") if own else None
        rows.append(FinishedStep(_own_cost(metrics, metrics.eval_seconds, own), finished_at))
    return rows


def _own_cost(metrics: Metrics, seconds: float, own: StepRecord | None) -> StepCost:
    counts = own.counts if own else {}
    tokens, cores = counts.get("tokens_generated"), counts.get("cores")
    if metrics.eval_counts is not None:
        tokens, cores = metrics.eval_counts.tokens_generated, metrics.eval_counts.cores
    return StepCost(
        step="eval",
        updates=None,
        tokens_trained=None,
        tokens_generated=tokens,
        wall_seconds=seconds,
        core_hours=seconds * cores / 3600 if cores else None,
    )


def digests(steps: Sequence[StepRecord]) -> list[Row]:
    """Return what each step has read from outside the run and what it wrote, by SHA-256: {step, file, digest}."""
    names = set(STEP_TABLES) | {"policy"}
    rows = []
    for step in steps:
        outside = {key: value for key, value in step.manifest["inputs"].items() if key not in names}
        rows += [{"step": step.label, "file": f"reads {key}", "digest": value} for key, value in outside.items()]
        written = step.manifest.get("outputs", {})
        rows += [{"step": step.label, "file": f"writes {key}", "digest": value} for key, value in written.items()]
    return rows
