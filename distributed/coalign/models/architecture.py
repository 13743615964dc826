"""Which class of transformers opens a model folder, and how: of a model of several kinds of input, the text part.

Knows configs, no weights.
"""

from __future__ import annotations

import functools
import logging
from typing import Any

from transformers import AutoConfig, PreTrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from coalign.config import ModelTable
from coalign.errors import UserError

logger = logging.getLogger("coalign")

# Names of the text part's weights in folders of several kinds of input, as hubs and transformers write them, and
# their names in a model of text alone.
_TEXT_KEYS = {
    r"^(model\.)?language_model\.lm_head\.": "lm_head.",
    r"^(model\.)?language_model\.model\.": "model.",
    r"^model\.language_model\.": "model.",
}


def read_config(folder: str, table: ModelTable) -> Any:
    """Return the config of a folder's text model. Raises UserError when transformers has no causal LM for it.

    A model of several kinds of input keeps its text part's config inside its own. It is opened by that alone, where
    transformers has a class for it.
    """
    config = AutoConfig.from_pretrained(folder, revision=table.revision, trust_remote_code=False)
    text = config.get_text_config()
    if text is not config and _class_of(text) is not None:
        written, _ = PreTrainedConfig.get_config_dict(folder, revision=table.revision)
        of_text = written.get("text_config") or {}
        if "tie_word_embeddings" in written or "tie_word_embeddings" not in of_text:
            text.tie_word_embeddings = config.tie_word_embeddings  # the whole model's decides, as in transformers
        return text
    if _class_of(config) is None:
        raise UserError(
            f"{folder}: transformers has no causal language model for model_type {config.model_type!r}; use a model of"
            " text"
        )
    return config


def opening_options(folder: str, table: ModelTable) -> dict[str, Any]:
    """Return what AutoModelForCausalLM.from_pretrained needs beside the folder: config, attention, names of weights.

    Without SDPA in the model's code its attention is eager. Raises UserError when transformers can't open the model.
    """
    config = read_config(folder, table)
    attention = table.attention
    if attention == "sdpa" and not _class_of(config)._supports_sdpa:
        _say_once(f"{config.model_type} models have no SDPA attention in transformers; using eager attention")
        attention = "eager"
    return {"config": config, "attn_implementation": attention, "key_mapping": dict(_TEXT_KEYS)}


def _class_of(config: Any) -> Any:
    """Return the class of causal LMs that a config of exactly this kind opens, or None."""
    return MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)


@functools.cache
def _say_once(message: str) -> None:
    logger.info("%s", message)
