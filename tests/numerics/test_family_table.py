"""docs/models.md says what tiny models of each family do; its rows are found anew here, most in the slow lane."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from numerics.families import all_families
from numerics.family_table import COLUMNS, PAGE, Row, init_ranks, page, try_family

QUICK = ("llama", "mixtral", "lfm2")
SLOW = ("qwen2", "qwen3", "gemma2", "gemma3", "mistral", "phi", "gpt2", "gpt_neox", "qwen3_moe", "olmoe", "gpt_oss")
SLOW += ("bloom", "falcon", "qwen3_5", "rwkv", "bert")


@pytest.fixture(scope="module")
def _one_rank() -> Iterator[None]:
    """Train in this process, and leave its signals and its process group as they were."""
    handled = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)}
    init_ranks()
    yield
    for number, handler in handled.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("family", [*QUICK, *(pytest.param(family, marks=pytest.mark.slow) for family in SLOW)])
def test_a_family_does_what_the_page_says(family: str, tmp_path: Path, _one_rank: None) -> None:
    assert try_family(family, tmp_path).line() in PAGE.read_text(encoding="utf-8").splitlines(), "run `make families`"


def test_the_page_has_every_kind_of_row() -> None:
    """Written anew with the rows that it has, the page stays as it is."""
    text = PAGE.read_text(encoding="utf-8")
    rows = []
    for line in text.splitlines():
        if line.startswith("| `"):
            family, *cells = [cell.strip() for cell in line.strip("|").split(" | ")]
            name = family.strip("`")
            rows.append(Row(name, tuple(cells)) if len(cells) == len(COLUMNS) else Row(name, refusal=" | ".join(cells)))
    assert {row.family for row in rows} <= set(all_families()) and set(QUICK) | set(SLOW) <= {r.family for r in rows}
    assert page(rows, text) == text
    assert {len(row.cells) for row in rows} == {0, len(COLUMNS)}
