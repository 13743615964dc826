"""Write lengths.json: how long real prompts and answers are, as numbers alone.

Run by hand: `python tests/benchmarks/make_lengths.py FOLDER`, a Super-NaturalInstructions folder (tasks/*.json).
Lengths are tokens of the tokenizer that `prepare` trains on these tasks with the vocabulary of configs/sni-mini.toml;
a prompt is the task's own definition and an input in the chat template, an answer ends with its end-of-turn.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "distributed"))

from coalign.config import DataTable, ModelTable, RandomTable
from coalign.data import read_sources
from coalign.encoding import Codec
from coalign.models import load_tokenizer, make_random_model
from coalign.prompts import correct_question, type_question
from coalign.records import Example, Task, Wording
from coalign.splits import Prepared, split_instances, tokenizer_texts
from coalign.wordings import render_prompt

VOCABULARY, CONTEXT = 4096, 768
NUM_BINS = 16  # of a histogram: as many rows in each, told by the length in its middle


def make_codec(prepared: Prepared) -> Codec:
    """Return the tokenizer of a model that starts from random weights."""
    table = RandomTable(vocab_size=VOCABULARY, hidden_size=8, num_layers=1, num_heads=1, context=CONTEXT)
    with tempfile.TemporaryDirectory() as folder:
        texts = tokenizer_texts(prepared.tasks, prepared.examples)
        make_random_model(Path(folder) / "model", texts, table, seed=0)
        return Codec(load_tokenizer(str(Path(folder) / "model"), ModelTable()), ModelTable())


def histogram(lengths: list[int]) -> list[int]:
    """Return the length in the middle of each of NUM_BINS bins that hold equally many."""
    middles = (np.arange(NUM_BINS) + 0.5) / NUM_BINS
    return [int(x) for x in np.quantile(lengths, middles, method="nearest")]


def measure_task(task: Task, examples: list[Example], codec: Codec) -> dict[str, Any]:
    """Return what a training task's rows look like: prompts and answers that fit the context."""
    wording = Wording(id="original", task=task.id, text=task.instruction)
    prompts, answers = [], []
    for example in examples:
        prompt = len(codec.encode_prompt(render_prompt(wording, example.input) or ""))
        answer = len(codec.encode_answer(example.outputs[0]))
        if prompt + answer <= CONTEXT:
            prompts.append(prompt)
            answers.append(answer)
    return {
        "rows": len(prompts),
        "too_long": len(examples) - len(prompts),
        "instruction": len(codec.encode_plain(task.instruction)),
        "distinct_answers": len({example.outputs[0] for example in examples}),
        "prompt": histogram(prompts) if prompts else [],
        "answer": histogram(answers) if answers else [],
    }


def measure(folder: str) -> dict[str, Any]:
    """Return the content of lengths.json."""
    read = read_sources(DataTable(path=folder, format="sni"))
    prepared = split_instances(read.tasks, read.instances, DataTable(path=folder))
    codec = make_codec(prepared)
    by_task: dict[str, list[Example]] = defaultdict(list)
    for example in prepared.examples:
        by_task[example.task].append(example)
    tasks = [measure_task(task, by_task[task.id], codec) for task in prepared.tasks if task.seen]
    texts = [example.input for example in prepared.examples]
    tokens = sum(len(codec.encode_plain(text)) for text in texts)
    return {
        "source": f"{Path(folder).name}, {len(tasks)} training tasks",
        "tokenizer": f"byte-level BPE of {VOCABULARY} entries, trained by prepare on these tasks",
        "context": CONTEXT,
        "words_per_token": round(sum(len(text.split()) for text in texts) / tokens, 3),
        "type_question": len(codec.encode_prompt(type_question("", "", ""))),
        "correct_question": len(codec.encode_prompt(correct_question("", "", "", ""))),
        "tasks": [task for task in tasks if task["rows"]],
    }


def main() -> None:
    """Measure the folder and write the file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", help="Super-NaturalInstructions folder")
    found = measure(parser.parse_args().folder)
    rows = ",\n  ".join(json.dumps(task) for task in found.pop("tasks"))
    head = json.dumps(found, indent=1).removesuffix("\n}")
    Path(__file__).with_name("lengths.json").write_text(f'{head},\n "tasks": [\n  {rows}\n ]\n}}\n', encoding="utf-8")


if __name__ == "__main__":
    main()
