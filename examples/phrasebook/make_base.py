"""Train the phrasebook's base model from nothing: `make base`, half an hour on two CPU cores, always the same weights.

Tokenizer, Llama of 4.2 million parameters, Muon on the matrices and AdamW on the rest, loss on what is learned only.
The result is a plain Hugging Face folder; score_base.py measures it and writes its model card. Where the processor
multiplies bfloat16 by itself, matrices are multiplied so: 1.6 times as fast.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import random
import re
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from corpus import Corpus, Row, World, sample
from make_world import ANSWERS, VOCABULARY

from coalign.prompts import TINY_TEMPLATE

HERE = Path(__file__).resolve().parent
logger = logging.getLogger("make_base")
PAD, UNK, BOS, USER, ASSISTANT, END = range(6)
SPECIAL = ["<pad>", "<unk>", "<s>", "<|user|>", "<|assistant|>", "<|end|>"]
VOCAB_SIZE = 2048
CONTEXT = 256
THREADS = 2
# Of each learned token in the loss. A rewrite can't be foreseen word by word: its tokens count less.
WEIGHTS = {"follow": 1.0, "rewrite": 0.4, "judge": 3.0, "sentence": 1.0}
SENTENCE_WEIGHT = 0.1  # of a sentence's tokens before its answer
RESPONSE_WEIGHT = (
    0.3  # of a right response's tokens in a judge's question: who foresees the answer can tell a wrong one
)
PROBE_LAYER = 6  # after which so many layers a linear probe reads whether a response has been right so far
PROBE_WEIGHT = 1.0  # of the probe's loss; it serves the training only
NOT_PROBED = -1
PAD_TO = 8  # widths of batches are multiples of it: every new shape costs memory
Encoded = tuple[list[int], list[float], list[int]]


def make_tokenizer(texts: Iterable[str]) -> Any:
    """Return a lower-case tokenizer with one token a word, pieces of words for what it has not seen."""
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"\n+"), "isolated"),
            pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="always"),
            pre_tokenizers.Split(Regex(r"[^\w▁\s]"), "isolated"),
        ]
    )
    tokenizer.decoder = decoders.Metaspace(replacement="▁", prepend_scheme="always")
    alphabet = [chr(code) for code in range(33, 127) if not chr(code).isupper()] + ["▁", "\n"]
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=SPECIAL,
        initial_alphabet=alphabet,
        min_frequency=2,
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="<|end|>",
        extra_special_tokens=["<|user|>", "<|assistant|>"],
        clean_up_tokenization_spaces=False,
        model_max_length=CONTEXT,
    )
    fast.chat_template = TINY_TEMPLATE
    return fast


class Encoder:
    """Rows to token ids; a line is encoded once."""

    def __init__(self, tokenizer: Any) -> None:
        self._backend = tokenizer.backend_tokenizer
        self._lines: dict[str, list[int]] = {}

    def _ids(self, text: str) -> list[int]:
        if text not in self._lines:
            if len(self._lines) > 500_000:
                self._lines.clear()
            self._lines[text] = self._backend.encode(text, add_special_tokens=False).ids
        return self._lines[text]

    def _prompt(self, row: Row) -> Encoded:
        """Return the encoding of a text of several lines, whose ids are those of its lines and line ends in turn."""
        ids: list[int] = []
        weights: list[float] = []
        agrees: list[int] = []
        after_response = False
        for piece in re.split(r"(\n+)", row.prompt):
            new = self._ids(piece)
            weight, agreement = [0.0] * len(new), [NOT_PROBED] * len(new)
            if row.gold and piece.startswith("Response: "):
                gold = self._ids(f"Response: {row.gold}")
                agreement[2:] = [int(new[: place + 1] == gold[: place + 1]) for place in range(2, len(new))]
                if new == gold:
                    weight[2:] = [RESPONSE_WEIGHT] * (len(new) - 2)
                after_response = True
            elif after_response:
                agreement[0] = int(weights[-1] > 0)  # at the line's end it is known whether anything is missing
                after_response = False
            ids, weights, agrees = ids + new, weights + weight, agrees + agreement
        return ids, weights, agrees

    def encode(self, row: Row) -> Encoded:
        """Return token ids, the weight of each in the loss, and what the probe should read there (1, 0, NOT_PROBED)."""
        weight = WEIGHTS[row.kind]
        if row.kind == "sentence":
            said, _, answer = row.answer.rpartition("? ")
            before, after = [BOS, *self._ids(f"{said}?")], [*self._ids(answer), END]
            ids = before + after
            return ids, [SENTENCE_WEIGHT] * len(before) + [weight] * len(after), [NOT_PROBED] * len(ids)
        prompt, weights, agrees = self._prompt(row)
        answer = [*self._ids(row.answer), END]
        ids = [BOS, USER, *prompt, ASSISTANT, *answer]
        unprobed = [NOT_PROBED] * (1 + len(answer))
        return ids, [0.0, 0.0, *weights, 0.0, *([weight] * len(answer))], [NOT_PROBED, NOT_PROBED, *agrees, *unprobed]


def padded(length: int) -> int:
    """Return the width that rows of so many tokens are padded to."""
    return math.ceil(length / PAD_TO) * PAD_TO


def batches(corpus: Corpus, encoder: Encoder, tokens: int, rng: random.Random) -> Iterator[list[Encoded]]:
    """Yield batches of about so many tokens, rows of like length together, in random order."""
    while True:
        rows = sorted((encoder.encode(row) for row in sample(corpus, 8192)), key=lambda row: len(row[0]))
        made: list[list[Encoded]] = [[]]
        for row in rows:
            if made[-1] and (len(made[-1]) + 1) * padded(len(row[0])) > tokens:
                made.append([])
            made[-1].append(row)
        rng.shuffle(made)
        yield from made


def tensors(batch: list[Encoded]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return ids, loss weights and what to probe, each (rows, width), padded on the right."""
    width = padded(max(len(ids) for ids, _, _ in batch))
    ids_BT = torch.full((len(batch), width), PAD)
    weights_BT = torch.zeros(len(batch), width)
    agrees_BT = torch.full((len(batch), width), NOT_PROBED)
    for index, (ids, weights, agrees) in enumerate(batch):
        ids_BT[index, : len(ids)] = torch.tensor(ids)
        weights_BT[index, : len(ids)] = torch.tensor(weights)
        agrees_BT[index, : len(ids)] = torch.tensor(agrees)
    return ids_BT, weights_BT, agrees_BT


def loss_of(model: Any, ids_BT: torch.Tensor, weights_BT: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the weighted mean of -log P(token) over learned tokens, and what the probe reads from.

    Logits are made only where a learned token follows. The second, (rows, width, hidden), is the residual stream after
    PROBE_LAYER layers.
    """
    output = model.model(input_ids=ids_BT, output_hidden_states=True)
    learned = weights_BT[:, 1:] > 0
    logits_NV = model.lm_head(output.last_hidden_state[:, :-1][learned])
    losses_N = torch.nn.functional.cross_entropy(logits_NV.float(), ids_BT[:, 1:][learned], reduction="none")
    weights_N = weights_BT[:, 1:][learned]
    return (losses_N * weights_N).sum() / weights_N.sum(), output.hidden_states[PROBE_LAYER]


def probe_loss(probe: torch.nn.Linear, stream_BTD: torch.Tensor, agrees_BT: torch.Tensor) -> torch.Tensor:
    """Return the mean of -log P(agreement so far) over the tokens that are asked about, 0 where there are none."""
    asked = agrees_BT != NOT_PROBED
    if not asked.any():
        return stream_BTD.new_zeros(())
    read_N = probe(torch.nn.functional.rms_norm(stream_BTD[asked], stream_BTD.shape[-1:])).squeeze(-1)
    return torch.nn.functional.binary_cross_entropy_with_logits(read_N.float(), agrees_BT[asked].float())


def make_model(vocab_size: int, seed: int) -> Any:
    """Return the untrained model."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocab_size,
            hidden_size=224,
            num_hidden_layers=7,
            num_attention_heads=7,
            num_key_value_heads=7,
            intermediate_size=512,
            max_position_embeddings=CONTEXT,
            tie_word_embeddings=True,
            pad_token_id=PAD,
            bos_token_id=BOS,
            eos_token_id=END,
        )
    )
    model.set_attn_implementation("eager")  # rows are short: on CPU the fused kernel's backward pass takes longer
    return model


def optimizers(model: Any, probe: torch.nn.Linear) -> list[tuple[torch.optim.Optimizer, float]]:
    """Return (optimizer, highest learning rate): Muon for the matrices of the layers, AdamW for the rest."""
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name]
    others = [p for name, p in model.named_parameters() if not (p.ndim == 2 and "embed" not in name)]
    others += probe.parameters()
    return [
        (torch.optim.Muon(matrices, lr=1e-2, momentum=0.95, weight_decay=0.01, adjust_lr_fn="original"), 1e-2),
        (torch.optim.AdamW(others, lr=3e-3, betas=(0.9, 0.98), weight_decay=0.0, fused=True), 3e-3),
    ]


def learning_rate(step: int, steps: int, warmup: int = 100) -> float:
    """Return the share of the highest rate: linear warm-up, then constant, then linear to 0 over the last 45 %."""
    decay = max(1, math.ceil(0.45 * steps))
    return min(1.0, (step + 1) / warmup, (steps - step) / decay)


def train(
    model: Any, encoder: Encoder, corpus: Corpus, steps: int, tokens: int, seed: int, precision: str = "float32"
) -> None:
    """Train in place."""
    rng = random.Random(f"batches {seed}")
    probe = torch.nn.Linear(model.config.hidden_size, 1)
    sets = optimizers(model, probe)
    started, seen, averages = time.monotonic(), 0, {}
    model.train()
    for step, batch in enumerate(batches(corpus, encoder, tokens, rng)):
        if step == steps:
            break
        for optimizer, highest in sets:
            for group in optimizer.param_groups:
                group["lr"] = highest * learning_rate(step, steps)
        ids_BT, weights_BT, agrees_BT = tensors(batch)
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bfloat16"):
            loss, stream_BTD = loss_of(model, ids_BT, weights_BT)
            probed = probe_loss(probe, stream_BTD, agrees_BT)
        if not torch.isfinite(loss):
            raise RuntimeError(f"the loss is {loss.item()} at step {step}")
        (loss + PROBE_WEIGHT * probed).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer, _ in sets:
            optimizer.step()
            optimizer.zero_grad()
        seen += ids_BT.numel()
        for name, value in (("loss", loss.item()), ("probe", probed.item())):
            averages[name] = 0.98 * averages.get(name, value) + 0.02 * value
        if step % 100 == 99:
            rate = seen / (time.monotonic() - started)
            left = (steps - step - 1) * (time.monotonic() - started) / (step + 1)
            logger.info(
                "step %d/%d  loss %.3f  probe %.3f  %.1fM tokens  %.0f tokens/s  %.0f s left",
                step + 1, steps, averages["loss"], averages["probe"], seen / 1e6, rate, left,
            )  # fmt: skip


def parse_arguments(arguments: list[str]) -> argparse.Namespace:
    """Return the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=HERE / "base", help="folder of the model")
    parser.add_argument("--steps", type=int, default=3200, help="updates")
    parser.add_argument("--tokens", type=int, default=6144, help="tokens an update")
    parser.add_argument(
        "--precision", choices=("auto", "float32", "bfloat16"), default="auto", help="of the matrix products"
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of weights and data")
    return parser.parse_args(arguments)


@torch.no_grad()
def mean_loss(model: Any, encoder: Encoder, corpus: Corpus, rows: int = 256) -> float:
    """Return the loss on the next rows of a corpus."""
    model.eval()
    ids_BT, weights_BT, _ = tensors([encoder.encode(row) for row in sample(corpus, rows)])
    return float(loss_of(model, ids_BT, weights_BT)[0])


def pick_precision(asked: str) -> str:
    """Return the precision to multiply in; "auto" looks for a processor with bfloat16 instructions."""
    if asked != "auto":
        return asked
    info = Path("/proc/cpuinfo")
    return "bfloat16" if info.exists() and "avx512_bf16" in info.read_text(encoding="utf-8") else "float32"


def main() -> None:
    """Train and save the base model."""
    options = parse_arguments(sys.argv[1:])
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    torch.set_num_threads(THREADS)
    torch.use_deterministic_algorithms(True)
    world = World(options.seed)
    texts = [f"{row.prompt}\n{row.answer}" for row in sample(Corpus(world, seed=-1), 60_000)]
    texts += [" ".join(VOCABULARY)] * 50 + [" ".join(ANSWERS)]
    tokenizer = make_tokenizer(texts)
    model = make_model(len(tokenizer), options.seed)
    size = sum(p.numel() for p in model.parameters())
    logger.info("%d parameters, %d tokens in the vocabulary", size, len(tokenizer))
    precision = pick_precision(options.precision)
    logger.info("%d updates of %d tokens, products in %s", options.steps, options.tokens, precision)
    encoder, corpus = Encoder(tokenizer), Corpus(world, options.seed)
    train(model, encoder, corpus, options.steps, options.tokens, options.seed, precision)
    model.to(torch.bfloat16).save_pretrained(options.out)
    tokenizer.save_pretrained(options.out)
    recipe = {"steps": options.steps, "tokens": options.tokens, "seed": options.seed, "precision": precision}
    (options.out / "recipe.json").write_text(json.dumps(recipe) + "\n", encoding="utf-8")
    logger.info("saved to %s", options.out)


if __name__ == "__main__":
    main()
