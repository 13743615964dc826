"""A small model with random weights and a tokenizer trained on the run's own texts, for runs without a given model.

Knows texts as strings only, no records.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from coalign.config import RandomTable
from coalign.prompts import TINY_TEMPLATE
from coalign.runs.atomic_files import replace_folder

logger = logging.getLogger("coalign")


def make_random_model(folder: Path, texts: Iterable[str], table: RandomTable, seed: int) -> None:
    """Write a folder with a randomly initialised Llama model and a byte-level BPE tokenizer trained on `texts`.

    The weights depend on `seed` and the table alone, and torch's global random state is left as it was.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<pad>", "<s>", "<|user|>", "<|assistant|>", "<|end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=table.vocab_size,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="<|end|>",
        model_max_length=table.context,
        clean_up_tokenization_spaces=False,
    )
    wrapped.chat_template = TINY_TEMPLATE
    config = LlamaConfig(
        vocab_size=len(wrapped),
        hidden_size=table.hidden_size,
        num_hidden_layers=table.num_layers,
        num_attention_heads=table.num_heads,
        intermediate_size=table.intermediate_size,
        max_position_embeddings=table.context,
        tie_word_embeddings=True,
        pad_token_id=wrapped.pad_token_id,
        bos_token_id=wrapped.bos_token_id,
        eos_token_id=wrapped.eos_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config)

    def write(target: Path) -> None:
        model.save_pretrained(target)
        wrapped.save_pretrained(target)

    replace_folder(folder, write)
    num_parameters = sum(p.numel() for p in model.parameters())
    logger.info("made a model with random weights: %.2fM parameters, %d tokens", num_parameters / 1e6, len(wrapped))
