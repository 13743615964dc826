"""Put the same requests to both engines and list where they differ: greedy answers by token, log-probs, samples.

    python examples/compare_engines.py [MODEL] [--prompts FILE.jsonl] [--json FILE]

Needs an environment with vLLM. MODEL is a model folder (default: the phrasebook's base model). FILE.jsonl holds rows
{"prompt": ..., "answers": [...], "open": true | false}; the answers are scored, open prompts sampled. Default: the
phrasebook's tasks under their own and held-out wordings, and the requests to rewrite an instruction, which are open.
Ends with exit status 1 when log-probs differ, or a greedy answer differs although its two tokens aren't nearly tied.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "distributed"))

import torch

from coalign.config import GenerationTable, ModelTable
from coalign.generation.workers import Sampling, make_generate_worker, make_score_worker
from coalign.process import derive_seed
from coalign.prompts import paraphrase_prompt

PHRASEBOOK = Path(__file__).resolve().parent / "phrasebook"
ENGINES = ("transformers", "vllm")
INPUTS, WORDINGS = 2, 3  # of each task of the phrasebook, beside its own wording
NUM_PROMPTS, NUM_SAMPLES = 12, 4  # each sampled twice
DRAWN_PROMPTS, NUM_DRAWS = 4, 500  # one-token draws per prompt; their frequencies are compared
TIE = 1e-3  # nats; rounding may decide between tokens this close
SAMPLED = Sampling(max_new_tokens=16, temperature=1.0, top_p=0.95)
DRAWN = Sampling(max_new_tokens=1, temperature=1.5, top_p=0.9, top_k=8)
Row = dict[str, Any]


def read_phrasebook() -> list[Row]:
    """Return prompts of every task of the phrasebook with a right and a wrong answer, and requests to rewrite."""
    wordings = [json.loads(line) for line in (PHRASEBOOK / "wordings.jsonl").read_text("utf-8").splitlines()]
    rows = []
    for path in sorted((PHRASEBOOK / "tasks").glob("*.json")):
        task = json.loads(path.read_text("utf-8"))
        held_out = [w["text"] for w in wordings if w["task"] == path.stem and w["split"] == "test"]
        other = task["Instances"][INPUTS]["output"][0]
        for instance, text in itertools.product(
            task["Instances"][:INPUTS], [task["Definition"][0], *held_out[:WORDINGS]]
        ):
            rows.append({"prompt": f"{text}\n\n{instance['input']}", "answers": [instance["output"][0], other]})
        rewrite = paraphrase_prompt(task["Definition"][0], [], 0)
        rows.append({"prompt": rewrite, "answers": held_out[:1], "open": True})
    return rows


def keep_tokens(ids: list[int], finished: bool) -> Row:
    """Stand in for the codec's description of an answer: tokens in the place of text."""
    return {"ids": list(ids), "finished": bool(finished)}


class Engine:
    """One engine with one model: answers, log-probs, samples."""

    def __init__(self, name: str, folder: str, dtype: str) -> None:
        self.arguments = (folder, ModelTable(path=folder), GenerationTable(engine=name, dtype=dtype, workers=0))
        self.scorer: Any = make_score_worker(*self.arguments, 0)
        self.codec = self.scorer.codec

    def answer(self, requests: list[Row], sampling: Sampling) -> list[list[Row]]:
        """Return the tokens of an answer for each seed of each request."""
        worker: Any = make_generate_worker(*self.arguments, sampling, 0)
        worker.codec.describe_answer = keep_tokens
        return [row["answers"] for row in worker(requests)]

    def score(self, requests: list[Row]) -> list[list[float]]:
        """Return the log-prob of every continuation of each request."""
        return [row["logps"] for row in self.scorer(requests)]

    def ask(self, rows: list[Row]) -> Row:
        """Return everything that is compared."""
        prompts = [self.codec.encode_prompt(row["prompt"]) for row in rows]
        verdicts = [self.codec.encode_plain("Yes"), self.codec.encode_plain("No")]
        greedy = [{"prompt_ids": ids, "seeds": [0]} for ids in prompts]
        scored = [
            {"prompt_ids": ids, "continuations": [*map(self.codec.encode_answer, row["answers"]), *verdicts]}
            for ids, row in zip(prompts, rows, strict=True)
        ]
        open_prompts = [ids for ids, row in zip(prompts, rows, strict=True) if row.get("open")] or prompts
        seeded = [
            {"prompt_ids": ids, "seeds": [derive_seed(n, k) for k in range(NUM_SAMPLES)]}
            for n, ids in enumerate(open_prompts[:NUM_PROMPTS])
        ]
        turned, half = seeded[::-1], len(seeded) // 2
        draws = [
            {"prompt_ids": ids, "seeds": [derive_seed("draw", n, k) for k in range(NUM_DRAWS)]}
            for n, ids in enumerate(open_prompts[:DRAWN_PROMPTS])
        ]
        return {
            "prompts": prompts,
            "greedy": [answers[0] for answers in self.answer(greedy, Sampling(max_new_tokens=16))],
            "scores": self.score(scored),
            "samples": self.answer(seeded, SAMPLED),
            "again": self.answer(seeded, SAMPLED),
            "moved": (self.answer(turned[:half], SAMPLED) + self.answer(turned[half:], SAMPLED))[::-1],
            "draws": [(n, *a["ids"]) for n, answers in enumerate(self.answer(draws, DRAWN)) for a in answers],
        }


def list_differences(found: dict[str, Row], rows: list[Row], scorer: Engine) -> list[Row]:
    """Return every greedy answer that differs: both texts, the place, and how much likelier the one token is there."""
    ours, theirs = (found[name]["greedy"] for name in ENGINES)
    differences = []
    for row, prompt, a, b in zip(rows, found["vllm"]["prompts"], ours, theirs, strict=True):
        if a == b:
            continue
        stop = scorer.codec.stop_ids[0]
        first, second = ([*one["ids"], *[stop] * one["finished"]] for one in (a, b))
        common = next((i for i, (x, y) in enumerate(zip(first, second, strict=False)) if x != y), -1)
        margin = None
        if common >= 0:
            request = {"prompt_ids": prompt + first[:common], "continuations": [[first[common]], [second[common]]]}
            logps = scorer.score([request])[0]
            margin = abs(logps[0] - logps[1])
        texts = {name: scorer.codec.decode(one["ids"]) for name, one in zip(ENGINES, (a, b), strict=True)}
        differences.append({"prompt": row["prompt"], **texts, "place": common, "margin": margin})
    return differences


def count_same(first: list[Any], second: list[Any]) -> int:
    """Return at how many places two lists agree."""
    return sum(a == b for a, b in zip(first, second, strict=True))


def compare(folder: str, rows: list[Row], dtype: str) -> Row:
    """Return what both engines say and where they differ."""
    found: dict[str, Row] = {}
    for name in ENGINES:  # vLLM comes last: it takes what a GPU has left
        engine = Engine(name, folder, dtype)
        found[name] = engine.ask(rows)
        if name != ENGINES[-1]:
            del engine
            gc.collect()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
    differences = list_differences(found, rows, engine)
    flat = {name: list(itertools.chain(*one["scores"])) for name, one in found.items()}
    gaps = [abs(a - b) for a, b in zip(*flat.values(), strict=True)]
    counts = {name: Counter(one["draws"]) for name, one in found.items()}
    drawn, num_draws = set().union(*counts.values()), len(found["vllm"]["draws"])
    result: Row = {
        "greedy": {"answers": len(rows), "same": len(rows) - len(differences), "differences": differences},
        "scores": {"continuations": len(gaps), "max_gap": max(gaps), "mean_gap": sum(gaps) / len(gaps)},
        "samples": {},
        "draws": {
            "tokens": {name: len(counts[name]) for name in ENGINES},
            "distance": sum(abs(counts[ENGINES[0]][t] - counts[ENGINES[1]][t]) for t in drawn) / (2 * num_draws),
        },
    }
    for name, one in found.items():
        samples, again, moved = (list(itertools.chain(*one[what])) for what in ("samples", "again", "moved"))
        result["samples"][name] = {
            "num": len(samples),
            "distinct": len({tuple(answer["ids"]) for answer in samples}),
            "again": count_same(samples, again),
            "moved": count_same(samples, moved),
        }
    return result


def describe(result: Row) -> list[str]:
    """Return what is printed."""
    greedy, scores, draws = result["greedy"], result["scores"], result["draws"]
    lines = [f"greedy answers: {greedy['same']} of {greedy['answers']} the same, token by token"]
    for one in greedy["differences"]:
        lines.append(f"  {one['prompt']!r}: transformers {one['transformers']!r}, vllm {one['vllm']!r}")
        margin = "unknown" if one["margin"] is None else f"{one['margin']:.2g} nats"
        lines.append(f"    first at token {one['place']}, between two tokens that are {margin} apart")
    lines.append(
        f"log-probs of {scores['continuations']} continuations: {scores['max_gap']:.2g} nats apart at most,"
        f" {scores['mean_gap']:.2g} in the mean"
    )
    for name, one in result["samples"].items():
        lines.append(
            f"{name}: {one['num']} samples, {one['distinct']} distinct; {one['again']} the same when asked again,"
            f" {one['moved']} in other company"
        )
    lines.append(
        f"draws of one token: {draws['tokens']['transformers']} and {draws['tokens']['vllm']} distinct ones, whose"
        f" frequencies are {draws['distance']:.3f} apart (total variation)"
    )
    return lines


def main() -> int:
    """Run the comparison and print it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default=str(PHRASEBOOK / "base"))
    parser.add_argument("--prompts", type=Path)
    parser.add_argument("--dtype", choices=("auto", "float32", "bfloat16"), default="float32")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    rows = read_phrasebook()
    if options.prompts:
        rows = [json.loads(line) for line in options.prompts.read_text("utf-8").splitlines() if line.strip()]
    result = compare(options.model, rows, options.dtype)
    print("\n".join(describe(result)))
    if options.json:
        options.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    unlike = [one for one in result["greedy"]["differences"] if one["margin"] is None or one["margin"] > TIE]
    return int(bool(unlike) or result["scores"]["max_gap"] > TIE)


if __name__ == "__main__":
    raise SystemExit(main())
