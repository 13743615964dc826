"""Which wordings are trained on, chosen by and tested with: quotas, order, pairs, unseen tasks."""

from __future__ import annotations

import random
from collections import Counter
from typing import get_args

import pytest

from coalign.records import Task, Wording, WordingSplit
from coalign.wordings.wordings import assign_splits, num_short, original_wording, without_cr

SEEN = Task("t", "Do it.")
UNSEEN = Task("t", "Do it.", seen=False)


def make(num_files: int, num_generated: int, num_pairs: int = 0) -> list[Wording]:
    files = [Wording(f"f{i}", "t", f"file {i}", source="file:x") for i in range(num_files)]
    for i in range(num_pairs):
        files += [Wording(f"p{i}:{form}", "t", f"{i}", source="file:x") for form in ("instruction", "template")]
    generated = [Wording(f"model:{i}", "t", f"model {i}", source="model") for i in range(num_generated)]
    return [original_wording(SEEN), *files, *generated]


def count(wordings: list[Wording], source: str) -> tuple[int, ...]:
    splits = Counter(w.split for w in wordings if w.source.startswith(source))
    return tuple(splits[split] for split in get_args(WordingSplit))


@pytest.mark.parametrize(
    ("files", "generated", "from_files", "from_model"),
    [
        (0, 0, (0, 0, 0), (0, 0, 0)),
        (0, 18, (0, 0, 0), (10, 2, 6)),
        (20, 10, (12, 2, 6), (10, 0, 0)),
        (7, 12, (2, 1, 4), (9, 1, 2)),
        (5, 0, (1, 1, 3), (0, 0, 0)),
        (1, 4, (0, 0, 1), (1, 1, 2)),
        (0, 1, (0, 0, 0), (0, 0, 1)),
    ],
)
def test_quotas(files: int, generated: int, from_files: tuple[int, ...], from_model: tuple[int, ...]) -> None:
    wordings = assign_splits(make(files, generated), SEEN, 2, 6, 0)
    assert count(wordings, "original") == (1, 0, 0)
    assert (count(wordings, "file"), count(wordings, "model")) == (from_files, from_model)


def test_unseen_task_is_tested_with_every_file_wording() -> None:
    wordings = assign_splits(make(9, 3), UNSEEN, 2, 6, 0)
    assert (count(wordings, "file"), count(wordings, "model")) == ((0, 0, 9), (3, 0, 0))
    wordings = assign_splits(make(2, 7), UNSEEN, 2, 6, 0)
    assert (count(wordings, "file"), count(wordings, "model")) == ((0, 0, 2), (3, 0, 4))
    assert num_short(wordings, UNSEEN, 2, 6, 10) == {}


@pytest.mark.parametrize("seed", range(20))
def test_pairs_stay_together(seed: int) -> None:
    wordings = assign_splits(make(3, 0, num_pairs=5), SEEN, 2, 5, seed)
    by_id = {w.id: w.split for w in wordings}
    assert all(by_id[f"p{i}:instruction"] == by_id[f"p{i}:template"] for i in range(5))
    splits = Counter(w.split for w in wordings)
    assert splits["test"] <= 5
    assert splits["dev"] <= 2
    assert splits["test"] >= 4


def test_order_of_the_rows_does_not_matter_but_the_seed_does() -> None:
    wordings = make(12, 8, num_pairs=2)
    shuffled = random.Random(0).sample(wordings, len(wordings))
    first, second = (assign_splits(rows, SEEN, 2, 6, 0) for rows in (wordings, shuffled))
    assert {w.id: w.split for w in first} == {w.id: w.split for w in second}
    assert [w.id for w in second] == [w.id for w in shuffled]
    assert assign_splits(wordings, SEEN, 2, 6, 1) != first


def test_split_given_in_a_file_is_kept_and_counts() -> None:
    wordings = [original_wording(SEEN)]
    wordings += [Wording(f"f{i}", "t", f"{i}", source="file:x", split="test") for i in range(5)]
    wordings += [Wording(f"g{i}", "t", f"{i}", source="file:x") for i in range(5)]
    result = assign_splits(wordings, SEEN, 1, 3, 0, fixed={f"f{i}" for i in range(5)})
    assert count(result, "file") == (4, 1, 5)


def test_a_second_assignment_leaves_the_first_alone() -> None:
    files = assign_splits(make(7, 0), SEEN, 2, 6, 0)
    assert num_short(files, SEEN, 2, 6) == {"dev": 1, "test": 2}
    rewrites = make(0, 13)[1:]
    together = assign_splits([*files, *rewrites], SEEN, 2, 6, 0, fixed={w.id for w in files})
    assert together[: len(files)] == files
    assert count(together, "model") == (10, 1, 2)
    assert num_short(together, SEEN, 2, 6, 10) == {}


def test_four_test_wordings_are_enough_for_cr() -> None:
    """Counted are those that test, not those that train."""
    split = {name: assign_splits(make(0, 18), SEEN, 2, num_test, 0) for name, num_test in (("few", 3), ("enough", 4))}
    assert without_cr(split) == ["few"]
