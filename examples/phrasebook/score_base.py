"""Measure the phrasebook's base model: does it follow, rewrite and judge? Writes its card, README.md, beside it.

Uses coalign's own generator and prompts, on inputs drawn for the purpose. The held-out wordings are asked as well, to
show how much room there is; nothing is chosen by them. `--after RUN` measures how the model of a run's stage 1 judges
its own answers and adds that to the card.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from corpus import FOLLOWED, HERE, World, kind_of, wrong_answer
from make_world import ANSWERS, draw_input, read_wordings

from coalign.config import GenerationTable, JudgeTable, ModelTable, ParaphraseTable
from coalign.generation.transformers_worker import GenerateWorker, Sampling, ScoreWorker
from coalign.judging.judge_model import all_prompts
from coalign.judging.verdicts import decide_by_judge, distinct_answers, questions, with_questions
from coalign.prompts import NO, NUM_VARIANTS, YES, correct_question, paraphrase_prompt, type_question
from coalign.records import Example, Response, Task, read_records
from coalign.text import loose_key, normalise_answer
from coalign.wordings.rewrites import check_rewrite, parse_paraphrase

INPUTS = 12
REWRITES = 20
THREADS = 2


def draw_inputs(task: str, count: int, seed: str) -> list[list[str]]:
    """Return inputs for a task."""
    rng = random.Random(f"score {seed} {task}")
    return [draw_input(rng, task) for _ in range(count)]


def share(flags: list[bool]) -> float:
    """Return the share of true values, rounded for reading."""
    return round(sum(flags) / max(1, len(flags)), 4)


def score_following(worker: GenerateWorker, inputs: int = INPUTS) -> dict[str, Any]:
    """Return accuracy by task under the wordings followed in training, other known ones, and held-out ones."""
    groups: dict[str, dict[str, list[str]]] = {}
    for task, own in read_wordings().items():
        followed, known = own.train[:FOLLOWED], own.train[FOLLOWED:]
        groups[task] = {"followed": followed, "known": known, "dev": own.dev, "test": own.test}
    rows, asked = [], []
    for task, wordings in groups.items():
        for words in draw_inputs(task, inputs, "follow"):
            for group, texts in wordings.items():
                for text in texts:
                    prompt = worker.codec.encode_prompt(f"{text}\n\n{' '.join(words)}")
                    rows.append({"prompt_ids": prompt, "seeds": [0]})
                    asked.append((task, group, ANSWERS[task](words)))
    right: dict[str, dict[str, list[bool]]] = defaultdict(lambda: defaultdict(list))
    for (task, group, gold), row in zip(asked, worker(rows), strict=True):
        answer = row["answers"][0]
        right[task][group].append(answer["finish"] == "stop" and answer["text"] == gold)
    table = {task: {group: share(flags) for group, flags in by.items()} for task, by in right.items()}
    means = {group: round(sum(row[group] for row in table.values()) / len(table), 4) for group in table["reverse"]}
    return {"mean": means, "by_task": table}


def score_rewriting(worker: GenerateWorker, world: World) -> dict[str, Any]:
    """Return what becomes of sampled rewrites of each Definition: verbatim, dropped by reason; and the texts."""
    rows, asked = [], []
    for task, own in read_wordings().items():
        known = own.train
        labels = ["no", "yes"] if task.startswith("has_") else []
        for variant in range(NUM_VARIANTS):
            prompt = worker.codec.encode_prompt(paraphrase_prompt(known[0], labels, variant))
            seeds = [1000 * variant + index for index in range(REWRITES // NUM_VARIANTS)]
            rows.append({"prompt_ids": prompt, "seeds": seeds})
            asked.append((task, known, labels))
    reasons: dict[str, int] = defaultdict(int)
    texts = []
    for (task, known, labels), row in zip(asked, worker(rows), strict=True):
        seen = {loose_key(text) for text in known}
        trained = {loose_key(text) for text in world.rewrites[task]}
        for answer in row["answers"]:
            text = parse_paraphrase(answer["text"])
            reason = "cut_off" if answer["finish"] != "stop" else None
            reason = reason or check_rewrite(known[0], text, labels, [], world.held_out.near, ParaphraseTable())
            verbatim = loose_key(text) in seen
            reasons["verbatim" if verbatim else reason or "kept"] += 1
            reasons["also in the training set"] += loose_key(text) in trained
            texts.append((task, text))
    return {"count": len(texts), "reasons": dict(reasons), "texts": texts}


def ask_all(worker: ScoreWorker, prompts: Iterable[str]) -> dict[str, float]:
    """Return {prompt: log P(Yes) - log P(No)}."""
    texts = list(dict.fromkeys(prompts))
    yes_no = [worker.codec.encode_plain(YES), worker.codec.encode_plain(NO)]
    rows = [{"prompt_ids": worker.codec.encode_prompt(text), "continuations": yes_no} for text in texts]
    scored = [row["logps"] for row in worker(rows)]
    return {text: yes - no for text, (yes, no) in zip(texts, scored, strict=True)}


def score_judging(worker: ScoreWorker, inputs: int = 3 * INPUTS) -> dict[str, float]:
    """Return error rates at the threshold 0: right answers called wrong, hard wrong ones called right.

    "correct by items" is the question put to each word of a list, as the quickstart does (judge.item_separator).
    """
    rng = random.Random("score judge")
    asked: list[tuple[str, str, tuple[str, ...], bool]] = []
    by_items = JudgeTable(item_separator=" ", type_question=False)

    def ask(question: str, kind: str, prompt: str, truth: bool) -> None:
        asked.append((question, kind, (prompt,), truth))

    for task, own in read_wordings().items():
        task_record = Task(task, own.train[0])
        for words in draw_inputs(task, inputs, "judge"):
            gold, listed = ANSWERS[task](words), " ".join(words)
            kind = "list" if kind_of(gold) == "words" else "one"
            wrong = wrong_answer(task, words, gold, rng, hard=1.0)
            for answer in (gold, wrong):
                ask("correct", kind, correct_question(own.train[0], listed, answer, gold), answer == gold)
                ask("correct without gold", kind, correct_question(own.train[0], listed, answer, None), answer == gold)
                if kind == "list":
                    example = Example("drawn", task, listed, (gold,), "dev")
                    prompts = questions(task_record, example, answer, by_items).get("correct", ())
                    asked.append(("correct by items", kind, prompts, answer == gold))
            other = wrong_answer(task, words, gold, rng, hard=0.0)
            for answer in (gold, other):
                ask("type", kind, type_question(own.train[0], listed, answer), kind_of(answer) == kind_of(gold))
    log_odds = ask_all(worker, (prompt for _, _, prompts, _ in asked for prompt in prompts))
    errors: dict[str, list[bool]] = defaultdict(list)
    for question, kind, prompts, truth in asked:
        said_yes = bool(prompts) and all(log_odds[prompt] >= 0 for prompt in prompts)
        name = "right called wrong" if truth else "wrong called right"
        errors[f"{question}, {kind}, {name}"].append(said_yes != truth)
    return {name: share(flags) for name, flags in sorted(errors.items())}


def score_own_answers(run: Path, model: ModelTable, generation: GenerationTable) -> dict[str, Any]:
    """Return the error rates of a stage-1 model on its own distinct answers, gold shown, judged as in the run.

    An answer is right when it is the gold one: in this world there is no other.
    """
    tasks = {task.id: task for task in read_records(Task, run / "prepare" / "tasks.jsonl")}
    examples = {(e.task, e.id): e for e in read_records(Example, run / "prepare" / "examples.jsonl")}
    answers, _ = distinct_answers(read_records(Response, run / "sample" / "responses.jsonl"))
    manifest = json.loads((run / "judge" / "manifest.json").read_text(encoding="utf-8"))
    threshold = manifest["counts"]["calibration"]["correct"]["threshold"]
    table = JudgeTable(item_separator=manifest["config"]["judge.item_separator"], type_question=False)
    whole = [answer for answer in answers if answer.text.strip() and answer.finish == "stop"]
    asked = with_questions(whole, tasks, examples, table)
    worker = ScoreWorker(str(run / "sft" / "model"), model, generation, THREADS)
    log_odds = ask_all(worker, (prompt for _, by_question in asked for prompt in all_prompts(by_question)))
    verdicts, _ = decide_by_judge(asked, log_odds.__getitem__, {"correct": threshold})
    truths = [normalise_answer(a.text) == normalise_answer(examples[a.task, a.example].outputs[0]) for a in whole]
    said = [verdicts[answer].reward == 2 for answer in whole]
    false_correct = [yes for yes, truth in zip(said, truths, strict=True) if not truth]
    false_incorrect = [not yes for yes, truth in zip(said, truths, strict=True) if truth]
    return {
        "right": len(false_incorrect),
        "wrong": len(false_correct),
        "false correct": share(false_correct),
        "false incorrect": share(false_incorrect),
    }


CARD = """---
library_name: transformers
pipeline_tag: text-generation
license: apache-2.0
language: en
tags: [coalign, consistency-alignment, tiny]
---

# Phrasebook base

A Llama of {parameters:,} parameters (bfloat16) that lives in the [phrasebook](../README.md), a world of word lists. It
can do there what consistency alignment asks of a language model: follow an instruction, put it in other words, judge
an answer. It is the base model of `make quickstart` and has no other use.

**How it was made.** `make base` (make_base.py): random weights, {steps:,} updates of {tokens:,} tokens drawn from
corpus.py and {last_steps} more that are mostly the judge's questions; nothing from elsewhere. Following was taught
under {followed} wordings per task. No held-out (dev or test) wording, nor one near it, was among what it read, wrote or
judged. Limits: about 1,900 words, lower case only, contexts up to 256 tokens, and no knowledge beyond its word lists.

**Following**, greedy, exact match, on {inputs} fresh inputs per task, %. "Followed" are the {followed} wordings that it
was taught to follow, "other" the rest of the training wordings, which it only learned to rewrite; dev and test are
held out.

| task | followed | other | dev | test |
|---|---|---|---|---|
{following}

**Rewriting**, {count} samples (temperature 1, top-p 0.95) from the Definitions: {verbatim} % repeat a wording that
we wrote, {kept} % pass coalign's filters ({reasons}), {trained} % of the texts occur in its training.{reading}

**Judging**, log P(Yes) - log P(No) at threshold 0, share of errors, %. Wrong answers are hard ones: of the right type,
another task's answer to the same list or the right one with one place changed. "By items" puts the question to each
word of the answer beside the word in the same place of the gold answer; the quickstart judges so.

| question | answer | right called wrong | wrong called right |
|---|---|---|---|
{judging}
{own}"""


def card(scores: dict[str, Any], reading: dict[str, Any] | None) -> str:
    """Return the model card."""
    table = scores["following"]["by_task"] | {"**mean**": scores["following"]["mean"]}
    groups = ("followed", "known", "dev", "test")
    following = [
        f"| {task} | " + " | ".join(f"{100 * row[g]:.0f}" for g in groups) + " |" for task, row in table.items()
    ]
    errors = scores["judging"]
    judging = [
        f"| {question} | {'several words' if kind == 'list' else 'one word'} |"
        f" {100 * errors[f'{question}, {kind}, right called wrong']:.1f} |"
        f" {100 * errors[f'{question}, {kind}, wrong called right']:.1f} |"
        for question in ("correct", "correct by items", "correct without gold", "type")
        for kind in ("one", "list")
        if f"{question}, {kind}, right called wrong" in errors
    ]
    rewriting, counts = scores["rewriting"], scores["rewriting"]["reasons"]
    dropped = [
        f"{name} {n}" for name, n in counts.items() if name not in ("kept", "verbatim", "also in the training set")
    ]
    read = own = ""
    if reading and reading["texts_sha256"] == rewriting["texts_sha256"]:
        read = (
            f" Of {reading['read']} read one by one, {reading['equivalent']} ask for the same as the original,"
            f" {reading['different']} for something else, {reading['malformed']} are malformed."
        )
    if after := scores.get("own answers"):
        own = (
            f"\nAfter stage 1 of the quickstart, on the model's own distinct answers with the gold answer shown:"
            f" {100 * after['false correct']:.1f} % of {after['wrong']} wrong ones called correct,"
            f" {100 * after['false incorrect']:.1f} % of {after['right']} right ones called incorrect.\n"
        )
    return CARD.format(
        **scores["made"],
        followed=FOLLOWED,
        inputs=INPUTS,
        following="\n".join(following),
        count=rewriting["count"],
        verbatim=f"{100 * counts.get('verbatim', 0) / rewriting['count']:.1f}",
        kept=f"{100 * counts.get('kept', 0) / rewriting['count']:.1f}",
        trained=f"{100 * counts.get('also in the training set', 0) / rewriting['count']:.1f}",
        reasons=", ".join(dropped) or "nothing dropped",
        reading=read,
        judging="\n".join(judging),
        own=own,
    )


def main() -> None:
    """Score a model folder and write its card."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, nargs="?", default=HERE / "base", help="folder of the model")
    parser.add_argument(
        "--after", type=Path, help="run whose stage-1 model judges its own answers; nothing else is measured"
    )
    options = parser.parse_args()
    folder: Path = options.folder
    path = HERE / "base_scores.json" if folder == HERE / "base" else folder.with_name(f"{folder.name}_scores.json")
    model, generation = ModelTable(path=str(folder), init="pretrained"), GenerationTable()
    weights = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    known: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    if known.get("weights_sha256") != weights:
        if options.after:
            raise SystemExit(
                f"{path} does not hold the scores of these weights; run score_base.py without --after first"
            )
        known = {}
    scores = known | {"weights_sha256": weights}
    if options.after:
        scores["own answers"] = score_own_answers(options.after, model, generation)
    else:
        greedy = GenerateWorker(str(folder), model, generation, Sampling(max_new_tokens=16), THREADS)
        parameters = sum(p.numel() for p in greedy.model.parameters())
        recipe = json.loads((folder / "recipe.json").read_text(encoding="utf-8"))
        scores["made"] = {"parameters": parameters} | {key: recipe[key] for key in ("steps", "last_steps", "tokens")}
        scores["following"] = score_following(greedy)
        sampling = Sampling(max_new_tokens=32, temperature=1.0, top_p=0.95)
        scores["rewriting"] = score_rewriting(
            GenerateWorker(str(folder), model, generation, sampling, THREADS), World()
        )
        scores["judging"] = score_judging(ScoreWorker(str(folder), model, generation, THREADS))
        texts = "".join(f"{task}: {text}\n" for task, text in scores["rewriting"].pop("texts"))
        scores["rewriting"]["texts_sha256"] = hashlib.sha256(texts.encode()).hexdigest()
        path.with_name(path.name.replace("scores.json", "rewrites.txt")).write_text(texts, encoding="utf-8")
    path.write_text(json.dumps(scores, indent=1) + "\n", encoding="utf-8")
    reading = HERE / "reading.json"
    text = card(scores, json.loads(reading.read_text(encoding="utf-8")) if reading.exists() else None)
    (folder / "README.md").write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
