"""Which sequences share a beginning, so that computing it once saves the most tokens.

Knows sequences of numbers, no model.
"""

from __future__ import annotations

import bisect
import dataclasses
from collections.abc import Sequence

Ids = tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class PrefixGroup:
    """Rows, by index, whose first `prefix` tokens are the same."""

    prefix: int
    rows: list[int]


def group_by_prefix(sequences: Sequence[Ids], firsts: Sequence[int]) -> list[PrefixGroup]:
    """Return groups of sequences that share a beginning; together they save the most tokens possible.

    A group saves (rows - 1) x prefix tokens. `firsts` is the earliest position of each sequence whose prediction is
    wanted; a beginning ends before it.

    Beginnings are the inner nodes of a tree of prefixes. A row joins the deepest opened node above it, and opening a
    node costs its depth. The savings of a subtree are a convex function of the depth opened above it. So one pass up
    the tree finds the largest such depth at which a node is still worth opening: O(n log n) after sorting.
    """
    root = _prefix_tree(sequences, firsts)
    groups: list[PrefixGroup] = []
    left: list[tuple[_Node, int, PrefixGroup | None]] = [(root, 0, None)]
    while left:
        node, above, group = left.pop()
        if above < node.worth_above:
            above, group = node.depth, PrefixGroup(node.depth, [])
            groups.append(group)
        for row in node.rows:
            if group is None:
                groups.append(PrefixGroup(firsts[row], [row]))
            else:
                group.rows.append(row)
        left += [(child, above, group) for child in reversed(node.children)]
    return groups


@dataclasses.dataclass
class _Node:
    """A prefix of `depth` tokens that rows or longer prefixes have in common, and the savings of its subtree.

    The savings are a piecewise linear, convex function of the depth a opened above, from 0 to the parent's depth. It is
    stored as values and slopes at both ends and as `bends` (place, change of slope). The node is opened where
    a < `worth_above`.
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
        """Add a row that ends or branches off here; in a group of depth a it saves a."""
        self.rows.append(row)
        self.first_slope += 1
        self.last_slope += 1
        self.last_value += self.depth

    def add_child(self, child: _Node) -> None:
        """Close a deeper node and add its savings; the shorter list of bends is inserted into the longer one."""
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
        """Take the maximum of opening this node, which saves the same for every a, and of leaving it closed."""
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
    """Return the root of the tree of common beginnings, with each row cut at its `firsts`."""
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
