"""Models in and out: tokenizer, causal LM, and the verified model folder.

Loads safetensors weights only, since pickled ones can run code. Knows no texts and no training settings.
"""

from __future__ import annotations

import contextlib
import json
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled
from transformers.utils.logging import disable_progress_bar

from coalign.config import ModelTable
from coalign.errors import UserError
from coalign.files import is_plain, list_folder, read_text
from coalign.models.architecture import read_config
from coalign.models.chat_template import ChatTemplate, today
from coalign.models.codec import Codec
from coalign.models.export_checks import complaint_of_reopened, main_dtype
from coalign.models.loaded_weights import held_messages, open_causal_lm, open_checked, reason_of
from coalign.models.stop_tokens import end_with, load_generation_config, stops_of
from coalign.runs.atomic_files import replace_folder, require_free_space

logger = logging.getLogger("coalign")
disable_progress_bar()

_UNLIMITED = 10**9
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
_FILES = (".json", ".jinja", ".safetensors", ".model", ".txt")  # of a model folder that are read


def pick_device(index: int = 0) -> torch.device:
    """Return GPU `index` of this process, or the CPU where there is none."""
    return torch.device("cuda", index) if torch.cuda.is_available() else torch.device("cpu")


def pick_dtype(name: str, device: torch.device) -> torch.dtype:
    """Return the dtype of "auto" (bfloat16 on GPU, float32 on CPU), "float32" or "bfloat16"."""
    if name == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    return _DTYPES[name]


def check_model_folder(folder: str) -> None:
    """Raise UserError when a local folder lacks safetensors weights, a config or a tokenizer; a hub name passes."""
    path = Path(folder)
    if not path.exists():
        if path.is_absolute() or folder.startswith(".") or folder.count("/") != 1:
            raise UserError(f"{folder}: no such model folder; check model.path")
        return  # a hub name
    if not path.is_dir():
        raise UserError(f"{folder} is a file; a model folder was expected")
    found = list_folder(path, "model.path")
    names = {item.name for item in found if is_plain(item)}
    for item in found:
        if item.suffix in _FILES and not item.is_file():  # transformers would go on as if it were not there
            raise UserError(f"{item}: a file was expected, this is a folder or a link that leads nowhere")
    if "adapter_config.json" in names:
        raise UserError(
            f"{folder} holds adapters (adapter_config.json); merge them into their model first, with peft's"
            " merge_and_unload, and save the result and its tokenizer to a folder of its own"
        )
    if "config.json" not in names:
        raise UserError(f"{folder} holds no config.json; a Hugging Face model folder was expected")
    if not any(name.endswith(".safetensors") for name in names):
        pickled = sorted(name for name in names if name.endswith((".bin", ".pt", ".pth")))
        if pickled:
            raise UserError(
                f"{folder} holds only pickle weights ({pickled[0]}), which can run code when opened; convert them to"
                " safetensors first (save_pretrained writes it)"
            )
        raise UserError(f"{folder} holds no *.safetensors weights")
    if not names & {"tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json"}:
        raise UserError(f"{folder} holds no tokenizer; save it beside the weights (tokenizer.save_pretrained)")


def load_tokenizer(folder: str, table: ModelTable) -> Any:
    """Return the model's tokenizer, with `model_max_length` set to the model's context in tokens.

    Raises UserError for a folder without a tokenizer, one whose ids exceed the embedding, an unknown context, or an
    unreadable chat template file.
    """
    check_model_folder(folder)
    options = {"revision": table.revision, "trust_remote_code": False}
    try:
        with held_messages("token"):  # those on the config come with the model
            tokenizer = AutoTokenizer.from_pretrained(folder, **options)
            config = AutoConfig.from_pretrained(folder, **options)
    except MemoryError:
        raise
    except Exception as error:  # transformers and tokenizers raise any kind for a file that is malformed
        raise UserError(f"{folder}: the tokenizer or config can't be loaded: {reason_of(error, table)}") from error
    if table.chat_template:
        tokenizer.chat_template = read_text(Path(table.chat_template), "model.chat_template")
        if not tokenizer.chat_template.strip():
            raise UserError(f"{table.chat_template}: the file is empty; check model.chat_template")
    _check_vocabulary(folder, tokenizer, config, table)
    longest = tokenizer.model_max_length
    if not isinstance(longest, int | float) or isinstance(longest, bool) or not longest >= 1:
        raise UserError(f"{folder}: model_max_length={longest!r:.40} in tokenizer_config.json is no number of tokens")
    limit = min(int(min(longest, _UNLIMITED)), _context_of(config))
    if limit >= _UNLIMITED and not table.max_tokens:
        raise UserError(f"{folder} does not say how long its context is; set model.max_tokens")
    tokenizer.model_max_length = limit
    tokenizer.truncation_side = "right"
    return tokenizer


def load_codec(folder: str, table: ModelTable, date: str = "") -> Codec:
    """Return the codec of a model folder: its tokenizer with the chat template and special tokens of [model].

    `date` (YYYY-MM-DD, empty: today) is for a template that writes one. Raises UserError, see Codec.
    """
    return Codec(load_tokenizer(folder, table), table, stops_of(load_generation_config(folder, table)), date)


def _check_vocabulary(folder: str, tokenizer: Any, config: Any, table: ModelTable) -> None:
    """Raise UserError when the tokenizer has ids beyond the embedding; on a GPU they would fail an assertion.

    A special token counts only where a prompt or an answer can hold it: a text model may keep that of an image.
    """
    rows = getattr(_text_config(config), "vocab_size", None)
    if not isinstance(rows, int):
        return
    beyond = {token: index for token, index in tokenizer.get_vocab().items() if index >= rows}
    if not beyond:
        return
    special = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    named = {tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token, tokenizer.unk_token}
    named |= {table.end_of_turn, table.pad_token}
    template = f"{tokenizer.chat_template}"
    turns = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "x"}]
    with contextlib.suppress(UserError):  # the codec tells what is wrong with a template
        conversations = [(turns[:1], {"add_generation_prompt": True}), (turns, {})]
        template += "".join(map(str, ChatTemplate(tokenizer, "", today()).render_first(conversations)))
    used = {token: i for token, i in beyond.items() if token not in special or token in named or token in template}
    if used:
        token = max(used, key=lambda token: used[token])
        raise UserError(
            f"{folder}: the tokenizer has ids up to {used[token]} ({token!r}), the model's embedding only {rows} rows;"
            " use the model's own tokenizer, or resize the embedding and save the model again"
        )


def _text_config(config: Any) -> Any:
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def _context_of(config: Any) -> int:
    text_config = _text_config(config)
    for name in ("max_position_embeddings", "n_positions", "max_sequence_length"):
        value = getattr(text_config, name, None)
        if isinstance(value, int) and value > 0:
            return value
    return _UNLIMITED


def load_model(folder: str, table: ModelTable, dtype: torch.dtype, num_gpus: int = 0) -> Any:
    """Return the causal LM of a folder or hub name in `dtype`, with dropout off.

    It lies on the CPU, or with `num_gpus` its layers are spread evenly over that number of GPUs of this process. Raises
    UserError when the model can't be loaded, does not fit these GPUs, lacks a weight, or holds NaN or infinity. Under
    ZeRO-3 transformers does not say which weights are missing: call `check_weights` before.
    """
    check_model_folder(folder)
    without_planned_attention()
    if num_gpus > torch.cuda.device_count():
        raise UserError(
            f"generation.gpus_per_worker={num_gpus}, but this process sees {torch.cuda.device_count()} GPUs; use fewer"
        )
    spread: dict[str, Any] = {"device_map": "auto"} if num_gpus else {}
    if num_gpus:  # GPUs without an entry stay unused
        spread["max_memory"] = {index: torch.cuda.mem_get_info(index)[0] for index in range(num_gpus)}
    if is_deepspeed_zero3_enabled():  # errors of other ranks arrive here too, and are no fault of the folder
        model, _ = open_causal_lm(folder, table, dtype)
    else:
        model = open_checked(folder, table, dtype, **spread)
    if {"cpu", "disk"} & {str(device) for device in getattr(model, "hf_device_map", {}).values()}:
        raise UserError(f"{folder}: {num_gpus} GPUs are too small for the model; use a higher gpus_per_worker")
    # A sum takes one pass and no copy, and NaN and infinity propagate through it.
    bad = next((n for n, p in model.named_parameters() if not torch.isfinite(p.detach().sum(dtype=torch.float32))), "")
    if bad:
        raise UserError(f"{folder}: its weight {bad} holds NaN or infinity; convert or download the model again")
    switch_off_dropout(model)
    return model


def check_weights(folder: str, table: ModelTable) -> None:
    """Raise UserError when a model can't be loaded or lacks a weight, from the names and shapes in its files alone."""
    check_model_folder(folder)
    open_checked(folder, table, torch.float32, device_map="meta")


def without_planned_attention() -> None:
    """Keep cuDNN out of attention: it makes a plan for every new shape, and ours seldom repeat."""
    torch.backends.cuda.enable_cudnn_sdp(False)


def switch_off_dropout(model: Any) -> None:
    """Set every dropout to zero, also of whole layers, so that log-probs of two passes can be compared."""
    for module in model.modules():
        if isinstance(module, torch.nn.modules.dropout._DropoutNd):
            module.p = 0.0
        # Families keep the rate of functional dropout in the module or read it from the config.
        for holder in (module, getattr(module, "config", None)):
            for name, value in list(getattr(holder, "__dict__", {}).items()):
                if "drop" in name and isinstance(value, float):
                    setattr(holder, name, 0.0)


def on_cpu(table: ModelTable) -> ModelTable:
    """Return the table with an attention implementation that runs on the CPU."""
    return table.model_copy(update={"attention": "sdpa" if table.attention == "flash_attention_2" else table.attention})


def export_model(
    folder: Path,
    state: dict[str, torch.Tensor],
    source: str,
    table: ModelTable,
    tokenizer: Any,
    check: Callable[[Any], str | None],
    stops: Sequence[int] = (),
) -> None:
    """Write a model folder that appears only when it is whole and verified.

    `state` holds weights on the CPU under the model's own names; config and generation config come from `source`, the
    model that training started from, with `stops` as the tokens that end a text. The folder is reopened as a user would
    open it: keys, shapes, values and tied weights are compared, then `check(model)` returns a complaint or None. Raises
    UserError when the disk is full and RuntimeError when a check fails.
    """
    num_bytes = sum(t.numel() * t.element_size() for t in state.values())
    require_free_space(folder, int(num_bytes * 1.05) + 2**20, "the exported model")
    with torch.device("meta"):
        shell = AutoModelForCausalLM.from_config(read_config(source, table), trust_remote_code=False)
    shell = shell.to(main_dtype(state))  # config.json names this dtype
    generation = load_generation_config(source, table)
    if generation is not None:
        shell.generation_config = generation
    end_with(shell, stops)

    def write(target: Path) -> None:
        shell.save_pretrained(target, state_dict=dict(state))  # a copy, since save_pretrained empties it
        tokenizer.save_pretrained(target)
        complaint = _compare_folder(target, state, table, check)
        if complaint:
            raise RuntimeError(f"the exported model failed its check and was not kept: {complaint}")

    replace_folder(folder, write)


def _compare_folder(
    folder: Path, state: dict[str, torch.Tensor], table: ModelTable, check: Callable[[Any], str | None]
) -> str | None:
    bad = next((name for name, t in state.items() if not torch.isfinite(t).all()), None)
    if bad:
        return f"{bad} holds NaN or infinity"
    model = load_model(str(folder), on_cpu(table), main_dtype(state))
    complaint = complaint_of_reopened(model.state_dict(), state)
    if complaint:
        return complaint
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    if config.get("tie_word_embeddings") and head is not None and head.weight.data_ptr() != embedding.weight.data_ptr():
        return "the output head should be tied to the embeddings and is not"
    return check(model)
