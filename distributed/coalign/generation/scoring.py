"""Log-probs of continuations: requests that begin alike compute their common beginning once.

A judge's prompts about one input differ only in their last line. They are laid out like shared-prefix groups in
training. Token ids in, numbers out; knows no judge and no text. Shape suffixes: R rows, K kept positions, V
vocabulary, N wanted log-probs.
"""

from __future__ import annotations

import dataclasses
import logging
import weakref
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from coalign.generation.prefix_groups import Ids, PrefixGroup, group_by_prefix
from coalign.models.attention import complaint_of
from coalign.models.logprobs import to_device, token_logps
from coalign.models.rows import TokenIds, TokenRow, best_fit, left_pad, to_batch
from coalign.models.sizes import PASS_TOKENS_CPU, ROW_TOKENS_CPU, ROW_TOKENS_GPU

logger = logging.getLogger("coalign")

# Whether a model computes shared rows exactly as separate ones; tested once, and again for longer ones.
_shares_exactly: weakref.WeakKeyDictionary[Any, bool] = weakref.WeakKeyDictionary()
_exact_up_to: weakref.WeakKeyDictionary[Any, int] = weakref.WeakKeyDictionary()  # tokens


@dataclasses.dataclass
class _Sequence:
    """A distinct sequence of inputs, and the wanted log P(token) by (position of the last input before it, token)."""

    ids: Ids
    logps: dict[tuple[int, int], float] = dataclasses.field(default_factory=dict)

    @property
    def first(self) -> int:
        """Return the earliest position whose prediction is wanted."""
        return min(position for position, _ in self.logps)


def score(
    model: Any, requests: Sequence[dict[str, Any]], codec: TokenIds, max_tokens: int, share: bool = True
) -> list[list[float]]:
    """Return log P(continuation given prompt) in nats, summed over tokens, for every continuation of every request.

    A request is {"prompt_ids", "continuations"}. Equal sequences are computed once. With `share`, common beginnings
    are computed once too, if the model allows it; results then depend, by rounding, on what is scored together. At most
    `max_tokens` padded tokens are computed at once.
    """
    places: dict[Ids, int] = {}
    rows: list[_Sequence] = []
    for request in requests:
        for continuation in request["continuations"]:
            # A continuation's last token is never an input, so continuations of one token share a row.
            ids = (*request["prompt_ids"], *continuation[:-1])
            if places.setdefault(ids, len(rows)) == len(rows):
                rows.append(_Sequence(ids))
            row = rows[places[ids]]
            row.logps |= dict.fromkeys(_wanted(request["prompt_ids"], continuation), 0.0)
    with torch.inference_mode():
        if not (share and shares_exactly(model, codec) and _score_shared(model, rows, codec, max_tokens)):
            for batch in batches([len(row.ids) for row in rows], max_tokens):
                _score_plain(model, [rows[i] for i in batch], codec)
    return [
        [
            sum(rows[places[*r["prompt_ids"], *c[:-1]]].logps[place] for place in _wanted(r["prompt_ids"], c))
            for c in r["continuations"]
        ]
        for r in requests
    ]


def _wanted(prompt: Sequence[int], continuation: Sequence[int]) -> list[tuple[int, int]]:
    return [(len(prompt) - 1 + k, token) for k, token in enumerate(continuation)]


def batches(lengths: Sequence[int], max_tokens: int) -> Iterator[list[int]]:
    """Yield indices of rows to compute together, longest first, so that rows x width <= `max_tokens`.

    A longer row is computed alone.
    """
    batch: list[int] = []
    for i in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        if batch and lengths[batch[0]] * (len(batch) + 1) > max_tokens:
            yield batch
            batch = []
        batch.append(i)
    if batch:
        yield batch


def _score_plain(model: Any, rows: Sequence[_Sequence], codec: TokenIds) -> None:
    """Fill in the rows' log-probs, each row computed by itself."""
    kept = max(len(row.ids) - row.first for row in rows)
    batch = left_pad([row.ids for row in rows], codec.pad_id, model.device)
    logits_RKV = model(**batch, use_cache=False, logits_to_keep=kept).logits[:, -kept:]
    _read(logits_RKV, rows, [len(row.ids) - kept for row in rows])


def _score_shared(model: Any, rows: Sequence[_Sequence], codec: TokenIds, max_tokens: int) -> bool:
    """Fill in the log-probs, computed in shared rows: a group's beginning, then rests that see it and themselves.

    Returns False when rows of this length are not exact.
    """
    on_cpu = model.device.type == "cpu"
    width = min(max_tokens, ROW_TOKENS_CPU if on_cpu else ROW_TOKENS_GPU)
    if on_cpu:
        max_tokens = min(max_tokens, PASS_TOKENS_CPU)
    groups = [
        part
        for group in group_by_prefix([row.ids for row in rows], [row.first for row in rows])
        for part in _parts(group, rows, width)
    ]
    sizes = [group.prefix + sum(len(rows[r].ids) - group.prefix for r in group.rows) for group in groups]
    longest = max(range(len(groups)), key=sizes.__getitem__, default=None)
    if longest is not None and not _shares_exactly_up_to(sizes[longest], model, rows, groups[longest], codec):
        return False
    packs = best_fit(sizes, width)
    for batch in batches([sum(sizes[g] for g in pack) for pack in packs], max_tokens):
        _score_packs(model, rows, [[groups[g] for g in packs[p]] for p in batch], codec)
    return True


def _parts(group: PrefixGroup, rows: Sequence[_Sequence], width: int) -> Iterator[PrefixGroup]:
    """Cut a group into parts of at most `width` tokens, or twice its prefix if that is more."""
    limit = max(width, 2 * group.prefix)
    part: list[int] = []
    tokens = group.prefix
    for row in group.rows:
        rest = len(rows[row].ids) - group.prefix
        if part and tokens + rest > limit:
            yield PrefixGroup(group.prefix, part)
            part, tokens = [], group.prefix
        part.append(row)
        tokens += rest
    yield PrefixGroup(group.prefix, part)


def _score_packs(
    model: Any, rows: Sequence[_Sequence], packs: Sequence[Sequence[PrefixGroup]], codec: TokenIds
) -> None:
    """Fill in the log-probs of the groups of one forward pass; the groups of a pack share a row."""
    laid, places, wanted = [TokenRow() for _ in packs], [], []
    for number, (pack, line) in enumerate(zip(packs, laid, strict=True)):
        for item, group in enumerate(pack):
            line.append(rows[group.rows[0]].ids[: group.prefix], 0, item, 0)
            for segment, r in enumerate(group.rows, start=1):
                shift = len(line.ids) - group.prefix
                line.append(rows[r].ids[group.prefix :], group.prefix, item, segment)
                places += [(number, shift + position, token) for position, token in rows[r].logps]
                wanted += [(r, place) for place in rows[r].logps]
    batch = to_device(to_batch(laid, places, range(len(places)), codec.pad_id), model.device)
    for (r, place), logp in zip(wanted, token_logps(model, batch).tolist(), strict=True):
        rows[r].logps[place] = logp


def shares_exactly(model: Any, codec: TokenIds) -> bool:
    """Return whether a model computes shared rows exactly as separate ones.

    Tested once per model, on a few made-up sequences. A model with an attention of its own (ALiBi), or without any,
    fails.
    """
    if model not in _shares_exactly:
        vocabulary = model.config.get_text_config().vocab_size
        ids = [(7919 * k + 13) % vocabulary for k in range(1, 40)]
        beginnings = [tuple(ids[:9]), tuple(ids[9:14])]
        rests = [(0, ids[20:23]), (0, ids[23:25]), (1, ids[25:29]), (1, ids[29:30])]
        rows = [_Sequence((*beginnings[b], *rest)) for b, rest in rests]
        for row in rows:
            row.logps = {(len(row.ids) - 1, ids[30]): 0.0}
        groups = [PrefixGroup(len(beginnings[b]), [i for i, (of, _) in enumerate(rests) if of == b]) for b in (0, 1)]
        _remember(model, _complaint_of_sharing(model, rows, groups, codec))
    return _shares_exactly[model]


def _shares_exactly_up_to(
    tokens: int, model: Any, rows: Sequence[_Sequence], group: PrefixGroup, codec: TokenIds
) -> bool:
    """Return whether the longest group of this call, of so many tokens, is exact too.

    A window that counts places in the row instead of positions shows in long rows alone.
    """
    if tokens > _exact_up_to.get(model, 0):
        _remember(model, _complaint_of_sharing(model, rows, [group], codec))
        _exact_up_to[model] = tokens
    return _shares_exactly[model]


def _remember(model: Any, complaint: str) -> None:
    if complaint:
        logger.info("common beginnings are computed for each prompt: %s", complaint)
    _shares_exactly[model] = not complaint


def _complaint_of_sharing(model: Any, rows: Sequence[_Sequence], groups: Sequence[PrefixGroup], codec: TokenIds) -> str:
    """Return how groups go wrong in one row, "" when the first and last of each equal those of rows of their own."""
    separate, shared = ([_Sequence(row.ids, dict(row.logps)) for row in rows] for _ in range(2))
    asked = sorted({row for group in groups for row in (group.rows[0], group.rows[-1])})
    for row in asked:
        _score_plain(model, [separate[row]], codec)
    try:
        _score_packs(model, shared, [groups], codec)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # from transformers' code of one of hundreds of families
        return f"the model rejects their attention mask ({str(error).strip().partition(chr(10))[0]})"
    pairs = [(shared[i].logps[place], separate[i].logps[place]) for i in asked for place in rows[i].logps]
    found = torch.tensor(pairs, dtype=torch.float64)
    return complaint_of(found[:, 0], found[:, 1], model.dtype)


def _read(logits_RKV: Tensor, rows: Sequence[_Sequence], starts: Sequence[int]) -> None:
    """Store the wanted log-probs, in float32 or wider; `starts` are the positions of the rows' first kept logits."""
    places = [(r, position - starts[r], token) for r, row in enumerate(rows) for position, token in row.logps]
    row_N, kept_N, token_N = torch.tensor(places, device=logits_RKV.device).unbind(1)
    logits_NV = logits_RKV[row_N, kept_N]
    logits_NV = logits_NV.to(torch.promote_types(logits_NV.dtype, torch.float32))
    logp_N = logits_NV.gather(1, token_N.unsqueeze(1)).squeeze(1) - logits_NV.logsumexp(dim=-1)
    found = iter(logp_N.tolist())
    for row in rows:
        row.logps = {place: next(found) for place in row.logps}
