"""The tokens that end a text by a model's generation config: read from a source, written into an exported model.

Knows no tokenizer and no weights.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import GenerationConfig

from coalign.config import ModelTable
from coalign.errors import UserError

logger = logging.getLogger("coalign")


def load_generation_config(folder: str, table: ModelTable) -> GenerationConfig | None:
    """Return the generation config of a model folder or hub name, None without one. Raises UserError for a bad one."""
    is_folder = Path(folder).exists()
    if is_folder and not Path(folder, "generation_config.json").exists():
        return None
    try:
        return GenerationConfig.from_pretrained(folder, revision=table.revision)
    except Exception as error:  # transformers raises many kinds
        if isinstance(error, OSError) and not is_folder:
            logger.debug("%s has no generation config", folder)
            return None
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f"{folder}: generation_config.json can't be read: {first}; mend or remove it") from error


def stops_of(config: GenerationConfig | None) -> list[int]:
    """Return the ids that end a text by a generation config."""
    stops = config.eos_token_id if config is not None else None
    return [index for index in (stops if isinstance(stops, list) else [stops]) if type(index) is int]


def end_with(model: Any, stops: Sequence[int]) -> None:
    """Write into a model's configs which tokens end a text: those of `stops` first, then those named already."""
    if not stops:
        return
    ends = list(dict.fromkeys([*stops, *stops_of(model.generation_config)]))
    value = ends[0] if len(ends) == 1 else ends
    for config in (model.generation_config, model.config, model.config.get_text_config()):
        config.eos_token_id = value
