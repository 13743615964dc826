"""The small dev measurement inside training: loss, accuracy, consistency, end-of-turn, variety of answers.

Settings are chosen by it, and never by test inputs. Answers are compared as in evaluation/. Knows the Engine protocol,
no DeepSpeed.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from coalign.config import TrainTable
from coalign.evaluation.grids import Vocabulary
from coalign.evaluation.metrics import ABSENT, agreement_matrix, answer_key, consistency_rate, is_correct
from coalign.models.codec import Codec, GeneratedIds
from coalign.models.logprobs import evaluation_mode, to_device, token_logps
from coalign.models.rows import TokenIds, left_pad
from coalign.process import rank, world_size
from coalign.records import Example, Task, Wording
from coalign.text import AnswerForm, unit_hash
from coalign.training.engine import Engine
from coalign.training.micro_batches import Item, collate
from coalign.training.training_rows import Encoder
from coalign.wordings.wordings import canonical_answer

logger = logging.getLogger("coalign")

_BUCKETS = 1024  # distinct answers are counted as occupied hash buckets, over all ranks


class DevMeasure:
    """Dev inputs under dev wordings, dealt out to the ranks input by input; call it to measure the engine's model."""

    def __init__(
        self,
        engine: Engine,
        codec: Codec,
        examples: Sequence[Example],
        wordings: Sequence[Wording],
        table: TrainTable,
        forms: Mapping[str, AnswerForm] | None = None,
    ) -> None:
        self.engine, self.codec, self.table, self.forms = engine, codec, table, forms or {}
        encoder = Encoder(codec, "drop")
        self.inputs: list[tuple[Example, list[tuple[Wording, Item]]]] = []
        for example in _spread(examples, table.dev_inputs):
            chosen = _dev_wordings(wordings, example.task, table.dev_wordings)
            pairs = [(w, item) for w in chosen if (item := encoder.encode(example, w, example.outputs[0]))]
            room = [(w, i) for w, i in pairs if len(i.prompt) + table.dev_max_new_tokens <= codec.max_tokens]
            if len(room) >= 2:
                self.inputs.append((example, room))
        # All ranks get equally many inputs, surplus ones with weight zero, so that they make the same forward passes.
        share = -(-len(self.inputs) // world_size())
        self.mine = [self.inputs[(rank() + k * world_size()) % len(self.inputs)] for k in range(share)]
        self.weights = [float(rank() + k * world_size() < len(self.inputs)) for k in range(share)]

    def __call__(self) -> dict[str, float]:
        """Return the measurement, the same on every rank.

        `dev_loss` and `p_gold` are in nats per token, `distinct_answers` is a count, the others are shares.
        """
        with evaluation_mode(self.engine.model):
            return self._measure()

    def _measure(self) -> dict[str, float]:
        names = ("inputs", "rows", "nll", "tokens", "p_gold", "right", "agreeing", "finished")
        sums = dict.fromkeys(names, 0.0)
        buckets = [0.0] * _BUCKETS
        for (example, pairs), weight in zip(self.mine, self.weights, strict=True):
            texts, values = self._measure_input(example, pairs)
            for key, value in values.items():
                sums[key] += weight * value
            for text in texts:
                buckets[int(unit_hash(text) * _BUCKETS)] = max(buckets[int(unit_hash(text) * _BUCKETS)], weight)
        reduced = self.engine.mean([*sums.values(), *buckets])
        total = dict(zip(names, (v * world_size() for v in reduced[: len(names)]), strict=True))
        return {
            "dev_loss": total["nll"] / total["tokens"],
            "p_gold": total["p_gold"] / total["rows"],
            "accuracy": total["right"] / total["rows"],
            "cr": total["agreeing"] / total["inputs"],
            "end_of_turn": total["finished"] / total["rows"],
            "distinct_answers": float(sum(v > 0 for v in reduced[len(names) :])),
        }

    def _measure_input(self, example: Example, pairs: list[tuple[Wording, Item]]) -> tuple[list[str], dict[str, float]]:
        items = [item for _, item in pairs]
        # All wordings of an input in one batch, however long: ranks must make equally many collective calls.
        batch = to_device(collate(items, self.codec.pad_id, False), self.engine.device)
        with torch.no_grad():
            logp_N = token_logps(self.engine.model, batch)
        lengths_R = torch.bincount(batch.response_N)
        prompts = [item.prompt for item in items]
        answers = greedy_in_step(self.engine.model, prompts, self.table.dev_max_new_tokens, self.codec, self._any_rank)
        described = [self.codec.describe_answer(answer.ids, answer.finished) for answer in answers]
        form = self.forms.get(example.task, ())
        keys = [
            answer_key(canonical_answer(wording, example.input, said["text"]), said["finish"], form)
            for (wording, _), said in zip(pairs, described, strict=True)
        ]
        return [key for key in keys if key], {
            "inputs": 1.0,
            "rows": float(len(items)),
            "nll": -float(logp_N.sum()),
            "tokens": float(len(logp_N)),
            "p_gold": float((logp_N / lengths_R[batch.response_N]).sum()),
            "right": float(sum(is_correct(key, example.outputs, form) for key in keys)),
            "agreeing": share_of_agreeing(keys),
            "finished": float(sum(a.finished for a in answers)),
        }

    def _any_rank(self, flag: bool) -> bool:
        return self.engine.mean([float(flag)])[0] > 0


def share_of_agreeing(keys: Sequence[str | None]) -> float:
    """Return the CR of one input: the share of pairs of answers that agree, by their normal forms (None: silent).

    NaN for fewer than two answers.
    """
    vocabulary = Vocabulary()
    codes_1W = np.array([[vocabulary.code(key) for key in keys]])
    return float(consistency_rate(agreement_matrix(codes_1W), codes_1W != ABSENT)[0])


def make_dev_measure(
    engine: Engine,
    codec: Codec,
    examples: Sequence[Example],
    wordings: Sequence[Wording],
    table: TrainTable,
    tasks: Sequence[Task] = (),
) -> DevMeasure | None:
    """Return the measurement, or None when it is switched off or no dev input fits two wordings (with a warning).

    `tasks` say what counts when their answers are compared; in a task that they lack none of it does.
    """
    if not table.eval_every or not table.dev_inputs:
        return None
    forms = {task.id: task.answer_form for task in tasks}
    measure = DevMeasure(engine, codec, [e for e in examples if e.split == "dev"], wordings, table, forms)
    if not measure.inputs:
        logger.warning("no dev measurement: no dev input fits two dev wordings")
        return None
    return measure


def _spread(examples: Sequence[Example], count: int) -> list[Example]:
    """Return `count` examples in hash order, one task after another in turn."""
    order = sorted(examples, key=lambda e: unit_hash(e.id))
    turn: dict[str, int] = {}
    keyed = []
    for position, example in enumerate(order):
        turn[example.task] = turn.get(example.task, 0) + 1
        keyed.append((turn[example.task], position, example))
    return [example for _, _, example in sorted(keyed, key=lambda k: k[:2])][:count]


def _dev_wordings(wordings: Sequence[Wording], task: str, count: int) -> list[Wording]:
    """Return up to `count` dev wordings of a task, followed by training ones where there are fewer than two."""
    of_task = [w for w in wordings if w.task == task]
    dev = [w for w in of_task if w.split == "dev"]
    if len(dev) < 2:
        dev += [w for w in of_task if w.split == "train"]
    return dev[:count]


@torch.no_grad()  # not inference_mode: a sharded model gathers its weights here and keeps them
def greedy_in_step(
    model: Any,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    codec: TokenIds,
    any_rank: Callable[[bool], bool],
) -> list[GeneratedIds]:
    """Return greedy answers, computed without a KV cache and with the same number of forward passes on every rank.

    The model may be sharded over the ranks; `any_rank(flag)` returns whether the flag holds on any of them.
    """
    rows = [list(prompt) for prompt in prompts]
    finished = [False] * len(rows)
    for _ in range(max_new_tokens):
        batch = left_pad(rows, codec.pad_id, next(model.parameters()).device)
        token_B = model(**batch, use_cache=False, logits_to_keep=1).logits[:, -1].argmax(dim=-1).tolist()
        for index, token in enumerate(token_B):
            finished[index] = finished[index] or token in codec.stop_ids
            if not finished[index]:
                rows[index].append(token)
        if not any_rank(not all(finished)):
            break
    return [GeneratedIds(row[len(p) :], done) for row, p, done in zip(rows, prompts, finished, strict=True)]
