"""Write lengths.json: how long real prompts and answers are, as numbers alone.

Run by hand: `python tests/benchmarks/make_lengths.py FOLDER RUN`, a Super-NaturalInstructions folder (tasks/*.json)
and the folder of a finished quickstart. Lengths are tokens of the tokenizer that `prepare` trains on these tasks with
the vocabulary of configs/sni-mini.toml; a prompt is the task's own definition and an input in the chat template, an
answer ends with its end-of-turn. The run shows how often responses to an input are equal, which untrained weights
can't.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "distributed"))

from coalign.config import DataTable, ModelTable, RandomTable
from coalign.data.sources import read_sources
from coalign.data.splits import Prepared, split_instances, tokenizer_texts
from coalign.models.codec import Codec
from coalign.models.model_folder import load_codec
from coalign.models.random_model import make_random_model
from coalign.prompts import correct_question, type_question
from coalign.records import Example, Task, Wording, read_rows
from coalign.wordings.wordings import render_prompt

VOCABULARY, CONTEXT = 4096, 768
SETTLED = ("exact_match", "empty", "cut_off")  # rules that leave nothing to ask about a response
NUM_BINS = 16  # of a histogram: as many rows in each, told by the length in its middle


def make_codec(prepared: Prepared) -> Codec:
    """Return the tokenizer of a model that starts from random weights."""
    table = RandomTable(vocab_size=VOCABULARY, hidden_size=8, num_layers=1, num_heads=1, context=CONTEXT)
    with tempfile.TemporaryDirectory() as folder:
        texts = tokenizer_texts(prepared.tasks, prepared.examples())
        make_random_model(Path(folder) / "model", texts, table, seed=0)
        return load_codec(str(Path(folder) / "model"), ModelTable())


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


def measure_repeats(run: Path) -> dict[str, Any]:
    """Return [responses, distinct ones, those of them that a model judged, number of such inputs] of the judge step."""
    responses: Counter[tuple[str, str]] = Counter()
    distinct: dict[tuple[str, str], set[str]] = defaultdict(set)
    judged: Counter[tuple[str, str]] = Counter()
    for _, row in read_rows(run / "sample" / "responses.jsonl"):
        responses[row["task"], row["example"]] += 1
        distinct[row["task"], row["example"]].add(row["canonical"])
    for _, row in read_rows(run / "judge" / "verdicts.jsonl"):
        judged[row["task"], row["example"]] += row["rule"] not in SETTLED
    counts = Counter((responses[key], len(distinct[key]), judged[key]) for key in responses)
    return {"source": run.name, "inputs": [[*key, number] for key, number in sorted(counts.items())]}


def measure(folder: str) -> dict[str, Any]:
    """Return what lengths.json says of the tasks."""
    read = read_sources(DataTable(path=folder, format="sni"))
    prepared = split_instances(read.tasks, read.instances, DataTable(path=folder))
    codec = make_codec(prepared)
    by_task: dict[str, list[Example]] = defaultdict(list)
    for example in prepared.examples():
        by_task[example.task].append(example)
    tasks = [measure_task(task, by_task[task.id], codec) for task in prepared.tasks if task.seen]
    texts = [example.input for example in prepared.examples()]
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
    parser.add_argument("run", type=Path, help="folder of a finished quickstart")
    options = parser.parse_args()
    found = measure(options.folder)
    found["judged"] = measure_repeats(options.run)
    rows = ",\n  ".join(json.dumps(task) for task in found.pop("tasks"))
    head = json.dumps(found, indent=1).removesuffix("\n}")
    Path(__file__).with_name("lengths.json").write_text(f'{head},\n "tasks": [\n  {rows}\n ]\n}}\n', encoding="utf-8")


if __name__ == "__main__":
    main()
