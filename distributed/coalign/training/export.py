"""A trained model leaves its engine: gathered, merged, written, and kept only if its log-probs equal the engine's.

The untouched model makes the same way before the first update, so that no training is lost. Knows neither stage and no
texts.
"""

from __future__ import annotations

import dataclasses
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from coalign.errors import UserError
from coalign.models.codec import Codec
from coalign.models.logprobs import evaluation_mode, to_device, token_logps
from coalign.models.lora import merge_lora
from coalign.models.model_folder import export_model
from coalign.process import rank
from coalign.recipe import USER_ERROR
from coalign.training.checkpoints import has_checkpoint
from coalign.training.deepspeed_engine import DeepSpeedEngine, run_on_rank_zero
from coalign.training.micro_batches import Item, collate
from coalign.training.token_files import as_rows

CHECKED_TOKENS = 2048  # at most this many in the batch on which live and reopened model are compared


def try_export(engine: DeepSpeedEngine, folder: Path, codec: Codec, items: Sequence[Item]) -> None:
    """Export the untouched model to `folder` and remove it again; a run with a checkpoint has done so already.

    Called by every rank before the first update. Raises UserError when the disk is full or the model can't be exported.
    """
    if has_checkpoint(folder.parents[1]):
        return
    try:
        export(engine, folder, codec, items)
    except SystemExit:  # of another rank than the first, which tells why
        raise SystemExit(USER_ERROR) from None
    except (UserError, OSError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # from transformers, for one of hundreds of families
        reason = (str(error).strip() or type(error).__name__).partition("\n")[0]
        raise UserError(
            f"{engine.source}: a trained model of this kind can't be exported, so it is not trained: {reason}; use"
            " another model"
        ) from error
    finally:
        if rank() == 0:
            shutil.rmtree(folder, ignore_errors=True)


def export(engine: DeepSpeedEngine, folder: Path, codec: Codec, items: Sequence[Item]) -> None:
    """Write the trained model as a verified folder: its log-probs of some `items` must equal the live engine's.

    Called by every rank. Raises UserError when the disk is full and RuntimeError when a check fails; then no folder is
    left.
    """
    batch = collate(_few(items), codec.pad_id, False)
    with torch.no_grad(), evaluation_mode(engine.model):
        live_N = token_logps(engine.model, to_device(batch, engine.device)).cpu()
    # Weights are compared exactly, and a merge in float32. What is left here is what a device and a dtype round.
    tolerance = 1e-4 if engine.dtype is torch.float32 else 0.1

    def measure(model: Any) -> torch.Tensor:
        with torch.no_grad():
            return token_logps(model, batch)

    def check(model: Any) -> str | None:
        difference = float((measure(model) - live_N).abs().mean())
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
        merged = merge_lora(engine.source, engine.table, state, measure) if engine.table.lora.enabled else state
        export_model(folder, merged, engine.source, engine.table, codec.tokenizer, check, codec.ends)

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
