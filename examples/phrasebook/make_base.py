"""Train the phrasebook's base model from nothing: `make base`, 40 minutes on two CPU cores, always the same weights.

Tokenizer, Llama of 4.2 million parameters, Muon on the matrices and AdamW on the rest, loss on what is learned only.
The result is a plain Hugging Face folder; score_base.py measures it and writes its model card.
"""

from __future__ import annotations

import argparse
import itertools
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
# Of a right response's tokens at the end of a judge's question: who foresees the answer can tell a wrong one.
RESPONSE_WEIGHT = 0.5
PARTS = 3  # batches per update
LAST_RATE = 0.25  # of the last updates, as a share of the highest learning rates
PAD_TO = 4  # widths of batches are multiples of it: every new shape costs memory
Encoded = tuple[list[int], list[float]]


def make_tokenizer(texts: Iterable[str]) -> Any:
    """Return a lower-case tokenizer with one token per word and pieces for words that it has not seen."""
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
        lines = [self._ids(piece) for piece in re.split(r"(\n+)", row.prompt)]
        ids = [token for line in lines for token in line]
        learned = len(lines[-1]) - 2 if row.right else 0  # "Response" and ":" stand before it
        return ids, [0.0] * (len(ids) - learned) + [RESPONSE_WEIGHT] * learned

    def encode(self, row: Row) -> Encoded:
        """Return token ids and the weight of each in the loss."""
        weight = WEIGHTS[row.kind]
        if row.kind == "sentence":
            said, _, answer = row.answer.rpartition("? ")
            before, after = [BOS, *self._ids(f"{said}?")], [*self._ids(answer), END]
            return before + after, [SENTENCE_WEIGHT] * len(before) + [weight] * len(after)
        prompt, weights = self._prompt(row)
        answer = [*self._ids(row.answer), END]
        return [BOS, USER, *prompt, ASSISTANT, *answer], [0.0, 0.0, *weights, 0.0, *([weight] * len(answer))]


def padded(length: int) -> int:
    """Return the width to which rows of `length` tokens are padded."""
    return math.ceil(length / PAD_TO) * PAD_TO


def batches(corpus: Corpus, encoder: Encoder, tokens: int, rng: random.Random) -> Iterator[list[Encoded]]:
    """Yield batches of about `tokens` tokens in random order; the rows of a batch have similar lengths."""
    while True:
        rows = sorted((encoder.encode(row) for row in sample(corpus, 8192)), key=lambda row: len(row[0]))
        made: list[list[Encoded]] = [[]]
        for row in rows:
            if made[-1] and (len(made[-1]) + 1) * padded(len(row[0])) > tokens:
                made.append([])
            made[-1].append(row)
        rng.shuffle(made)
        yield from made


def tensors(batch: list[Encoded]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return ids and loss weights, each (rows, width), padded on the right."""
    width = padded(max(len(ids) for ids, _ in batch))
    ids_BT = torch.full((len(batch), width), PAD)
    weights_BT = torch.zeros(len(batch), width)
    for index, (ids, weights) in enumerate(batch):
        ids_BT[index, : len(ids)] = torch.tensor(ids)
        weights_BT[index, : len(ids)] = torch.tensor(weights)
    return ids_BT, weights_BT


def loss_of(model: Any, ids_BT: torch.Tensor, weights_BT: torch.Tensor) -> torch.Tensor:
    """Return the weighted sum of -log P(token) over learned tokens; logits are made only where one follows."""
    hidden_BTD = model.model(input_ids=ids_BT).last_hidden_state
    learned = weights_BT[:, 1:] > 0
    logits_NV = model.lm_head(hidden_BTD[:, :-1][learned])
    losses_N = torch.nn.functional.cross_entropy(logits_NV, ids_BT[:, 1:][learned], reduction="none")
    return (losses_N * weights_BT[:, 1:][learned]).sum()


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


class Muon(torch.optim.Optimizer):
    """Momentum whose direction is made orthogonal by Newton-Schulz iterations (Jordan et al. 2024).

    torch.optim.Muon iterates in bfloat16, which takes most of the time where the processor does not multiply it. Here
    it is float32, and matrices of one shape go through together.
    """

    def __init__(self, matrices: list[torch.nn.Parameter], lr: float, momentum: float = 0.95, decay: float = 0.01):
        super().__init__(matrices, {"lr": lr, "momentum": momentum, "decay": decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """Update every matrix once."""
        for group in self.param_groups:
            for shape in dict.fromkeys(p.shape for p in group["params"]):
                same = [p for p in group["params"] if p.shape == shape]
                gradient_MRC = torch.stack([p.grad for p in same])
                average_MRC = self.state[same[0]].setdefault("momentum", torch.zeros_like(gradient_MRC))
                average_MRC.lerp_(gradient_MRC, 1 - group["momentum"])
                directions = orthogonal(gradient_MRC.lerp(average_MRC, group["momentum"]))
                rate = group["lr"] * math.sqrt(max(1.0, shape[0] / shape[1]))
                for parameter, direction in zip(same, directions, strict=True):
                    parameter.mul_(1 - group["lr"] * group["decay"]).add_(direction, alpha=-rate)


def orthogonal(matrices_MRC: torch.Tensor) -> torch.Tensor:
    """Return matrices of the same shape with singular values near 1: five Newton-Schulz steps."""
    if matrices_MRC.shape[1] > matrices_MRC.shape[2]:
        return orthogonal(matrices_MRC.mT).mT
    x = matrices_MRC / matrices_MRC.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    for _ in range(5):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=-4.7750, alpha=2.0315), x, beta=3.4445)
    return x


def optimizers(model: Any) -> list[tuple[torch.optim.Optimizer, float]]:
    """Return (optimizer, highest learning rate): Muon for the matrices of the layers, AdamW for the rest."""
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name]
    others = [p for name, p in model.named_parameters() if not (p.ndim == 2 and "embed" not in name)]
    return [
        (Muon(matrices, lr=1e-2), 1e-2),
        (torch.optim.AdamW(others, lr=3e-3, betas=(0.9, 0.98), weight_decay=0.0, fused=True), 3e-3),
    ]


def learning_rate(step: int, steps: int, warmup: int = 100) -> float:
    """Return the share of the highest rate: linear warm-up, then constant, then linear to 0 over the last 45 %."""
    decay = max(1, math.ceil(0.45 * steps))
    return min(1.0, (step + 1) / warmup, (steps - step) / decay)


def train(model: Any, encoder: Encoder, corpus: Corpus, steps: int, tokens: int, seed: int, rate: float = 1.0) -> None:
    """Train in place, at a share of the usual learning rates.

    An update takes PARTS batches, so that it sees rows of several lengths and so of all kinds.
    """
    parts = batches(corpus, encoder, tokens // PARTS, random.Random(f"batches {seed}"))
    sets = optimizers(model)
    started, seen, average = time.monotonic(), 0, 0.0
    model.train()
    for step in range(steps):
        for optimizer, highest in sets:
            for group in optimizer.param_groups:
                group["lr"] = rate * highest * learning_rate(step, steps)
        update = [tensors(batch) for batch in itertools.islice(parts, PARTS)]
        total = sum(float(weights_BT[:, 1:].sum()) for _, weights_BT in update)
        loss = 0.0
        for ids_BT, weights_BT in update:
            share = loss_of(model, ids_BT, weights_BT) / total
            share.backward()
            loss += share.item()
            seen += ids_BT.numel()
        if not math.isfinite(loss):
            raise RuntimeError(f"the loss is {loss} at step {step}")
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer, _ in sets:
            optimizer.step()
            optimizer.zero_grad()
        average = 0.98 * average + 0.02 * loss if step else loss
        if step % 50 == 49:
            spent = time.monotonic() - started
            logger.info(
                "step %d/%d  loss %.3f  %.1fM tokens  %.0f tokens/s  %.0f s left",
                step + 1, steps, average, seen / 1e6, seen / spent, (steps - step - 1) * spent / (step + 1),
            )  # fmt: skip


def finish(model: Any, encoder: Encoder, world: World, steps: int, tokens: int, seed: int) -> None:
    """Train a rounded model on the corpus of the last updates; it is in bfloat16 afterwards, as it is saved."""
    with torch.no_grad():
        for parameter in model.parameters():  # not model.to: the angles of the positions stay as they are
            parameter.copy_(parameter.bfloat16())
    train(model, encoder, Corpus(world, f"{seed} last", last=True), steps, tokens, seed + 1, LAST_RATE)
    model.to(torch.bfloat16)


def parse_arguments(arguments: list[str]) -> argparse.Namespace:
    """Return the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=HERE / "base", help="folder of the model")
    parser.add_argument("--steps", type=int, default=1150, help="updates")
    parser.add_argument("--last-steps", type=int, default=100, help="updates after that, at a lower rate")
    parser.add_argument("--tokens", type=int, default=6144, help="tokens per update")
    parser.add_argument("--seed", type=int, default=0, help="seed of weights and data")
    return parser.parse_args(arguments)


@torch.no_grad()
def mean_loss(model: Any, encoder: Encoder, corpus: Corpus, rows: int = 256) -> float:
    """Return the loss on the next rows of a corpus."""
    model.eval()
    ids_BT, weights_BT = tensors([encoder.encode(row) for row in sample(corpus, rows)])
    return float(loss_of(model, ids_BT, weights_BT) / weights_BT[:, 1:].sum())


def main() -> None:
    """Train and save the base model."""
    options = parse_arguments(sys.argv[1:])
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    torch.set_num_threads(THREADS)
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # nothing is read before it is written
    world = World(options.seed)
    texts = [f"{row.prompt}\n{row.answer}" for row in sample(Corpus(world, seed=-1), 60_000)]
    texts += [" ".join(VOCABULARY)] * 50 + [" ".join(ANSWERS)]
    tokenizer = make_tokenizer(texts)
    model = make_model(len(tokenizer), options.seed)
    size = sum(p.numel() for p in model.parameters())
    logger.info("%d parameters, %d tokens in the vocabulary", size, len(tokenizer))
    logger.info("%d updates of %d tokens", options.steps, options.tokens)
    encoder, corpus = Encoder(tokenizer), Corpus(world, options.seed)
    train(model, encoder, corpus, options.steps, options.tokens, options.seed)
    finish(model, encoder, world, options.last_steps, options.tokens, options.seed)
    model.save_pretrained(options.out)
    tokenizer.save_pretrained(options.out)
    recipe = {"steps": options.steps, "last_steps": options.last_steps, "tokens": options.tokens, "seed": options.seed}
    (options.out / "recipe.json").write_text(json.dumps(recipe) + "\n", encoding="utf-8")
    logger.info("saved to %s", options.out)


if __name__ == "__main__":
    main()
