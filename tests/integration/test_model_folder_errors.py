"""Model folders and adapters that can't be trained, through the real commands: one clear line before any work."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from integration.bad_inputs import World

PRETRAINED = ("model.init=pretrained", "model.path=./my-model")
LORA = ("model.lora.enabled=true", "model.lora.rank=4")


def my_model(world: World) -> Path:
    """Return a copy of the run's starting model."""
    folder = world.folder / "my-model"
    shutil.copytree(world.run_folder / "prepare" / "model", folder)
    return folder


def edit(folder: Path, name: str, **values: Any) -> None:
    path = folder / name
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def rewrite(folder: Path, change: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    from safetensors.torch import load_file, save_file

    weights = change(load_file(folder / "model.safetensors"))
    save_file({n: w.contiguous() for n, w in weights.items()}, folder / "model.safetensors", {"format": "pt"})


def one_missing(folder: Path) -> None:
    rewrite(folder, lambda weights: {n: w for n, w in weights.items() if "mlp.down_proj" not in n})


def compiled(folder: Path) -> None:
    rewrite(folder, lambda weights: {f"_orig_mod.{n}": w for n, w in weights.items()})


def fewer_layers(folder: Path) -> None:
    rewrite(folder, lambda weights: weights | {n.replace("s.0.", "s.1."): w.clone() for n, w in weights.items()})


def larger_embedding(folder: Path) -> None:
    edit(folder, "config.json", vocab_size=4000)


def added_token(folder: Path) -> None:
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    last = {**tokenizer["added_tokens"][0], "id": 400, "content": "<|new|>", "special": False}
    edit(folder, "tokenizer.json", added_tokens=[*tokenizer["added_tokens"], last])


def malformed_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").write_text("{}")


def adapters_alone(folder: Path) -> None:
    (folder / "adapter_config.json").write_text("{}")


ZERO3 = "train.zero_stage=3"
CASES: list[tuple[str, Callable[[Path], Any], tuple[str, ...], str]] = [
    ("a weight is missing", one_missing, (), "its weights lack model.layers.0.mlp.down_proj.weight; "),
    ("a weight is missing, ZeRO-3", one_missing, (ZERO3,), "its weights lack model.layers.0.mlp.down_proj.weight; "),
    ("compiled", compiled, (), 'take "_orig_mod." off its names'),
    (
        "fewer layers, ZeRO-3",
        fewer_layers,
        (ZERO3,),
        "no place for: model.layers.1.input_layernorm.weight (and 8 more)",
    ),
    ("another embedding", larger_embedding, (), "and config.json asks for [4000, 32]"),
    ("another embedding, ZeRO-3", larger_embedding, (ZERO3,), "and config.json asks for [4000, 32]"),
    ("token beyond the embedding", added_token, (), "('<|new|>'), the model's embedding only 400 rows"),
    ("tokenizer of nothing", malformed_tokenizer, (), "the tokenizer or config can't be loaded: KeyError"),
    ("adapters", adapters_alone, (), "merge them into their model first"),
    ("tied head", lambda folder: None, (*LORA, 'model.lora.target_modules=["lm_head","q_proj"]'), "lm_head is shared"),
    (
        "tied head, ZeRO-3",
        lambda folder: None,
        (*LORA, 'model.lora.target_modules=["lm_head","embed_tokens"]', ZERO3),
        "model.embed_tokens is shared",
    ),
    (
        "half of the targets",
        lambda folder: None,
        (*LORA, 'model.lora.target_modules=["q_proj","nosuch"]'),
        "no layer that can be adapted is named nosuch; linear layers here: down_proj",
    ),
]


@pytest.mark.parametrize(("change", "settings", "said"), [case[1:] for case in CASES], ids=[case[0] for case in CASES])
def test_a_model_that_cannot_be_trained_ends_before_the_first_update(
    change: Callable[[Path], Any], settings: tuple[str, ...], said: str, run: World
) -> None:
    """Exit status 2 and one line on stderr; no update is made and nothing is written."""
    change(my_model(run))
    run.remove("sft")
    outcome = run.run("sft", *PRETRAINED, *settings)
    assert outcome.code == 2, outcome.stderr
    (line,) = outcome.errors
    assert line.startswith("error: ") and said in line
    assert not (run.run_folder / "sft" / "model").exists() and not (run.run_folder / "sft" / "metrics.jsonl").exists()


def test_the_same_lora_run_twice_gives_the_same_weights(run: World) -> None:
    """Adapters and their dropout follow run.seed; the log tells how many weights are trained."""
    weights = []
    for seed in (1, 1, 2):
        run.remove("sft")
        outcome = run.run("sft", *LORA, "model.lora.dropout=0.2", f"run.seed={seed}", "train.checkpoint_every=0")
        assert outcome.code == 0, outcome.stderr
        assert outcome.stdout.count("LoRA trains 2176 adapter weights beside ") == 1
        weights.append((run.run_folder / "sft" / "model" / "model.safetensors").read_bytes())
    assert weights[0] == weights[1] != weights[2]
