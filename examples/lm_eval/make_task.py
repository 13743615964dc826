"""Write tasks for lm-evaluation-harness that measure accuracy and CR over the wordings of a coalign run.

    python examples/lm_eval/make_task.py RUN FOLDER [--wordings FILE] [--model MODEL] ...

The README beside this file says how to evaluate them.
"""

from __future__ import annotations

import argparse
import json
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from coalign import answer_form
from coalign.answer_form import AnswerForm
from coalign.config import EvalTable, ModelTable
from coalign.errors import UserError
from coalign.evaluation import requests
from coalign.recipe import run_step
from coalign.records import Example, Task, dump_line, read_records
from coalign.runs.outputs import step_output
from coalign.wordings import asking
from coalign.wordings.asking import Pair
from coalign.wordings.wordings import MIN_WORDINGS, expected_answer

SCORING = Path(__file__).with_name("coalign_scoring.py")
CUT_OFF_TOKENS = ("ÿ", "<0xFF>")  # the byte FF, which no text holds, in byte-level BPE and in SentencePiece

DEFAULTS = """\
custom_dataset: !function coalign_scoring.documents
test_split: test
output_type: generate_until
doc_to_text: !function coalign_scoring.prompt
doc_to_target: !function coalign_scoring.target
process_results: !function coalign_scoring.process_results
num_fewshot: 0
generation_kwargs: {generation}
"""
TASK = """\
include: defaults
task: {name}
dataset_kwargs: {{"task": {task}}}
metric_list:
"""
METRIC = """\
  - metric: {metric}
    aggregation: !function coalign_scoring.{metric}
    higher_is_better: true
"""
GROUP = """\
group: {name}
task: {tasks}
aggregate_metric_list: {metrics}
"""


class Generation(NamedTuple):
    """What is fixed by a model's tokenizer: lm-eval's generation_kwargs, and the prompts that fit the context."""

    settings: dict[str, Any]
    too_long: frozenset[tuple[str, str, str]] = frozenset()


def main(argv: list[str]) -> None:
    """Read the run, write the folder."""
    options = read_options(argv)
    run, folder = Path(options.run), Path(options.folder)
    table = EvalTable(
        split=options.split,
        wordings_file=options.wordings,
        max_inputs=options.max_inputs,
        max_wordings=options.max_wordings,
        max_new_tokens=options.max_new_tokens,
    )
    tasks = read_records(Task, step_output(run / "prepare", "tasks.jsonl"))
    examples = read_records(Example, step_output(run / "prepare", "examples.jsonl"))
    wordings, dropped, _ = requests.held_out_wordings(table, run / "paraphrase", tasks)
    pairs, unfit = requests.plan_pairs(tasks, examples, wordings, table)
    generation = read_generation(options, run, pairs, table.max_new_tokens)
    fitting = [pair for pair in pairs if pair.key not in generation.too_long]
    reasons = Counter(row["reason"] for row in [*dropped, *unfit])
    reasons["too_long"] += len(pairs) - len(fitting)
    if not fitting:
        raise UserError(
            f"none of the {len(pairs)} prompts fits the context of the model; use a model with a longer one"
        )
    rows = make_documents(fitting, MIN_WORDINGS[table.split], {task.id: task.answer_form for task in tasks})
    name = write_folder(folder, options.name or run.resolve().name, rows, generation.settings)
    print(
        f"{len(rows)} documents of {len({row['task'] for row in rows})} tasks; left out: {dict(+reasons) or 'nothing'}"
    )
    model = options.model if options.model != "any" else "MODEL"
    print(
        f"lm_eval --model hf --model_args pretrained={model or run / 'align' / 'model'} --tasks {name}"
        f" --include_path {folder} --apply_chat_template"
    )


def count(text: str) -> int:
    """Read a number that is not negative."""
    number = int(text)
    if number < 0:
        raise ValueError
    return number


def read_options(argv: Sequence[str]) -> argparse.Namespace:
    """Return the command's options."""
    parser = argparse.ArgumentParser(prog="make_task.py", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("run", help="run folder with prepare/ and, without --wordings, paraphrase/")
    parser.add_argument("folder", help="where to write; must not exist or be empty")
    parser.add_argument("--name", default="", help="the task is called coalign_NAME (default: the run's name)")
    parser.add_argument("--wordings", default="", metavar="FILE", help="JSONL of wordings instead of the held-out ones")
    parser.add_argument("--split", default="test", choices=("test", "dev"), help="which inputs and wordings")
    parser.add_argument(
        "--model",
        default="",
        help="folder that has the tokenizer of the models to be measured"
        " (default: RUN/sft/model); any: leave out what depends on it, see README.md",
    )
    parser.add_argument("--end-of-turn", default="", metavar="TOKEN", help="as model.end_of_turn")
    parser.add_argument("--max-new-tokens", type=count, default=64, help="as eval.max_new_tokens")
    parser.add_argument("--max-inputs", type=count, default=0, help="as eval.max_inputs")
    parser.add_argument("--max-wordings", type=count, default=0, help="as eval.max_wordings")
    options = parser.parse_args(argv)
    if not options.max_new_tokens:
        parser.error("--max-new-tokens must be 1 or more")
    return options


def read_generation(options: argparse.Namespace, run: Path, pairs: Sequence[Pair], max_new_tokens: int) -> Generation:
    """Return how to generate greedily until the end of turn, with a mark on answers that were cut off.

    lm-eval hands over texts alone. So one token more is generated, and forced to be one that no text ends with: it
    shows up exactly behind the answers that have not ended by then.
    """
    settings: dict[str, Any] = {"do_sample": False, "until": [], "max_gen_toks": max_new_tokens}
    if options.model == "any":
        return Generation(settings)
    from coalign.models.model_folder import load_codec

    folder = options.model or str(run / "sft" / "model")
    table = ModelTable(end_of_turn=options.end_of_turn)
    codec = load_codec(folder, table)
    _, dropped = asking.build_requests(pairs, codec, "drop", max_new_tokens)
    settings["eos_token_id"] = codec.stop_ids
    mark = cut_off_token(codec.tokenizer)
    if mark is None:
        print(f"{folder}: its tokenizer has no token for the byte FF, so cut-off answers will count by their text")
    else:
        settings |= {"max_gen_toks": max_new_tokens + 1, "forced_eos_token_id": mark}
    return Generation(settings, frozenset((row["task"], row["example"], row["wording"]) for row in dropped))


def cut_off_token(tokenizer: Any) -> int | None:
    """Return a token that decodes to U+FFFD alone, None when the vocabulary has none."""
    for token in CUT_OFF_TOKENS:
        index = tokenizer.convert_tokens_to_ids(token)
        if index is not None and tokenizer.decode([index]) == "\ufffd":
            return int(index)
    return None


def make_documents(
    pairs: Iterable[Pair], min_wordings: int, forms: Mapping[str, AnswerForm] | None = None
) -> list[dict[str, Any]]:
    """Return a document for each pair: the prompt, the gold answers, and the words in which this wording wants them.

    `forms` holds what counts when answers are compared, by task; a task that it lacks has none of it.

    `min_wordings` of a document is None when its task does not enter CR: no input has that many wordings.
    """
    rows = [_document(pair) | {"answer_form": list((forms or {}).get(pair.example.task, ()))} for pair in pairs]
    num_wordings = Counter((row["task"], row["example"]) for row in rows)
    in_cr = {task for (task, _), number in num_wordings.items() if number >= min_wordings}
    return [row | {"min_wordings": min_wordings if row["task"] in in_cr else None} for row in rows]


def _document(pair: Pair) -> dict[str, Any]:
    example, wording = pair.example, pair.wording
    words = {label: expected_answer(wording, example.input, label) for label in wording.answers or {}}
    return {
        "task": example.task,
        "example": example.id,
        "wording": wording.id,
        "prompt": pair.prompt,
        "golds": list(example.outputs),
        "targets": [word for gold in example.outputs if (word := expected_answer(wording, example.input, gold))],
        "answers": list(words.items()) if wording.answers is not None else None,
    }


def write_folder(folder: Path, name: str, rows: Sequence[dict[str, Any]], generation: dict[str, Any]) -> str:
    """Write documents, scoring, a file a task and the group of them all; return the group's name."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder} is there already and not empty; give a new folder")
    folder.mkdir(parents=True, exist_ok=True)
    group = f"coalign_{_slug(name)}"
    with_cr: dict[str, bool] = {row["task"]: row["min_wordings"] is not None for row in rows}
    names = task_names(group, with_cr)
    with (folder / "documents.jsonl").open("w", encoding="utf-8") as stream:
        stream.writelines(map(dump_line, rows))
    _write(folder / SCORING.name, scoring_source())
    _write(folder / "defaults", DEFAULTS.format(generation=json.dumps(generation)))
    for task, task_name in names.items():
        metrics = ["accuracy", "cr"] if with_cr[task] else ["accuracy"]
        lines = [TASK.format(name=task_name, task=yaml_string(task)), *(METRIC.format(metric=m) for m in metrics)]
        _write(folder / f"{task_name}.yaml", "".join(lines))
    metrics = ["accuracy", "cr"] if any(with_cr.values()) else ["accuracy"]
    means = [{"metric": metric, "aggregation": "mean", "weight_by_size": False} for metric in metrics]
    text = GROUP.format(name=group, tasks=json.dumps(list(names.values())), metrics=json.dumps(means))
    _write(folder / f"{group}.yaml", text)
    return group


def task_names(group: str, tasks: Iterable[str]) -> dict[str, str]:
    """Return a name for each task by which lm_eval and a file can be called, all different."""
    taken: dict[str, int] = defaultdict(int)
    names = {}
    for task in tasks:
        name = f"{group}_{_slug(task)}"
        taken[name] += 1
        while taken[name] > 1:
            name = f"{name}_{taken[name]}"
            taken[name] += 1
        names[task] = name
    return names


def yaml_string(text: str) -> str:
    """Return a text as a YAML string, which is JSON's but for surrogates and line separators."""
    plain = (c if c.isprintable() and c not in '"\\' else f"\\U{ord(c):08x}" for c in text)
    return f'"{"".join(plain)}"'


def scoring_source() -> str:
    """Return coalign_scoring.py with the source of coalign.answer_form in place of its import."""
    inner = Path(answer_form.__file__).read_text(encoding="utf-8").partition("from __future__ import annotations\n")[2]
    scoring = SCORING.read_text(encoding="utf-8")
    statement = next(line for line in scoring.splitlines() if line.startswith("from coalign.answer_form import"))
    return scoring.replace(f"{statement}\n", inner.strip() + "\n")


def _slug(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9_-]+", "_", text).strip("_") or "task"


def _write(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    run_step(main)
