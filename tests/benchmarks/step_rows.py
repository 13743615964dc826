"""Rows about a step as a whole against a limit: eval's consistency metrics, and prepare on very many rows."""

from __future__ import annotations

import functools
import json
import random
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.lengths import lengths
from benchmarks.networks import made_up_word
from benchmarks.processes import run_json, run_watched
from benchmarks.rows import Row, Side, reported

ROOT = Path(__file__).resolve().parents[2]
SPLIT_FILES = ("examples.jsonl", "dropped.jsonl")


def limit_row(name: str, run: Callable[[], dict[str, Any]], key: str, limit: float, unit: str, what: str) -> Row:
    """Return one figure of a run as a share of a limit."""
    return Row(
        name,
        f"a limit of {what}",
        1.0,
        Side(run),
        float(limit),
        lambda _, found: bool(found["same"]),
        at_most=True,
        unit=unit,
        measure=reported(key),
        warm_up=False,
        max_repeats=1,
    )


def consistency_rows(tiny: bool) -> list[Row]:
    """Return time and memory of CR, MCR and their bootstrap, in a process of their own."""
    inputs = 2000 if tiny else 100_000
    command = [sys.executable, "-m", "benchmarks.consistency", str(inputs)]
    run = functools.cache(lambda: run_json(command))
    name = f"CR, MCR, bootstrap, {inputs:,} inputs x 10 wordings"
    return [
        limit_row(name, run, "seconds", 10.0, "CPU s", "10 s"),
        limit_row(name, run, "peak_mib", 1e9 / 2**20, "MiB", "1 GB"),
    ]


def write_rows(path: Path, count: int) -> None:
    """Write rows of instruction, input and output, as long as real ones and all unlike."""
    source = random.Random(0)
    parts = [a + b for a in "bdfgklmnprstvz" for b in ("a", "e", "i", "o", "u", "an", "er", "is", "ol", "ut")]
    known = [made_up_word(source, parts) for _ in range(5000)]
    per_token = lengths()["words_per_token"]

    def text(num_tokens: int) -> str:
        return " ".join(source.choices(known, k=max(1, round(num_tokens * per_token))))

    tasks = [task | {"text": text(task["instruction"])} for task in lengths()["tasks"]]
    with path.open("w", encoding="utf-8") as stream:
        for number, task in enumerate(source.choices(tasks, k=count)):
            size = source.choice(task["prompt"]) - task["instruction"]
            row = {"instruction": task["text"], "input": f"{text(size)} {number}", "output": text(task["answer"][8])}
            stream.write(json.dumps(row) + "\n")


def prepare(count: int) -> dict[str, Any]:
    """Run launch/prepare.py on that many rows; `same` says whether every row is in its output, used or dropped."""
    with tempfile.TemporaryDirectory() as place:
        write_rows(Path(place) / "rows.jsonl", count)
        settings = [f"data.path={place}/rows.jsonl", "data.format=jsonl", f"run.folder={place}", "run.name=bench"]
        found = run_watched([sys.executable, str(ROOT / "launch" / "prepare.py"), *settings])
        outputs = [Path(place) / "bench" / "prepare" / name for name in SPLIT_FILES]
        return found | {"same": sum(num_lines(path) for path in outputs) == count}


def num_lines(path: Path) -> int:
    """Return the lines of a file."""
    with path.open("rb") as stream:
        return sum(1 for _ in stream)


def prepare_rows(tiny: bool) -> list[Row]:
    """Return time and memory of prepare."""
    count = 2000 if tiny else 1_000_000
    run = functools.cache(lambda: prepare(count))
    name = f"prepare, {count:,} JSONL rows"
    memory = (300e6 + 16 * count) / 2**20
    return [
        limit_row(name, run, "seconds", 90.0, "s", "90 s"),
        limit_row(name, run, "peak_mib", memory, "MiB", "300 MB and 16 bytes per row"),
    ]


BUILDERS: dict[str, Callable[[bool], list[Row]]] = {"consistency": consistency_rows, "prepare": prepare_rows}
