"""model_folder: LoRA merged as its formula says, folders that reopen equal or do not appear, the random model."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, GenerationConfig

from coalign.config import LoraTable, ModelTable, RandomTable
from coalign.errors import UserError
from coalign.models.lora import attach_lora, merge_lora
from coalign.models.model_folder import export_model, load_codec, load_model, load_tokenizer
from coalign.models.random_model import make_random_model
from coalign.runs.digests import digest_file

SHAPE = RandomTable(vocab_size=300, hidden_size=32, num_layers=2, num_heads=4, intermediate_size=48, context=64)
TEXTS = ["one text", "and another text"]
IDS = torch.tensor([[3, 4, 5, 6, 7, 8, 9]])


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Return a model folder with tied weights and a generation config of its own."""
    folder = tmp_path_factory.mktemp("models") / "model"
    make_random_model(folder, TEXTS, SHAPE, seed=0)
    GenerationConfig(temperature=0.3, do_sample=True, eos_token_id=4).save_pretrained(folder)
    return str(folder)


def untied(folder: Path) -> str:
    """Return a model folder whose output head is a matrix of its own."""
    make_random_model(folder, TEXTS, SHAPE, seed=0)
    model = load_model(str(folder), ModelTable(), torch.float32)
    config = model.config
    config.tie_word_embeddings = False
    torch.manual_seed(5)
    type(model)(config).save_pretrained(folder)
    return str(folder)


def trained_state(source: str, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    """Return weights that differ from the source's."""
    model = load_model(source, ModelTable(), dtype)
    with torch.no_grad():
        for number, parameter in enumerate(model.parameters()):
            parameter.mul_(1.5).add_(0.01 * number)
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def logits_of(model: Any) -> torch.Tensor:
    with torch.no_grad():
        logits: torch.Tensor = model(input_ids=IDS).logits
    return logits


def write(folder: Path, state: dict[str, torch.Tensor], source: str, check: Callable[[Any], str | None]) -> None:
    export_model(folder, state, source, ModelTable(), load_tokenizer(source, ModelTable()), check)


def test_an_exported_folder_reopens_equal(source: str, tmp_path: Path) -> None:
    """A plain from_pretrained finds the weights, tied, with tokenizer, chat template and generation config."""
    state = trained_state(source)
    live = load_model(source, ModelTable(), torch.float32)
    live.load_state_dict(state)
    write(tmp_path / "out", dict(state), source, lambda model: None)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.equal(logits_of(model), logits_of(live))
    assert not torch.allclose(logits_of(model), logits_of(load_model(source, ModelTable(), torch.float32)))
    assert model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()
    assert model.generation_config.temperature == 0.3
    old, new = (load_tokenizer(f, ModelTable()) for f in (source, str(tmp_path / "out")))
    assert new.chat_template == old.chat_template and new("one text").input_ids == old("one text").input_ids
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_untied_head_stays_untied(dtype: torch.dtype, tmp_path: Path) -> None:
    """Head and embeddings come back as two matrices, in the dtype that they were trained in."""
    source = untied(tmp_path / "source")
    state = trained_state(source, dtype)
    write(tmp_path / "out", dict(state), source, lambda model: None)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    assert model.dtype is dtype and torch.equal(model.lm_head.weight, state["lm_head.weight"])
    assert not torch.equal(model.lm_head.weight, model.model.embed_tokens.weight)


def bad_nan(state: dict[str, torch.Tensor]) -> None:
    state["model.layers.1.mlp.up_proj.weight"][3, 4] = float("nan")


def bad_shape(state: dict[str, torch.Tensor]) -> None:
    state["model.layers.1.mlp.up_proj.weight"] = torch.zeros(48, 16)


def bad_missing(state: dict[str, torch.Tensor]) -> None:
    del state["model.layers.0.self_attn.q_proj.weight"]


def bad_key(state: dict[str, torch.Tensor]) -> None:
    state["model.layers.9.mlp.up_proj.weight"] = torch.zeros(48, 32)


def bad_tie(state: dict[str, torch.Tensor]) -> None:
    state["lm_head.weight"] = state["lm_head.weight"] + 1


@pytest.mark.parametrize(
    ("spoil", "said"),
    [(bad_nan, r"up_proj\.weight holds NaN"), (bad_shape, ""), (bad_missing, ""), (bad_key, ""), (bad_tie, "")],
)
def test_spoilt_weights_leave_no_folder(
    spoil: Callable[[dict[str, torch.Tensor]], None], said: str, source: str, tmp_path: Path
) -> None:
    """NaN, a wrong shape, a missing or unknown weight, an untied head: an error, and nothing that looks complete."""
    state = trained_state(source)
    spoil(state)
    with pytest.raises((RuntimeError, UserError), match=said):
        write(tmp_path / "out", state, source, lambda model: None)
    assert not (tmp_path / "out").exists()


def test_a_failed_check_leaves_no_folder(source: str, tmp_path: Path) -> None:
    """The caller's own check of the reopened model decides, and an older folder of that name stays as it was."""
    with pytest.raises(RuntimeError, match="its log-probs differ"):
        write(tmp_path / "out", trained_state(source), source, lambda model: "its log-probs differ")
    assert not (tmp_path / "out").exists()
    write(tmp_path / "out", trained_state(source), source, lambda model: None)
    before = digest_file(tmp_path / "out" / "model.safetensors")
    with pytest.raises(RuntimeError):
        write(tmp_path / "out", load_model(source, ModelTable(), torch.float32).state_dict(), source, lambda m: "no")
    assert digest_file(tmp_path / "out" / "model.safetensors") == before


def test_an_interrupted_write_leaves_no_folder(source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An interrupt half way leaves nothing under the folder's name, and the next attempt succeeds."""
    tokenizer = load_tokenizer(source, ModelTable())

    def interrupt(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(type(tokenizer), "save_pretrained", interrupt)
    with pytest.raises(KeyboardInterrupt):
        export_model(tmp_path / "out", trained_state(source), source, ModelTable(), tokenizer, lambda model: None)
    assert not (tmp_path / "out").exists()
    monkeypatch.undo()
    write(tmp_path / "out", trained_state(source), source, lambda model: None)
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_a_full_disk_is_said_before_anything_is_written(
    source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Too little space is the user's to mend."""
    import shutil

    monkeypatch.setattr(shutil, "disk_usage", lambda path: type("Usage", (), {"free": 1000})())
    with pytest.raises(UserError, match="free"):
        write(tmp_path / "out", trained_state(source), source, lambda model: None)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("targets", [[], ["q_proj", "down_proj"]])
def test_merged_lora_is_its_formula_and_peft(source: str, dtype: torch.dtype, targets: list[str]) -> None:
    """W + alpha / rank B A, summed in float32 and then rounded, equals peft's merge_and_unload and the live model."""
    table = ModelTable(lora=LoraTable(enabled=True, rank=4, alpha=10.0, target_modules=targets))
    model = attach_lora(load_model(source, table, torch.float32), table.lora)
    torch.manual_seed(2)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.05)
    adapters = {n: t.detach().clone() for n, t in model.state_dict().items() if ".lora_" in n}
    merged = merge_lora(source, table, {n: t.to(dtype) for n, t in adapters.items()})
    plain = load_model(source, table, torch.float32).state_dict()
    assert set(merged) == set(plain) and all(t.dtype is dtype for t in merged.values())
    touched = 0
    for name, tensor in plain.items():
        key = f"base_model.model.{name.removesuffix('.weight')}"
        if f"{key}.lora_A.default.weight" in adapters:
            down, up = (adapters[f"{key}.lora_{x}.default.weight"].to(dtype).float() for x in "AB")
            tensor = tensor + 10.0 / 4 * (up @ down)
            touched += 1
        if dtype is torch.float32:
            assert torch.allclose(merged[name], tensor, rtol=0, atol=1e-6)
        else:  # rounded once, at the end
            assert float((merged[name] != tensor.to(dtype)).float().mean()) < 0.01
    assert touched == (4 if targets else 14)
    if dtype is torch.float32:
        live = logits_of(model)
        assert not torch.allclose(live, logits_of(load_model(source, table, dtype)), atol=1e-3)
        by_peft = model.merge_and_unload()
        assert torch.allclose(logits_of(by_peft), live, atol=1e-5)
        assert all(torch.allclose(merged[n], t, atol=1e-6) for n, t in by_peft.state_dict().items())


def test_only_adapters_are_trained(source: str) -> None:
    """The base is frozen, the output head is left alone, and an unknown layer name lists the known ones."""
    model = attach_lora(load_model(source, ModelTable(), torch.float32), LoraTable(enabled=True, rank=2))
    trained = [n for n, p in model.named_parameters() if p.requires_grad]
    assert trained and all(".lora_" in n for n in trained) and not any("lm_head" in n for n in trained)
    with pytest.raises(UserError, match=r"target_modules=\['nothing'\].*q_proj"):
        attach_lora(
            load_model(source, ModelTable(), torch.float32), LoraTable(enabled=True, target_modules=["nothing"])
        )


def test_the_random_model_is_decided_by_texts_shape_and_seed(tmp_path: Path) -> None:
    """Two makings give equal bytes, without touching the random state; another seed gives other weights."""
    torch.manual_seed(0)
    make_random_model(tmp_path / "a", TEXTS, SHAPE, 7)
    drawn = torch.rand(1)
    torch.manual_seed(1)
    make_random_model(tmp_path / "b", TEXTS, SHAPE, 7)
    make_random_model(tmp_path / "c", TEXTS, SHAPE, 8)
    torch.manual_seed(0)
    assert torch.equal(torch.rand(1), drawn)
    for name in ("model.safetensors", "tokenizer.json", "config.json"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    assert digest_file(tmp_path / "a" / "model.safetensors") != digest_file(tmp_path / "c" / "model.safetensors")
    model = load_model(str(tmp_path / "a"), ModelTable(), torch.float32)
    assert model.lm_head.weight.data_ptr() == model.get_input_embeddings().weight.data_ptr()
    assert load_tokenizer(str(tmp_path / "a"), ModelTable()).model_max_length == SHAPE.context


def test_dropout_is_off_in_training_mode(tmp_path: Path) -> None:
    """A model whose config asks for dropout computes the same twice, so that log-probs can be compared."""
    from numerics.tiny import network

    noisy = network("gpt2", torch.float32, attn_pdrop=0.5, resid_pdrop=0.5, embd_pdrop=0.5)
    make_random_model(tmp_path / "tokenizer", TEXTS, SHAPE, 0)
    load_tokenizer(str(tmp_path / "tokenizer"), ModelTable()).save_pretrained(tmp_path / "model")
    noisy.save_pretrained(tmp_path / "model")
    model = load_model(str(tmp_path / "model"), ModelTable(), torch.float32).train()
    assert torch.equal(logits_of(model), logits_of(model))
    noisy.train()
    assert not torch.equal(logits_of(noisy), logits_of(noisy))


def test_the_log_tells_what_was_made(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Untrained weights are called that."""
    with caplog.at_level(logging.INFO, "coalign"):
        make_random_model(tmp_path / "a", TEXTS, SHAPE, 7)
    assert "random weights" in caplog.text


def test_an_exported_model_ends_where_it_was_trained_to(source: str, tmp_path: Path) -> None:
    """The trained end of turn is in both configs, beside the source's own stops, and generate ends there."""
    state = trained_state(source)
    tokenizer = load_tokenizer(source, ModelTable())
    export_model(tmp_path / "out", state, source, ModelTable(), tokenizer, lambda model: None, [9, 2])
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model.generation_config.eos_token_id == [9, 2, 4] and model.config.eos_token_id == [9, 2, 4]
    assert model.generation_config.temperature == 0.3

    def always_nine(head: Any, inputs: Any, logits: torch.Tensor) -> torch.Tensor:
        return logits.index_fill(-1, torch.tensor([9]), 1e4)

    model.lm_head.register_forward_hook(always_nine)
    assert model.generate(IDS, do_sample=False, max_new_tokens=8)[0].tolist() == [*IDS[0].tolist(), 9]


def test_a_codec_stops_at_the_sources_list(source: str, tmp_path: Path) -> None:
    """Of the generation config alone; a damaged one is an error in one line."""
    folder = tmp_path / "model"
    shutil.copytree(source, folder)
    assert load_codec(str(folder), ModelTable()).stop_ids == [4]
    GenerationConfig(eos_token_id=[7, 4, 9]).save_pretrained(folder)
    codec = load_codec(str(folder), ModelTable())
    assert codec.stop_ids == [4, 7, 9] and codec.ends == [4, 7, 9]
    (folder / "generation_config.json").unlink()
    assert load_codec(str(folder), ModelTable()).stop_ids == [4]
    for damaged in ("[]", "{", "null", "3", ""):
        (folder / "generation_config.json").write_text(damaged)
        with pytest.raises(UserError, match=r"generation_config\.json"):
            load_codec(str(folder), ModelTable())
