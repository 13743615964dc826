"""A trained model leaves its engine: gathered, merged, written, and kept only if its log-probs equal the engine's.

Knows neither stage and no texts.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from coalign.models.codec import Codec
from coalign.models.logprobs import evaluation_mode, to_device, token_logps
from coalign.models.lora import merge_lora
from coalign.models.model_folder import export_model
from coalign.training.deepspeed_engine import DeepSpeedEngine, run_on_rank_zero
from coalign.training.micro_batches import Item, collate
from coalign.training.token_files import as_rows

CHECKED_TOKENS = 2048  # at most this many in the batch on which live and reopened model are compared


def export(engine: DeepSpeedEngine, folder: Path, codec: Codec, items: Sequence[Item]) -> None:
    """Write the trained model as a verified folder: its log-probs of some `items` must equal the live engine's.

    Called by every rank. Raises UserError when the disk is full and RuntimeError when a check fails; then no folder is
    left.
    """
    batch = collate(_few(items), codec.pad_id, False)
    with torch.no_grad(), evaluation_mode(engine.model):
        live_N = token_logps(engine.model, to_device(batch, engine.device)).cpu()
    tolerance = 1e-4 if engine.dtype is torch.float32 else 0.1

    def check(model: Any) -> str | None:
        with torch.no_grad():
            reopened_N = token_logps(model, batch)
        difference = float((reopened_N - live_N).abs().mean())
        if difference <= tolerance:
            return None
        return f"its log-probs differ from the live engine's by {difference:.2g} per token (at most {tolerance:g})"

    state = engine.gather_state()

    def write() -> None:
        threads = torch.get_num_threads()
        torch.set_num_threads(os.cpu_count() or 1)  # the other ranks wait and need no cores
        try:
            write_alone()
        finally:
            torch.set_num_threads(threads)

    def write_alone() -> None:
        merged = merge_lora(engine.source, engine.table, state) if engine.table.lora.enabled else state
        export_model(folder, merged, engine.source, engine.table, codec.tokenizer, check)

    run_on_rank_zero(write)


def _few(items: Sequence[Item]) -> list[Item]:
    """Return up to four of the shortest items with one response each, within CHECKED_TOKENS for a check on a CPU."""
    chosen: list[Item] = []
    lengths = as_rows(items).sizes.longest
    for index in np.argsort(lengths, kind="stable")[:4].tolist():
        if chosen and sum(i.longest() for i in chosen) + int(lengths[index]) > CHECKED_TOKENS:
            break
        chosen.append(dataclasses.replace(items[index], responses=items[index].responses[:1]))
    return chosen
