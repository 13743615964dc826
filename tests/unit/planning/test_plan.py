"""The plan before a run: formulas against numbers worked out by hand, the way out of what can't fit, the command."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from coalign.commandline import load
from coalign.config import GenerationTable, LoraTable, ModelTable, TrainTable
from coalign.errors import UserError
from coalign.models import known_shapes, worker_memory
from coalign.models import shape as shapes
from coalign.models.worker_memory import GB
from coalign.planning import data_counts, machine, plan_text, training_memory, workload
from coalign.planning import plan as planning
from coalign.planning.training_memory import TrainingSetup

ROOT = Path(__file__).resolve().parents[3]
SEVEN = known_shapes.KNOWN["7b"][0]
ROUND = dataclasses.replace(SEVEN, given_parameters=7 * 10**9)  # 7B as papers count
# As on the hub: the sizes of published checkpoints.
PUBLISHED = {
    "1b": 1_235_814_400,
    "4b": 4_022_468_096,
    "7b": 6_738_415_616,
    "mistral-7b": 7_241_732_096,
    "8b": 8_030_261_248,
    "13b": 13_015_864_320,
    "32b": 32_763_876_352,
    "70b": 68_976_648_192,
}
GPT2 = {"model_type": "gpt2", "n_embd": 768, "n_layer": 12, "n_head": 12, "vocab_size": 50257, "n_positions": 1024}
LORA = ModelTable(lora=LoraTable(enabled=True))


def training(stage: int, ranks: int = 8, model: ModelTable | None = None, **settings: Any) -> TrainingSetup:
    train = TrainTable.model_validate({"zero_stage": stage, **settings})
    return TrainingSetup(ROUND, model or ModelTable(), train, ranks, 2048)


def plan_of(tmp_path: Path, words: str = "", options: str = "--shape 7b") -> planning.Plan:
    """Return the plan of a config without a run, changed by key=value words."""
    path = tmp_path / "plan.toml"
    path.write_text(f'[run]\nfolder = "{tmp_path}"\n[model]\npath = "elsewhere/model"\n')
    config = load(path, words.split())
    return planning.make_plan(config, machine.read_machine_options(options.split())[0])


def run_plan(*words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "launch/plan.py", *words]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameters_are_those_of_published_models(name: str) -> None:
    assert shapes.count_parameters(known_shapes.known_shape(name)) == PUBLISHED[name]


def test_parameters_of_a_config_file(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(GPT2))
    assert shapes.count_parameters(shapes.read_shape(tmp_path)) == 124_439_808
    qwen = {"model_type": "qwen2", "hidden_size": 3584, "num_hidden_layers": 28, "num_attention_heads": 28}
    qwen |= {"num_key_value_heads": 4, "intermediate_size": 18944, "vocab_size": 152064}
    (tmp_path / "config.json").write_text(json.dumps(qwen))
    assert shapes.count_parameters(shapes.read_shape(tmp_path)) == 7_615_616_512  # Qwen2.5 7B


def test_counts_and_activations_are_those_of_transformers_and_torch() -> None:
    """Tiny models: the weights, and what a layer keeps for its backward pass, byte by byte."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    widths = {"hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 176}
    for dtype, attention in ((torch.bfloat16, "sdpa"), (torch.float32, "eager")):
        kept: dict[int, int] = {}
        for layers in (2, 3):
            config = LlamaConfig(
                num_hidden_layers=layers, vocab_size=96, attn_implementation=attention, attention_bias=True, **widths
            )
            model = LlamaForCausalLM(config).to(dtype)
            shape = shapes._llama_shape("tiny", "llama", config.to_dict())
            assert shapes.count_parameters(shape) == sum(p.numel() for p in model.parameters())
            weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
            saved: dict[int, torch.Tensor] = {}

            def keep(tensor: torch.Tensor, saved: dict[int, torch.Tensor] = saved) -> torch.Tensor:
                saved[tensor.untyped_storage().data_ptr()] = tensor
                return tensor

            mask = torch.full((2, 1, 16, 16), torch.finfo(dtype).min, dtype=dtype).triu(1)
            with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
                hidden = model.model(torch.zeros(2, 16, dtype=torch.long), attention_mask=mask).last_hidden_state
            assert hidden.requires_grad
            kept[layers] = sum(t.untyped_storage().nbytes() for key, t in saved.items() if key not in weights)
        a_token = (kept[3] - kept[2]) / 32
        assert a_token == training_memory.layer_activation_bytes(shape, dtype.itemsize, attention, 16)


def test_states_are_those_of_the_zero_paper() -> None:
    """2 + 2 + 12 bytes a weight, figure 1 of arXiv 1910.02054: what is split at which stage."""

    def parts(stage: int) -> list[float]:
        plan = training(stage)
        found = (
            training_memory.weights_bytes(plan),
            training_memory.gradients_bytes(plan),
            training_memory.optimizer_bytes(plan),
        )
        return [num_bytes / GB for num_bytes in found]

    assert parts(0) == [14, 14, 84]
    assert parts(1) == [14, 14, 10.5]
    assert parts(2) == [14, 1.75, 10.5]
    assert parts(3) == [1.75, 1.75, 10.5]
    assert sum(parts(3)) == 16 * 7 / 8
    paper = dataclasses.replace(SEVEN, given_parameters=7_500_000_000)
    for stage, expected in enumerate((120, 31.4, 16.6, 1.9)):  # the figure's own numbers, 64 ranks
        plan = dataclasses.replace(training(stage, 64), shape=paper)
        states = (
            training_memory.weights_bytes(plan)
            + training_memory.gradients_bytes(plan)
            + training_memory.optimizer_bytes(plan)
        )
        assert states / GB == pytest.approx(expected, abs=0.05)
    single = training(0, 1, precision="float32")
    assert training_memory.optimizer_bytes(single) == 8 * 7 * GB  # no master copy of what is fp32 already
    assert training_memory.optimizer_bytes(training(2, 1, precision="float32")) == 12 * 7 * GB


def test_lora_trains_few_weights() -> None:
    """Rank 16 in all maps of Llama 2 7B: 32 x 16 x (4 x (4096 + 4096) + 3 x (4096 + 11008)) = 39,976,960."""
    adapters = 39_976_960
    assert shapes.count_lora_parameters(SEVEN, LoraTable()) == adapters
    two = LoraTable(target_modules=["q_proj", "model.layers.0.self_attn.v_proj"])
    assert shapes.count_lora_parameters(SEVEN, two) == 32 * 16 * 2 * (4096 + 4096)
    plan = training(2, model=LORA)
    assert training_memory.weights_bytes(plan) == 2 * (7 * 10**9 + adapters)
    assert training_memory.gradients_bytes(plan) == 2 * adapters / 8
    assert training_memory.optimizer_bytes(plan) == 12 * adapters / 8
    with pytest.raises(UserError, match="'query'"):
        shapes.count_lora_parameters(SEVEN, LoraTable(target_modules=["query"]))


def test_offloading_moves_states_to_the_host() -> None:
    plan = training(3, offload_optimizer=True, offload_parameters=True)
    assert (
        training_memory.weights_bytes(plan)
        == training_memory.gradients_bytes(plan)
        == training_memory.optimizer_bytes(plan)
        == 0
    )
    assert training_memory.step_bytes(plan) == 0
    assert training_memory.host_bytes(plan) - training_memory.host_bytes(training(3)) == (12 + 4 + 2 + 2) * 7 * GB / 8
    assert training_memory.gradients_bytes(training(1, offload_optimizer=True)) == 14 * GB  # whole on every rank


def test_activations_as_korthikanti_counts_them() -> None:
    """34 h a token and layer (section 4.1) less the two dropout masks of one byte; 2 h with full recomputation."""
    h, heads = 512, 8
    gpt = shapes.Shape("gpt", 4, h, heads, heads, h // heads, 4 * h, 1000, 1024, gpt2=True, fused_gelu=True)
    statistics = 4 * 2 + 4 * heads  # of the norms, and logsumexp of attention, which the paper leaves out
    assert training_memory.layer_activation_bytes(gpt, 2) == (34 - 2) * h + statistics
    settings = {"micro_batch_tokens": 4096, "zero_stage": 0}
    plain = TrainingSetup(gpt, ModelTable(), TrainTable.model_validate(settings), 1, 256)
    again = dataclasses.replace(plain, train=TrainTable.model_validate(settings | {"gradient_checkpointing": True}))
    layer = training_memory.layer_activation_bytes(gpt, 2)
    saved = training_memory.activation_bytes(plain) - training_memory.activation_bytes(again)
    assert saved == 4096 * (3 * layer - 4 * 2 * h)
    # Llama 2 7B by hand: norms 2 x 8 h, queries, keys, values and result 8 h, MLP 8 f, three small ones.
    assert training_memory.layer_activation_bytes(SEVEN, 2) == 24 * 4096 + 8 * 11008 + 8 + 4 * 32


def test_grouped_keys_count_in_the_cache_and_not_in_masked_attention() -> None:
    mistral = known_shapes.KNOWN["mistral-7b"][0]
    assert worker_memory.kv_bytes(SEVEN, 2) == 524_288
    assert worker_memory.kv_bytes(mistral, 2) == 524_288 // 4
    ungrouped = dataclasses.replace(mistral, num_kv_heads=32)
    assert training_memory.layer_activation_bytes(mistral, 2) == training_memory.layer_activation_bytes(ungrouped, 2)


def test_the_head_holds_a_block_of_logits_and_what_is_kept() -> None:
    plan = dataclasses.replace(training(2, micro_batch_tokens=16384), shape=SEVEN)
    block = 16384 * (2**26 // 16384)
    assert training_memory.head_bytes(plan) == 8 * 4096 * 16384 + 8 * block + 2 * 2**27 + 2 * 32000 * 4096
    small = dataclasses.replace(plan, train=plan.train.model_copy(update={"micro_batch_tokens": 2048}))
    assert training_memory.head_bytes(small) == 8 * 4096 * 2048 + (8 + 2) * 2048 * 32000 + 2 * 32000 * 4096
    capped = dataclasses.replace(plan, shape=dataclasses.replace(SEVEN, plain_head=False))
    assert training_memory.head_bytes(capped) == 12 * 16384 * 32000 + 2 * 32000 * 4096


def test_a_pass_and_a_step_are_not_there_together() -> None:
    parts = [worker_memory.Part(when, size, "", when) for when, size in (("always", 1.0), ("pass", 5.0), ("step", 3.0))]
    assert worker_memory.Memory(tuple(parts)).total_bytes == 6.0


def test_vllm_fills_its_share() -> None:
    generation = GenerationTable(engine="vllm")
    assert worker_memory.generation_memory(SEVEN, generation, 80 * GB, 400, 100).total_bytes == pytest.approx(80 * GB)
    assert worker_memory.generation_memory(SEVEN, generation, 14 * GB, 400, 100).total_bytes > 14 * GB


def test_flops() -> None:
    """6 N D and 12 L q T D; recomputing adds a third; frozen weights save a third, and adapters cost their own."""
    matrices, attention = 6 * 6_738_415_616, 12 * 32 * 4096 * 512
    full = workload.training_flops(SEVEN, ModelTable(), 1000, 512, False)
    assert full == 1000 * (matrices + attention)
    assert workload.training_flops(SEVEN, ModelTable(), 1000, 512, True) == pytest.approx(full * 4 / 3)
    lora = workload.training_flops(SEVEN, LORA, 1000, 512, False)
    assert lora == 1000 * (matrices * 2 / 3 + attention + 6 * 39_976_960)
    assert workload.forward_flops(SEVEN, 1000, 512) == full / 3


def test_a_checkpoint_by_hand() -> None:
    full, tiny = ModelTable(), TrainTable(precision="float32")
    assert workload.checkpoint_bytes(ROUND, full, TrainTable(zero_stage=2)) == 14 * 7 * GB
    assert workload.checkpoint_bytes(ROUND, full, TrainTable(zero_stage=3)) == 12 * 7 * GB
    assert workload.checkpoint_bytes(ROUND, full, tiny) == 16 * 7 * GB
    assert workload.checkpoint_bytes(ROUND, LORA, TrainTable(zero_stage=3)) == 14 * GB + 12 * 39_976_960


def test_work_follows_the_config(tmp_path: Path) -> None:
    words = "data.max_tasks=10 data.max_sft_inputs=64 data.max_align_inputs=5 sample.samples=3 sft.max_steps=7"
    plan = plan_of(tmp_path, words, "--shape 7b --prompt-tokens 100 --answer-tokens 10")
    work = {one.step: one for one in workload.works(plan.config, plan.shape, plan.counts)}
    assert list(work) == ["prepare", "paraphrase", "sft", "sample", "judge", "rank", "align", "eval"]
    assert work["sft"].tokens == 7 * 32 * 110
    assert work["sample"].new_tokens == 10 * 5 * 4 * 3 * 10
    assert work["sample"].tokens == 10 * 5 * 4 * 100  # a prompt is computed once for its samples
    assert work["align"].what == "13 updates of 16, 200 groups"
    assert work["align"].tokens == 200 * (100 + 8 * 10)
    seconds = work["sft"].read_flops / (8 * 989e12 * 0.35)
    assert plan_text.hours(plan, work["sft"]) == pytest.approx(seconds / 3600)


def test_counts_come_from_prepare_when_it_is_complete(tmp_path: Path) -> None:
    folder = tmp_path / "prepare"
    folder.mkdir()
    rows = [{"task": "t", "input": "x" * 40 * (1 + n % 2), "outputs": ["y" * 8]} for n in range(10)]
    (folder / "tasks.jsonl").write_text(json.dumps({"id": "t", "instruction": "i" * 200}) + "\n")
    (folder / "examples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    counts = {"tasks": {"seen": 1, "unseen": 0}, "inputs": {"sft": 4, "align": 3, "dev": 2, "test": 1}}
    (folder / "manifest.json").write_text(
        json.dumps({"config": {}, "inputs": {}, "outputs": {}, "counts": counts, "digest": "d"})
    )
    found = data_counts.make_counts(folder, plan_of(tmp_path).config.data, machine.ASSUMED, 4096)
    assert (found.tasks, found.inputs) == (1, counts["inputs"])
    assert (found.instruction_tokens, found.prompt_tokens, found.answer_tokens) == (50, 65 + 12, 3)
    assert found.longest_tokens == 70 + 12 + 3
    many = [{"task": "t", "input": f"{n}" * 300, "outputs": ["y"]} for n in range(3000)]
    (folder / "examples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in many))
    spread = data_counts._spread_rows(folder / "examples.jsonl", 50)
    assert len(spread) == 50 and int(spread[-1]["input"][:4]) > 2900


# What is wrong, the machine, and the setting that is proposed.
TOO_LARGE = [
    ("train.zero_stage=2 train.micro_batch_tokens=32768", "--shape 7b", "train.gradient_checkpointing=true"),
    (
        "train.gradient_checkpointing=true train.zero_stage=3 train.micro_batch_tokens=65536",
        "--shape 7b --gpu-memory 40",
        "train.micro_batch_tokens",
    ),
    ("train.gradient_checkpointing=true train.zero_stage=1", "--shape 13b", "train.zero_stage="),
    ("train.gradient_checkpointing=true train.zero_stage=3", "--shape 70b --gpus 8", "--ranks"),
    ("train.gradient_checkpointing=true train.zero_stage=0", "--shape 7b --gpu-memory 48 --gpus 1", "model.lora"),
    ("train.zero_stage=0 train.micro_batch_tokens=32768", "--shape 70b --gpus 1", "train.zero_stage=3"),
    (
        "train.gradient_checkpointing=true train.zero_stage=3 model.lora.enabled=true train.micro_batch_tokens=256",
        "--shape 4b --gpu-memory 5 --gpus 1024",
        "",
    ),
    (
        "train.precision=float32 train.zero_stage=3 model.lora.enabled=true",
        "--shape 70b --gpu-memory 16 --gpus 1024 --prompt-tokens 1500",
        "train.precision=bfloat16",
    ),
    ("train.precision=float32 train.zero_stage=0", "--shape 70b --gpu-memory 12 --gpus 1", "train.precision=bfloat16"),
    (
        "train.zero_stage=1 train.gradient_checkpointing=true model.lora.enabled=true train.micro_batch_tokens=2048",
        "--shape 70b --gpu-memory 24 --gpus 1",
        "train.zero_stage=3 train.offload_parameters=true",
    ),
]


@pytest.mark.parametrize(("words", "options", "proposed"), TOO_LARGE)
def test_the_proposed_change_makes_it_fit(tmp_path: Path, words: str, options: str, proposed: str) -> None:
    """Whatever is proposed is given to the command's own parsers, and then fits."""
    plan = plan_of(tmp_path, words, options)
    change = planning.smallest_change(plan)
    if not proposed:
        assert change is None
        assert "no setting tried here makes it fit" in str(planning.complaint_of_plan(plan))
        return
    assert not planning.training_fits(plan) and change
    text = planning.words_of(change)
    assert proposed in text and f"it fits with {text} (" in str(planning.complaint_of_plan(plan))
    numbers = [text[text.index("--") :]] if "--" in text else []
    settings = text[: text.index("--")] if "--" in text else text
    again = plan_of(tmp_path, f"{words} {settings}", " ".join([options, *numbers]))
    assert planning.training_fits(again)
    for key in change if len(change) > 1 else ():
        fewer = {name: value for name, value in change.items() if name != key}
        if key == "train.zero_stage" and "train.offload" in text:  # which is refused without the stage
            continue
        assert not planning.training_fits(planning.changed(plan, fewer)), f"{key} is not needed"


def test_ways_are_tried_in_order(tmp_path: Path) -> None:
    """Where several changes would help, the first of the order is named, and of its sizes the smallest change."""
    plan = plan_of(tmp_path, "train.zero_stage=2 train.micro_batch_tokens=32768")
    assert planning.smallest_change(plan) == {"train.gradient_checkpointing": True}
    plan = plan_of(tmp_path, "train.zero_stage=3 train.gradient_checkpointing=true train.micro_batch_tokens=131072")
    change = planning.smallest_change(plan)
    assert change == {"train.micro_batch_tokens": 65536}


def test_tokens_in_flight_are_what_half_of_the_free_memory_holds(tmp_path: Path) -> None:
    """A power of two, by the formulas of the plan; a setting is taken as it is."""
    free = {tokens: worker_memory.tokens_in_flight(SEVEN, "auto", tokens * GB) for tokens in (1, 10, 36, 66, 500)}
    assert free == {1: 4096, 10: 4096, 36: 16384, 66: 32768, 500: 65536}
    for tokens in (16384, 32768):
        table = GenerationTable(batch_tokens=tokens)
        needed = worker_memory.sampling_bytes(SEVEN, table, 96, 32)
        assert worker_memory.tokens_in_flight(SEVEN, "auto", 2 * needed + 1) == tokens
        assert worker_memory.tokens_in_flight(SEVEN, "auto", 2 * needed - 1) == tokens // 2
    assert plan_of(tmp_path).config.generation.batch_tokens == 32768
    assert plan_of(tmp_path, "generation.batch_tokens=5000").config.generation.batch_tokens == 5000


def test_generation_that_does_not_fit(tmp_path: Path) -> None:
    plan = plan_of(tmp_path, "generation.workers=16 train.zero_stage=3 train.gradient_checkpointing=true")
    assert "it fits with generation.workers=8" in str(planning.complaint_of_plan(plan))
    words = "generation.batch_tokens=262144 train.zero_stage=3 train.gradient_checkpointing=true"
    plan = plan_of(tmp_path, words)
    assert "it fits with generation.batch_tokens=65536" in str(planning.complaint_of_plan(plan))
    plan = plan_of(tmp_path, "generation.batch_tokens=262144 train.zero_stage=2 train.micro_batch_tokens=32768")
    said = str(planning.complaint_of_plan(plan))
    assert "train.gradient_checkpointing=true (" in said and "generation.batch_tokens=65536" in said
    words = "train.zero_stage=3 train.gradient_checkpointing=true"
    said = str(planning.complaint_of_plan(plan_of(tmp_path, words, "--shape 70b --gpus 64")))
    assert "it fits with generation.gpus_per_worker=2.0" in said


# Of the workers: what is wrong, the machine, and all that is proposed.
WORKERS = [
    ("workers=8 gpus_per_worker=2", "--shape 4b --gpus 1", "gpus_per_worker=1.0 workers=1"),
    ("workers=0 gpus_per_worker=4", "--shape 1b --gpus 2", "gpus_per_worker=2.0"),
    (
        "workers=2 gpus_per_worker=0.25 batch_tokens=65536",
        "--shape 13b --gpus 1",
        "gpus_per_worker=1.0 workers=1 batch_tokens=32768",
    ),
    ("workers=2 gpus_per_worker=0.25", "--shape 13b --gpus 1", "gpus_per_worker=1.0 workers=1"),
    ("dtype=float32 gpus_per_worker=8", "--shape 32b --gpus 1", "dtype=bfloat16 gpus_per_worker=1.0 workers=1"),
    ("engine=vllm gpus_per_worker=4", "--shape 32b --gpus 2", "gpus_per_worker=2.0 workers=1"),
    ("workers=1", "--shape 70b --gpus 1", ""),
]


@pytest.mark.parametrize(("words", "options", "proposed"), WORKERS)
def test_the_change_proposed_for_workers_makes_them_fit(
    tmp_path: Path, words: str, options: str, proposed: str
) -> None:
    words, proposed = (" ".join(f"generation.{word}" for word in text.split()) for text in (words, proposed))
    plan = plan_of(tmp_path, words, options)
    said = planning._generation_complaint(plan)
    assert not planning.generation_fits(plan)
    if not proposed:
        assert "no setting tried here makes it fit" in said and "more of them (--gpus)" in said
        return
    assert said.endswith(f"; it fits with {proposed}")
    assert planning.generation_fits(plan_of(tmp_path, f"{words} {proposed}", options))


def test_workers_get_no_more_gpus_than_a_node_has(tmp_path: Path) -> None:
    words = "slurm.nodes=8 slurm.gpus_per_node="
    assert "gpus_per_worker=2.0" in planning._generation_complaint(plan_of(tmp_path, f"{words}2", "--shape 70b"))
    assert "no setting tried here" in planning._generation_complaint(plan_of(tmp_path, f"{words}1", "--shape 70b"))


def test_the_table_in_the_docs_is_what_the_formulas_give() -> None:
    written = (ROOT / "docs" / "planning.md").read_text(encoding="utf-8")
    assert "\n".join(plan_text.sizing_lines()) in written, (
        "put the output of launch/plan.py --table into docs/planning.md"
    )


def test_the_command_prints_a_plan(tmp_path: Path) -> None:
    done = run_plan("configs/llama2-7b.toml", f"run.folder={tmp_path}", "--gpus", "8")
    assert done.returncode == 0, done.stderr
    assert "6.738B parameters" in done.stdout and "nothing was measured" in done.stdout
    for word in ("weights", "communication buffers", "peak", "generation", "hours", "assumed:", "align", "--mfu"):
        assert word in done.stdout
    here = run_plan(f"run.folder={tmp_path}")  # the default config's model is a folder here
    assert here.returncode == 0 and "examples/phrasebook/base/config.json" in here.stdout


def test_the_command_refuses_what_cannot_fit(tmp_path: Path) -> None:
    done = run_plan(
        "configs/llama2-7b.toml", f"run.folder={tmp_path}", "train.gradient_checkpointing=false", "--gpus=8"
    )
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1 and "it fits with train.gradient_checkpointing=true (" in done.stderr


# Words of the config, options, the GPUs and ranks planned, and what is said of them.
GPUS = [
    ("", "", (8, 8), "an assumption"),
    ("slurm.nodes=1 slurm.gpus_per_node=2", "", (2, 2), "slurm.nodes=1 x slurm.gpus_per_node=2"),
    ("slurm.nodes=4 slurm.gpus_per_node=4 train.ray_ranks=2", "", (16, 16), "slurm.nodes=4 x slurm.gpus_per_node=4"),
    ("slurm.nodes=2 slurm.gpus_per_node=4 slurm.ranks_per_node=1", "", (8, 2), "slurm.ranks_per_node=1"),
    ("slurm.nodes=2 train.ray_ranks=3", "", (3, 3), "train.ray_ranks"),
    ("slurm.gpus_per_node=2 train.ray_ranks=3", "--gpus 4", (4, 4), ""),
    ("slurm.gpus_per_node=2", "--ranks 1", (1, 1), ""),
]


@pytest.mark.parametrize(("words", "options", "expected", "said"), GPUS)
def test_gpus_not_given_are_those_of_the_config(
    tmp_path: Path, words: str, options: str, expected: tuple[int, int], said: str
) -> None:
    plan = plan_of(tmp_path, words, f"--shape 1b {options}")
    assert (plan.options.gpus, plan.ranks) == expected
    lines = [line for line in plan_text.plan_lines(plan) if "(--gpus): " in line]
    assert len(lines) == bool(said) and all(said in line for line in lines)


BAD = [
    (["nowhere.toml"], "no such config file"),
    (["model.path=some/where"], "is neither a local folder nor a known name"),
    (["model.path=docs"], "holds no config.json"),
    (["--shape", "9b"], "choose among qwen2.5-0.5b, "),
    (["--layers", "32"], "--hidden is missing"),
    (["--hidden", "64"], "--layers is missing: --hidden alone"),
    (
        ["configs/llama2-7b.toml", "--vocabulary", "128000", "--context=100"],
        "--layers is missing: --vocab.*, --context",
    ),
    (["--kv-heads", "2", "--parameters", "7e9"], "--layers is missing: --kv-heads, --parameters alone"),
    (["--shape", "7b", "--layers", "2", "--hidden", "64"], "--shape 7b has its own .* leave out --layers, --hidden,"),
    (["--shape", "7b", "--context", "10", "--parameters", "7e9"], "leave out --context, or --shape"),
    (["--layers", "2", "--hidden", "100", "--heads", "7"], "not divisible by 7"),
    (["--gpus"], "--gpus needs a value"),
    (["--gpus", "0"], "a whole number above 0"),
    (["--gpus", "1.5"], "a whole number above 0"),
    (["--gpu-memory", "much"], "a number was expected"),
    (["--mfu", "35"], "is a share"),
    (["--ranks", "9", "--gpus", "8"], "a GPU of its own"),
    (["slurm.gpus_per_node=2", "slurm.ranks_per_node=3"], "ranks_per_node=3: a rank needs a GPU of its own"),
    (["--cpus", "3"], "unknown option '--cpus'"),
    (["train.zero_stag=3"], "did you mean"),
    (["a.toml", "b.toml"], "one config file was expected"),
]


@pytest.mark.parametrize(("words", "message"), BAD, ids=[" ".join(words) for words, _ in BAD])
def test_bad_words(words: list[str], message: str, capsys: pytest.CaptureFixture[str], monkeypatch: Any) -> None:
    """In this process, since a start takes longer than all of them; the command itself is tested above."""
    monkeypatch.chdir(ROOT)
    monkeypatch.syspath_prepend(str(ROOT / "launch"))
    import plan

    with pytest.raises(UserError, match=message):
        plan.main(words)
    assert capsys.readouterr().out == ""


LLAMA = {"model_type": "llama", "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
LLAMA |= {"intermediate_size": 176, "vocab_size": 96}
BAD_VALUES = [
    ("hidden_size", '"x"'),
    ("hidden_size", "0"),
    ("hidden_size", "64.5"),
    ("num_hidden_layers", "1e400"),
    ("num_hidden_layers", "1" + "0" * 400),
    ("num_hidden_layers", "-3"),
    ("num_hidden_layers", "null"),
    ("num_attention_heads", "0"),
    ("num_attention_heads", "true"),
    ("num_key_value_heads", "0"),
    ("vocab_size", "[96]"),
]


@pytest.mark.parametrize(("key", "value"), BAD_VALUES, ids=[f"{key}={value[:5]}" for key, value in BAD_VALUES])
def test_widths_and_counts_are_positive_whole_numbers(tmp_path: Path, key: str, value: str) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(LLAMA | {"head_dim": None}))
    assert shapes.read_shape(tmp_path).head_size == 16
    path.write_text(json.dumps(LLAMA | {key: "HERE"}).replace('"HERE"', value))
    with pytest.raises(UserError, match=rf"config.json: {key}=.*: a whole number from 1 to") as caught:
        shapes.read_shape(tmp_path)
    assert len(str(caught.value)) < len(str(path)) + 120


def test_bad_config_files(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    cases = [
        ("{", "malformed JSON"),
        ("[]", "holds no table"),
        (json.dumps({"model_type": "mixtral"}), "'mixtral' is none whose"),
        (json.dumps({"model_type": "llama", "hidden_size": 64}), "no value for 'num_attention_heads'"),
    ]
    for text, message in cases:
        path.write_text(text)
        with pytest.raises(UserError, match=message):
            shapes.read_shape(tmp_path)


def test_numbers_describe_a_model() -> None:
    numbers = {"layers": 32, "hidden": 4096}
    assert shapes.count_parameters(shapes.shape_of_numbers(numbers)) == PUBLISHED["7b"]
    assert shapes.count_parameters(shapes.shape_of_numbers(numbers | {"parameters": 7 * 10**9})) == 7 * 10**9
    options, words = machine.read_machine_options(["x.toml", "--parameters", "7e9", "a.b=1", "--layers=32"])
    assert (options.parameters, options.layers, words) == (7 * 10**9, 32, ["x.toml", "a.b=1"])
    assert machine.read_machine_options(["--ranks", "2"])[0].gpus == 2
