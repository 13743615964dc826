"""Memory a generation worker needs, by formula: weights, keys and values of batch_tokens, the passes beside them.

Used by planning, and by workers that are left the choice. Follows slots.py, decoding.py and likelihoods.py; h, f, q and
e are those of memory.py.
"""

from __future__ import annotations

import dataclasses

from coalign.config import GenerationTable
from coalign.models.shape import Shape, count_parameters
from coalign.models.sizes import (
    BLOCK_LOGITS_GPU,
    PREFILL_TOKENS_GPU,
    ROW_TOKENS_GPU,
    VLLM_GPU_SHARE,
    padded_slots,
)

GB = 10**9
CONTEXT_BYTES = 1 * GB  # an assumption: CUDA's context, NCCL, kernels
FRAGMENTATION = 0.1  # an assumption: what the allocator can't use, as a share of all but weights and states

TOKENS_ON_CPU, LEAST_TOKENS, MOST_TOKENS = 16384, 4096, 65536  # in flight, where generation.batch_tokens is 0
PROMPT_TOKENS, NEW_TOKENS = 96, 32  # of a row, assumed for it: the shorter rows are, the more of them need a choice


def kv_bytes(shape: Shape, e: int) -> int:
    """Return the bytes of keys and values of one token in all layers: 2 x layers x key width x e."""
    return 2 * shape.num_layers * shape.kv_width * e


def forward_bytes(shape: Shape, e: int, row_tokens: int) -> int:
    """Return what a forward pass without gradients holds a token: three MLP tensors, two h, an fp32 norm, the mask."""
    return e * (3 * shape.intermediate + 2 * shape.hidden) + 4 * shape.hidden + e * row_tokens


def sampling_bytes(shape: Shape, generation: GenerationTable, prompt_tokens: int, new_tokens: int) -> float:
    """Return what sampling takes beside the weights: the slots (slots.py), a pass over entering prompts, the choice.

    Slots hold batch_tokens and spare columns, a quarter of the width or 32, both padded as steps are (padding.py). The
    choice of a token sorts and sums up float64: 46 bytes an entry of the vocabulary and row, beside the logits of a
    step, which are there twice.
    """
    e, width = element_bytes(generation.dtype), prompt_tokens + new_tokens
    rows = max(1, generation.batch_tokens // width)
    padded_rows, columns = padded_slots(rows, width + max(32, width // 4))
    slots = padded_rows * columns
    entering = max(PREFILL_TOKENS_GPU, prompt_tokens)
    choice = (46 * rows + 2 * e * padded_rows) * shape.vocabulary
    per_token = forward_bytes(shape, e, width) + kv_bytes(shape, e)
    return slots * kv_bytes(shape, e) + entering * per_token + choice


def scoring_bytes(shape: Shape, generation: GenerationTable, prompt_tokens: int, new_tokens: int) -> float:
    """Return what judging takes beside the weights: batch_tokens in rows that prompts share (likelihoods.py).

    A row has ROW_TOKENS_GPU, so the mask has as many entries a token. Logits exist in blocks of
    BLOCK_LOGITS_GPU (fused_head.py), in e and in float32.
    """
    e, width = element_bytes(generation.dtype), prompt_tokens + new_tokens
    tokens = max(generation.batch_tokens, width)
    return tokens * forward_bytes(shape, e, max(width, ROW_TOKENS_GPU)) + BLOCK_LOGITS_GPU * (e + 4)


def tokens_in_flight(shape: Shape, dtype: str, free_bytes: float) -> int:
    """Return what generation.batch_tokens = 0 means on a GPU: a power of two that half of what is free holds."""
    tokens = MOST_TOKENS
    while tokens > LEAST_TOKENS:
        table = GenerationTable(batch_tokens=tokens, dtype=dtype)  # type: ignore[arg-type]
        if max(f(shape, table, PROMPT_TOKENS, NEW_TOKENS) for f in (sampling_bytes, scoring_bytes)) <= free_bytes / 2:
            break
        tokens //= 2
    return tokens


def generation_memory(
    shape: Shape, generation: GenerationTable, gpu_bytes: float, prompt_tokens: int, new_tokens: int
) -> Memory:
    """Return the table of one worker's memory; `gpu_bytes` is its GPU, or its part of one."""
    e = element_bytes(generation.dtype)
    weights = Part("weights", e * count_parameters(shape), f"{e} bytes")
    if generation.engine == "vllm":
        rest = VLLM_GPU_SHARE * gpu_bytes - CONTEXT_BYTES - weights.num_bytes
        least = float(kv_bytes(shape, e) * (prompt_tokens + new_tokens))  # without room for one row vLLM does not start
        cache = Part("vLLM's cache", max(rest, least), f"what is left of {VLLM_GPU_SHARE:.0%} of the GPU")
        free = Part(
            "margin",
            CONTEXT_BYTES + (1 - VLLM_GPU_SHARE) * gpu_bytes,
            f"1 GB CUDA + {1 - VLLM_GPU_SHARE:.0%} left free",
        )
        return Memory((weights, cache, free))
    parts = [
        weights,
        Part(
            "sampling",
            sampling_bytes(shape, generation, prompt_tokens, new_tokens),
            f"{kv_bytes(shape, e)} bytes of keys and values a token, spare columns, prompts entering",
            "pass",
        ),
        Part(
            "judging",
            scoring_bytes(shape, generation, prompt_tokens, new_tokens),
            "batch_tokens in one pass; not together with sampling",
            "step",
        ),
    ]
    return Memory((*parts, margin(parts, ("weights",))))


@dataclasses.dataclass(frozen=True, slots=True)
class Part:
    """One line of a memory table. Parts with "pass" are there together, so are those with "step", but not both."""

    name: str
    num_bytes: float
    formula: str
    when: str = "always"


@dataclasses.dataclass(frozen=True, slots=True)
class Memory:
    """The memory of one GPU, and of the host for one rank."""

    parts: tuple[Part, ...]
    host_bytes: float = 0.0

    @property
    def total_bytes(self) -> float:
        """Return the peak: what is always there, and the larger of a pass and the optimizer's step."""
        return self._sum("always") + max(self._sum("pass"), self._sum("step"))

    def _sum(self, when: str) -> float:
        return sum(part.num_bytes for part in self.parts if part.when == when)


def element_bytes(precision: str) -> int:
    """Return the bytes of an element; "auto" is bfloat16 on a GPU."""
    return 4 if precision == "float32" else 2


def margin(parts: list[Part], fixed: tuple[str, ...]) -> Part:
    """Return what is left for CUDA, NCCL and the allocator: two assumptions. `fixed` parts don't fragment."""
    moving = Memory(tuple(part for part in parts if part.name not in fixed)).total_bytes
    formula = f"{CONTEXT_BYTES / GB:.0f} GB CUDA and NCCL + {FRAGMENTATION:.0%} of what comes and goes"
    return Part("margin", CONTEXT_BYTES + FRAGMENTATION * moving, formula)
