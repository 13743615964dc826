"""Log-probs of continuations: requests that begin alike compute their common beginning once.

Used by generation's ScoreWorker; the judge's prompts about one input differ in their last line alone. Token ids in,
numbers out. Shape suffixes: B groups, R rows, T tokens, K kept positions, V vocabulary, N wanted log-probs.
"""

from __future__ import annotations

import bisect
import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from coalign.decoding import TokenIds, left_pad

Ids = tuple[int, ...]


@dataclasses.dataclass
class _Row:
    """A distinct sequence of inputs and what is wanted of it: log P(token) after (and including) a position."""

    ids: Ids
    logps: dict[tuple[int, int], float] = dataclasses.field(default_factory=dict)

    @property
    def first(self) -> int:
        """Return the earliest position whose prediction is wanted."""
        return min(position for position, _ in self.logps)


@dataclasses.dataclass(frozen=True)
class Group:
    """Rows by number whose first `prefix` tokens are the same."""

    prefix: int
    rows: list[int]


def score(
    model: Any, requests: Sequence[dict[str, Any]], codec: TokenIds, max_tokens: int, share: bool = True
) -> list[list[float]]:
    """Return log P(continuation given prompt), summed over its tokens, for every continuation of every request.

    Equal sequences are computed once. With `share` common beginnings are too: equal to the plain computation up to
    rounding, which depends on what is scored together. At most `max_tokens` padded tokens are computed at once.
    """
    places: dict[Ids, int] = {}
    rows: list[_Row] = []
    for request in requests:
        for continuation in request["continuations"]:
            # A continuation's last token is never an input, so continuations of one token share a row.
            ids = (*request["prompt_ids"], *continuation[:-1])
            if places.setdefault(ids, len(rows)) == len(rows):
                rows.append(_Row(ids))
            row = rows[places[ids]]
            row.logps |= dict.fromkeys(_wanted(request["prompt_ids"], continuation), 0.0)
    groups = group_by_prefix([row.ids for row in rows], [row.first for row in rows]) if share else []
    # Where little is common, a second pass and the padding of long rests would cost more than they save.
    worth = [group for group in groups if len(group.rows) > 1 and group.prefix >= _longest(group, rows)]
    shared = [part for group in worth for part in _parts(group, rows, max_tokens)]
    alone = set(range(len(rows))).difference(*(group.rows for group in shared))
    with torch.inference_mode():
        shapes = [(group.prefix, _longest(group, rows)) for group in shared]
        for batch in batches(shapes, [len(group.rows) for group in shared], max_tokens):
            _score_shared(model, [(shared[i].prefix, [rows[r] for r in shared[i].rows]) for i in batch], codec)
        left = [rows[i] for i in sorted(alone)]
        for batch in batches([(0, len(row.ids)) for row in left], [1] * len(left), max_tokens):
            _score_plain(model, [left[i] for i in batch], codec)
    return [
        [
            sum(rows[places[*r["prompt_ids"], *c[:-1]]].logps[place] for place in _wanted(r["prompt_ids"], c))
            for c in r["continuations"]
        ]
        for r in requests
    ]


def group_by_prefix(sequences: Sequence[Ids], firsts: Sequence[int]) -> list[Group]:
    """Return groups that share a beginning, which ends before `firsts` of each, where its first prediction is wanted.

    They save the most tokens that any groups can: (rows - 1) x beginning each. The beginnings are the inner nodes of a
    tree of prefixes; a row is in the group of the deepest node above it that is opened, and opening one costs its
    depth. What a subtree saves is a convex function of the depth that is open above it, so one pass up the tree says
    up to which such depth a node is worth opening: O(n log n) after sorting.
    """
    root = _prefix_tree(sequences, firsts)
    groups: list[Group] = []
    left: list[tuple[_Node, int, Group | None]] = [(root, 0, None)]
    while left:
        node, above, group = left.pop()
        if above < node.worth_above:
            above, group = node.depth, Group(node.depth, [])
            groups.append(group)
        for row in node.rows:
            if group is None:
                groups.append(Group(firsts[row], [row]))
            else:
                group.rows.append(row)
        left += [(child, above, group) for child in reversed(node.children)]
    return groups


@dataclasses.dataclass
class _Node:
    """A prefix of `depth` tokens that rows or longer prefixes have in common, and what its subtree saves.

    `saved` is that for every depth a that is open above, from 0 to `end`: a convex function in pieces, by its values
    and slopes at both ends and the places between where its slope changes. The node is opened where a < `worth_above`.
    """

    depth: int
    rows: list[int] = dataclasses.field(default_factory=list)
    children: list[_Node] = dataclasses.field(default_factory=list)
    worth_above: float = 0.0
    first_value: float = 0.0
    first_slope: int = 0
    last_value: float = 0.0
    last_slope: int = 0
    bends: list[tuple[float, int]] = dataclasses.field(default_factory=list)

    def add_row(self, row: int) -> None:
        """Add a row that ends or branches off here; joined to a group of depth a it saves a."""
        self.rows.append(row)
        self.first_slope += 1
        self.last_slope += 1
        self.last_value += self.depth

    def add_child(self, child: _Node) -> None:
        """Close a deeper node and add what its subtree saves, the shorter list of bends into the longer one."""
        child._close(self.depth)
        self.children.append(child)
        self.first_value += child.first_value
        self.first_slope += child.first_slope
        self.last_value += child.last_value
        self.last_slope += child.last_slope
        shorter, longer = sorted((self.bends, child.bends), key=len)
        for bend in shorter:
            bisect.insort(longer, bend)
        self.bends, child.bends = longer, []

    def _close(self, end: int) -> None:
        """Take the better of opening this node, which saves the same whatever is open above, and of not."""
        opened = self.last_value - self.depth
        if self.first_value < opened:
            place, value, slope, passed = 0.0, self.first_value, self.first_slope, 0
            while passed < len(self.bends) and value + slope * (self.bends[passed][0] - place) < opened:
                value += slope * (self.bends[passed][0] - place)
                place, slope, passed = self.bends[passed][0], slope + self.bends[passed][1], passed + 1
            self.worth_above = place + (opened - value) / slope
            self.bends[:passed] = [(self.worth_above, slope)]
            self.first_value, self.first_slope = opened, 0
        place = float(self.depth)
        while self.bends and self.bends[-1][0] >= end:
            bend, change = self.bends.pop()
            self.last_value -= self.last_slope * (place - bend)
            self.last_slope -= change
            place = bend
        self.last_value -= self.last_slope * (place - end)


def _prefix_tree(sequences: Sequence[Ids], firsts: Sequence[int]) -> _Node:
    """Return the root of the tree of common beginnings, each row as long as its `firsts` lets it be."""
    cut = [sequence[:first] for sequence, first in zip(sequences, firsts, strict=True)]
    order = sorted(range(len(cut)), key=lambda i: cut[i])
    path = [_Node(0)]
    for row, after in zip(order, [*order[1:], None], strict=True):
        common = 0 if after is None else _common(cut[row], cut[after])
        if common > path[-1].depth:
            path.append(_Node(common))
        path[-1].add_row(row)
        while path[-1].depth > common:
            closed = path.pop()
            if common > path[-1].depth:
                path.append(_Node(common))
            path[-1].add_child(closed)
    return path[0]


def _common(a: Ids, b: Ids) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def _wanted(prompt: Sequence[int], continuation: Sequence[int]) -> list[tuple[int, int]]:
    return [(len(prompt) - 1 + k, token) for k, token in enumerate(continuation)]


def _longest(group: Group, rows: Sequence[_Row]) -> int:
    return max(len(rows[r].ids) for r in group.rows) - group.prefix


def _parts(group: Group, rows: Sequence[_Row], max_tokens: int) -> Iterator[Group]:
    """Cut a group that is too large to be computed at once."""
    size = max(1, max_tokens // (group.prefix + _longest(group, rows)))
    for start in range(0, len(group.rows), size):
        yield Group(group.prefix, group.rows[start : start + size])


def batches(shapes: Sequence[tuple[int, int]], counts: Sequence[int], max_tokens: int) -> Iterator[list[int]]:
    """Yield indices of what is computed together, longest rests first: rows x padded width within `max_tokens`.

    `shapes` are the tokens of a row's beginning and rest, which are padded apart, `counts` the rows.
    """
    batch: list[int] = []
    widths, rows = (0, 0), 0
    for i in sorted(range(len(shapes)), key=lambda i: (-shapes[i][1], -shapes[i][0], i)):
        grown = (max(widths[0], shapes[i][0]), max(widths[1], shapes[i][1]))
        if batch and sum(grown) * (rows + counts[i]) > max_tokens:
            yield batch
            batch, grown, rows = [], shapes[i], 0
        batch.append(i)
        widths, rows = grown, rows + counts[i]
    if batch:
        yield batch


def _score_plain(model: Any, rows: Sequence[_Row], codec: TokenIds) -> None:
    """Fill in the rows' log-probs, each computed from its first token on."""
    kept = max(len(row.ids) - row.first for row in rows)
    batch = left_pad([row.ids for row in rows], codec.pad_id, model.device)
    logits_RKV = model(**batch, use_cache=False, logits_to_keep=kept).logits[:, -kept:]
    _read(logits_RKV, rows, [len(row.ids) - kept for row in rows])


def _score_shared(model: Any, groups: Sequence[tuple[int, Sequence[_Row]]], codec: TokenIds) -> None:
    """Fill in the log-probs of groups' rows: the beginnings first, then every row's rest behind a copy of its own.

    Rests are padded at the right, so that distances of columns are distances of positions (sliding windows).
    """
    device = model.device
    prefixes = left_pad([rows[0].ids[:prefix] for prefix, rows in groups], codec.pad_id, device)
    cache = DynamicCache()
    model(**prefixes, past_key_values=cache, use_cache=True, logits_to_keep=1)
    source_R = torch.tensor([b for b, (_, rows) in enumerate(groups) for _ in rows], device=device)
    layers: Any = cache.layers
    for layer in layers:
        layer.batch_select_indices(source_R.to(layer.keys.device))  # it may lie on another GPU than the first

    rests = [(prefix, row) for prefix, rows in groups for row in rows]
    width = max(len(row.ids) - prefix for prefix, row in rests)
    ids, mask, positions = [], [], []
    for prefix, row in rests:
        length = len(row.ids) - prefix
        ids.append([*row.ids[prefix:], *[codec.pad_id] * (width - length)])
        mask.append([1] * length + [0] * (width - length))
        positions.append([prefix + min(k, length - 1) for k in range(width)])
    kept = width - min(row.first - prefix for prefix, row in rests)
    logits_RKV = model(
        input_ids=torch.tensor(ids, device=device),
        attention_mask=torch.cat([prefixes["attention_mask"][source_R], torch.tensor(mask, device=device)], dim=1),
        position_ids=torch.tensor(positions, device=device),
        past_key_values=cache,
        use_cache=True,
        logits_to_keep=kept,
    ).logits[:, -kept:]
    _read(logits_RKV, [row for _, row in rests], [prefix + width - kept for prefix, _ in rests])


def _read(logits_RKV: Tensor, rows: Sequence[_Row], starts: Sequence[int]) -> None:
    """Store the wanted log-probs, in float32 at least; `starts` are the positions of the rows' first kept logits."""
    places = [(r, position - starts[r], token) for r, row in enumerate(rows) for position, token in row.logps]
    row_N, kept_N, token_N = torch.tensor(places, device=logits_RKV.device).unbind(1)
    logits_NV = logits_RKV[row_N, kept_N]
    logits_NV = logits_NV.to(torch.promote_types(logits_NV.dtype, torch.float32))
    logp_N = logits_NV.gather(1, token_N.unsqueeze(1)).squeeze(1) - logits_NV.logsumexp(dim=-1)
    found = iter(logp_N.tolist())
    for row in rows:
        row.logps = {place: next(found) for place in row.logps}
