"""Mistakes of a user's, through the recipes: one clear line on stderr, exit status 2, nothing half-written.

A new case is one row of CASES (the run in the working folder) or EARLY (an empty working folder).
"""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import shutil
import socket
import subprocess
import sys
from collections import namedtuple
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from coalign.runs.digests import digest_file
from coalign.runs.step_folder import StepFolder
from integration.bad_inputs import (
    ROOT,
    TASKS,
    Outcome,
    World,
    losses,
    recipe_command,
    run_command,
    run_recipe,
)

STEPS = ("prepare", "paraphrase", "sft", "sample", "judge", "rank", "align", "eval")
PRETRAINED = ("model.init=pretrained", "model.path=my-model")
ASK_MODEL = ("paraphrase.num_wordings=1", "paraphrase.max_attempts=1", "paraphrase.max_new_tokens=4")


@dataclasses.dataclass(frozen=True)
class Case:
    """A mistake: the command, what is put into the working folder before, and what the one line must hold."""

    name: str
    step: str
    says: tuple[str, ...]
    settings: tuple[str, ...] = ()
    files: dict[str, bytes | str] = dataclasses.field(default_factory=dict)
    change: Callable[[World], Any] | None = None
    keep: bool = False  # the step's own folder stays, instead of being run anew


def sni(**values: Any) -> str:
    """Return a task file; a value of None leaves its key out."""
    task = {"Definition": ["Say it."], "Instances": [{"id": "1", "input": "a", "output": ["b"]}], **values}
    return json.dumps({key: value for key, value in task.items() if value is not None}, indent=1)


def rows(*items: dict[str, Any]) -> str:
    """Return JSONL."""
    return "".join(json.dumps(item) + "\n" for item in items)


def wording(**values: Any) -> str:
    """Return one line of a wordings file; a value of None leaves its key out."""
    row = {"task": "animal", "id": "w", "text": "Name the animal.", **values}
    return rows({key: value for key, value in row.items() if value is not None})


TASK = "data/tasks/animal.json"
GOOD_ROW = {"instruction": "Say it.", "input": "a", "output": "b"}

# Seen before anything is read or made: the working folder holds the config, data and wordings, and no run.
EARLY = [
    # the command line and the config
    Case(
        "unknown key",
        "align",
        ("unknown key 'align.rank_wieght'", "did you mean 'rank_weight'"),
        ("align.rank_wieght=1",),
    ),
    Case(
        "unknown key in the file",
        "sft",
        ("unknown key 'sft.batchrows' in config.toml", "'batch_rows'"),
        files={"config.toml": "[sft]\nbatchrows = 3\n"},
    ),
    Case(
        "key of another table",
        "sft",
        ("unknown key 'sft.zero_stage'", "did you mean 'train.zero_stage'"),
        ("sft.zero_stage=1",),
    ),
    Case("unknown table", "rank", ("unknown key 'aling'", "did you mean 'align'"), ("aling.margin=1",)),
    Case("wrong type", "sft", ('sft.batch_rows="many"', "sft.batch_rows=many", "integer"), ("sft.batch_rows=many",)),
    Case("out of range", "sample", ("sample.top_p=1.5", "less than or equal to 1"), ("sample.top_p=1.5",)),
    Case("unknown choice", "align", ('align.loss="hing"', "'hinge'"), ("align.loss=hing",)),
    Case("contradicting values", "sft", ("sft.epochs=2 and sft.max_steps=3", "exactly one"), ("sft.epochs=2",)),
    Case(
        "contradicting model",
        "sft",
        ("model.path='m' contradicts model.init=\"random\"", "remove one"),
        ("model.path=m",),
    ),
    Case(
        "offload without ZeRO 3",
        "sft",
        ("train.offload_parameters needs train.zero_stage=3",),
        ("train.offload_parameters=true",),
    ),
    Case("shares over 1", "prepare", ("leaves nothing for test", "less than 1"), ("data.sft_share=0.9",)),
    Case("malformed TOML", "eval", ("config.toml: malformed TOML", "line 2"), files={"config.toml": "[run]\nname =\n"}),
    Case("binary config", "eval", ("config.toml: byte 0 is not UTF-8",), files={"config.toml": b"\xff\xfe\x00"}),
    Case(
        "missing config",
        "rank",
        ("config.toml: no such config file",),
        change=lambda w: (w.folder / "config.toml").unlink(),
    ),
    Case("two configs", "rank", ("one config file was expected, not 2",), ("other.toml",)),
    Case("unknown option", "judge", ("unknown option '--verbose'", "key=value", "--help"), ("--verbose",)),
    Case("no key", "judge", ("'=3' is not key=value",), ("=3",)),
    Case("unknown step borrowed", "sft", ("run.inputs", "'sfft'", "'sft'"), ('run.inputs={sfft="runs/a"}',)),
    Case("run folder is a file", "prepare", ("runs/r/prepare", "run.folder"), files={"runs": "x"}),
    Case("wandb not installed", "align", ("log.wandb=true", "pip install wandb"), ("log.wandb=true",)),
    Case("bytes of another encoding", "rank", ("run.name on the command line", "0xff"), ("run.name=\udcff",)),
    Case("a word in another encoding", "rank", ("a word on the command line", "0xe9"), ("caf\udce9.toml",)),
    # data
    Case(
        "data with a key twice",
        "prepare",
        ("d.jsonl, line 1: the key 'input' stands twice in one object",),
        ("data.path=d.jsonl",),
        {"d.jsonl": '{"instruction": "Say it.", "input": "a", "input": "b", "output": "c"}\n'},
    ),
    Case(
        "task with a key twice",
        "prepare",
        ("animal.json: the key 'output' stands twice",),
        files={TASK: '{"Definition": "Say.", "Instances": [{"input": "a", "output": "b", "output": "c"}]}'},
    ),
    Case(
        "missing data", "prepare", ("nothing.jsonl: no such file or folder", "data.path"), ("data.path=nothing.jsonl",)
    ),
    Case("missing data folder", "prepare", ("./nothing: no such file or folder",), ("data.path=./nothing",)),
    Case("malformed JSON", "prepare", ("animal.json, line 2: malformed JSON",), files={TASK: '{\n"Definition": x}'}),
    Case(
        "malformed JSONL",
        "prepare",
        ("d.jsonl, line 2: malformed JSON",),
        ("data.path=d.jsonl",),
        {"d.jsonl": rows(GOOD_ROW) + "{x\n"},
    ),
    Case(
        "no Definition",
        "prepare",
        ("animal.json: no 'Definition'", "needs Definition and Instances"),
        files={TASK: sni(Definition=None)},
    ),
    Case("no Instances", "prepare", ("animal.json: no 'Instances'",), files={TASK: sni(Instances=None)}),
    Case(
        "instance without output",
        "prepare",
        ("animal.json: Instances[1]", "no 'output'"),
        files={TASK: sni(Instances=[{"input": "a", "output": "b"}, {"input": "c"}])},
    ),
    Case(
        "instance with empty output",
        "prepare",
        ("Instances[0].output is empty", "at least one reference"),
        files={TASK: sni(Instances=[{"input": "a", "output": [""]}])},
    ),
    Case(
        "duplicate ids",
        "prepare",
        ("the id 'i' is also at", "Instances[0]", "unique"),
        files={TASK: sni(Instances=[{"id": "i", "input": x, "output": "o"} for x in "ab"])},
    ),
    Case(
        "empty instruction",
        "prepare",
        ("animal.json: Definition is empty", "needs an instruction"),
        files={TASK: sni(Definition=[" "])},
    ),
    Case(
        "empty instruction in a row",
        "prepare",
        ("d.jsonl, line 1: instruction is empty",),
        ("data.path=d.jsonl",),
        {"d.jsonl": rows(GOOD_ROW | {"instruction": " "})},
    ),
    Case("binary task file", "prepare", ("animal.json: byte 0 is not UTF-8",), files={TASK: b"\xff\xfe\x00\x01"}),
    Case(
        "Latin-1 rows",
        "prepare",
        ("d.jsonl, line 1: byte", "not UTF-8"),
        ("data.path=d.jsonl",),
        {"d.jsonl": '{"instruction": "é", "output": "x"}'.encode("latin-1")},
    ),
    Case(
        "dataset without the columns",
        "prepare",
        ("the columns are question, answer", "expected instruction", "rename"),
        ("data.path=d.csv",),
        {"d.csv": "question,answer\na,b\n"},
    ),
    Case(
        "unknown unseen task",
        "prepare",
        ("data.unseen_tasks names 'animla'", "did you mean 'animal'"),
        ('data.unseen_tasks=["animla"]',),
    ),
    Case(
        "unknown task asked for",
        "prepare",
        ("data.only_tasks names 'animla'", "did you mean 'animal'"),
        ('data.only_tasks=["animla"]',),
    ),
]


# Changes to a copy of the run's starting model


def with_model(change: Callable[[Path], Any]) -> Callable[[World], Any]:
    """Return what puts a changed copy of the run's starting model at my-model."""

    def prepare(world: World) -> None:
        folder = world.folder / "my-model"
        shutil.copytree(world.run_folder / "prepare" / "model", folder)
        change(folder)

    return prepare


def remove(*patterns: str) -> Callable[[Path], Any]:
    """Return what removes files from a model folder."""

    def change(folder: Path) -> None:
        for pattern in patterns:
            for path in folder.glob(pattern):
                path.unlink()

    return change


def write(name: str, content: bytes | str) -> Callable[[Path], Any]:
    """Return what replaces a file of a model folder."""
    return lambda folder: (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())


def edit(name: str, **values: Any) -> Callable[[Path], Any]:
    """Return what changes keys of a JSON file of a model folder; a value of None removes the key."""

    def change(folder: Path) -> None:
        old = json.loads((folder / name).read_text())
        kept = {key: value for key, value in (old | values).items() if value is not None}
        (folder / name).write_text(json.dumps(kept))

    return change


def both(*changes: Callable[[Path], Any]) -> Callable[[Path], Any]:
    """Return what does several changes."""
    return lambda folder: [change(folder) for change in changes]


def only_pickle(folder: Path) -> None:
    """Turn safetensors weights into pickle ones."""
    import torch
    from safetensors.torch import load_file

    weights = folder / "model.safetensors"
    torch.save(load_file(weights), folder / "pytorch_model.bin")
    weights.unlink()


def bad_weight(folder: Path) -> None:
    """Put a NaN into the embedding."""
    from safetensors.torch import load_file, save_file

    weights = load_file(folder / "model.safetensors")
    name = next(name for name in weights if "embed" in name)
    weights[name][:] = float("nan")
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


def small_embedding(folder: Path) -> None:
    """Take the last rows out of the embedding, so that the tokenizer has more tokens than the model."""
    from safetensors.torch import load_file, save_file

    weights = {name: w[:100] if "embed" in name else w for name, w in load_file(folder / "model.safetensors").items()}
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    edit("config.json", vocab_size=100)(folder)


def cut(name: str) -> Callable[[Path], Any]:
    """Return what cuts a file in half."""
    return lambda folder: os.truncate(folder / name, (folder / name).stat().st_size // 2)


NO_TURN = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
TURN = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>' + m['content'] + '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
BAD_TEMPLATES = [
    ("loses the question", ("drops the user's message",), TURN.replace("in messages", "in messages[1:]")),
    ("alters the question", ("alters", "model.chat_template"), TURN.replace("m['content']", "m['content'] | upper")),
    ("doubles the question", ("repeats",), TURN.replace("m['content']", "m['content'] + m['content']")),
    ("divides by zero", ("ZeroDivisionError",), "{{ 1/0 }}"),
    ("counts too far", ("OverflowError",), "{% for i in range(999999999) %}{% endfor %}"),
    ("calls itself", ("RecursionError",), "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}"),
    ("wants memory", ("memory", "model.chat_template"), TURN + "{{ 'x' * 10**10 }}"),
    (
        "opens a thought",
        ("always opens a thought", '"strip"'),
        TURN.replace("'<|assistant|>'", "'<|assistant|><think>'"),
    ),
    ("has another turn", ("otherwise than it asks for one",), TURN.replace("'<|assistant|>'", "'<|assistant|>Sure: '")),
]
EATS = "{% for m in messages if m['role'] == 'user' %}{{ m['content'] }}{% endfor %}"


def without(step: str) -> Callable[[World], Any]:
    """Return what removes a step."""
    return lambda world: world.remove(step)


def incomplete(step: str) -> Callable[[World], Any]:
    """Return what makes a step look interrupted."""
    return lambda world: (world.run_folder / step / "manifest.json").unlink()


def other_wordings(world: World) -> None:
    """Run paraphrase again with other settings."""
    world.remove("paraphrase")
    assert world.run("paraphrase", "paraphrase.num_test=5").code == 0


def no_align_inputs(world: World) -> None:
    """Take the align inputs out of the prepared data, as if prepare had found none."""
    path = world.run_folder / "prepare" / "examples.jsonl"
    kept = [line for line in path.read_text().splitlines(keepends=True) if '"align"' not in line]
    path.write_text("".join(kept))
    manifest = world.manifest("prepare")
    manifest["outputs"][path.name] = digest_file(path)
    manifest.pop("seal")
    (path.parent / "manifest.json").write_text(json.dumps(manifest))


def unlabelled(world: World) -> None:
    """Judge without gold answers."""
    world.remove("judge")
    assert world.run("judge", "judge.gold=false").code == 0


def missing(step: str, needs: str, launcher: str = "python") -> Case:
    """Return the row of a step whose input step has not been run."""
    says = (f"runs/r/{needs} has not been run", f"run first: {launcher} launch/{needs}.py config.toml")
    return Case(f"{step} without {needs}", step, says, change=without(needs))


def too_long(step: str, *says: str, tokens: int = 45) -> Case:
    """Return the row of a step with rows longer than the context under the policy "error"."""
    settings = (f"model.max_tokens={tokens}", "model.too_long=error", 'eval.models=["sft"]')
    return Case(f"too long for {step}", step, (str(tokens), 'model.too_long="drop"', *says), settings)


# A complete run lies in the working folder; the step's own folder is removed first.
CASES = [
    # input steps
    missing("paraphrase", "prepare"),
    missing("sft", "paraphrase"),
    missing("sample", "sft", "deepspeed"),
    missing("judge", "sample"),
    missing("rank", "judge"),
    missing("align", "rank"),
    missing("eval", "align", "deepspeed"),
    Case(
        "incomplete input step",
        "rank",
        ("runs/r/judge is not complete", "run first: python launch/judge.py config.toml"),
        change=incomplete("judge"),
    ),
    Case(
        "borrowed step missing",
        "sft",
        ("runs/other/paraphrase has not been run", "run.inputs"),
        ('run.inputs={paraphrase="runs/other"}',),
    ),
    Case("borrowed step run here", "sft", ("run.inputs.sft='runs/other'",), ('run.inputs={sft="runs/other"}',)),
    Case(
        "stale input step",
        "sample",
        ("runs/r/sft is stale", "another paraphrase", "remove runs/r/sft"),
        change=other_wordings,
    ),
    Case(
        "stale step",
        "rank",
        ("runs/r/rank is complete with other settings", "input 'judge' has changed", "remove runs/r/rank"),
        change=unlabelled,
        keep=True,
    ),
    Case(
        "complete with other settings",
        "sft",
        ("sft.max_steps was 3 and is now 4", "run.name", "remove runs/r/sft"),
        ("sft.max_steps=4",),
        keep=True,
    ),
    Case(
        "round without the round before",
        "sample",
        ("runs/r/round2/align", "run first: deepspeed launch/align.py"),
        ("run.round=3",),
    ),
    # the model
    Case("no model named", "sft", ("model.path is empty", 'model.init="random"'), ("model.init=pretrained",)),
    Case(
        "model folder missing",
        "sft",
        ("./my-model: no such model folder", "model.path"),
        ("model.init=pretrained", "model.path=./my-model"),
    ),
    Case(
        "model is a file",
        "sft",
        ("my-model.bin is a file", "folder was expected"),
        ("model.init=pretrained", "model.path=my-model.bin"),
        {"my-model.bin": "x"},
    ),
    Case(
        "hub model out of reach",
        "sft",
        ("some/model-that-is-nowhere",),
        ("model.init=pretrained", "model.path=some/model-that-is-nowhere"),
    ),
    Case(
        "model without tokenizer",
        "sft",
        ("my-model holds no tokenizer", "save_pretrained"),
        PRETRAINED,
        change=with_model(remove("tokenizer*")),
    ),
    Case(
        "pickle weights",
        "sft",
        ("my-model holds only pickle weights (pytorch_model.bin)", "safetensors"),
        PRETRAINED,
        change=with_model(only_pickle),
    ),
    Case(
        "model without weights",
        "sft",
        ("my-model holds no *.safetensors",),
        PRETRAINED,
        change=with_model(remove("*.safetensors")),
    ),
    Case(
        "model without config",
        "sft",
        ("my-model holds no config.json",),
        PRETRAINED,
        change=with_model(remove("config.json")),
    ),
    Case(
        "malformed model config",
        "sft",
        ("my-model", "config"),
        PRETRAINED,
        change=with_model(write("config.json", "{")),
    ),
    Case(
        "unknown architecture",
        "sft",
        ("my-model", "nosuch"),
        PRETRAINED,
        change=with_model(edit("config.json", model_type="nosuch", architectures=None)),
    ),
    Case(
        "malformed tokenizer",
        "sft",
        ("my-model", "tokenizer"),
        PRETRAINED,
        change=with_model(write("tokenizer.json", "{x")),
    ),
    Case(
        "weights cut short",
        "paraphrase",
        ("my-model", "model can't be loaded"),
        PRETRAINED + ASK_MODEL,
        change=with_model(cut("model.safetensors")),
    ),
    Case(
        "tokenizer of a larger model",
        "paraphrase",
        ("my-model", "tokenizer", "embedding"),
        PRETRAINED + ASK_MODEL,
        change=with_model(small_embedding),
    ),
    Case(
        "no end of turn",
        "sft",
        ("neither an end-of-turn", "EOS", "model.end_of_turn"),
        PRETRAINED,
        change=with_model(both(edit("tokenizer_config.json", eos_token=None), write("chat_template.jinja", NO_TURN))),
    ),
    Case("end of turn is no token", "sft", ("model.end_of_turn='<nope>' is no token",), ("model.end_of_turn=<nope>",)),
    Case("pad is no token", "sft", ("model.pad_token='<nope>' is no token",), ("model.pad_token=<nope>",)),
    Case(
        "template eats the answer",
        "sft",
        ("chat template drops the assistant's answer", "model.chat_template"),
        ("model.chat_template=t.jinja",),
        {"t.jinja": EATS},
    ),
    Case(
        "template missing",
        "sft",
        ("t.jinja: no such file; check model.chat_template",),
        ("model.chat_template=t.jinja",),
    ),
    Case(
        "template not UTF-8",
        "sft",
        ("t.jinja: byte 0 is not UTF-8",),
        ("model.chat_template=t.jinja",),
        {"t.jinja": b"\xff"},
    ),
    Case(
        "template malformed",
        "sft",
        ("chat template", "line 2", "model.chat_template"),
        ("model.chat_template=t.jinja",),
        {"t.jinja": "{{ bos_token }}\n{% for m in messages %}"},
    ),
    Case(
        "template refuses",
        "sft",
        ("chat template", "no users here", "model.chat_template"),
        ("model.chat_template=t.jinja",),
        {"t.jinja": "{{ raise_exception('no users here') }}"},
    ),
    *(
        Case(f"template {name}", "sft", says, ("model.chat_template=t.jinja",), {"t.jinja": text})
        for name, says, text in BAD_TEMPLATES
    ),
    Case(
        "generation config is no object",
        "sft",
        ("my-model", "generation_config.json"),
        PRETRAINED,
        change=with_model(write("generation_config.json", "[]")),
    ),
    Case(
        "thoughts kept where the template has none of them",
        "sft",
        ("does not keep the thought", 'model.thinking="keep" can\'t be'),
        ("model.chat_template=t.jinja", "model.thinking=keep"),
        {"t.jinja": TURN.replace("m['content']", "m['content'].split('</think>')[-1]")},
    ),
    Case(
        "LoRA on no layer",
        "sft",
        ("model.lora.target_modules=['nolayer']", "q_proj"),
        ("model.lora.enabled=true", 'model.lora.target_modules=["nolayer"]'),
    ),
    Case(
        "model with NaN weights",
        "paraphrase",
        ("my-model", "NaN"),
        PRETRAINED + ASK_MODEL,
        change=with_model(bad_weight),
    ),
    Case(
        "NaN loss",
        "sft",
        ("no longer finite in an update with the rows", " under ", "Lower the learning rate"),
        ("sft.learning_rate=1e30",),
    ),
    # rows longer than the context
    too_long("sft", "under"),
    too_long("sample", "under"),
    too_long("judge", "example", tokens=60),
    too_long("align", "under"),
    too_long("eval", "under wording"),
    Case("nothing fits", "sft", ("no row is left to train on", "model.max_tokens"), ("model.max_tokens=5",)),
    Case("no group fits", "align", ("no group is left to train on", "model.max_tokens"), ("model.max_tokens=5",)),
    # wordings
    Case("wordings missing", "paraphrase", ("none.jsonl: no such file",), ('paraphrase.files=["none.jsonl"]',)),
    Case(
        "wordings malformed",
        "paraphrase",
        ("wordings.jsonl, line 1: malformed JSON",),
        files={"wordings.jsonl": "{x\n"},
    ),
    Case(
        "wordings binary",
        "paraphrase",
        ("wordings.jsonl, line 1: byte 0 is not UTF-8",),
        files={"wordings.jsonl": b"\xff\x00"},
    ),
    Case(
        "wording with a bad regex",
        "paraphrase",
        ("line 1", "fields_regex='('", "no regular expression"),
        files={"wordings.jsonl": wording(kind="template", fields_regex="(")},
    ),
    Case(
        "wording with a regex that takes for ever",
        "paraphrase",
        ("wordings.jsonl: wording 'w' of task 'animal'", "fields_regex=", "takes over 1 s on the input", "repeat"),
        files={"wordings.jsonl": wording(kind="template", fields_regex=r"(?P<a>(\w+\s?)+)!$", text="{a}")},
    ),
    Case(
        "wording of eval with a regex that takes for ever",
        "eval",
        ("w.jsonl: wording 'w' of task 'animal'", "takes over 1 s"),
        ("eval.wordings_file=w.jsonl",),
        {"w.jsonl": wording(kind="template", fields_regex=r"(?P<a>(?:[\w\s]+)+)+!$", text="{a}")},
    ),
    Case(
        "wording with half a surrogate pair",
        "paraphrase",
        ("wordings.jsonl, line 2: task has half a surrogate pair",),
        files={"wordings.jsonl": wording() + wording(task="\ud800", id="v")},
    ),
    Case(
        "wording of eval with half a surrogate pair",
        "eval",
        ("w.jsonl, line 1: text has half a surrogate pair",),
        ("eval.wordings_file=w.jsonl",),
        {"w.jsonl": wording(text="\ud800")},
    ),
    Case(
        "wording with other answers",
        "paraphrase",
        ("wording 'w': answers has 'nosuch', which are no answers of task 'animal'",),
        files={"wordings.jsonl": wording(answers={"nosuch": "A"})},
    ),
    Case(
        "wording with a key twice",
        "paraphrase",
        ("wordings.jsonl, line 1: the key 'id' stands twice",),
        files={"wordings.jsonl": '{"task": "animal", "id": "v", "id": "w", "text": "Name it."}\n'},
    ),
    Case(
        "wording without text",
        "paraphrase",
        ("wordings.jsonl, line 1", "'text' is missing", "task, id and text"),
        files={"wordings.jsonl": wording(text=None)},
    ),
    Case(
        "wording with an unknown field",
        "paraphrase",
        ("line 1", "field 'b'", "fields_regex has a"),
        files={"wordings.jsonl": wording(kind="template", fields_regex="(?P<a>.*)", text="{b}")},
    ),
    Case(
        "wording twice",
        "paraphrase",
        ("line 2: the id 'w' of task 'animal' was used before", "line 1", "rename"),
        files={"wordings.jsonl": wording() + wording()},
    ),
    Case(
        "wordings of unknown tasks only",
        "paraphrase",
        ("none of its 1 tasks", "'nosuch'", "'animal'"),
        files={"wordings.jsonl": wording(task="nosuch")},
    ),
    Case("wordings empty", "paraphrase", ("wordings.jsonl: holds no wordings",), files={"wordings.jsonl": ""}),
    Case("wordings of eval missing", "eval", ("none.jsonl: no such file",), ("eval.wordings_file=none.jsonl",)),
    Case(
        "wordings of eval of other tasks",
        "eval",
        ("w.jsonl: none of its 1 tasks",),
        ("eval.wordings_file=w.jsonl",),
        {"w.jsonl": wording(task="nosuch")},
    ),
    # settings of one step
    Case(
        "replay missing",
        "sft",
        ("none.jsonl: no such file; check sft.replay",),
        ("sft.replay=none.jsonl", "sft.replay_share=0.5"),
    ),
    Case(
        "replay without share",
        "sft",
        ("sft.replay_share=0", "give both"),
        ("sft.replay=r.jsonl",),
        {"r.jsonl": rows(GOOD_ROW)},
    ),
    Case(
        "replay malformed",
        "sft",
        ("r.jsonl, line 1: malformed JSON",),
        ("sft.replay=r.jsonl", "sft.replay_share=0.5"),
        {"r.jsonl": "{"},
    ),
    Case(
        "replay without output",
        "sft",
        ("r.jsonl, line 1: no 'output'",),
        ("sft.replay=r.jsonl", "sft.replay_share=0.5"),
        {"r.jsonl": rows({"instruction": "Say it."})},
    ),
    Case(
        "replay of nothing",
        "sft",
        ("sft.replay='r.jsonl' holds no usable row",),
        ("sft.replay=r.jsonl", "sft.replay_share=0.5"),
        {"r.jsonl": "\n"},
    ),
    Case(
        "no inputs to train on",
        "sft",
        ('no inputs in the split "align"', "data.*_share"),
        ("sft.split=align",),
        change=no_align_inputs,
    ),
    Case(
        "no room for a prompt",
        "sample",
        ("no prompt is left to ask", "too_long 24", "sample.max_new_tokens"),
        ("sample.max_new_tokens=99999999",),
    ),
    Case(
        "no room for a prompt under test",
        "eval",
        ("no prompt of base is left to ask", "eval.max_new_tokens"),
        ("eval.max_new_tokens=256",),
    ),
    Case("judge is no folder", "judge", ("judge.model='nosuch'", "no model folder"), ("judge.model=nosuch",)),
    Case(
        "judge too weak",
        "judge",
        ("judge.min_quality=1", "sft.replay", "judge.allow_weak=true"),
        ("judge.min_quality=1.0", "judge.allow_weak=false"),
    ),
    Case(
        "gold asked of unlabelled judging",
        "rank",
        ("rank.rewards", "judge.gold"),
        ("rank.rewards=gold",),
        change=unlabelled,
    ),
    Case(
        "unknown model under test",
        "eval",
        ("eval.models: 'nosuch' is neither", "base, sft, align"),
        ('eval.models=["nosuch"]',),
    ),
    Case("folder without a model under test", "eval", ("eval.models: data holds no model",), ('eval.models=["data"]',)),
    Case("unknown agreement", "eval", ("eval.agreement='exakt'", "rouge_l>=0.7"), ("eval.agreement=exakt",)),
    Case(
        "threshold of agreement",
        "eval",
        ("eval.agreement='rouge_l>=7'", "rouge_l>=0.7"),
        ("eval.agreement=rouge_l>=7",),
    ),
    Case(
        "judge of itself",
        "eval",
        ("eval.agreement='runs/r/sft' is the same model as 'sft'",),
        ("eval.agreement=runs/r/sft",),
    ),
    Case(
        "weak judge of agreement",
        "eval",
        ("eval.agreement='other'", "the judge is too weak", "eval.min_quality=0.99", "eval.allow_weak=true"),
        ("eval.agreement=other", "eval.min_quality=0.99"),
        change=lambda w: another_model(w),
    ),
]


def another_model(world: World) -> Path:
    """Return a folder with the trained model changed a little: a model can't judge its own agreement."""
    from safetensors.torch import load_file, save_file

    folder = world.folder / "other"
    shutil.copytree(world.run_folder / "sft" / "model", folder)
    weights = load_file(folder / "model.safetensors")
    weights["model.norm.weight"] *= 1.01
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    return folder


def prepare_case(case: Case, world: World) -> None:
    for name, content in case.files.items():
        world.write(name, content)
    if case.change:
        case.change(world)


def assert_one_clear_line(outcome: Outcome, says: tuple[str, ...]) -> None:
    assert outcome.code == 2, f"exit status {outcome.code}\n{outcome.stdout[-1000:]}\n{outcome.stderr[-3000:]}"
    assert len(outcome.errors) == 1, outcome.stderr
    line = outcome.errors[0]
    assert line.startswith("error: ")
    for fragment in says:
        assert fragment in line, f"{fragment!r} is not in: {line}"


def check_case(case: Case, world: World) -> None:
    before = world.outputs()
    assert_one_clear_line(world.run(case.step, *case.settings), case.says)
    assert world.outputs() == before, "something half-written was left behind"
    assert world.half_written() == []


@pytest.mark.parametrize("case", EARLY, ids=lambda case: case.name)
def test_early_mistake_is_one_clear_line(case: Case, world: World) -> None:
    """A mistake in command line, config or data leaves no run behind."""
    prepare_case(case, world)
    check_case(case, world)
    assert not (world.folder / "runs").is_dir()


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_mistake_is_one_clear_line(case: Case, run: World) -> None:
    """A mistake in settings, models, wordings or step order ends the step before it writes an output."""
    prepare_case(case, run)
    if not case.keep:
        run.remove(case.step)
    check_case(case, run)


# What is resolved, and said


@pytest.mark.parametrize("step", ["sft", "sample", "judge", "align", "eval"])
def test_rows_longer_than_the_context_are_dropped_and_counted(step: str, run: World) -> None:
    """Under the policy "drop" a step goes on without the rows, prints how many, and lists them."""
    run.remove(step)
    tokens = 60 if step == "judge" else 45
    outcome = run.run(step, f"model.max_tokens={tokens}", "model.too_long=drop", 'eval.models=["sft"]')
    assert outcome.code == 0, outcome.stderr
    lines = (run.run_folder / step / "dropped.jsonl").read_text().splitlines()
    listed = sum("too_long" in line for line in lines)
    counted = run.manifest(step)["counts"]["dropped"]
    assert listed > 0 and (counted["too_long"] if isinstance(counted, dict) else counted) == listed
    said = [line for line in outcome.stdout.splitlines() if "longer than the context" in line or "too_long" in line]
    assert any(str(listed) in line for line in said), outcome.stdout[-2000:]


def test_a_weak_judge_of_agreement_is_measured_and_named_where_its_numbers_stand(run: World) -> None:
    """With eval.allow_weak the step goes on; error rates and what the order decides are in metrics.json and printed."""
    run.remove("eval")
    another_model(run)
    settings = ("eval.agreement=other", "eval.allow_weak=true", "eval.min_quality=0.99", 'eval.models=["sft"]')
    outcome = run.run("eval", *settings)
    assert outcome.code == 0, outcome.stderr
    found = json.loads((run.run_folder / "eval" / "metrics.json").read_text())["agreement_judge"]
    assert found["num_alike"] > 4 and found["num_unlike"] > 4 and found["num_pairs"] >= found["num_agreeing"]
    assert 0 <= found["unlike_called_alike"] <= 1 and 0 <= found["balanced_accuracy"] < 0.99
    assert "continuing with a weak judge of agreement" in outcome.stdout
    rests = f"CR and MCR rest on a judge of agreement (asked in both orders, on {found['num_alike']} pairs of equal"
    assert rests in outcome.stdout
    assert rests in (run.run_folder / "eval" / "report.html").read_text()
    again = run.run("eval", *settings)
    assert again.code == 0 and "complete" in again.stdout + again.stderr


def test_missing_pad_token_is_resolved_openly(run: World) -> None:
    """Without a pad token the end-of-turn pads, and the log says so."""
    with_model(edit("tokenizer_config.json", pad_token=None))(run)
    run.remove("paraphrase")
    outcome = run.run("paraphrase", *PRETRAINED, *ASK_MODEL)
    assert outcome.code == 0, outcome.stderr
    assert "no pad token; padding with the end-of-turn" in outcome.stdout


# Reports


@pytest.mark.parametrize(
    ("arguments", "metrics", "says"),
    [
        ([], None, ("no run was named", "launch/report.py runs/default")),
        (["runs/none"], None, ("runs/none holds neither", "run its eval step first")),
        (["runs/a"], "{x", ("metrics.json: malformed JSON",)),
        (["runs/a"], "{}", ("metrics.json was not written by eval",)),
    ],
)
def test_report_of_nothing(arguments: list[str], metrics: str | None, says: tuple[str, ...], world: World) -> None:
    """The report names the folder without results."""
    if metrics is not None:
        world.write("runs/a/eval/metrics.json", metrics)
    assert_one_clear_line(run_recipe("report", *arguments), says)


# Interrupted training


@pytest.fixture
def stopped(run: World, monkeypatch: pytest.MonkeyPatch) -> World:
    """A run whose third update of sft gave NaN; every update was followed by a checkpoint."""
    from coalign.training import loop, objectives

    run.remove("sft")
    update, loss, updates = loop._update, objectives.sft_loss, []

    def counted(*arguments: Any) -> Any:
        updates.append(1)
        return update(*arguments)

    def spoilt(*arguments: Any) -> Any:
        return loss(*arguments) * (float("nan") if len(updates) == 3 else 1.0)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "_update", counted)
        patch.setattr(objectives, "sft_loss", spoilt)
        outcome = run.run("sft", "train.checkpoint_every=1")
    assert_one_clear_line(outcome, ("the loss is no longer finite", " under ", "the last checkpoint is kept"))
    named = outcome.errors[0].partition("with the rows ")[2].partition(";")[0].split(", ")
    assert len(named) == 4 and all(name.split("-")[0] in TASKS for name in named)
    assert not (run.run_folder / "sft" / "model").exists() and not (run.run_folder / "sft" / "manifest.json").exists()
    return run


def assert_same_curve(stopped: World, finished_here: Path) -> None:
    """Fail unless sft made the updates of a run that nothing has stopped."""
    expected = losses(finished_here / "r" / "sft")
    assert len(expected) == 3 == stopped.manifest("sft")["counts"]["updates"]
    assert losses(stopped.run_folder / "sft") == pytest.approx(expected, abs=1e-5)


def test_nan_loss_keeps_the_last_good_checkpoint(stopped: World, finished_here: Path) -> None:
    """After a NaN loss the same command goes on from the update before it."""
    outcome = stopped.run("sft", "train.checkpoint_every=1")
    assert outcome.code == 0, outcome.stderr
    assert "resuming after update 2" in outcome.stdout
    assert_same_curve(stopped, finished_here)


@pytest.mark.parametrize("damage", ["cut", "missing", "without meta", "meta cut"])
def test_checkpoint_cut_short_is_passed_over(damage: str, stopped: World, finished_here: Path) -> None:
    """A damaged checkpoint is named, and the newest whole one is used."""
    newest = stopped.run_folder / "sft" / "checkpoints" / "step_000002"
    largest = max((path for path in newest.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)
    victim = newest / "checkpoint.json" if "meta" in damage else largest
    if "cut" in damage:
        os.truncate(victim, victim.stat().st_size // 2)
    else:
        victim.unlink()
    outcome = stopped.run("sft", "train.checkpoint_every=1")
    assert outcome.code == 0, outcome.stderr
    why = "checkpoint.json is missing" if damage == "without meta" else victim.name
    assert f"runs/r/sft/checkpoints/step_000002 is passed over: {why}" in outcome.stdout
    assert "resuming after update 1 from" in outcome.stdout
    assert_same_curve(stopped, finished_here)


# No space


class Disk:
    """A small disk that can be filled: a real one where mounting is allowed, else failing writes."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder, self.left = folder, 0
        folder.mkdir()
        mount = ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(folder)]
        self.real = shutil.which("mount") is not None and subprocess.run(mount, capture_output=True).returncode == 0
        if not self.real:
            self.real_fsync, self.patch = os.fsync, monkeypatch

    def fill(self, room: int) -> None:
        """Leave room for a few more bytes, or about as many small files."""
        if self.real:
            free = shutil.disk_usage(self.folder).free
            (self.folder / "ballast").write_bytes(b"x" * (free - room))
        else:
            self.left = room // 4096
            self.patch.setattr(os, "fsync", self.fsync)

    def fsync(self, number: int) -> None:
        self.left -= 1
        if self.left < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self.real_fsync(number)

    def free(self) -> None:
        """Make space again."""
        self.left = 10**9
        (self.folder / "ballast").unlink(missing_ok=True)

    def remove(self) -> None:
        if self.real:
            subprocess.run(["umount", str(self.folder)], check=True)


@pytest.fixture
def disk(run: World, monkeypatch: pytest.MonkeyPatch) -> Iterator[Disk]:
    """A small disk that holds the run."""
    disk = Disk(run.folder / "disk", monkeypatch)
    shutil.copytree(run.folder / "runs", disk.folder / "runs")
    yield disk
    disk.remove()


def test_full_disk_stops_between_shards_and_the_step_resumes(disk: Disk, run: World) -> None:
    """A full disk is one line; shards that were written are kept, and the same command goes on after them."""
    sample = disk.folder / "runs" / "r" / "sample"
    shutil.rmtree(sample)
    settings = ("run.folder=disk/runs", "generation.shard_size=4")
    disk.fill(4 * 4096)
    assert_one_clear_line(run.run("sample", *settings), ("no space left on the disk of disk/runs/r/sample", "finished"))
    kept = len(list((sample / "shards").glob("*.jsonl")))
    assert 0 < kept < 6 and not (sample / "manifest.json").exists() and run.half_written() == []
    disk.free()
    outcome = run.run("sample", *settings)
    assert outcome.code == 0, outcome.stderr
    assert f"{kept} of 6 shards are done already" in outcome.stdout


def test_full_disk_stops_training_and_it_resumes(disk: Disk, run: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """A checkpoint that finds no space ends the step, keeps the one before, and the same command goes on there."""
    from coalign.training import deepspeed_engine

    sft = disk.folder / "runs" / "r" / "sft"
    shutil.rmtree(sft)
    real = deepspeed_engine.DeepSpeedEngine.save

    def save(self: Any, folder: Path, state: dict[str, Any]) -> None:
        if state["step"] == 2:
            disk.fill(16 * 4096 if disk.real else 0)
        real(self, folder, state)

    settings = ("run.folder=disk/runs", "train.checkpoint_every=1")
    with monkeypatch.context() as patch:
        patch.setattr(deepspeed_engine.DeepSpeedEngine, "save", save)
        outcome = run.run("sft", *settings)
    assert_one_clear_line(outcome, ("disk/runs", "free some"))
    assert [path.name for path in (sft / "checkpoints").glob("step_*")] == ["step_000001"]
    assert run.half_written() == []
    disk.free()
    outcome = run.run("sft", *settings)
    assert outcome.code == 0, outcome.stderr
    assert "resuming after update 1 from" in outcome.stdout


def test_export_asks_for_space_first(run: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """The trained model is not written to a disk that can't hold it."""
    run.remove("sft")
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(2**30, 2**30 - 2**18, 2**18))
    outcome = run.run("sft")
    assert_one_clear_line(outcome, ("runs/r/sft", "the exported model needs", "free some space"))
    assert not (run.run_folder / "sft" / "model").exists() and run.half_written() == []


@pytest.mark.parametrize("place", ["rows", "results", "worker"])
def test_full_object_store_stops_the_step_and_it_resumes(
    place: str, run: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """When Ray has no space for a shard the step names it and the way out, and finished shards are kept."""
    import ray

    full = ray.exceptions.ObjectStoreFullError("no space")
    raised = {"rows": full, "results": full, "worker": ray.exceptions.RayTaskError("run", "", full)}[place]
    calls: list[int] = []

    def submit(call: int, make_worker: Callable[[], Any], rows: list[Any]) -> Any:
        calls.append(call)
        if place == "rows" and len(calls) == 2:
            raise raised
        return len(calls), tuple(json.dumps(row) for row in make_worker()(rows))

    def get(reference: Any) -> Any:
        if reference[0] == 2:
            raise raised
        return [json.loads(row) for row in reference[1]]

    actor = SimpleNamespace(run=SimpleNamespace(remote=submit))
    member = SimpleNamespace(actor=actor, place="here", in_flight=0)
    wait = lambda refs, num_returns, timeout: (refs[:1], refs[1:])  # noqa: E731
    fake_ray = SimpleNamespace(exceptions=ray.exceptions, get=get, wait=wait)
    cluster = SimpleNamespace(require_shared=lambda folder: None)
    pool = SimpleNamespace(calls=0, members=[member], ray=fake_ray, cluster=cluster)
    run.remove("sample")
    with monkeypatch.context() as patch:
        patch.setattr("coalign.clusters.worker_pool._pool", lambda _: pool)
        patch.setattr("coalign.clusters.worker_pool.MAX_IN_FLIGHT", 1)
        outcome = run.run("sample", "generation.shard_size=8", "generation.workers=1")
    assert_one_clear_line(outcome, ("no space in the Ray object store for shard 1", "generation.shard_size"))
    outcome = run.run("sample", "generation.shard_size=8")
    assert outcome.code == 0, outcome.stderr
    assert "1 of 3 shards are done already" in outcome.stdout


# Devices and processes


@pytest.mark.ray
def test_more_gpus_than_the_cluster_has(run: World) -> None:
    """Asking Ray for GPUs that are not there ends the step, as a command of its own."""
    run.remove("sample")
    command = recipe_command("sample", "config.toml", "generation.workers=1", "generation.gpus_per_worker=99")
    outcome = run_command(command)
    says = ("generation.workers=1 x gpus_per_worker=99 asks for 99 GPUs, the cluster has", "use fewer GPUs each")
    assert_one_clear_line(outcome, says)


def test_more_ranks_than_gpus(run: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rank 0 itself refuses when more ranks are started on a node than it has GPUs."""
    import torch

    import coalign.training.deepspeed_engine  # noqa: F401  chooses the accelerator while the GPU is not yet pretended

    monkeypatch.setenv("LOCAL_SIZE", "2")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "a device")
    run.remove("sft")
    assert_one_clear_line(run.run("sft"), ("2 ranks were started on this node, which shows 1 GPU", "--num_gpus"))


def test_two_commands_on_one_step(run: World) -> None:
    """The second command on a step says which process works there."""
    run.remove("rank")
    first = StepFolder(run.run_folder / "rank", {}, {})
    first.open()
    says = ("another process is writing to runs/r/rank", f"process {os.getpid()} on ", "another run.name")
    assert_one_clear_line(run.run("rank"), says)
    first.close()
    assert run.run("rank").code == 0


def test_one_line_from_many_ranks(world: World) -> None:
    """Of two ranks without an input step the first alone tells, and both leave with exit status 2."""
    variables = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1", "DS_ACCELERATOR": "cpu"}
    ranks = [
        subprocess.Popen(
            recipe_command("sft", "config.toml"),
            env={**os.environ, **variables, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    said = [process.communicate(timeout=240)[1] for process in ranks]
    assert [process.returncode for process in ranks] == [2, 2]
    assert said[0].startswith("error: the step in runs/r/prepare has not been run") and said[0].count("\n") == 1
    assert said[1] == ""


@pytest.mark.deepspeed
def test_one_line_through_the_launcher(world: World) -> None:
    """`deepspeed` with two ranks and a misspelt key prints the mistake once and passes exit status 2 on."""
    launcher = Path(sys.executable).with_name("deepspeed")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    words = [
        "--num_gpus",
        "2",
        "--master_port",
        port,
        str(ROOT / "launch" / "sft.py"),
        "config.toml",
        "sft.batchrows=4",
    ]
    outcome = run_command([sys.executable, str(launcher), *words])
    lines = [line for line in outcome.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 == (outcome.stderr + outcome.stdout).count("error: "), outcome.stderr
    assert "unknown key 'sft.batchrows'" in lines[0] and "'batch_rows'" in lines[0]
    assert outcome.code == 2
    assert "Traceback (most recent call last)" not in outcome.stderr + outcome.stdout


# Help


def run_and_list_imports(step: str, *arguments: str) -> tuple[Outcome, set[str]]:
    """Run a recipe and return its outcome and which of the packages that take seconds to import it imported."""
    command = recipe_command(step, *arguments)
    outcome = run_command([command[0], "-X", "importtime", *command[1:]])
    imported = {line.rpartition("|")[2].strip() for line in outcome.stderr.splitlines()}
    assert "coalign.process" in imported, f"{step}: the list of imports can't be read"
    return outcome, imported & {"torch", "transformers", "ray", "deepspeed", "datasets"}


@pytest.mark.parametrize("step", ["prepare", "rank"])
def test_a_step_without_a_model_imports_no_torch(step: str, run: World) -> None:
    settings = ()
    if step == "prepare":
        (run.run_folder / "prepare" / "model").rename(run.folder / "my-model")
        settings = PRETRAINED
    run.remove(*STEPS[STEPS.index(step) :])
    outcome, heavy = run_and_list_imports(step, "config.toml", *settings)
    assert outcome.code == 0 and not heavy, outcome.errors


def test_help_answers_at_once() -> None:
    """It is a matter of a second; that no recipe needs an engine for it, test_reuse.py asks."""
    before = os.times()
    outcome, heavy = run_and_list_imports("sft", "--help")
    assert outcome.code == 0 and outcome.stdout.startswith("usage: python launch/sft.py"), outcome.stderr
    assert not heavy
    after = os.times()
    seconds = after.children_user + after.children_system - before.children_user - before.children_system
    assert seconds < 5, f"{seconds:.1f} s of work"


def test_reader_of_help_may_leave() -> None:
    """`--help | head -1` ends without a traceback."""
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(
        recipe_command("sft", "--help"), stdout=writer, stderr=subprocess.PIPE, text=True, check=False
    )
    os.close(writer)
    assert done.stderr == ""
