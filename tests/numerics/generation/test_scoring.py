"""scoring: scores with shared beginnings against one row at a time, grouping against brute force."""

from __future__ import annotations

import math
import random
import time
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from coalign.generation.prefix_groups import group_by_prefix
from coalign.generation.scoring import score, shares_exactly
from numerics.families import tiny_config
from numerics.tiny import FAMILIES, VOCABULARY, network, random_ids


class FakeCodec:
    """What scoring reads of a codec."""

    pad_id = 0
    stop_ids: tuple[int, ...] = ()


CODEC: Any = FakeCodec()
CONTINUATIONS = [[9], [8], [5, 6], [5, 7], [5, 6, 3, 4]]


def judge_like(seed: int = 0) -> list[dict[str, Any]]:
    """Return requests as the judge makes them: inputs, questions about each, and responses in the last line.

    One request is there twice, one shares next to nothing with the others, one is a single token.
    """
    source = random.Random(seed)
    opening = random_ids(source, 2)
    rows = []
    for _ in range(3):
        asked = random_ids(source, source.randint(5, 9))
        for _ in range(2):
            question = random_ids(source, source.randint(1, 3))
            responses = [random_ids(source, source.randint(1, 4)) for _ in range(4)]
            rows += [[*opening, *asked, *question, *response, 11, 12] for response in responses]
    rows += [rows[0], list(random_ids(source, 9)), [4]]
    source.shuffle(rows)
    return [{"prompt_ids": row, "continuations": CONTINUATIONS} for row in rows]


def slow_score(model: Any, prompt: Sequence[int], continuation: Sequence[int]) -> float:
    """Return log P(continuation given prompt), one row, every position."""
    with torch.no_grad():
        logp = model(input_ids=torch.tensor([[*prompt, *continuation]])).logits[0].double().log_softmax(-1)
    return sum(float(logp[len(prompt) - 1 + k, t]) for k, t in enumerate(continuation))


@pytest.mark.parametrize("share", [True, False])
@pytest.mark.parametrize("max_tokens", [60, 8192])
@pytest.mark.parametrize("family", [*FAMILIES, "bloom", "window"])
def test_scores_equal_one_row_at_a_time(family: str, max_tokens: int, share: bool) -> None:
    """In float64 to 1e-9, whether common beginnings are shared or not, whatever fits into a batch.

    Bloom in float32: in float64 its own padding rows overflow to no number.
    """
    options = {"sliding_window": 4} if family == "window" else {}
    dtype, tolerance = (torch.float32, 1e-5) if family == "bloom" else (torch.float64, 1e-9)
    model = network("mistral" if family == "window" else family, dtype, **options)
    requests = judge_like()
    found = score(model, requests, CODEC, max_tokens, share)
    expected = [[slow_score(model, r["prompt_ids"], c) for c in r["continuations"]] for r in requests]
    for a, b in zip(found, expected, strict=True):
        assert a == pytest.approx(b, rel=tolerance, abs=tolerance)
    assert max(max(s) - min(s) for s in expected) > 1


def test_who_can_share() -> None:
    """All families with positions that follow the layout; Bloom takes distances from where tokens stand in a row."""
    assert all(shares_exactly(network(family, torch.float32), CODEC) for family in FAMILIES)
    assert not shares_exactly(network("bloom", torch.float32), CODEC)


def test_a_window_of_places_is_seen_in_long_rows() -> None:
    """GPT-Neo's window counts places in the row: short groups are exact, and longer ones are computed one by one."""
    config = tiny_config("gpt_neo", VOCABULARY)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    assert config.window_size == 64
    source = random.Random(3)
    for length in (10, 50):
        beginning = random_ids(source, length)
        prompts = [[*beginning, *random_ids(source, 3)] for _ in range(12)]
        requests = [{"prompt_ids": p, "continuations": [[9], [8]]} for p in prompts]
        found = score(model, requests, CODEC, 8192)
        for r, scores in zip(requests, found, strict=True):
            expected = [slow_score(model, r["prompt_ids"], c) for c in r["continuations"]]
            assert scores == pytest.approx(expected, abs=1e-4)
        assert shares_exactly(model, CODEC) == (length == 10)


@pytest.mark.parametrize("family", FAMILIES)
def test_sharing_changes_float32_by_rounding_alone(family: str) -> None:
    """Shared and plain agree to 1e-5."""
    model = network(family, torch.float32)
    shared, plain = (score(model, judge_like(1), CODEC, 8192, share) for share in (True, False))
    for a, b in zip(shared, plain, strict=True):
        assert a == pytest.approx(b, rel=1e-5, abs=1e-5)


def test_beginnings_and_equal_requests_are_computed_once() -> None:
    """The tokens that enter the model are fewer than half of the plain ones, and none for a request asked again."""
    model = network("llama", torch.float32)
    source = random.Random(3)
    inputs = [random_ids(source, 30) for _ in range(3)]
    prompts = [[*asked, *random_ids(source, 4)] for asked in inputs for _ in range(8)]
    requests = [{"prompt_ids": p, "continuations": [[9], [8]]} for p in prompts]
    score(model, requests, CODEC, 8192)  # whether sharing is exact is asked before anything is counted
    counted: list[int] = []
    handle = model.get_input_embeddings().register_forward_hook(
        lambda _module, arguments, _output: counted.append(arguments[0].numel())
    )
    once = score(model, requests, CODEC, 8192)
    tokens, counted[:] = sum(counted), []
    twice = score(model, [*requests, *requests], CODEC, 8192)
    handle.remove()
    assert tokens == 3 * 30 + 24 * 4 and sum(counted) == tokens
    assert twice == [*once, *once]


def all_partitions(rows: list[int]) -> Iterator[list[list[int]]]:
    """Yield every way to put rows into groups."""
    if not rows:
        yield []
        return
    for rest in all_partitions(rows[1:]):
        yield [[rows[0]], *rest]
        for place, group in enumerate(rest):
            yield [*rest[:place], [rows[0], *group], *rest[place + 1 :]]


def test_groups_save_the_most_tokens() -> None:
    """Against every way to put rows into groups; a prefix is common to its group and ends where it has to."""
    source = random.Random(0)
    nested = 0
    for trial in range(60):
        # Many branches of few tokens, or long stems where one beginning continues another.
        letters, length = (2, 8) if trial % 2 else (1, 14)
        sequences = [tuple(source.randint(1, letters) for _ in range(source.randint(2, length))) for _ in range(7)]
        sequences = list(dict.fromkeys(sequences))
        firsts = [source.randint(1, len(s)) for s in sequences]
        groups = group_by_prefix(sequences, firsts)
        assert sorted(i for g in groups for i in g.rows) == list(range(len(sequences)))
        for group in groups:
            assert len({sequences[i][: group.prefix] for i in group.rows}) == 1
            assert all(group.prefix <= firsts[i] for i in group.rows)

        def saved(rows: list[int], sequences: list[Any] = sequences, firsts: list[int] = firsts) -> int:
            limit = min(firsts[i] for i in rows)
            common = max(n for n in range(limit + 1) if len({sequences[i][:n] for i in rows}) == 1)
            return common * (len(rows) - 1)

        best = max(sum(map(saved, parts)) for parts in all_partitions(list(range(len(sequences)))))
        assert sum(group.prefix * (len(group.rows) - 1) for group in groups) == best
        nested += len({g.prefix for g in groups if len(g.rows) > 1}) > 1
    assert nested > 10


@pytest.mark.parametrize("shape", ["one beginning for all", "every row a beginning of the next"])
def test_many_rows_are_grouped_in_little_time(shape: str) -> None:
    """Four times as many rows take about four times as long, and not sixteen times."""
    source = random.Random(1)

    def seconds(count: int) -> float:
        rows = [(5, 6, *random_ids(source, 6)) for _ in range(count)]
        if shape != "one beginning for all":
            rows = [(5,) * (1 + i // 8) + (6 + i % 8,) for i in range(count // 8)]
        started = time.process_time()
        groups = group_by_prefix(rows, [len(row) for row in rows])
        assert sum(len(group.rows) for group in groups) == len(rows)
        return time.process_time() - started

    seconds(500)
    assert min(seconds(8000) for _ in range(2)) < 9 * min(seconds(2000) for _ in range(3)) + 0.05


def test_scores_of_all_single_tokens_sum_to_one() -> None:
    """A distribution over the whole vocabulary has mass one."""
    model = network("gpt2", torch.float32)
    ((*scores,),) = score(
        model, [{"prompt_ids": [4, 5], "continuations": [[t] for t in range(VOCABULARY)]}], CODEC, 8192
    )
    assert sum(math.exp(s) for s in scores) == pytest.approx(1.0, abs=1e-5)
