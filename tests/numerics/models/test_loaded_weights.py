"""loaded_weights: a folder whose weights are not those of its config is refused in one line, and nothing else is."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from coalign.config import ModelTable, RandomTable
from coalign.errors import UserError
from coalign.models.loaded_weights import complaint_of_weights
from coalign.models.model_folder import check_weights, load_codec, load_model, load_tokenizer
from coalign.models.random_model import make_random_model
from numerics.tiny import SHAPES, network

Weights = dict[str, torch.Tensor]
SHAPE = RandomTable(vocab_size=300, hidden_size=32, num_layers=2, num_heads=4, intermediate_size=48, context=64)
MOE = {
    **SHAPES["qwen3"], "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16,
    "decoder_sparse_step": 1,
}  # fmt: skip
DOWN, GATE = "model.layers.0.mlp.down_proj.weight", "model.layers.0.mlp.gate_proj.weight"


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a tied Llama of two layers."""
    folder = tmp_path_factory.mktemp("models") / "model"
    make_random_model(folder, ["one text", "and another text"], SHAPE, seed=0)
    return folder


def edit(folder: Path, name: str, **values: Any) -> None:
    path = folder / name
    old = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(old | values))


def altered(source: Path, target: Path, change: Callable[[Weights], Weights] | None = None, **config: Any) -> str:
    """Return a copy of a model folder with other weights or another config."""
    shutil.copytree(source, target)
    if change:
        weights = change(load_file(target / "model.safetensors"))
        save_file({n: w.contiguous() for n, w in weights.items()}, target / "model.safetensors", {"format": "pt"})
    if config:
        edit(target, "config.json", **config)
    return str(target)


def both(folder: str, table: ModelTable | None = None) -> list[str]:
    """Return what loading the model and checking its names and shapes alone say, "" where they accept it."""
    said = []
    for load in (lambda t: load_model(folder, t, torch.float32), lambda t: check_weights(folder, t)):
        try:
            load(table or ModelTable())
            said.append("")
        except UserError as error:
            said.append(str(error).removeprefix(folder))
    return said


def without(*names: str) -> Callable[[Weights], Weights]:
    return lambda weights: {n: w for n, w in weights.items() if n not in names}


def renamed(before: str, after: str) -> Callable[[Weights], Weights]:
    return lambda weights: {after + n.removeprefix(before): w for n, w in weights.items()}


def added(name: str) -> Callable[[Weights], Weights]:
    return lambda weights: weights | {name: torch.ones(2, 2)}


REFUSED: dict[str, tuple[Callable[[Weights], Weights] | None, dict[str, Any], str]] = {
    "one missing": (without(DOWN), {}, f"its weights lack {DOWN}; "),
    "two missing": (without(DOWN, GATE), {}, f"its weights lack {GATE} (and 1 more)"),
    "more layers in config": (None, {"num_hidden_layers": 4}, "lack model.layers.2.self_attn.q_proj.weight (and 17"),
    "fewer layers in config": (None, {"num_hidden_layers": 1}, "no place for: model.layers.1.input_layernorm.weight"),
    "no layers in config": (None, {"num_hidden_layers": -1}, "no place for: model.layers.0.input_layernorm.weight"),
    "untied without a head": (None, {"tie_word_embeddings": False}, "lack lm_head.weight; "),
    "biases": (None, {"attention_bias": True}, "lack model.layers.0.self_attn.q_proj.bias (and 7 more)"),
    "compiled": (renamed("", "_orig_mod."), {}, 'take "_orig_mod." off its names'),
    "in a wrapper": (renamed("", "module."), {}, 'take "module." off its names'),
    "in a wrapper, twice": (renamed("", "module.x."), {}, 'take "module.x." off its names'),
    "inner model in a wrapper": (renamed("model.", "x."), {}, "the file has x.embed_tokens.weight instead"),
    "another architecture": (None, {"model_type": "bert"}, "lack bert.embeddings.word_embeddings.weight (and 43 more)"),
    "head for rewards": (added("score.weight"), {}, "no place for: score.weight; "),
    "value head": (added("v_head.summary.weight"), {}, "no place for: v_head.summary.weight"),
    "adapters in the file": (added("model.layers.0.mlp.up_proj.lora_A.weight"), {}, "up_proj.lora_A.weight"),
    "another head": (lambda w: w | {"lm_head.weight": 2 * w["model.embed_tokens.weight"]}, {}, "hold another head"),
    "larger embedding": (None, {"vocab_size": 290}, "model.embed_tokens.weight has the shape [275, 32], and"),
    "narrower layers": (None, {"intermediate_size": 40}, "down_proj.weight has the shape [32, 48]"),
    "fewer key heads": (None, {"num_key_value_heads": 2}, "asks for [16, 32] (and 3 more)"),
    "layers of another size": (None, {"head_dim": 6}, "k_proj.weight has the shape [32, 32]"),
    "unknown activation": (None, {"hidden_act": "nosuch"}, "the model can't be loaded: KeyError 'nosuch'; check"),
    "negative width": (None, {"hidden_size": -8}, "the model can't be loaded: Trying to create tensor with negative"),
    "padding beyond": (None, {"pad_token_id": 9999}, "the model can't be loaded: Padding_idx must be within"),
    "no causal LM": (None, {"model_type": "t5"}, "transformers has no causal language model for model_type 't5'"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_weights_of_another_model_are_refused(
    name: str, source: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Both ways to look say the same, in one line, and transformers prints no table beside it."""
    change, config, said = REFUSED[name]
    for found in both(altered(source, tmp_path / "model", change, **config)):
        assert said in found and "\n" not in found
    assert capfd.readouterr() == ("", "")


ACCEPTED: dict[str, Callable[[Weights], Weights]] = {
    "untouched": lambda weights: weights,
    "the inner model alone": renamed("model.", ""),
    "head beside tied embeddings": lambda w: w | {"lm_head.weight": w["model.embed_tokens.weight"].clone()},
    "rotary frequencies": added("model.layers.0.self_attn.rotary_emb.inv_freq"),
    "layers that predict further tokens": added("mtp.layers.0.mlp.up_proj.weight"),
    "part for images": added("model.visual.blocks.0.attn.qkv.weight"),
    "bridge from images": added("multi_modal_projector.linear_1.weight"),
}


@pytest.mark.parametrize("name", ACCEPTED)
def test_what_changes_no_text_is_accepted(
    name: str, source: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """What tying explains and what a causal LM computes without is no fault."""
    folder = altered(source, tmp_path / "model", ACCEPTED[name])
    assert both(folder) == ["", ""] and capfd.readouterr() == ("", "")
    plain = load_model(str(source), ModelTable(), torch.float32).state_dict()
    assert all(
        torch.equal(t, plain[n]) for n, t in load_model(folder, ModelTable(), torch.float32).state_dict().items()
    )


def test_further_layers_are_left_out_where_the_config_names_them() -> None:
    """DeepSeek and GLM write layers for further tokens behind those of the model."""
    model = network("llama", torch.float32)
    report = {"missing_keys": set(), "mismatched_keys": set(), "unexpected_keys": {"model.layers.2.mlp.x.weight"}}
    assert "model.layers.2.mlp.x.weight" in complaint_of_weights(model, report)
    model.config.num_nextn_predict_layers = 1
    assert complaint_of_weights(model, report) == ""
    report["unexpected_keys"] = {"model.layers.10.mlp.x.weight", "model.layers.3.mlp.x.weight"}
    assert "no place for: model.layers.3.mlp.x.weight (and 1 more)" in complaint_of_weights(model, report)


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen2", "mistral", "qwen3", "phi", "bloom", "mpt"])
@pytest.mark.parametrize("tied", [False, True])
def test_families_load_as_they_were_saved(family: str, tied: bool, source: Path, tmp_path: Path) -> None:
    """Nothing is missing and nothing is left over, tied or not."""
    shutil.copytree(source, tmp_path / "model")
    network(family, torch.float32, tie_word_embeddings=tied).save_pretrained(tmp_path / "model")
    assert both(str(tmp_path / "model"), ModelTable(attention="eager")) == ["", ""]


def lose_expert(part: str) -> Callable[[Weights], Weights]:
    return lambda weights: {n: w for n, w in weights.items() if f"layers.0.mlp.experts.{part}" not in n}


def misshapen(weights: Weights) -> Weights:
    name = "model.layers.0.mlp.experts.1.down_proj.weight"
    return weights | {name: weights[name][:, :8]}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda weights: weights, ""),
        (lose_expert("1.down"), "experts.down_proj has the shape [3, 32, 16]"),
        (lose_expert(""), "lack model.layers.0.mlp.experts.gate_up_proj (and 1 more)"),
        (misshapen, "parts of one of its fused weights (such as experts) are missing or unlike in shape"),
        (renamed("", "module."), 'take "module." off its names'),
    ],
)
def test_experts_that_the_library_fuses(
    change: Callable[[Weights], Weights], said: str, source: Path, tmp_path: Path
) -> None:
    """Names in the file differ from those in the model; one lost expert is seen all the same."""
    shutil.copytree(source, tmp_path / "moe")
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(AutoConfig.for_model("qwen3_moe", **MOE)).save_pretrained(tmp_path / "moe")
    for found in both(altered(tmp_path / "moe", tmp_path / "model", change)):
        assert said in found and bool(found) == bool(said)


def test_a_missing_kernel_names_the_key(source: Path) -> None:
    """The message is ours, and its advice works."""
    for found in both(str(source), ModelTable(attention="flash_attention_2")):
        assert found.endswith('model.attention="flash_attention_2" can\'t be used with it; set model.attention="sdpa"')
    assert both(str(source), ModelTable(attention="sdpa")) == ["", ""]


@pytest.mark.parametrize("family", ["gemma2", "bloom", "mpt"])
def test_a_missing_attention_is_replaced(family: str, source: Path, tmp_path: Path) -> None:
    """A family without SDPA gets eager attention, and nobody has to set a key for it."""
    shutil.copytree(source, tmp_path / "model")
    network(family, torch.float32).save_pretrained(tmp_path / "model")
    assert both(str(tmp_path / "model")) == ["", ""]
    assert load_model(str(tmp_path / "model"), ModelTable(), torch.float32).config._attn_implementation == "eager"


CONFIG, TOKENIZER, ITS_CONFIG = "config.json", "tokenizer.json", "tokenizer_config.json"
NO_TOKENIZER: list[tuple[str, str | dict[str, Any], str]] = [
    (CONFIG, "[]", "must be a mapping, not list"),
    (CONFIG, "null", "NoneType"),
    (CONFIG, "3", "int"),
    (CONFIG, {"hidden_size": "big"}, "'hidden_size' expected int, got str"),
    (CONFIG, {"vocab_size": "400"}, "'vocab_size' expected int"),
    (CONFIG, {"num_attention_heads": 3}, "multiple of the number of attention heads"),
    (CONFIG, {"num_attention_heads": 0}, "modulo by zero"),
    (CONFIG, {"dtype": "nosuch"}, "no attribute 'nosuch'"),
    (CONFIG, {"model_type": "nosuch"}, "model type `nosuch`"),
    (CONFIG, {"model_type": "mine", "auto_map": {"AutoConfig": "a.B"}}, "coalign runs no code from model folders"),
    (TOKENIZER, "{}", "KeyError"),
    (TOKENIZER, "[]", "str"),
    (TOKENIZER, "null", "NoneType"),
    (TOKENIZER, {"model": {"type": "Nosuch"}}, "did not match any variant"),
    (TOKENIZER, {"model": {"type": "BPE", "vocab": {"a": 0}, "merges": ["a b c"]}}, "Merges"),
    (TOKENIZER, {"added_tokens": 3}, "not iterable"),
    (ITS_CONFIG, "[]", "list"),
    (ITS_CONFIG, "null", "NoneType"),
    (ITS_CONFIG, {"tokenizer_class": 3}, "int"),
    (ITS_CONFIG, {"eos_token": 3}, "eos_token has to be either str"),
    (ITS_CONFIG, {"extra_special_tokens": 3}, "must be a list"),
    (ITS_CONFIG, {"model_max_length": "512"}, "model_max_length='512' in tokenizer_config.json is no number"),
    (ITS_CONFIG, {"model_max_length": 0}, "model_max_length=0"),
    (ITS_CONFIG, {"model_max_length": True}, "model_max_length=True"),
    ("adapter_config.json", "{}", "holds adapters (adapter_config.json); merge them into their model first"),
]


def put(folder: Path, name: str, content: str | dict[str, Any]) -> str:
    """Write a file of a model folder, or change keys of it."""
    if isinstance(content, dict):
        edit(folder, name, **content)
    else:
        (folder / name).write_text(content)
    return str(folder)


@pytest.mark.parametrize(("name", "content", "said"), NO_TOKENIZER)
def test_a_malformed_tokenizer_or_config_is_one_error(
    name: str, content: str | dict[str, Any], said: str, source: Path, tmp_path: Path
) -> None:
    """Whatever a library raises for a malformed file becomes an error with the folder and a line of its message."""
    shutil.copytree(source, tmp_path / "model")
    folder = put(tmp_path / "model", name, content)
    with pytest.raises(UserError) as caught:
        load_codec(folder, ModelTable())
    text = str(caught.value)
    assert text.startswith(folder) and said in text and "\n" not in text


@pytest.mark.parametrize("content", ["[]", "null", '{"max_new_tokens": "x"}'])
def test_a_malformed_generation_config_is_one_error(content: str, source: Path, tmp_path: Path) -> None:
    """The model's own defaults for sampling are read with it."""
    shutil.copytree(source, tmp_path / "model")
    for found in both(put(tmp_path / "model", "generation_config.json", content)):
        assert found.startswith(": the model can't be loaded: ") and "\n" not in found


@pytest.mark.parametrize("error", [MemoryError("no room"), torch.OutOfMemoryError("CUDA out of memory")])
def test_a_full_memory_keeps_its_own_error(error: Exception, source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is no fault of the folder, and recipe.py says what to do about a GPU's."""

    def fail(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", fail)
    with pytest.raises(type(error)):
        load_model(str(source), ModelTable(), torch.float32)


def test_messages_of_a_model_that_loads_are_still_printed(
    source: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """They are held back only until the outcome is known."""
    handler = logging.StreamHandler()  # transformers' own writes to the stderr of its import
    logging.getLogger("transformers").addHandler(handler)
    try:
        load_model(
            put(Path(altered(source, tmp_path / "model")), "generation_config.json", {"temperature": 0.5}),
            ModelTable(),
            torch.float32,
        )
    finally:
        logging.getLogger("transformers").removeHandler(handler)
    assert "temperature" in capfd.readouterr().err


def add_tokens(folder: Path, *tokens: str, special: bool, template: str = "") -> str:
    """Give the tokenizer of a folder more tokens than the embedding has rows."""
    tokenizer = load_tokenizer(str(folder), ModelTable())
    tokenizer.add_tokens(list(tokens), special_tokens=special)
    tokenizer.chat_template = template or tokenizer.chat_template
    tokenizer.save_pretrained(folder)
    return str(folder)


TURN = "{% for m in messages %}{{ '<|' + m.role + '|>' + m.content + eos_token }}{% endfor %}{{ '<|assistant|>' }}"


@pytest.mark.parametrize(
    ("tokens", "special", "template", "table", "said"),
    [
        (["<tool>"], False, "", {}, "ids up to 275 ('<tool>'), the model's embedding only 275 rows"),
        (["<|system|>", "<|im_end|>"], True, TURN + "<|im_end|>", {}, "ids up to 276 ('<|im_end|>')"),
        (["<turn>"], True, "", {"end_of_turn": "<turn>"}, "('<turn>')"),
        (["<hole>"], True, "", {"pad_token": "<hole>"}, "('<hole>')"),
        (["<image>"], True, "", {}, ""),
    ],
)
def test_ids_beyond_the_embedding_are_refused(
    tokens: list[str],
    special: bool,
    template: str,
    table: dict[str, str],
    said: str,
    source: Path,
    tmp_path: Path,
) -> None:
    """Tokens that a text, the template or the end of a turn can hold count; a special one that nothing writes not."""
    shutil.copytree(source, tmp_path / "model")
    folder = add_tokens(tmp_path / "model", *tokens, special=special, template=template)
    if not said:
        assert max(load_codec(folder, ModelTable()).encode_prompt(f"a {tokens[0]} b")) < 275
        return
    with pytest.raises(UserError, match="embedding only") as caught:
        load_codec(folder, ModelTable.model_validate(table))
    assert said in str(caught.value)


def test_a_token_that_the_template_only_composes_is_seen(source: Path, tmp_path: Path) -> None:
    """The names of roles become tokens when the template is rendered."""
    shutil.copytree(source, tmp_path / "model")
    words = {"<|user|>": "<|USER|>"}
    text = (tmp_path / "model" / "tokenizer.json").read_text().replace("<|user|>", words["<|user|>"])
    (tmp_path / "model" / "tokenizer.json").write_text(text)
    folder = add_tokens(tmp_path / "model", "<|user|>", special=True, template=TURN)
    with pytest.raises(UserError, match=r"'<\|user\|>'"):
        load_codec(folder, ModelTable())


def test_an_embedding_padded_beyond_the_tokenizer_is_fine(source: Path, tmp_path: Path) -> None:
    """Families pad the rows to a multiple of 64 or more."""
    pad = {"model.embed_tokens.weight": torch.zeros(320, 32)}
    folder = altered(source, tmp_path / "model", lambda weights: weights | pad, vocab_size=320)
    load_codec(folder, ModelTable())
    assert both(folder) == ["", ""]
