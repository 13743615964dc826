"""Memory of a generation worker by formula: weights, the KV cache of batch_tokens, the passes beside it.

Follows generation/kv_cache.py, decoding.py and scoring.py. Knows shapes and numbers, and imports no torch. In formulas
e is the bytes per element. Part and Memory also serve the training steps, in planning/training_memory.py.
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
FRAGMENTATION = 0.1  # an assumption: the share lost in the allocator, of all memory but weights and states

TOKENS_ON_CPU, LEAST_TOKENS, MOST_TOKENS = 16384, 4096, 65536  # in flight, where generation.batch_tokens is 0
PROMPT_TOKENS, NEW_TOKENS = 96, 32  # assumed per row when choosing it: shorter rows mean more rows, and more memory


def kv_bytes(shape: Shape, e: int) -> int:
    """Return the bytes of the KV cache per token, over all layers: 2 x layers x key width x e."""
    return 2 * shape.num_layers * shape.kv_width * e


def forward_bytes(shape: Shape, e: int, row_tokens: int) -> int:
    """Return the bytes per token of a forward pass without gradients, in rows of `row_tokens`.

    These are three MLP tensors, two hidden states, one norm in float32, and the mask.
    """
    return e * (3 * shape.intermediate + 2 * shape.hidden) + 4 * shape.hidden + e * row_tokens


def sampling_bytes(shape: Shape, generation: GenerationTable, prompt_tokens: int, new_tokens: int) -> float:
    """Return the bytes of sampling beside the weights: the KV cache, the prefill pass, the choice of tokens.

    Slots of the cache hold batch_tokens and spare columns, a quarter of the width or 32, both padded (sizes.py).
    Choosing a token sorts and sums in float64: 46 bytes per row and entry of the vocabulary. The logits of a step exist
    twice.
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
    """Return the bytes of scoring beside the weights: batch_tokens in rows that prompts share (generation/scoring.py).

    A row has ROW_TOKENS_GPU tokens, and the mask as many entries per token. Logits exist in blocks of BLOCK_LOGITS_GPU
    (fused_head.py), in e bytes and in float32.
    """
    e, width = element_bytes(generation.dtype), prompt_tokens + new_tokens
    tokens = max(generation.batch_tokens, width)
    return tokens * forward_bytes(shape, e, max(width, ROW_TOKENS_GPU)) + BLOCK_LOGITS_GPU * (e + 4)


def tokens_in_flight(shape: Shape, dtype: str, free_bytes: float) -> int:
    """Return the tokens in flight that generation.batch_tokens = 0 means on a GPU with `free_bytes`.

    It is the largest power of two whose sampling and scoring fit half of these, within LEAST_TOKENS and MOST_TOKENS.
    """
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
    """Return the memory table of one worker; `gpu_bytes` is the memory of its GPU, or its share of one.

    `prompt_tokens` and `new_tokens` are the longest of a row.
    """
    e = element_bytes(generation.dtype)
    weights = Part("weights", e * count_parameters(shape), f"{e} bytes")
    if generation.engine == "vllm":
        rest = VLLM_GPU_SHARE * gpu_bytes - CONTEXT_BYTES - weights.num_bytes
        least = float(kv_bytes(shape, e) * (prompt_tokens + new_tokens))  # vLLM does not start without room for one row
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
            f"KV cache of {kv_bytes(shape, e)} bytes per token, spare columns, prefill",
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
    """One line of a memory table. Parts of "pass" coexist, and so do parts of "step", but the two never overlap."""

    name: str
    num_bytes: float
    formula: str
    when: str = "always"


@dataclasses.dataclass(frozen=True, slots=True)
class Memory:
    """The memory of one GPU, part by part, and the host memory of one rank."""

    parts: tuple[Part, ...]
    host_bytes: float = 0.0

    @property
    def total_bytes(self) -> float:
        """Return the peak in bytes: the constant parts, and the larger of a pass and the optimizer's step."""
        return self._sum("always") + max(self._sum("pass"), self._sum("step"))

    def _sum(self, when: str) -> float:
        return sum(part.num_bytes for part in self.parts if part.when == when)


def element_bytes(precision: str) -> int:
    """Return the bytes per element; "auto" is bfloat16 on a GPU."""
    return 4 if precision == "float32" else 2


def margin(parts: list[Part], fixed: tuple[str, ...]) -> Part:
    """Return the part assumed for CUDA, NCCL and the allocator's fragmentation; `fixed` parts don't fragment."""
    moving = Memory(tuple(part for part in parts if part.name not in fixed)).total_bytes
    formula = f"{CONTEXT_BYTES / GB:.0f} GB CUDA and NCCL + {FRAGMENTATION:.0%} of all that is not fixed"
    return Part("margin", CONTEXT_BYTES + FRAGMENTATION * moving, formula)
