"""Model cards: the README.md in an exported model folder, with the Hub's metadata; see model_card_results for results.

Knows manifests, no model. A card holds no path of this machine, and takes no markup from names and settings.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import jinja2

from coalign.commandline import toml_value
from coalign.config_values import differing_values
from coalign.display import code_span, markdown, on_one_line, shell_line
from coalign.experiment.arms import ARMS
from coalign.process import world_size
from coalign.runs.atomic_files import write_atomic
from coalign.runs.digests import CARD
from coalign.runs.run_folder import RunFolder
from coalign.runs.step_folder import StepFolder, installed_versions, read_manifest

logger = logging.getLogger("coalign")

BEGIN, END = "<!-- results -->", "<!-- end of results -->"
STEPS_TO = {  # whose settings define a model
    "sft": ("prepare", "paraphrase", "sft"),
    "align": ("prepare", "paraphrase", "sft", "sample", "judge", "rank", "align"),
}
FORMATS = {"sni": "Super-NaturalInstructions", "jsonl": "JSONL", "messages": "chat messages", "hf": "Hugging Face"}
_ABSOLUTE = re.compile(r"""(?<![\w.:/~-])~?/(?:[^\s"',;:=\[\]{}]*/)?([^\s"',;:=\[\]{}/]*)""")
_HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")


def placeless(text: str) -> str:
    """Return a text with only the last part of every absolute path in it."""
    return _ABSOLUTE.sub(r"\1", text)


def card_text(step: StepFolder, run: RunFolder, counts: dict[str, Any], end_of_turn: str, thinking: str = "") -> str:
    """Return the card of a training step's model, as it is exported: nothing is measured yet.

    `counts` are the step's own; `end_of_turn` is the token that ends an answer, `thinking` says what became
    of thoughts.
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
        title=f"{markdown(run.run.name)}, {'stage 2' if stage == 'align' else 'stage 1'}",
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
        thinking=thinking,
        thinks=json.dumps(step.config.get("model.thinking", "off") != "off").capitalize(),
        begin=BEGIN,
        end=END,
        is_random=is_random,
        settings={key: on_one_line(placeless(toml_value(value))) for key, value in settings.items()},
        command=placeless(shell_line(["bash", "launch/local.sh", *run.arguments])),
        versions=versions,
        versions_words=", ".join(f"{name} {version}" for name, version in versions.items()),
        ranks=f"Trained by {world_size()} process{'es' if world_size() > 1 else ''}.",
    )
    return _with_metadata(body, stage, step.config, sources)


def write_card(step: StepFolder, run: RunFolder, counts: dict[str, Any], end_of_turn: str, thinking: str = "") -> None:
    """Write the card into the model folder that a training step has just exported, see `card_text`."""
    write_atomic(step.path / "model" / CARD, card_text(step, run, counts, end_of_turn, thinking))


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


def _template() -> jinja2.Template:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("coalign.report"),
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
    return assemble(data.to_yaml(), body)


def assemble(metadata: str, body: str) -> str:
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
    return code_span(placeless(text))


def _base(config: dict[str, Any]) -> str:
    if config["model.init"] == "random":
        return "none; untrained weights and a tokenizer trained on the prepared texts"
    path = config["model.path"]
    if not _is_hub_name(path):
        return f"{_code(path)}, a folder"
    return f"[{path}](https://huggingface.co/{path}), revision {code_span(config['model.revision'])}"


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
    return ", ".join(f"{number} {markdown(name)}" for name, number in counts.items()) or "none"


def _what(stage: str, config: dict[str, Any], settings: dict[str, Any]) -> str:
    kind = "A language model, fine-tuned with LoRA and merged" if config["model.lora.enabled"] else "A language model"
    if stage == "align":
        return f"{kind}, after both stages of consistency alignment."
    if settings.get("sft.wordings") == "original":
        return f"{kind}, fine-tuned on the original instructions alone (a control arm)."
    return f"{kind}, after stage 1 of consistency alignment."


def _method(stage: str, configs: dict[str, dict[str, Any]]) -> list[str]:
    """Return a paragraph per stage, with the settings that define it."""
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
