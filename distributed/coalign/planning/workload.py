"""What a run computes and writes, by formula: tokens, FLOPs and bytes on disk, step by step.

N is the number of weights, D that of tokens. Sources: "Chinchilla" arXiv 2203.15556, "PaLM" arXiv 2204.02311. Knows
nothing of GPUs or hours.
"""

from __future__ import annotations

import dataclasses
import math

from coalign.config import Config, ModelTable, StageTable, TrainTable
from coalign.models.shape import Shape, count_lora_parameters, count_parameters
from coalign.models.sizes import PACK_ON_CPU
from coalign.models.worker_memory import element_bytes
from coalign.planning.data_counts import CHARACTERS_PER_TOKEN, ROW_BYTES, Counts
from coalign.prompts import NUM_VARIANTS

QUESTION_TOKENS = 60  # an assumption: a question to the judge or a request to rewrite, without the task's own text


@dataclasses.dataclass(frozen=True, slots=True)
class Work:
    """What one step computes and writes; `tokens` are read, `new_tokens` are generated one after another."""

    step: str
    what: str
    tokens: float = 0.0
    new_tokens: float = 0.0
    read_flops: float = 0.0
    new_flops: float = 0.0
    disk_bytes: float = 0.0


def group_size(config: Config) -> int:
    """Return the largest size of a group: W wordings x K samples and the gold answer, at most rank.max_candidates."""
    return min(config.rank.max_candidates, config.sample.wordings_per_input * config.sample.samples + 1)


def pack_width(train: TrainTable) -> int:
    """Return the width, in tokens, of the attention in a row that several items share.

    With train.pack_tokens < 0 the device decides. A GPU skips blocks in which no token sees another, for which
    PACK_ON_CPU tokens are a good estimate.
    """
    return min(PACK_ON_CPU if train.pack_tokens < 0 else train.pack_tokens, train.micro_batch_tokens)


def row_widths(config: Config, counts: Counts) -> dict[str, int]:
    """Return {training step: tokens of its widest row}: a pack in sft, a prompt and its responses (or one) in align."""
    responses = group_size(config) if config.train.shared_prefix else 1
    longest_prompt = max(1, counts.longest_tokens - counts.answer_tokens)
    return {
        "sft": max(pack_width(config.train), counts.longest_tokens),
        "align": longest_prompt + responses * max(config.sample.max_new_tokens, counts.answer_tokens),
    }


def forward_flops(shape: Shape, tokens: float, row_tokens: float) -> float:
    """Return 2 N per token for the matrices (Chinchilla, appendix F) and 4 L q T for attention (PaLM, appendix B).

    L is the number of layers, q the width of all query heads, T the tokens of a row. A causal mask saves nothing here.
    """
    return tokens * (2 * count_parameters(shape) + 4 * shape.num_layers * shape.query_width * row_tokens)


def training_flops(shape: Shape, model: ModelTable, tokens: float, row_tokens: float, recomputed: bool) -> float:
    """Return 6 N D and attention: a backward pass costs two forward passes, recomputation costs a third.

    Frozen weights (LoRA) need no gradient of their own: 4 N D, and 6 for the adapters.
    """
    forward = forward_flops(shape, tokens, row_tokens)
    total = (4 if recomputed else 3) * forward
    if not model.lora.enabled:
        return total
    adapters = (8 if recomputed else 6) * count_lora_parameters(shape, model.lora) * tokens
    return total - 2 * count_parameters(shape) * tokens + adapters


def checkpoint_bytes(shape: Shape, model: ModelTable, train: TrainTable) -> float:
    """Return the size of a checkpoint: e bytes per weight and 12 per trained weight (8 at stage 0 in float32).

    e is the bytes of an element. At stage 3 DeepSpeed leaves out the trained weights, of which it saves master copies,
    and saves the frozen ones.
    """
    e, lora = element_bytes(train.precision), model.lora
    total = count_parameters(shape)
    trained = count_lora_parameters(shape, lora) if lora.enabled else total
    weights = (total if lora.enabled else 0) if train.zero_stage == 3 else total + (trained if lora.enabled else 0)
    return e * weights + (8 if e == 4 and train.zero_stage == 0 else 12) * trained


def works(config: Config, shape: Shape, counts: Counts) -> list[Work]:
    """Return the work of every step, in order, as if sampled answers were as long as gold answers."""
    examples = sum(counts.inputs.values())
    row_bytes = ROW_BYTES + CHARACTERS_PER_TOKEN * (counts.prompt_tokens + counts.answer_tokens)
    made = element_bytes("float32") * count_parameters(shape) if config.model.init == "random" else 0
    prepare = Work("prepare", f"{counts.tasks} tasks, {examples} inputs", disk_bytes=examples * row_bytes + made)
    sample, judge, rank = _sampled(config, shape, counts)
    return [
        prepare,
        _paraphrase(config, shape, counts),
        _training("sft", config, shape, counts),
        sample,
        judge,
        rank,
        _training("align", config, shape, counts),
        _eval(config, shape, counts),
    ]


def _generated(step: str, what: str, shape: Shape, asked: tuple[int, int], drawn: tuple[int, int]) -> Work:
    """Return the work of a step that reads each prompt once and draws answers; both are (number, tokens of one)."""
    (prompts, prompt), (answers, answer) = asked, drawn
    width = prompt + answer
    read, new = prompts * prompt, answers * answer
    flops = forward_flops(shape, read, prompt), forward_flops(shape, new, width)
    return Work(step, what, read, new, *flops, 2 * answers * (ROW_BYTES + 2 * CHARACTERS_PER_TOKEN * answer))


def _paraphrase(config: Config, shape: Shape, counts: Counts) -> Work:
    table = config.paraphrase
    wanted = table.num_wordings and table.num_wordings + (0 if table.files else table.num_dev + table.num_test)
    attempts = wanted * table.max_attempts
    prompts, answers = counts.tasks * min(NUM_VARIANTS, attempts), counts.tasks * attempts
    answer = min(table.max_new_tokens, counts.instruction_tokens)
    prompt = QUESTION_TOKENS + counts.instruction_tokens
    return _generated("paraphrase", f"{answers} rewrites at most", shape, (prompts, prompt), (answers, answer))


def _sampled(config: Config, shape: Shape, counts: Counts) -> tuple[Work, Work, Work]:
    """Return the work of sample, judge (as if all responses differ and none is gold) and rank (disk alone)."""
    table, inputs = config.sample, counts.inputs["align"]
    prompts = inputs * table.wordings_per_input
    responses, answer = prompts * table.samples, min(table.max_new_tokens, counts.answer_tokens)
    what = f"{responses} responses"
    sample = _generated("sample", what, shape, (prompts, counts.prompt_tokens), (responses, answer))
    kinds = 2 if config.judge.type_question else 1
    questions = kinds * responses
    tokens = kinds * inputs * (counts.prompt_tokens + QUESTION_TOKENS) + questions * answer
    flops = forward_flops(shape, tokens, counts.prompt_tokens + QUESTION_TOKENS + answer)
    rows = 2 * responses * (ROW_BYTES + CHARACTERS_PER_TOKEN * answer)
    judge = Work("judge", f"{questions} questions at most", tokens, read_flops=flops, disk_bytes=rows)
    groups = _num_groups(config, counts)
    candidates = groups * group_size(config) * (ROW_BYTES + CHARACTERS_PER_TOKEN * answer)
    return sample, judge, Work("rank", f"{groups} groups at most", disk_bytes=candidates)


def _num_groups(config: Config, counts: Counts) -> int:
    """Return the number of groups: one per input and wording, or per input and rank.wordings_per_input."""
    sampled = config.sample.wordings_per_input
    return counts.inputs["align"] * min(config.rank.wordings_per_input or sampled, sampled)


def _training(step: str, config: Config, shape: Shape, counts: Counts) -> Work:
    """Return the work of a training step: updates, dev measurements, checkpoints and the exported model."""
    train, recomputed = config.train, config.train.gradient_checkpointing
    stage: StageTable
    if step == "sft":
        stage, batch, items = config.sft, config.sft.batch_rows, counts.inputs[config.sft.split]
        item_tokens = counts.prompt_tokens + counts.answer_tokens
        width = max(pack_width(train), item_tokens)
    else:
        stage, batch, items = config.align, config.align.batch_groups, _num_groups(config, counts)
        responses = group_size(config)
        prompts = 1 if train.shared_prefix else responses
        item_tokens = prompts * counts.prompt_tokens + responses * counts.answer_tokens
        width = item_tokens if train.shared_prefix else counts.prompt_tokens + counts.answer_tokens
    used = stage.num_drawn(items, batch)
    updates = math.ceil(used / batch)
    tokens = used * item_tokens
    flops = training_flops(shape, config.model, tokens, width, recomputed)
    if step == "align" and config.align.loss == "dpo":
        flops += forward_flops(shape, min(items, used) * item_tokens, width)
    checkpoints = math.ceil(updates / train.checkpoint_every) if train.checkpoint_every else 0
    # While a checkpoint is written, those that are kept are still on disk.
    kept = min(checkpoints, train.keep_last + 1) * checkpoint_bytes(shape, config.model, train)
    folder = element_bytes(train.precision) * count_parameters(shape)
    what = f"{updates} updates of {batch}, {used} {'rows' if step == 'sft' else 'groups'}"
    return Work(step, what, tokens, 0.0, flops + _dev_flops(config, shape, counts, updates), 0.0, kept + folder)


def _dev_flops(config: Config, shape: Shape, counts: Counts, updates: int) -> float:
    """Return the FLOPs of the dev measurements, which compute the whole row for each new token of an answer."""
    train = config.train
    if not train.eval_every:
        return 0.0
    measured = math.ceil(updates / train.eval_every) + 1
    rows = min(train.dev_inputs, counts.inputs["dev"]) * train.dev_wordings
    passes = 1 + min(train.dev_max_new_tokens, 2 * counts.answer_tokens)
    width = counts.prompt_tokens + counts.answer_tokens
    return forward_flops(shape, float(measured * rows * passes * width), width)


def _eval(config: Config, shape: Shape, counts: Counts) -> Work:
    table = config.eval
    held_out = config.paraphrase.num_test if table.split == "test" else config.paraphrase.num_dev
    wordings = min(table.max_wordings or held_out, held_out)
    inputs = counts.inputs[table.split]
    if table.max_inputs:
        inputs = min(inputs, counts.tasks * table.max_inputs)
    pairs = len(table.models) * (inputs * wordings + 2 * table.noise_inputs * table.noise_samples)
    answer = min(table.max_new_tokens, counts.answer_tokens)
    what = f"{pairs} answers of {len(table.models)} models"
    return _generated("eval", what, shape, (pairs, counts.prompt_tokens), (pairs, answer))
