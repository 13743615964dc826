"""Sampling with continuous batching: one prefill serves all samples of a prompt; waiting prompts replace finished rows.

Token ids in, token ids out. Knows no files and no text. Shape suffixes: B prompts, T tokens, V vocabulary, R live rows,
N samples of a call.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from coalign.generation.cascade_attention import SharedPrompts, attending_in_cascade
from coalign.generation.cuda_graphs import FixedSteps
from coalign.generation.forward import StepFunction, cascades_exactly, next_logits
from coalign.generation.kv_cache import SlotCache
from coalign.generation.sampling import Sampling, penalised, pick_tokens, uniforms
from coalign.models.codec import GeneratedIds
from coalign.models.rows import TokenIds, left_pad
from coalign.models.sizes import PREFILL_TOKENS, PREFILL_TOKENS_GPU

# Waiting prompts enter once an eighth of the rows is free: prefilling one alone costs as much as a step of all rows.
REFILL_SHARE = 8


def decode(
    model: Any,
    prompts: Sequence[Sequence[int]],
    seeds: Sequence[Sequence[int]],
    sampling: Sampling,
    codec: TokenIds,
    max_tokens: int,
    fixed: FixedSteps | None = None,
) -> list[list[GeneratedIds]]:
    """Return one answer per seed for each prompt.

    Live rows times (longest prompt + max_new_tokens) stay within `max_tokens`, which are the tokens in flight. Prompts
    enter longest first; one whose samples alone exceed `max_tokens` is computed by itself. With `fixed`, which callers
    keep from call to call, steps have few shapes, and a GPU records them.
    """
    with torch.inference_mode():
        if fixed is not None and fixed.is_exact(codec):
            cache = SlotCache(model.device, memory=fixed)
            return _Decoder(model, prompts, seeds, sampling, codec, cache, fixed.next_logits).run(max_tokens)
        step = functools.partial(next_logits, model)
        share = max(map(len, seeds), default=0) > 1 and model.device.type == "cpu" and cascades_exactly(model, codec)
        cache = SlotCache(model.device, SharedPrompts(model.config) if share else None)
        with attending_in_cascade(model) if share else contextlib.nullcontext():
            return _Decoder(model, prompts, seeds, sampling, codec, cache, step).run(max_tokens)


@dataclasses.dataclass
class _Sample:
    """One answer in the making; `number` numbers the samples of the call, prompt by prompt."""

    number: int
    prompt: int
    ids: list[int] = dataclasses.field(default_factory=list)
    finished: bool = False


class _Decoder:
    """The state of one call of `decode`: the live rows, in the order of their slots, and the waiting prompts."""

    def __init__(
        self,
        model: Any,
        prompts: Sequence[Sequence[int]],
        seeds: Sequence[Sequence[int]],
        sampling: Sampling,
        codec: TokenIds,
        cache: SlotCache,
        step: StepFunction,
    ) -> None:
        self.model, self.prompts, self.sampling, self.codec = model, prompts, sampling, codec
        self.stops = frozenset(codec.stop_ids)
        owners = [prompt for prompt, group in enumerate(seeds) for _ in group]
        self.samples = [_Sample(number, prompt) for number, prompt in enumerate(owners)]
        self.of_prompt: list[list[_Sample]] = [[] for _ in prompts]
        for sample in self.samples:
            self.of_prompt[sample.prompt].append(sample)
        self.waiting = sorted(range(len(prompts)), key=lambda i: (-len(prompts[i]), i))
        self.live: list[_Sample] = []
        self.cache, self.next_logits = cache, step
        self.token_R = torch.zeros(0, dtype=torch.long, device=model.device)
        self.seen_RV: Tensor | None = None  # with a repetition penalty: the tokens of each row so far
        self.uniform_NT: Tensor | None = None
        if sampling.temperature:
            flat = [seed for group in seeds for seed in group]
            self.uniform_NT = uniforms(flat, sampling.max_new_tokens).to(model.device)

    def run(self, max_tokens: int) -> list[list[GeneratedIds]]:
        """Prefill and step until no row lives and no prompt waits."""
        while self.live or self.waiting:
            if entering := self._entering(max_tokens):
                self._enter(entering, max_tokens)
            else:
                self._step()
        return [[GeneratedIds(sample.ids, sample.finished) for sample in group] for group in self.of_prompt]

    def _size(self, prompt: int) -> int:
        return len(self.prompts[prompt]) + self.sampling.max_new_tokens

    def _entering(self, max_tokens: int) -> list[int]:
        """Return the waiting prompts that enter now; none while too few rows are free to make a prefill worthwhile."""
        if not self.waiting:
            return []
        # Prompts enter longest first, so the longest of all lives or is the first to enter.
        widest = max(map(self._size, [*(sample.prompt for sample in self.live), self.waiting[0]]))
        rows, count = len(self.live), 0
        for prompt in self.waiting:
            if rows and (rows + len(self.of_prompt[prompt])) * widest > max_tokens:
                break
            rows, count = rows + len(self.of_prompt[prompt]), count + 1
        few = (rows - len(self.live)) * REFILL_SHARE * widest < max_tokens
        return [] if self.live and few and count < len(self.waiting) else self.waiting[:count]

    def _enter(self, entering: list[int], max_tokens: int) -> None:
        """Prefill prompts, those of similar lengths in one pass."""
        del self.waiting[: len(entering)]
        room = self._room([*self.live, *(sample for i in entering for sample in self.of_prompt[i])], max_tokens)
        at_once = PREFILL_TOKENS if self.model.device.type == "cpu" else PREFILL_TOKENS_GPU
        while entering:
            count = max(1, at_once // len(self.prompts[entering[0]]))
            self._prefill(entering[:count], room)
            entering = entering[count:]

    def _prefill(self, entering: list[int], room: tuple[int, int]) -> None:
        """Compute prompts once, give each of their samples a row and draw its first token."""
        prompts, device = [self.prompts[i] for i in entering], self.model.device
        prefilled = DynamicCache()
        batch = left_pad(prompts, self.codec.pad_id, device)
        logits_BV = self.model(**batch, past_key_values=prefilled, use_cache=True, logits_to_keep=1).logits[:, -1]
        new = [sample for i in entering for sample in self.of_prompt[i]]
        source = [b for b, i in enumerate(entering) for _ in self.of_prompt[i]]
        self.cache.admit(prefilled, [len(p) for p in prompts], source, room)
        logits_RV = logits_BV.float()[torch.tensor(source, device=device)]
        seen_RV = self._seen([prompts[b] for b in source], logits_RV)
        token_R = self._pick(logits_RV, new, seen_RV)
        if seen_RV is not None:
            self.seen_RV = seen_RV if self.seen_RV is None else torch.cat([self.seen_RV, seen_RV])
        self.token_R = torch.cat([self.token_R, token_R])
        self.live += new
        self._record(new, token_R)

    def _room(self, samples: list[_Sample], max_tokens: int) -> tuple[int, int]:
        """Return the slots and columns of the cache for these samples and for those that may follow."""
        width = max(self._size(sample.prompt) for sample in samples)
        most = max_tokens // width
        if self.cache.prompts is not None:
            width = self.sampling.max_new_tokens
        if not self.waiting:
            return len(samples), width
        # Spare columns make moving the used ones to the left a rare event.
        to_come = sum(len(self.of_prompt[prompt]) for prompt in self.waiting)
        return max(len(samples), min(most, len(samples) + to_come)), width + max(32, width // 4)

    def _step(self) -> None:
        """Draw the next token of every live row."""
        logits_RV = self.next_logits(self.cache, self.token_R)
        self.token_R = self._pick(logits_RV.float(), self.live, self.seen_RV)
        self._record(self.live, self.token_R)

    def _seen(self, prompts: Sequence[Sequence[int]], logits_RV: Tensor) -> Tensor | None:
        """Return which tokens occur in each prompt, (R, V), or None without a repetition penalty."""
        if self.sampling.repetition_penalty == 1.0:
            return None
        rows, ids = zip(*((row, token) for row, prompt in enumerate(prompts) for token in prompt), strict=True)
        seen_RV = torch.zeros_like(logits_RV, dtype=torch.bool)
        seen_RV[list(rows), list(ids)] = True
        return seen_RV

    def _pick(self, logits_RV: Tensor, samples: list[_Sample], seen_RV: Tensor | None) -> Tensor:
        """Return the next token of each sample, (R,), and mark it as seen."""
        device = logits_RV.device
        if seen_RV is not None:
            logits_RV = penalised(logits_RV, seen_RV, self.sampling.repetition_penalty)
        uniform_R = torch.zeros(0, device=device)
        if self.uniform_NT is not None:
            place = torch.tensor([[sample.number, len(sample.ids)] for sample in samples], device=device)
            uniform_R = self.uniform_NT[place[:, 0], place[:, 1]]
        token_R = pick_tokens(logits_RV, uniform_R, self.sampling)
        if seen_RV is not None:
            seen_RV.scatter_(1, token_R.unsqueeze(1), True)
        return token_R

    def _record(self, samples: list[_Sample], token_R: Tensor) -> None:
        """Append tokens to the samples. Finished ones leave, and the last rows take their places."""
        done = set()
        for sample, token in zip(samples, token_R.tolist(), strict=True):
            if token in self.stops:
                sample.finished = True
            else:
                sample.ids.append(token)
            if sample.finished or len(sample.ids) == self.sampling.max_new_tokens:
                done.add(sample.number)
        if not done:
            return
        alive = [sample.number not in done for sample in self.live]
        order = [row for row, stays in enumerate(alive) if stays]
        # Rows keep their slots, except that the last ones fill the gaps.
        num_rows = len(order)
        last = [row for row in order if row >= num_rows]
        order = [row if alive[row] else last.pop() for row in range(num_rows)]
        self.cache.keep(order)
        self.live = [self.live[row] for row in order]
        order_R = torch.tensor(order, dtype=torch.long, device=self.token_R.device)
        self.token_R = self.token_R[order_R]
        self.seen_RV = None if self.seen_RV is None else self.seen_RV[order_R]
