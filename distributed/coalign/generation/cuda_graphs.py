"""CUDA graphs for decoding: steps in few shapes, each of which a GPU records once and replays.

A step of few rows is dominated by launching every kernel of every layer; a graph launches them all at once. Rows and
columns are padded to few sizes, in the same memory from call to call, and a mask hides the padding. Knows no prompts
and no sampling. Shape suffixes: R live rows, S rows of the shape, T its columns, H heads, D head size, V vocabulary.
"""

from __future__ import annotations

import logging
import warnings
from collections import Counter
from typing import Any

import torch
from torch import Tensor
from transformers import Cache
from transformers.cache_utils import DynamicLayer

from coalign.generation.cascade_attention import may_cascade
from coalign.generation.forward import complaint_of_step
from coalign.generation.kv_cache import SlotCache
from coalign.models.attention import layer_windows
from coalign.models.rows import TokenIds
from coalign.models.sizes import padded_slots

logger = logging.getLogger("coalign")

# Steps of a shape that are computed before it is recorded, since recording takes as long as several steps.
STEPS_BEFORE = 2
MAX_GRAPHS = 64  # kept at a time; the least recently used goes first
COARSER = 2  # a step has this many times fewer sizes per octave than the slots, since each recorded one costs memory
NO_START = 2**40  # the start column of a padding row


class _Layer(DynamicLayer):
    """One layer's keys and values in a fixed shape, (S, H, T, D) each; the new token goes into one column."""

    def __init__(self, keys_SHTD: Tensor, values_SHTD: Tensor, column_1: Tensor) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.keys, self.values, self.is_initialized = keys_SHTD, values_SHTD, True
        self._column_1 = column_1

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Write one token per row; return all columns."""
        assert self.keys is not None and self.values is not None
        self.keys.index_copy_(2, self._column_1, key_states)
        self.values.index_copy_(2, self._column_1, value_states)
        return self.keys, self.values


class FixedSteps:
    """Decoding steps of one model in fixed shapes, and the memory of its caches' slots; one cache at a time.

    Implements kv_cache.SlotMemory. On a CPU steps have the same shapes, and nothing is recorded.
    """

    def __init__(self, model: Any) -> None:
        self.model = model
        self._device: torch.device = model.device
        self._dtype = model.dtype
        self._windows = layer_windows(model.config)
        self._memory: dict[int, Tensor] = {}
        self._token_S = self._start_S = torch.zeros(0, dtype=torch.long, device=self._device)
        self._column_1 = torch.zeros(1, dtype=torch.long, device=self._device)
        self._logits_SV: Tensor | None = None  # the output of recorded steps
        self._graphs: dict[tuple[int, int, int], Any] = {}
        self._steps: Counter[tuple[int, int, int]] = Counter()
        self._records = self._device.type == "cuda"
        self._stream: Any = torch.cuda.Stream(self._device) if self._records else None  # type: ignore[no-untyped-call]
        self._pool: Any = None
        self._exact: bool | None = None

    @property
    def num_graphs(self) -> int:
        """Return the number of steps recorded at present."""
        return len(self._graphs)

    def is_exact(self, codec: TokenIds) -> bool:
        """Return whether steps in fixed shapes give the logits of plain ones; tested once, on two made-up prompts."""
        if self._exact is None:
            complaint = self._complaint(codec)
            if complaint:
                logger.info("sampling runs without CUDA graphs: %s", complaint)
            self._exact = not complaint
        return self._exact

    def room(self, slots: int, columns: int) -> tuple[int, int]:
        """Return the slots and columns of the smallest fixed shape with at least these."""
        return padded_slots(slots, columns)

    def take(self, place: int, like_SHTD: Tensor, slots: int, columns: int) -> Tensor:
        """Return zeroed memory for a layer's keys or values: (slots, H, columns, D).

        The same `place` keeps its address until it has to grow, which discards all graphs.
        """
        shape = (slots, like_SHTD.shape[1], columns, like_SHTD.shape[3])
        size = slots * columns * shape[1] * shape[3]
        if place not in self._memory or len(self._memory[place]) < size:
            self._forget()
            self._memory[place] = like_SHTD.new_zeros(size)
        return self._memory[place][:size].zero_().view(shape)  # a NaN left by an earlier call would survive the mask

    def next_logits(self, cache: SlotCache, token_R: Tensor) -> Tensor:
        """Append a token to every row of a cache; return the logits after it, (R, V), valid until the next step."""
        cache.make_room()
        rows, end = len(token_R), cache.extent.high
        padded = padded_slots(rows, end + 1, COARSER)
        shape = min(padded[0], cache.num_slots), min(padded[1], cache.num_columns)
        self._set_inputs(token_R, cache, shape[0])
        logits_SV = self._computed(cache, (cache.num_columns, *shape))
        cache.advance()
        return logits_SV[:rows]

    def _set_inputs(self, token_R: Tensor, cache: SlotCache, slots: int) -> None:
        if len(self._token_S) < cache.num_slots:
            self._forget()
            self._token_S, self._start_S = (self._token_S.new_zeros(cache.num_slots) for _ in range(2))
            self._logits_SV = None
        rows = len(token_R)
        self._token_S[:rows] = token_R
        self._start_S[:rows] = cache.start_R
        self._start_S[rows:slots] = NO_START
        self._column_1.fill_(cache.extent.high)

    def _computed(self, cache: SlotCache, key: tuple[int, int, int]) -> Tensor:
        """Return the logits of a step, (S, V), replayed if it is recorded; `key` is (columns of the slots, S, T)."""
        self._steps[key] += 1
        if self._records and key not in self._graphs and self._steps[key] > STEPS_BEFORE:
            self._record(cache, key)
        if key not in self._graphs:
            return self._logits(cache, *key[1:])
        self._graphs[key] = graph = self._graphs.pop(key)  # in order of last use
        graph.replay()
        assert self._logits_SV is not None
        return self._logits_SV

    def _logits(self, cache: SlotCache, rows: int, columns: int) -> Tensor:
        """Compute a step's logits, (S, V); a padding row sees only its own token."""
        start_S1 = torch.minimum(self._start_S[:rows], self._column_1).unsqueeze(1)
        column_T = torch.arange(columns, device=self._device)
        far_ST = self._column_1 - column_T
        seen_ST = (far_ST >= 0) & (column_T >= start_S1)

        def mask(window: int | None) -> Tensor:
            near_ST = seen_ST if window is None else seen_ST & (far_ST < window)
            empty_ST = torch.zeros(near_ST.shape, dtype=self._dtype, device=self._device)
            return empty_ST.masked_fill(~near_ST, torch.finfo(self._dtype).min)[:, None, None, :]

        masks = {kind: mask(window) for kind, window in self._windows.items()}
        slots = Cache(
            layers=[
                _Layer(keys[:rows, :, :columns], values[:rows, :, :columns], self._column_1)
                for keys, values in cache.states()
            ]
        )
        logits_S1V: Tensor = self.model(
            input_ids=self._token_S[:rows].unsqueeze(1),
            attention_mask=masks if len(masks) > 1 else next(iter(masks.values())),
            position_ids=self._column_1 - start_S1,
            past_key_values=slots,
            use_cache=True,
        ).logits
        return logits_S1V[:, -1]

    def _record(self, cache: SlotCache, key: tuple[int, int, int]) -> None:
        """Compute a step and record it. When that fails, this model's steps run without graphs from then on."""
        current = torch.cuda.current_stream(self._device)
        try:
            logits_SV = self._unwaiting(cache, key)
            if self._logits_SV is None:
                self._logits_SV = logits_SV.new_empty(len(self._token_S), logits_SV.shape[1])
            graph = torch.cuda.CUDAGraph()
            self._pool = self._pool or torch.cuda.graph_pool_handle()
            with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
                self._logits_SV[: key[1]] = self._logits(cache, *key[1:])
            if len(self._graphs) >= MAX_GRAPHS:
                oldest = next(iter(self._graphs))
                del self._graphs[oldest], self._steps[oldest]
            self._graphs[key] = graph
        except RuntimeError as error:  # includes CUDA errors and out of memory
            logger.warning("sampling runs without CUDA graphs: %s", str(error).partition("\n")[0])
            self._forget()
            self._records, self._logits_SV = False, None
        finally:
            torch.cuda.set_stream(current)

    def _unwaiting(self, cache: SlotCache, key: tuple[int, int, int]) -> Tensor:
        """Compute a step on the recording stream. Raises RuntimeError where the model waits for the GPU.

        Such a model can't be recorded, and an error during recording would leave torch's allocator in that mode.
        """
        current, before = torch.cuda.current_stream(self._device), torch.cuda.get_sync_debug_mode()
        self._stream.wait_stream(current)
        try:
            with warnings.catch_warnings(), torch.cuda.stream(self._stream):
                warnings.simplefilter("ignore")  # torch warns that the mode is a prototype
                torch.cuda.set_sync_debug_mode("error")
                return self._logits(cache, *key[1:])
        finally:
            torch.cuda.set_sync_debug_mode(before)
            current.wait_stream(self._stream)

    def _forget(self) -> None:
        """Discard all recorded steps, because memory that they read is about to change or is needed."""
        self._graphs.clear()
        self._pool = None

    def _complaint(self, codec: TokenIds) -> str:
        if not may_cascade(self.model):
            return "the model has an attention of its own"
        if len(set(getattr(self.model, "hf_device_map", {"": 0}).values())) > 1:
            return "the model's layers lie on several devices"
        return complaint_of_step(self.model, codec, SlotCache(self._device, memory=self), self.next_logits)
