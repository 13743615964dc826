"""lora: adapters depend on the seed alone, targets that can't be trained are refused, and the log tells what is."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from coalign.config import LogTable, LoraTable, ModelTable, RandomTable, TrainTable
from coalign.errors import UserError
from coalign.models.lora import attach_lora, merge_lora
from coalign.models.model_folder import load_model, switch_off_dropout
from coalign.models.random_model import make_random_model
from coalign.training.loop import TrainingPlan, train
from coalign.training.objectives import sft_objective
from numerics.engine import TorchEngine
from numerics.tiny import SHAPES, network, random_items

IDS = torch.tensor([[3, 4, 5, 6]])


def lora(*targets: str, **values: Any) -> LoraTable:
    return LoraTable(enabled=True, rank=2, target_modules=list(targets), **values)


def adapters(model: Any) -> dict[str, torch.Tensor]:
    return {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}


def test_first_adapters_follow_the_seed_alone() -> None:
    """Equal after any draws before, unlike for another seed; the random state goes on as if nothing had happened."""
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    first = adapters(attach_lora(network("llama", torch.float32), lora(), seed=7))
    torch.manual_seed(3)
    model = network("llama", torch.float32)
    torch.manual_seed(3)
    second = adapters(attach_lora(model, lora(), seed=7))
    assert torch.equal(torch.rand(2), expected)
    other = adapters(attach_lora(network("llama", torch.float32), lora(), seed=8))
    assert first.keys() == second.keys() and all(torch.equal(t, second[n]) for n, t in first.items())
    assert all(torch.equal(t, other[n]) == ("lora_B" in n) for n, t in first.items())


TIED = [
    ("llama", ["lm_head", "q_proj"], "lm_head"),
    ("llama", ["embed_tokens"], "model.embed_tokens"),
    ("llama", ["model.embed_tokens", "v_proj"], "model.embed_tokens"),
    ("llama", ["lm_head", "embed_tokens"], "model.embed_tokens"),
    ("gpt2", ["wte"], "transformer.wte"),
    ("gpt2", ["c_attn", "lm_head"], "lm_head"),
    ("bloom", ["word_embeddings"], "transformer.word_embeddings"),
]


@pytest.mark.parametrize(("family", "targets", "named"), TIED)
def test_adapters_on_a_shared_weight_are_refused(family: str, targets: list[str], named: str) -> None:
    """However a tied head or embedding is named: merged, the update would be in both."""
    with pytest.raises(UserError, match=rf"the weight of {named} is shared with another layer"):
        attach_lora(network(family, torch.float32, tie_word_embeddings=True), lora(*targets))


@pytest.mark.parametrize(
    ("targets", "said"),
    [
        (["q_proj", "nosuch"], "is named nosuch; linear layers here: down_proj, gate_proj"),
        (["nosuch", "q_proj", "other"], "is named nosuch, other; "),
        (["proj"], "not found in the base model"),
        (["all-linear"], "not found in the base model"),
        ([".*q_proj"], "not found in the base model"),
        (["input_layernorm"], "LlamaRMSNorm"),
        (["mlp"], "Target module LlamaMLP; linear"),
        (["model.layers.7.self_attn.q_proj", "v_proj"], "is named model.layers.7.self_attn.q_proj; "),
    ],
)
def test_a_target_that_names_no_layer_is_refused(targets: list[str], said: str) -> None:
    """Also one among others that do."""
    with pytest.raises(UserError) as caught:
        attach_lora(network("llama", torch.float32), lora(*targets))
    text = str(caught.value)
    assert text.startswith(f"model.lora.target_modules={targets}: ") and said in text and "\n" not in text


@pytest.mark.parametrize(
    ("targets", "num_layers"),
    [([], 14), (["q_proj"], 2), (["self_attn.q_proj", "mlp.up_proj"], 4), (["model.layers.1.mlp.up_proj"], 1)],
)
def test_the_log_tells_what_is_trained(targets: list[str], num_layers: int, caplog: pytest.LogCaptureFixture) -> None:
    """One line: adapter weights, all weights, layers. A dense model has nothing that can't be adapted."""
    model = network("llama", torch.float32)
    total = sum(p.numel() for p in model.parameters())
    with caplog.at_level(logging.INFO, "coalign"):
        trained = sum(t.numel() for t in adapters(attach_lora(model, lora(*targets))).values())
    (line,) = caplog.messages
    assert line.startswith(f"LoRA trains {trained} adapter weights beside {total} of the model (")
    assert f" on {num_layers} layers: " in line


def experts(family: str) -> Any:
    """Return a tiny network with a fused tensor of experts per layer."""
    values = {
        "num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16,
        "shared_expert_intermediate_size": 16, "decoder_sparse_step": 1, "initializer_range": 0.2,
    }  # fmt: skip
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **SHAPES["qwen3"], **values))


def test_fused_experts_that_stay_as_they_are_are_named(caplog: pytest.LogCaptureFixture) -> None:
    """Experts in one tensor are no linear layers, so the default targets may pass over them."""
    model = experts("qwen2_moe")
    fused = sum(p.numel() for n, p in model.named_parameters() if ".experts." in n)
    share = fused / sum(p.numel() for p in model.parameters())
    with caplog.at_level(logging.WARNING, "coalign"):
        attach_lora(model, lora())
    (line,) = caplog.messages
    assert f"warning: {100 * share:.0f}% of the model's weights have no adapters and stay as they are" in line
    assert "model.layers.N.mlp.experts.gate_up_proj, model.layers.N.mlp.experts.down_proj" in line


@pytest.mark.parametrize(
    ("family", "targets"),
    [("qwen3_moe", []), ("mixtral", []), ("qwen3_moe", ["q_proj", "gate_proj", "up_proj", "down_proj"])],
)
def test_fused_experts_with_adapters_are_merged_exactly(
    family: str, targets: list[str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Where peft adapts the fused tensor, nothing is warned of, and merged weights give the live model's logits."""
    experts(family).save_pretrained(tmp_path / "model")
    folder, table = with_tokenizer(tmp_path / "model"), ModelTable(lora=lora(*targets))
    with caplog.at_level(logging.WARNING, "coalign"):
        model = attach_lora(load_model(folder, table, torch.float32), table.lora)
    assert caplog.messages == []
    assert_merged_exactly(folder, table, model)


def test_dropout_that_peft_lacks_is_refused() -> None:
    """The error names the key, not the targets."""
    with pytest.raises(UserError, match=r"model\.lora\.dropout=0\.1: .*; set it to 0"):
        attach_lora(experts("qwen3_moe"), lora(dropout=0.1))


@pytest.mark.parametrize("targets", [["lm_head"], ["embed_tokens"], ["lm_head", "embed_tokens", "q_proj"]])
def test_an_untied_head_or_embedding_is_adapted_exactly(targets: list[str], tmp_path: Path) -> None:
    """Merged weights give the live model's logits, and only the named layers change."""
    network("llama", torch.float32).save_pretrained(tmp_path / "model")
    folder, table = with_tokenizer(tmp_path / "model"), ModelTable(lora=lora(*targets))
    plain = load_model(folder, table, torch.float32).state_dict()
    merged = assert_merged_exactly(folder, table, attach_lora(load_model(folder, table, torch.float32), table.lora))
    assert {n.split(".")[-2] for n, t in merged.items() if not torch.equal(t, plain[n])} == set(targets)


def with_tokenizer(folder: Path) -> str:
    """Give a folder of weights a tokenizer."""
    shape = RandomTable(vocab_size=300, hidden_size=8, num_layers=1, num_heads=1, intermediate_size=8, context=64)
    make_random_model(folder.with_name("other"), ["one text"], shape, seed=0)
    for path in folder.with_name("other").glob("tokenizer*"):
        path.rename(folder / path.name)
    return str(folder)


def assert_merged_exactly(folder: str, table: ModelTable, model: Any) -> dict[str, torch.Tensor]:
    """Give the adapters any values and compare the merged model with the live one; return the merged weights."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.1)
    merged = merge_lora(folder, table, adapters(model))
    fresh = load_model(folder, table, torch.float32)
    before = fresh(input_ids=IDS).logits
    fresh.load_state_dict(merged)
    with torch.no_grad():
        live = model.eval()(input_ids=IDS).logits
        assert torch.allclose(fresh(input_ids=IDS).logits, live, atol=1e-4) and not torch.allclose(
            before, live, atol=1e-2
        )
    return merged


# Dropout of adapters

LOG = LogTable(tensorboard=False)


def trained(folder: Path, seed: int, steps: int = 6, noise: int = 0) -> dict[str, torch.Tensor]:
    """Train adapters with dropout for `steps` updates, or resume; `noise` is where torch's random state begins."""
    folder.mkdir(exist_ok=True)
    torch.manual_seed(noise)
    model = attach_lora(network("llama", torch.float32).train(), lora(dropout=0.5), seed)
    table = TrainTable(precision="float32", checkpoint_every=2)
    engine = TorchEngine(model, table)
    plan = TrainingPlan(random_items(18, most_responses=1)[: 3 * steps], sft_objective(), 3, 1e-2, 0, seed)
    train(engine, plan, table, LOG, folder)
    return adapters(model)


def test_dropout_follows_the_seed_and_survives_a_resume(tmp_path: Path) -> None:
    """The same seed gives the same weights, from any random state and after an interruption; another seed does not."""
    whole = trained(tmp_path / "a", seed=1)
    again = trained(tmp_path / "b", seed=1, noise=99)
    assert all(torch.equal(t, again[n]) for n, t in whole.items())
    for late in sorted((tmp_path / "b" / "checkpoints").iterdir())[1:]:
        for path in late.iterdir():
            path.unlink()
        late.rmdir()
    resumed = trained(tmp_path / "b", seed=1, noise=7)
    assert all(torch.equal(t, resumed[n]) for n, t in whole.items())
    other = trained(tmp_path / "c", seed=2)
    assert not any(torch.equal(t, other[n]) for n, t in whole.items())


@pytest.mark.parametrize(
    ("family", "values"),
    [
        ("gpt2", {"attn_pdrop": 0.5, "resid_pdrop": 0.5, "embd_pdrop": 0.5}),
        ("llama", {"attention_dropout": 0.5}),
        ("bloom", {"hidden_dropout": 0.5, "attention_dropout": 0.5}),
        ("phi", {"resid_pdrop": 0.5, "embd_pdrop": 0.5, "attention_dropout": 0.5}),
    ],
)
def test_dropout_of_the_model_itself_is_off(family: str, values: dict[str, float]) -> None:
    """Modules, functions that read an attribute, and functions that read the config: two passes are equal."""
    model = network(family, torch.float32, **values).train()
    ids = torch.arange(3, 12).unsqueeze(0)
    assert not torch.equal(model(input_ids=ids).logits, model(input_ids=ids).logits)
    switch_off_dropout(model)
    assert torch.equal(model(input_ids=ids).logits, model(input_ids=ids).logits)


@pytest.mark.parametrize("family", ["opt", "falcon", "gpt_neox", "biogpt"])
def test_dropout_of_whole_layers_and_from_the_config_is_off(family: str) -> None:
    """Also where a layer is left out at random."""
    shape = {
        "vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4, "ffn_dim": 48,
        "intermediate_size": 48, "max_position_embeddings": 64, "word_embed_proj_dim": 32, "pad_token_id": 0,
    }  # fmt: skip
    rates = dict.fromkeys(("dropout", "hidden_dropout", "attention_dropout", "layerdrop", "activation_dropout"), 0.5)
    rates |= {"hidden_dropout_prob": 0.5, "attention_probs_dropout_prob": 0.5}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **shape, **rates)).train()
    ids = torch.arange(3, 12).unsqueeze(0)
    switch_off_dropout(model)
    first = model(input_ids=ids).logits
    assert all(torch.equal(model(input_ids=ids).logits, first) for _ in range(4))
