"""What a run computes and writes, by formula: tokens, FLOPs and bytes on disk, step by step.

Used by planning, sizing and items. Sources: "Chinchilla" arXiv 2203.15556, "PaLM" arXiv 2204.02311.
"""

from __future__ import annotations

import dataclasses
import math

from coalign.config import (
    AlignTable,
    DataTable,
    EvalTable,
    GenerationTable,
    JudgeTable,
    ModelTable,
    ParaphraseTable,
    RankTable,
    RunTable,
    SampleTable,
    SftTable,
    StageTable,
    TrainTable,
)
from coalign.models.shape import Shape, count_lora_parameters, count_parameters
from coalign.models.sizes import PACK_ON_CPU
from coalign.models.worker_memory import element_bytes
from coalign.planning.data_counts import CHARACTERS_A_TOKEN, ROW_BYTES, Counts
from coalign.prompts import NUM_VARIANTS
from coalign.tables import SlurmTable

QUESTION_TOKENS = 60  # an assumption: a question to the judge, or for a rewrite, without what is asked about


@dataclasses.dataclass(frozen=True, slots=True)
class Tables:
    """The tables of the configuration that decide what is computed, and on how many GPUs."""

    run: RunTable
    model: ModelTable
    data: DataTable
    paraphrase: ParaphraseTable
    generation: GenerationTable
    train: TrainTable
    sft: SftTable
    sample: SampleTable
    judge: JudgeTable
    rank: RankTable
    align: AlignTable
    eval: EvalTable
    slurm: SlurmTable


@dataclasses.dataclass(frozen=True, slots=True)
class Work:
    """What one step computes and writes: `tokens` are read, `new_tokens` generated one after another."""

    step: str
    what: str
    tokens: float = 0.0
    new_tokens: float = 0.0
    read_flops: float = 0.0
    new_flops: float = 0.0
    disk_bytes: float = 0.0


def group_size(tables: Tables) -> int:
    """Return the most responses a group may have: W x K distinct ones, the gold answer, cut at rank.max_candidates."""
    return min(tables.rank.max_candidates, tables.sample.wordings_per_input * tables.sample.samples + 1)


def pack_width(train: TrainTable) -> int:
    """Return the tokens whose attention is computed in a row that items share.

    Where the device decides, a GPU skips the blocks in which no token sees another: PACK_ON_CPU tokens are near the
    truth.
    """
    return min(PACK_ON_CPU if train.pack_tokens < 0 else train.pack_tokens, train.micro_batch_tokens)


def row_widths(tables: Tables, counts: Counts) -> dict[str, int]:
    """Return the tokens of the widest row by stage: a pack in sft, a prompt with its responses (or one) in align."""
    responses = group_size(tables) if tables.train.shared_prefix else 1
    longest_prompt = max(1, counts.longest_tokens - counts.answer_tokens)
    return {
        "sft": max(pack_width(tables.train), counts.longest_tokens),
        "align": longest_prompt + responses * max(tables.sample.max_new_tokens, counts.answer_tokens),
    }


def forward_flops(shape: Shape, tokens: float, row_tokens: float) -> float:
    """Return 2 N a token for the matrices (Chinchilla, appendix F) and 4 L q T for attention (PaLM, appendix B).

    q is the width of all query heads, T the tokens of a row; a causal mask saves nothing here.
    """
    return tokens * (2 * count_parameters(shape) + 4 * shape.num_layers * shape.query_width * row_tokens)


def training_flops(shape: Shape, model: ModelTable, tokens: float, row_tokens: float, recomputed: bool) -> float:
    """Return 6 N D and attention: the backward pass costs two forward passes, a recomputed one costs one more.

    Frozen weights (LoRA) need no gradient of their own: 4 N D, and 6 for the adapters.
    """
    forward = forward_flops(shape, tokens, row_tokens)
    total = (4 if recomputed else 3) * forward
    if not model.lora.enabled:
        return total
    adapters = (8 if recomputed else 6) * count_lora_parameters(shape, model.lora) * tokens
    return total - 2 * count_parameters(shape) * tokens + adapters


def checkpoint_bytes(shape: Shape, model: ModelTable, train: TrainTable) -> float:
    """Return the size of a checkpoint: the weights in e bytes and 12 bytes a trained one (8 at stage 0 in float32).

    At stage 3 DeepSpeed leaves out trained weights, whose master copies are there, and keeps frozen ones.
    """
    e, lora = element_bytes(train.precision), model.lora
    total = count_parameters(shape)
    trained = count_lora_parameters(shape, lora) if lora.enabled else total
    weights = (total if lora.enabled else 0) if train.zero_stage == 3 else total + (trained if lora.enabled else 0)
    return e * weights + (8 if e == 4 and train.zero_stage == 0 else 12) * trained


def works(tables: Tables, shape: Shape, counts: Counts) -> list[Work]:
    """Return the work of every step, in order; sampling as if answers were as long as the gold ones are."""
    examples = sum(counts.inputs.values())
    row_bytes = ROW_BYTES + CHARACTERS_A_TOKEN * (counts.prompt_tokens + counts.answer_tokens)
    made = element_bytes("float32") * count_parameters(shape) if tables.model.init == "random" else 0
    prepare = Work("prepare", f"{counts.tasks} tasks, {examples} inputs", disk_bytes=examples * row_bytes + made)
    sample, judge, rank = _sampled(tables, shape, counts)
    return [
        prepare,
        _paraphrase(tables, shape, counts),
        _training("sft", tables, shape, counts),
        sample,
        judge,
        rank,
        _training("align", tables, shape, counts),
        _eval(tables, shape, counts),
    ]


def _generated(step: str, what: str, shape: Shape, asked: tuple[int, int], drawn: tuple[int, int]) -> Work:
    """Return the work of a step that reads prompts once each and draws answers: (how many, tokens of one) both."""
    (prompts, prompt), (answers, answer) = asked, drawn
    width = prompt + answer
    read, new = prompts * prompt, answers * answer
    flops = forward_flops(shape, read, prompt), forward_flops(shape, new, width)
    return Work(step, what, read, new, *flops, 2 * answers * (ROW_BYTES + 2 * CHARACTERS_A_TOKEN * answer))


def _paraphrase(tables: Tables, shape: Shape, counts: Counts) -> Work:
    table = tables.paraphrase
    wanted = table.num_wordings and table.num_wordings + (0 if table.files else table.num_dev + table.num_test)
    attempts = wanted * table.max_attempts
    prompts, answers = counts.tasks * min(NUM_VARIANTS, attempts), counts.tasks * attempts
    answer = min(table.max_new_tokens, counts.instruction_tokens)
    prompt = QUESTION_TOKENS + counts.instruction_tokens
    return _generated("paraphrase", f"{answers} rewrites at most", shape, (prompts, prompt), (answers, answer))


def _sampled(tables: Tables, shape: Shape, counts: Counts) -> tuple[Work, Work, Work]:
    """Return sample, judge (as if all responses were different and none matched) and rank, which computes nothing."""
    table, inputs = tables.sample, counts.inputs["align"]
    prompts = inputs * table.wordings_per_input
    responses, answer = prompts * table.samples, min(table.max_new_tokens, counts.answer_tokens)
    what = f"{responses} responses"
    sample = _generated("sample", what, shape, (prompts, counts.prompt_tokens), (responses, answer))
    kinds = 2 if tables.judge.type_question else 1
    questions = kinds * responses
    tokens = kinds * inputs * (counts.prompt_tokens + QUESTION_TOKENS) + questions * answer
    flops = forward_flops(shape, tokens, counts.prompt_tokens + QUESTION_TOKENS + answer)
    rows = 2 * responses * (ROW_BYTES + CHARACTERS_A_TOKEN * answer)
    judge = Work("judge", f"{questions} questions at most", tokens, read_flops=flops, disk_bytes=rows)
    groups = _num_groups(tables, counts)
    candidates = groups * group_size(tables) * (ROW_BYTES + CHARACTERS_A_TOKEN * answer)
    return sample, judge, Work("rank", f"{groups} groups at most", disk_bytes=candidates)


def _num_groups(tables: Tables, counts: Counts) -> int:
    """Return one group an input and wording; rank.wordings_per_input may ask for fewer."""
    sampled = tables.sample.wordings_per_input
    return counts.inputs["align"] * min(tables.rank.wordings_per_input or sampled, sampled)


def _training(step: str, tables: Tables, shape: Shape, counts: Counts) -> Work:
    """Return the work of a training step: its updates, the dev measurements between them, checkpoints and the model."""
    train, recomputed = tables.train, tables.train.gradient_checkpointing
    stage: StageTable
    if step == "sft":
        stage, batch, items = tables.sft, tables.sft.batch_rows, counts.inputs[tables.sft.split]
        item_tokens = counts.prompt_tokens + counts.answer_tokens
        width = max(pack_width(train), item_tokens)
    else:
        stage, batch, items = tables.align, tables.align.batch_groups, _num_groups(tables, counts)
        responses = group_size(tables)
        prompts = 1 if train.shared_prefix else responses
        item_tokens = prompts * counts.prompt_tokens + responses * counts.answer_tokens
        width = item_tokens if train.shared_prefix else counts.prompt_tokens + counts.answer_tokens
    used = stage.num_drawn(items, batch)
    updates = math.ceil(used / batch)
    tokens = used * item_tokens
    flops = training_flops(shape, tables.model, tokens, width, recomputed)
    if step == "align" and tables.align.loss == "dpo":
        flops += forward_flops(shape, min(items, used) * item_tokens, width)
    checkpoints = math.ceil(updates / train.checkpoint_every) if train.checkpoint_every else 0
    # While a checkpoint is written those that are kept are still there.
    kept = min(checkpoints, train.keep_last + 1) * checkpoint_bytes(shape, tables.model, train)
    folder = element_bytes(train.precision) * count_parameters(shape)
    what = f"{updates} updates of {batch}, {used} {'rows' if step == 'sft' else 'groups'}"
    return Work(step, what, tokens, 0.0, flops + _dev_flops(tables, shape, counts, updates), 0.0, kept + folder)


def _dev_flops(tables: Tables, shape: Shape, counts: Counts, updates: int) -> float:
    """Return the forward passes of the dev measurements: whole rows for every token, until the answers end."""
    train = tables.train
    if not train.eval_every:
        return 0.0
    measured = math.ceil(updates / train.eval_every) + 1
    rows = min(train.dev_inputs, counts.inputs["dev"]) * train.dev_wordings
    passes = 1 + min(train.dev_max_new_tokens, 2 * counts.answer_tokens)
    width = counts.prompt_tokens + counts.answer_tokens
    return forward_flops(shape, float(measured * rows * passes * width), width)


def _eval(tables: Tables, shape: Shape, counts: Counts) -> Work:
    table = tables.eval
    held_out = tables.paraphrase.num_test if table.split == "test" else tables.paraphrase.num_dev
    wordings = min(table.max_wordings or held_out, held_out)
    inputs = counts.inputs[table.split]
    if table.max_inputs:
        inputs = min(inputs, counts.tasks * table.max_inputs)
    pairs = len(table.models) * (inputs * wordings + 2 * table.noise_inputs * table.noise_samples)
    answer = min(table.max_new_tokens, counts.answer_tokens)
    what = f"{pairs} answers of {len(table.models)} models"
    return _generated("eval", what, shape, (pairs, counts.prompt_tokens), (pairs, answer))
