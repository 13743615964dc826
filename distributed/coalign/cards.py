"""Model cards: the README.md in an exported model folder, with the Hub's metadata; results come in when eval is done.

Used by launch/sft.py, launch/align.py and launch/eval.py. Knows manifests and metrics.json, no model. A card holds no
path of this machine.
"""

from __future__ import annotations

import json
import logging
import re
import shlex
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import jinja2

from coalign.arms import ARMS
from coalign.artifacts import StepFolder, installed_versions, read_manifest
from coalign.commandline import toml_value
from coalign.config import EvalTable, differing_values
from coalign.digests import CARD
from coalign.process import world_size
from coalign.run_folder import RunFolder
from coalign.whole_files import write_atomic

logger = logging.getLogger("coalign")

BEGIN, END = "<!-- results -->", "<!-- end of results -->"
STEPS_TO = {  # whose settings make a model what it is
    "sft": ("prepare", "paraphrase", "sft"),
    "align": ("prepare", "paraphrase", "sft", "sample", "judge", "rank", "align"),
}
METRICS = {"accuracy": "accuracy", "cr": "CR", "corrected_cr": "corrected CR", "mcr": "MCR"}
SETS = {"": "all tasks", "seen": "tasks seen in training", "unseen": "unseen tasks"}
FORMATS = {"sni": "Super-NaturalInstructions", "jsonl": "JSONL", "messages": "chat messages", "hf": "Hugging Face"}
UNSEEN = " under wordings that no training step has seen"
_ABSOLUTE = re.compile(r"""(?<![\w.:/~-])~?/(?:[^\s"',;:=\[\]{}]*/)?([^\s"',;:=\[\]{}/]*)""")
_HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")


def placeless(text: str) -> str:
    """Return a text with only the last part of every absolute path in it."""
    return _ABSOLUTE.sub(r"\1", text)


def describe(step: StepFolder, run: RunFolder, counts: dict[str, Any], end_of_turn: str) -> str:
    """Return the card of a training step's model, as it is exported: nothing is measured yet.

    `counts` are the step's own; `end_of_turn` is the token that ends an answer.
    """
    stage = step.path.name
    manifests = {name: read_manifest(run.step(name)) or {} for name in STEPS_TO[stage][:-1]}
    configs = {name: manifest.get("config", {}) for name, manifest in manifests.items()} | {stage: step.config}
    sources = _sources(configs["prepare"])
    settings = differing_values({key: value for config in configs.values() for key, value in config.items()})
    digests = {f"the step {name}": manifest["digest"] for name, manifest in manifests.items() if manifest}
    if data := manifests["prepare"].get("inputs", {}).get("data"):
        digests = {"data": data} | digests
    is_random = step.config["model.init"] == "random"
    versions = installed_versions()
    body = _template().render(
        title=f"{run.run.name}, {'stage 2' if stage == 'align' else 'stage 1'}",
        what=_what(stage, step.config, settings),
        base=_base(step.config),
        stage=stage_label(stage, configs["sft"]) + (f", round {run.run.round}" if run.run.round > 1 else ""),
        stage_name=stage,
        method=_method(stage, configs),
        counts=", ".join(f"{value} {key.replace('_', ' ')}" for key, value in counts.items() if value is not None),
        data_words=_data_words(manifests),
        sources=[source | {"name": _code(source["name"])} for source in sources],
        digests=digests,
        end_of_turn=json.dumps(end_of_turn, ensure_ascii=False),
        begin=BEGIN,
        end=END,
        is_random=is_random,
        settings={key: placeless(toml_value(value)) for key, value in settings.items()},
        command=placeless(shlex.join(["bash", "launch/local.sh", *run.arguments])),
        versions=versions,
        versions_words=", ".join(f"{name} {version}" for name, version in versions.items()),
        ranks=f"Trained by {world_size()} process{'es' if world_size() > 1 else ''}.",
    )
    return _with_metadata(body, stage, step.config, sources)


def write_card(step: StepFolder, run: RunFolder, counts: dict[str, Any], end_of_turn: str) -> None:
    """Write the card into the model folder that a training step has just exported, see `describe`."""
    write_atomic(step.path / "model" / CARD, describe(step, run, counts, end_of_turn))


def stage_label(stage: str, sft: dict[str, Any]) -> str:
    """Return the paper's name of a stage, given the settings of stage 1."""
    first = "SFT" if sft.get("sft.wordings") == "original" else "SFT (IA)"
    return {"base": "base", "sft": first, "align": f"{first} + CAT"}.get(stage, stage)


def model_labels(run: RunFolder, models: dict[str, str]) -> dict[str, str]:
    """Return what to call each model of eval.models: the paper's name of a stage of this run, the title of an arm.

    Any other has its own name.
    """
    sft = (read_manifest(run.step("sft")) or {}).get("config", {})
    labels = {}
    for name, value in models.items():
        known = stage_label(value, sft) + (f", round {run.run.round}" if value == "align" and run.run.round > 1 else "")
        own = ARMS[name].title if _is_arm(name, value) else name
        labels[name] = known if name == value else f"{name}: {known}" if value in STEPS_TO else own
    return labels


def _is_arm(name: str, value: str) -> bool:
    """Return whether a path lies where a ladder puts the model of the arm of that name."""
    arm, path = ARMS.get(name), Path(value)
    return arm is not None and bool(arm.result) and path.name == arm.result and (arm.run or name) in path.parts


def add_results(run: RunFolder, table: EvalTable, metrics: dict[str, Any]) -> None:
    """Write the results into the cards of the models that this run has made itself.

    A measurement that is written elsewhere (eval.folder) is no result of the run, and borrowed steps, the base model
    and other folders are not ours to write to.
    """
    if table.folder:
        return
    for name, value in table.models.items():
        card = run.step(value) / "model" / CARD if value in STEPS_TO and value not in run.run.inputs else None
        if card is not None and card.resolve().is_relative_to(run.path.resolve()):
            fill_card(card, metrics, name)


def fill_card(card: Path, metrics: dict[str, Any], name: str) -> None:
    """Write the results of an evaluation into `name`'s card, if it is there; a failure is only warned of."""
    from yaml import YAMLError

    if not card.is_file():
        return
    try:
        text = card.read_text(encoding="utf-8")
        filled = with_results(text, metrics, name)
        if filled != text:  # a card that says it already keeps its time
            write_atomic(card, filled)
    except (OSError, ValueError, YAMLError) as error:  # somebody may have edited it
        logger.warning("the results could not be written into %s: %s", card, " ".join(str(error).split()))


def with_results(text: str, metrics: dict[str, Any], name: str) -> str:
    """Return a card with the results of an evaluation: in the text those of every model, in the metadata `name`'s.

    A card whose marks were taken out keeps its text.
    """
    from huggingface_hub import EvalResult, ModelCard, ModelCardData

    card = ModelCard(text)
    assert isinstance(card.data, ModelCardData)
    dataset = card.data.get("datasets") or [metrics["run"]]
    wordings = _given_wordings(metrics)
    options = {
        "task_type": "text-generation",
        "dataset_type": dataset[0],
        "dataset_name": f"held-out inputs{'' if wordings else ' and wordings'} of {', '.join(dataset)}{wordings}",
        "dataset_split": metrics["split"],
    }
    estimates = {metric: metrics["models"][name][metric] for metric in METRICS}
    card.data.model_name = card.text.strip().partition("\n")[0].removeprefix("# ")
    card.data.eval_results = [
        EvalResult(
            **options,
            metric_type=metric,
            metric_name=METRICS[metric],
            metric_value=round(found["mean"], 4),
            metric_args={key: _rounded(found[key]) for key in ("low", "high", "num_tasks")},
        )
        for metric, found in estimates.items()
        if found["mean"] is not None
    ] or None
    before, begin, rest = card.text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if begin and end:
        card.text = "\n".join([before + begin, *results_lines(metrics, name), end + after])
    return _assemble(card.data.to_yaml(), card.text)


def results_lines(metrics: dict[str, Any], name: str) -> list[str]:
    """Return the tables of results: every model, and how the one of this card differs from those before it."""
    labels = {key: placeless(metrics.get("labels", {}).get(key, key)) for key in metrics["models"]}
    both = 0 < metrics["num_seen_tasks"] < metrics["num_tasks"]
    lines = []
    for which, words in SETS.items() if both else [("", SETS[""])]:
        lines += ["", f"| {words} | {' | '.join(METRICS.values())} |", f"|---|{'---|' * len(METRICS)}"]
        for key, model in metrics["models"].items():
            label = f"**{labels[key]}** (this model)" if key == name else labels[key]
            lines.append(_row(label, model[which] if which else model))
        for first in metrics["models"]:
            rows = metrics[f"differences_{which}" if which else "differences"]
            found = {row["metric"]: row for row in rows if (row["a"], row["b"]) == (first, name)}
            if found:
                lines.append(_row(f"{labels[name]} minus {labels[first]}", found, signed=True))
    one = metrics["models"][name]
    method = {"bootstrap": "a two-level bootstrap over tasks and inputs", "t": "Student's t over tasks"}
    kind = method.get(one["accuracy"]["method"])
    return [
        *lines,
        "",
        f"Greedy answers to {metrics['num_inputs']} {metrics['split']} inputs of {metrics['num_tasks']} tasks"
        f" ({metrics['num_tasks_in_cr']} of them in CR){_given_wordings(metrics) or UNSEEN}. Means over the inputs of a"
        " task, then over tasks; "
        + (f"in brackets 95 % intervals by {kind}." if kind else "too few tasks for intervals.")
        + " A difference whose interval contains 0 shows nothing.",
        "",
        f"CR is the share of pairs of wordings whose answers agree ({placeless(metrics['agreement'])}), corrected CR"
        " takes off what independent answers with the task's own frequencies would reach, MCR is the share of wordings"
        " in the largest agreeing group, accuracy is exact match after normalising.",
    ]


def _given_wordings(metrics: dict[str, Any]) -> str:
    """Return words for a file of wordings that was evaluated under in the place of the held-out ones; "" without."""
    file = metrics.get("settings", {}).get("eval.wordings_file", "")
    return f" under the wordings of {Path(file).name}" if file else ""


def _row(label: str, estimates: dict[str, Any], signed: bool = False) -> str:
    return f"| {label} | {' | '.join(_cell(estimates.get(metric), signed) for metric in METRICS)} |"


def _cell(found: dict[str, Any] | None, signed: bool) -> str:
    if found is None or found["mean"] is None:
        return "–"
    form = "{:+.3f}" if signed else "{:.3f}"
    interval = "" if found["low"] is None else f" [{form.format(found['low'])}, {form.format(found['high'])}]"
    return form.format(found["mean"]) + interval


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 4)


def _template() -> jinja2.Template:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("coalign"),
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
        autoescape=False,  # markdown
    )
    return environment.get_template("card.md.j2")


def _with_metadata(body: str, stage: str, config: dict[str, Any], sources: Iterable[dict[str, Any]]) -> str:
    from huggingface_hub import ModelCardData

    data = ModelCardData(
        base_model=config["model.path"] if _is_hub_name(config["model.path"]) else None,
        datasets=[source["name"] for source in sources if source["on_hub"]] or None,
        library_name="transformers",
        license=_license(config["model.path"]),
        pipeline_tag="text-generation",
        tags=["consistency-alignment", "coalign", "sft", *(["self-reward"] if stage == "align" else [])],
    )
    return _assemble(data.to_yaml(), body)


def _assemble(metadata: str, body: str) -> str:
    return f"---\n{metadata.strip()}\n---\n\n{body.strip()}\n"


def _is_hub_name(path: str) -> bool:
    return bool(path) and bool(_HUB_NAME.fullmatch(path)) and not Path(path).exists()


def _license(path: str) -> str | None:
    """Return the licence that the base model's own card names, when there is a card in its folder."""
    from huggingface_hub import ModelCard

    card = Path(path) / CARD
    if not path or not card.is_file():
        return None
    try:
        found = ModelCard.load(card, ignore_metadata_errors=True).data.get("license")
    except (OSError, ValueError):
        return None
    return found if isinstance(found, str) else None


def _code(text: str) -> str:
    return f"`{placeless(text)}`"


def _base(config: dict[str, Any]) -> str:
    if config["model.init"] == "random":
        return "none; untrained weights and a tokenizer trained on the prepared texts"
    path = config["model.path"]
    if not _is_hub_name(path):
        return f"{_code(path)}, a folder"
    return f"[{path}](https://huggingface.co/{path}), revision `{config['model.revision']}`"


def _sources(config: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the sources of the data as prepare read them: {name, format, rows, on_hub}."""
    listed = config.get("data.sources") or [{"path": config.get("data.path", ""), "format": config.get("data.format")}]
    found = []
    for source in listed:
        given, path = source["format"] or "auto", source["path"]
        on_hub = _is_hub_name(path) and given in ("auto", "hf")
        rows = f"at most {source['max_rows']}" if source.get("max_rows") else "all"
        words = "Hugging Face Hub" if on_hub else FORMATS.get(given, "found by its content")
        found.append({"name": placeless(path), "format": words, "rows": rows, "on_hub": on_hub})
    return found


def _data_words(manifests: dict[str, dict[str, Any]]) -> str:
    prepared, wordings = (manifests[name].get("counts", {}) for name in ("prepare", "paraphrase"))
    tasks, inputs, splits = prepared.get("tasks", {}), prepared.get("inputs", {}), wordings.get("splits", {})
    return (
        f"{tasks.get('seen', 0)} tasks seen in training and {tasks.get('unseen', 0)} kept out of it. Inputs, split by a"
        f" hash of their text: {_listed(inputs)}. Wordings of the instructions: {_listed(splits)} (sources:"
        f" {_listed(wordings.get('sources', {}))}). Test inputs and test wordings were used for nothing but eval."
    )


def _listed(counts: dict[str, Any]) -> str:
    return ", ".join(f"{number} {name}" for name, number in counts.items()) or "none"


def _what(stage: str, config: dict[str, Any], settings: dict[str, Any]) -> str:
    kind = "A language model, fine-tuned with LoRA and merged" if config["model.lora.enabled"] else "A language model"
    if stage == "align":
        return f"{kind}, after both stages of consistency alignment."
    if settings.get("sft.wordings") == "original":
        return f"{kind}, fine-tuned on the original instructions alone (a control arm)."
    return f"{kind}, after stage 1 of consistency alignment."


def _method(stage: str, configs: dict[str, dict[str, Any]]) -> list[str]:
    """Return a paragraph a stage, with the settings that make it what it is."""
    sft = configs["sft"]
    asked = "the original instructions alone" if sft.get("sft.wordings") == "original" else "original and paraphrased"
    first = (
        f"Stage 1, {stage_label('sft', sft)}: fine-tuning on the gold answers under {asked}"
        f"{'' if asked.endswith('alone') else ' wordings of the instructions'}; the loss is the mean negative"
        " log-probability of the answer's tokens. " + _updates(sft, "sft")
    )
    if stage == "sft":
        return [first]
    sample, judge, rank, align = (configs[name] for name in ("sample", "judge", "rank", "align"))
    rewards = {
        "judge": "the judge's rewards",
        "exact": "exact match with the gold answer as reward (a control arm)",
        "permuted": "permuted rewards (a control arm)",
        "gold": "the gold answer alone (a control arm)",
    }
    second = (
        "Stage 2, consistency alignment training (CAT): the model of the stage before answered other inputs under"
        f" {sample.get('sample.wordings_per_input')} wordings, {sample.get('sample.samples')} times each; a judge"
        f" ({_code(str(judge.get('judge.model')))}) rewarded each answer with 0 (wrong type), 1 (right type) or 2"
        " (correct) by comparing log-probabilities of yes and no,"
        f" {'with' if judge.get('judge.gold') else 'without'} gold answers; answers were pooled over wordings"
        f" ({_code(str(rank.get('rank.pool')))}), ordered by {rewards.get(str(rank.get('rank.rewards')), 'rewards')}."
        " The loss raises the best answer and ranks the others below it under every wording:"
        f" {align.get('align.loss')} with weight {align.get('align.rank_weight')} and margin"
        f" {align.get('align.margin')}, after RRHF ([arXiv 2304.05302](https://arxiv.org/abs/2304.05302)). "
        + _updates(align, "align")
    )
    return [first, second]


def _updates(config: dict[str, Any], stage: str) -> str:
    epochs, updates = config.get(f"{stage}.epochs"), config.get(f"{stage}.max_steps")
    length = f"{updates} updates" if updates else f"{epochs:g} epochs" if epochs else "an unknown number of updates"
    return f"AdamW, {length}, highest learning rate {config.get(f'{stage}.learning_rate')}."
