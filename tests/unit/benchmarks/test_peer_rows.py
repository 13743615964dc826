"""The benchmarks' rows against other projects, without those projects: a plain twin stands in for each.

The twins read what the other project's script would read, and compute it as plainly as can be. That the projects
themselves find the same is tested by tests/peers/test_benchmark_rows.py, which installs them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from benchmarks import peer_rows
from benchmarks.bench import BUILDERS, PEERS, parse
from benchmarks.networks import FIRST, STOP, TINY, Codec, make_counting_network
from benchmarks.peer_rows import ROUNDS, load, paired_groups, pairs_of
from benchmarks.rows import measure_row
from coalign.generation.decoding import decode
from coalign.generation.sampling import Sampling

Found = dict[str, Any]


def logps(model: Any, prompt: list[int], answer: list[int]) -> torch.Tensor:
    """Return the log-prob of every token of an answer, from the logits of one row."""
    logits: torch.Tensor = model(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1]
    return logits.log_softmax(-1).gather(1, torch.tensor(answer).unsqueeze(1)).squeeze(1)


def plain_sft(spec: Found) -> Found:
    """Return loss and gradient norm of one update, row by row."""
    model = load(spec["model"])
    parts = []
    for row in spec["rows"]:
        answer = [token for token in row["labels"] if token != -100]
        parts.append(logps(model, row["input_ids"][: -len(answer)], answer))
    loss = -torch.cat(parts).mean()
    loss.backward()  # type: ignore[no-untyped-call]
    norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters()])
    return {"losses": [loss.item()] * (1 + ROUNDS), "grad_norms": [norm.item()] * (1 + ROUNDS)}


def plain_dpo(spec: Found) -> Found:
    """Return the mean over pairs of -log sigmoid(beta (what the winner gained - what the loser gained))."""
    model, reference = load(spec["model"]), load(spec["reference"])
    losses = []
    for pair in spec["rows"]:
        gains = []
        for answer in (pair["chosen_ids"], pair["rejected_ids"]):
            gains.append(logps(model, pair["prompt_ids"], answer).sum())
            gains[-1] -= logps(reference, pair["prompt_ids"], answer).sum()
        losses.append(-torch.sigmoid(spec["options"]["beta"] * (gains[0] - gains[1])).log())
    return {"losses": [torch.stack(losses).mean().item()] * (1 + ROUNDS)}


def plain_answers(spec: Found) -> Found:
    """Return greedy answers, one forward pass a token, as many as samples were asked for."""
    model, greedy = load(spec["model"]), []
    for prompt in spec["prompts"]:
        ids: list[int] = []
        while len(ids) < spec["max_tokens"] and not set(ids) & set(spec["stop_ids"]):
            ids.append(int(model(torch.tensor([prompt + ids])).logits[0, -1].argmax()))
        greedy.append(ids)
    return {"greedy": greedy, "answers": [ids for ids in greedy for _ in range(spec["samples"])]}


TWINS: dict[str, Callable[[Found], Found]] = {
    "trl-sft": plain_sft,
    "trl-dpo": plain_dpo,
    "vllm": plain_answers,
    "vllm-mixed": plain_answers,
}


def change(found: Found) -> Found:
    """Return what would be found if one number were slightly another one."""
    if "losses" in found:
        return found | {"losses": [found["losses"][0] * 1.001, *found["losses"][1:]]}
    others = [[*ids[:-2], ids[-2] + 1, ids[-1]] for ids in found["greedy"]]
    return found | {"greedy": others, "answers": others * (len(found["answers"]) // len(others))}


@pytest.mark.parametrize("name", list(PEERS))
def test_both_sides_of_a_row_get_the_same_work(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the other project is told to compute is what ours computes, and a small difference is noticed."""

    def twin(environment: str, script: str, spec: Found, variables: dict[str, str]) -> Found:
        assert environment == name.partition("-")[0] and script.startswith(environment)
        with torch.enable_grad():
            return TWINS[name](spec) | {"seconds": 1.0}

    rows = PEERS[name](True)
    monkeypatch.setattr(peer_rows, "run_script", twin)
    assert [measure_row(row, 1)["same_result"] for row in rows] == [True]
    monkeypatch.setattr(peer_rows, "run_script", lambda *asked: change(twin(*asked)))
    assert [measure_row(row, 1)["same_result"] for row in rows] == [False]


def test_rows_against_other_projects_are_measured_only_when_they_are_named() -> None:
    assert not set(parse([]).rows) & PEERS.keys() and not BUILDERS.keys() & PEERS.keys()
    assert parse(["--rows", *PEERS]).rows == list(PEERS)


def test_pairs_are_disjoint_and_hold_every_response() -> None:
    (item,) = paired_groups(1, TINY)
    pairs = pairs_of(item)
    assert [tuple(pair[key]) for pair in pairs for key in ("chosen_ids", "rejected_ids")] == list(item.responses)
    assert all(tuple(pair["prompt_ids"]) == item.prompt for pair in pairs)
    assert item.rewards == (1, 0) * 4


def test_counting_network_counts_down() -> None:
    prompts = [[200, 300, FIRST + 5], [FIRST + 1], [400] * 30 + [FIRST + 127]]
    found = decode(make_counting_network(TINY), prompts, [[0]] * 3, Sampling(128), Codec(STOP), 1000)
    assert [answers[0].ids for answers in found] == [list(range(FIRST + n - 1, FIRST - 1, -1)) for n in (5, 1, 127)]
    assert all(answers[0].finished for answers in found)
