"""decoding: greedy against transformers, sampling against brute force, what is computed how often."""

from __future__ import annotations

import contextlib
import itertools
import math
import random
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from transformers import DynamicCache

from coalign.config import GenerationTable, ModelTable, RandomTable
from coalign.generation import transformers_worker
from coalign.generation.cascade_attention import SharedPrompts, attending_in_cascade
from coalign.generation.cuda_graphs import FixedSteps
from coalign.generation.decoding import decode
from coalign.generation.forward import cascades_exactly, next_logits
from coalign.generation.kv_cache import SlotCache
from coalign.generation.sampling import Sampling, pick_tokens
from coalign.generation.transformers_worker import GenerateWorker, ScoreWorker
from coalign.models import worker_memory
from coalign.models.codec import GeneratedIds
from coalign.models.model_checks import has_plain_cache
from coalign.models.random_model import make_random_model
from coalign.models.rows import left_pad
from coalign.models.shape import shape_of
from coalign.process import derive_seed
from coalign.training.dev_measure import greedy_in_step
from numerics.tiny import FAMILIES, network, random_ids


class FakeCodec:
    """What decoding reads of a codec: the pad token and where to stop."""

    pad_id = 0

    def __init__(self, *stop_ids: int) -> None:
        self.stop_ids = sorted(stop_ids)


def prompts_of(count: int, seed: int = 0) -> list[list[int]]:
    source = random.Random(seed)
    return [list(random_ids(source, source.randint(1, 12))) for _ in range(count)]


def greedy_by_transformers(
    model: Any, prompt: Sequence[int], limit: int, *stop: int, repetition_penalty: float = 1.0
) -> list[int]:
    """Return transformers' own greedy continuation of one prompt, the stop token included."""
    ids = torch.tensor([list(prompt)])
    out = model.generate(
        ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=limit, eos_token_id=list(stop),
        pad_token_id=0, repetition_penalty=repetition_penalty,
    )  # fmt: skip
    return out[0, len(prompt) :].tolist()


@pytest.mark.parametrize("max_tokens", [30, 60, 8192])
def test_a_repetition_penalty_equals_that_of_transformers(max_tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prompt and answer count, of each row its own, while rows come and go; without it a row repeats itself."""
    monkeypatch.setattr("coalign.generation.decoding.PREFILL_TOKENS", 24)
    model, prompts = network("llama", torch.float32), prompts_of(7)
    stop = greedy_by_transformers(model, prompts[0], 12, 2, repetition_penalty=1.3)[3]
    codec: Any = FakeCodec(stop, 2)
    answers = {}
    for penalty in (1.0, 1.3):
        sampling = Sampling(12, repetition_penalty=penalty)
        found = decode(model, prompts, [[0]] * len(prompts), sampling, codec, max_tokens)
        answers[penalty] = [answer.ids for (answer,) in found]
        for prompt, ids in zip(prompts, answers[penalty], strict=True):
            expected = greedy_by_transformers(model, prompt, 12, stop, 2, repetition_penalty=penalty)
            assert ids == [token for token in expected if token not in (stop, 2)]
    repeated = {p: sum(len(ids) - len(set(ids)) for ids in found) for p, found in answers.items()}
    assert repeated[1.3] < repeated[1.0]


@pytest.mark.parametrize("max_tokens", [20, 60, 8192])  # rows together: one, two or three, all
@pytest.mark.parametrize("family", [*FAMILIES, "bloom", "mpt"])
def test_greedy_equals_transformers(family: str, max_tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Greedy answers of rows that come and go equal `generate` on each prompt alone, stop tokens included."""
    monkeypatch.setattr(
        "coalign.generation.decoding.PREFILL_TOKENS", 24
    )  # several passes where many prompts enter together
    model = network(family, torch.float32)
    assert has_plain_cache(model.config)
    prompts = prompts_of(7)
    # a token that some answers contain, so that rows leave the batch at different times
    stop = greedy_by_transformers(model, prompts[0], 12, 2)[3]
    codec: Any = FakeCodec(stop, 2)
    found = decode(model, prompts, [[0]] * len(prompts), Sampling(12), codec, max_tokens)
    ends = []
    for prompt, (answer,) in zip(prompts, found, strict=True):
        expected = greedy_by_transformers(model, prompt, 12, stop, 2)
        ended = expected[-1] in (stop, 2)
        assert (answer.ids, answer.finished) == (expected[:-1] if ended else expected, ended)
        ends.append((ended, len(answer.ids)))
    assert len(set(ends)) > 1 and ends[0][0]
    assert greedy_in_step(model, prompts, 12, codec, lambda flag: flag) == [answers[0] for answers in found]


@pytest.mark.parametrize("max_tokens", [60, 8192])
@pytest.mark.parametrize(
    ("family", "changed"),
    [
        ("mistral", {"sliding_window": 4}),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1}),  # one layer of two
    ],
)
def test_greedy_with_a_sliding_window(family: str, changed: dict[str, Any], max_tokens: int) -> None:
    """Layers that forget give what transformers gives."""
    model = network(family, torch.float32, **changed)
    codec: Any = FakeCodec(2)
    prompts = prompts_of(4)
    found = decode(model, prompts, [[0, 1]] * 4, Sampling(10), codec, max_tokens)
    for prompt, answers in zip(prompts, found, strict=True):
        expected = greedy_by_transformers(model, prompt, 10, 2)
        assert all([*a.ids, *([2] if a.finished else [])] == expected for a in answers)


# Families, and models whose layers forget.
each_attention = pytest.mark.parametrize(
    ("family", "changed"),
    [
        *((family, {}) for family in (*FAMILIES, "cohere")),
        ("mistral", {"sliding_window": 4}),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1}),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(value),
)


@pytest.mark.parametrize("max_tokens", [40, 90, 8192])
@each_attention
def test_samples_that_share_a_prompt_equal_samples_that_copy_it(
    family: str, changed: dict[str, Any], max_tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Samples of prompts of unlike lengths, some with more than others, while rows come and go."""
    model = network(family, torch.float64, **changed)
    codec: Any = FakeCodec(2, 3, 4, 5)
    prompts, counts = prompts_of(9), [3, 1, 4, 2, 3, 5, 1, 2, 4]
    seeds = [[derive_seed("share", n, k) for k in range(count)] for n, count in enumerate(counts)]
    assert cascades_exactly(model, codec)

    def answers() -> list[list[GeneratedIds]]:
        return decode(model, prompts, seeds, Sampling(12, 1.5), codec, max_tokens)

    shared = answers()
    monkeypatch.setattr("coalign.generation.decoding.cascades_exactly", lambda *_: False)
    assert shared == answers()
    assert len({answer.finished for group in shared for answer in group}) == 2


@pytest.mark.parametrize("family", ["bloom", "mpt", "gemma2"])
def test_models_that_attend_in_their_own_way_copy_prompts(family: str) -> None:
    """Distances as a bias, or a soft cap on scores: greedy samples equal those of transformers all the same."""
    model = network(family, torch.float32)
    codec: Any = FakeCodec(2)
    assert not cascades_exactly(model, codec)
    (answers,) = decode(model, [[5, 6, 7, 8]], [[0, 1]], Sampling(6), codec, 8192)
    expected = greedy_by_transformers(model, [5, 6, 7, 8], 6, 2)
    assert all([*a.ids, *([2] if a.finished else [])] == expected for a in answers)


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen3", "phi"])
def test_attention_to_a_shared_prompt_equals_that_to_copies(family: str) -> None:
    """The logits of every step, to rounding, while prompts and rows leave and others come."""
    model = network(family, torch.float64)
    source = random.Random(3)
    plain, shared = SlotCache(model.device), SlotCache(model.device, SharedPrompts(model.config))

    def admit(cache: SlotCache, prompts: list[list[int]], rows: list[int], room: tuple[int, int]) -> None:
        prefilled = DynamicCache()
        model(**left_pad(prompts, 0, model.device), past_key_values=prefilled, use_cache=True)
        cache.admit(prefilled, [len(p) for p in prompts], rows, room)

    def step(count: int) -> float:
        token_R = torch.tensor([source.randrange(3, 64) for _ in range(count)])
        copied_RV = next_logits(model, plain, token_R)
        with attending_in_cascade(model):
            return float((copied_RV - next_logits(model, shared, token_R)).abs().max())

    with torch.inference_mode():
        found = []
        for prompts, rows, leave in (
            ([12, 9, 7], [0, 0, 1, 2, 2, 2], [0, 5, 2]),
            ([8, 3], [0, 1, 1, 1], [1, 6, 5, 3]),
            ([5], [0, 0], [5, 4, 0]),
        ):
            texts = [list(random_ids(source, length)) for length in prompts]
            for cache in (plain, shared):
                admit(cache, texts, rows, (12, 40))
            found += [step(len(plain._starts)) for _ in range(3)]
            for cache in (plain, shared):
                cache.keep(leave)
            found += [step(len(leave))]
    assert max(found) < 1e-12 and len(found) == 12


def test_a_prompt_is_read_once_for_its_samples() -> None:
    """The keys of 2 prompts are kept for 2 x 4 rows, beside each one's own; a prompt with one answer shares nothing."""
    model = network("llama", torch.float32)
    codec: Any = FakeCodec()
    assert cascades_exactly(model, codec)
    seen: list[tuple[int, ...]] = []
    attend = SharedPrompts.attend

    def watched(self: SharedPrompts, layer: int, *states: Any) -> torch.Tensor:
        seen.append((self._keys[layer].shape[0], states[1].shape[0], states[1].shape[2]))
        return attend(self, layer, *states)

    prompts = [list(random_ids(random.Random(n), 10)) for n in range(2)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SharedPrompts, "attend", watched)
        decode(model, prompts, [[0, 1, 2, 3], [4, 5, 6, 7]], Sampling(4, 1.0), codec, 8192)
        assert seen == [(2, 8, length) for length in (1, 2, 3) for _layer in range(2)]
        seen.clear()
        decode(model, prompts, [[0], [4]], Sampling(4, 1.0), codec, 8192)
        assert not seen
    assert model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("max_tokens", [60, 150, 8192])
@each_attention
def test_steps_of_fixed_shapes_equal_others(
    family: str, changed: dict[str, Any], max_tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same answers, call after call in the same memory, of few samples and many, short prompts and long ones."""
    monkeypatch.setattr("coalign.models.sizes.COLUMNS", 4)  # several shapes within the context of a tiny network
    model = network(family, torch.float64, **changed)
    codec: Any = FakeCodec(2, 3, 4, 5)
    fixed = FixedSteps(model)
    assert fixed.is_exact(codec)
    prompts = prompts_of(9)
    for few, count in ((slice(0, 3), 1), (slice(0, 9), 3), (slice(4, 6), 2)):
        seeds = [[derive_seed("fixed", n, k) for k in range(count)] for n, _ in enumerate(prompts[few])]
        args = (model, prompts[few], seeds, Sampling(12, 1.5), codec, max_tokens)
        assert decode(*args, fixed) == decode(*args)
    assert len(fixed._steps) > 1 and not fixed.num_graphs  # which a GPU alone has


class Replayed:
    """A CUDA graph as far as a CPU can be one: it computes again in the memory that was there when it was recorded."""

    num_replays = 0
    work: Any = None

    def replay(self) -> None:
        Replayed.num_replays += 1
        self.work()


@pytest.fixture
def graphs_on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let FixedSteps record on a CPU."""
    stream = SimpleNamespace(wait_stream=lambda _other: None)
    for name, stub in {
        "CUDAGraph": Replayed, "graph": lambda *_, **__: contextlib.nullcontext(), "graph_pool_handle": object,
        "stream": contextlib.nullcontext, "current_stream": lambda _device: stream, "set_stream": lambda _stream: None,
        "get_sync_debug_mode": lambda: 0, "set_sync_debug_mode": lambda _mode: None,
    }.items():  # fmt: skip
        monkeypatch.setattr(torch.cuda, name, stub)
    begin, record = FixedSteps.__init__, FixedSteps._record

    def begin_recording(self: Any, model: Any) -> None:
        begin(self, model)
        self._records, self._stream = True, stream

    def remember(self: Any, cache: SlotCache, key: tuple[int, int, int]) -> None:
        record(self, cache, key)
        states, logits_SV = cache.states(), self._logits_SV
        then = SimpleNamespace(states=lambda: states)
        self._graphs[key].work = lambda: logits_SV[: key[1]].copy_(self._logits(then, *key[1:]))

    monkeypatch.setattr(FixedSteps, "__init__", begin_recording)
    monkeypatch.setattr(FixedSteps, "_record", remember)


@pytest.mark.usefixtures("graphs_on_cpu")
@pytest.mark.parametrize("max_graphs", [2, 64])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_what_is_recorded_stays_right_from_call_to_call(
    family: str, max_graphs: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Calls of few rows, many and few again: where memory grows steps are recorded anew, else they find it in place."""
    monkeypatch.setattr("coalign.models.sizes.COLUMNS", 4)
    monkeypatch.setattr("coalign.generation.cuda_graphs.MAX_GRAPHS", max_graphs)
    model, codec = network(family, torch.float64), cast(Any, FakeCodec(2, 3))
    fixed = FixedSteps(model)
    before = Replayed.num_replays
    for number, (count, samples, max_tokens) in enumerate([(3, 1, 80), (9, 3, 8192), (9, 2, 150), (4, 2, 8192)] * 2):
        prompts = prompts_of(count, seed=number % 4)
        seeds = [[derive_seed("replayed", number, n, k) for k in range(samples)] for n in range(count)]
        args = (model, prompts, seeds, Sampling(20, 1.5), codec, max_tokens)
        assert decode(*args, fixed) == decode(*args)
    assert Replayed.num_replays > before + 100 and 1 < fixed.num_graphs <= max_graphs


@pytest.mark.parametrize("family", ["bloom", "mpt"])
def test_a_model_that_counts_positions_itself_has_no_fixed_steps(family: str) -> None:
    model = network(family, torch.float64)
    codec: Any = FakeCodec(2)
    fixed = FixedSteps(model)
    args = (model, prompts_of(3), [[0], [1], [2]], Sampling(6), codec, 8192)
    assert not fixed.is_exact(codec) and decode(*args, fixed) == decode(*args)


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("family", "changed"), [("llama", {}), ("gpt2", {}), ("qwen3", {}), ("mistral", {"sliding_window": 4})]
)
def test_recorded_steps_find_what_computed_ones_do(family: str, changed: dict[str, Any]) -> None:
    """Graphs on a GPU, with prompts and rows that come and go, call after call; in float64, where nothing is close."""
    model = network(family, torch.float64, **changed).to("cuda")
    codec: Any = FakeCodec(2, 3)
    fixed = FixedSteps(model)
    for seed in range(3):
        prompts = prompts_of(12, seed=seed)
        seeds = [[derive_seed("recorded", seed, n, k) for k in range(4)] for n in range(12)]
        args = (model, prompts, seeds, Sampling(24, 1.5), codec, 300)
        assert decode(*args, fixed) == decode(*args)
    assert fixed.is_exact(codec) and fixed.num_graphs > 1


@pytest.mark.gpu
def test_a_model_that_waits_for_the_gpu_is_not_recorded(caplog: pytest.LogCaptureFixture) -> None:
    """It samples all the same, says why, and leaves the allocator as it was."""
    model = network("llama", torch.float64).to("cuda")
    model.model.norm.register_forward_hook(lambda _module, _arguments, output: output * float(output.sum() != 0))
    codec: Any = FakeCodec(2, 3)
    fixed = FixedSteps(model)
    args = (model, prompts_of(6), [[n, n + 9] for n in range(6)], Sampling(24, 1.5), codec, 8192)
    assert decode(*args, fixed) == decode(*args)
    assert fixed.is_exact(codec) and not fixed.num_graphs and "without CUDA graphs" in caplog.text
    torch.cuda.empty_cache()


def test_prompts_are_computed_once_and_rows_refilled() -> None:
    """Six prompts of three samples under a budget of two: one pass per prompt, and no step with more rows than fit."""
    model = network("llama", torch.float32)
    assert cascades_exactly(model, cast(Any, FakeCodec(2)))  # asked here, so that its passes are not counted
    source = random.Random(7)
    prompts = [list(random_ids(source, 10)) for _ in range(6)]
    shapes: list[tuple[int, int]] = []
    handle = model.get_input_embeddings().register_forward_hook(
        lambda _module, arguments, _output: shapes.append(tuple(arguments[0].shape))
    )
    seeds = [[derive_seed("refill", n, k) for k in range(3)] for n in range(6)]
    codec: Any = FakeCodec(*range(2, 6))  # ends early now and then
    found = decode(model, prompts, seeds, Sampling(12, 1.5), codec, max_tokens=6 * 22)
    handle.remove()
    lengths = [len(a.ids) + a.finished for answers in found for a in answers]
    prefills = [shape for shape in shapes if shape[1] > 1]
    steps = [rows for rows, width in shapes if width == 1]
    assert sum(rows * width for rows, width in prefills) == 60 and len(prefills) > 2
    assert max(steps) <= 6 and sum(steps) == sum(lengths) - 18  # each first token comes from the prompt's pass
    assert len({n for n in lengths}) > 3 and any(a.finished for answers in found for a in answers)
    between = [i for i, shape in enumerate(shapes) if shape[1] > 1][1]
    assert shapes[between - 1][1] == 1 and shapes[between + 1][0] > shapes[between][0] * 3  # others lived on


def slow_pick(logits: Sequence[float], uniform: float, sampling: Sampling) -> int:
    """Cut to top-k, sorted, then to the fewest tokens that reach top-p, and walk along the rest."""
    scaled = [x / sampling.temperature for x in logits]
    order = list(range(len(scaled)))
    if sampling.top_k or sampling.top_p < 1:
        order.sort(key=lambda i: (-scaled[i], i))
    order = order[: sampling.top_k] if sampling.top_k else order
    top = max(scaled)
    weights = [math.exp(scaled[i] - top) for i in order]
    probabilities = [w / sum(weights) for w in weights]
    kept = []
    mass = 0.0
    for p in probabilities:
        if kept and mass >= sampling.top_p:
            break
        kept.append(p)
        mass += p
    walked = 0.0
    for index, p in enumerate(kept):
        walked += p
        if uniform * mass < walked:
            return order[index]
    return order[len(kept) - 1]


@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.5])
@pytest.mark.parametrize("top_p", [1.0, 0.9, 0.2, 1e-6])
@pytest.mark.parametrize("top_k", [0, 1, 5, 100])
def test_drawing_equals_brute_force(temperature: float, top_p: float, top_k: int) -> None:
    """Top-k, top-p and temperature follow their definitions, for numbers at both ends of [0, 1) too."""
    draw = torch.Generator().manual_seed(0)
    logits_BV = torch.randn(200, 20, generator=draw) * 2
    logits_BV[::3, 4] = logits_BV[::3, 7]  # ties
    uniform_B = torch.rand(200, generator=draw, dtype=torch.float64)
    uniform_B[:3] = torch.tensor([0.0, 1.0 - 2**-53, 0.5], dtype=torch.float64)
    sampling = Sampling(1, temperature, top_p, top_k)
    found = pick_tokens(logits_BV, uniform_B, sampling).tolist()
    rows = [(row, u) for row, u in zip(logits_BV.tolist(), uniform_B.tolist(), strict=True)]
    expected = [slow_pick(row, u, sampling) for row, u in rows]
    assert sum(a != b for a, b in zip(found, expected, strict=True)) == 0


def test_drawn_tokens_follow_the_distribution() -> None:
    """A hundred thousand draws match the tempered softmax, and nothing outside the nucleus is drawn."""
    logits = torch.tensor([2.0, 1.5, 1.0, 0.0, -1.0, -3.0])
    uniform_B = torch.rand(100_000, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    drawn = pick_tokens(logits.expand(100_000, -1), uniform_B, Sampling(1, 0.7))
    shares = torch.bincount(drawn, minlength=6) / 100_000
    assert torch.allclose(shares, torch.softmax(logits / 0.7, -1), atol=0.006)
    nucleus = pick_tokens(logits.expand(100_000, -1), uniform_B, Sampling(1, 0.7, top_p=0.8, top_k=3))
    kept = torch.softmax(logits[:3] / 0.7, -1)[:2]
    assert torch.allclose(torch.bincount(nucleus) / 100_000, kept / kept.sum(), atol=0.006)


def test_a_sampled_continuation_follows_the_model() -> None:
    """Over many seeds, the two-token continuations of a prompt occur as often as the model says."""
    model = network("llama", torch.float32, vocab_size=6)
    codec: Any = FakeCodec(5)
    prompt = [3, 4, 3]
    seeds = [derive_seed("draw", n) for n in range(4000)]
    (answers,) = decode(model, [prompt], [seeds], Sampling(2, 1.0), codec, 8192)
    seen = [(*a.ids, *([5] if a.finished else [])) for a in answers]
    with torch.no_grad():
        first = model(input_ids=torch.tensor([prompt])).logits[0, -1].softmax(-1)
        second = model(input_ids=torch.tensor([[*prompt, t] for t in range(6)])).logits[:, -1].softmax(-1)
    for a, b in itertools.product(range(5), range(6)):
        expected = float(first[a] * second[a, b])
        tolerance = 5 * math.sqrt(expected * (1 - expected) / 4000) + 1e-9
        assert seen.count((a, b)) / 4000 == pytest.approx(expected, abs=tolerance)
    assert seen.count((5,)) / 4000 == pytest.approx(float(first[5]), abs=0.05)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Return a random model folder with a real tokenizer."""
    path = tmp_path_factory.mktemp("generation") / "model"
    table = RandomTable(vocab_size=300, hidden_size=32, num_layers=2, num_heads=4, intermediate_size=48, context=128)
    make_random_model(path, ["some words to learn from"], table, 1)
    return str(path)


def requests(num_seeds: int) -> list[dict[str, Any]]:
    """Return requests of unlike lengths, each with seeds of its own and a key to pass through."""
    return [
        {"prompt_ids": ids, "seeds": [derive_seed("r", n, k) for k in range(num_seeds)], "id": n}
        for n, ids in enumerate(prompts_of(9, seed=3))
    ]


def generate(folder: str, rows: list[dict[str, Any]], cuts: list[int], mode: str, **sampling: Any) -> list[Any]:
    """Return the answers of rows processed in shards, each by a worker of its own."""
    table = GenerationTable(mode=mode, dtype="float32", batch_tokens=200)  # type: ignore[arg-type]
    found = []
    for start, end in itertools.pairwise([0, *cuts, len(rows)]):
        worker = GenerateWorker(folder, ModelTable(), table, Sampling(**{"max_new_tokens": 20, **sampling}), 1)
        found += worker(rows[start:end])
    return found


def test_exact_mode_does_not_depend_on_neighbours(folder: str) -> None:
    """The same answers, to the byte, whatever the shards, the workers and the order."""
    rows = requests(3)
    whole = generate(folder, rows, [], "exact", temperature=1.0)
    assert whole == generate(folder, rows, [1, 4, 5], "exact", temperature=1.0)
    assert whole == generate(folder, rows[::-1], [2], "exact", temperature=1.0)[::-1]
    assert [row["id"] for row in whole] == list(range(9))
    texts = [answer["text"] for row in whole for answer in row["answers"]]
    assert len(texts) == 27 and len(set(texts)) > 20


def test_fast_mode_gives_the_same_texts_up_to_rounding(folder: str) -> None:
    """Larger batches change at most a rare draw that lies on an edge."""
    rows = requests(3)
    exact, fast = (generate(folder, rows, [], mode, temperature=1.0) for mode in ("exact", "fast"))
    pairs = [(a, b) for x, y in zip(exact, fast, strict=True) for a, b in zip(x["answers"], y["answers"], strict=True)]
    assert sum(a == b for a, b in pairs) >= len(pairs) - 1


def test_a_seed_decides_the_text(folder: str) -> None:
    """Equal seeds give equal answers; another seed another."""
    row = requests(1)[0]
    doubled = {**row, "seeds": [row["seeds"][0], 7, row["seeds"][0]]}
    (found,) = generate(folder, [doubled], [], "exact", temperature=1.0)
    first, other, again = found["answers"]
    assert first == again and first != other


def test_finish_reason_and_token_count(folder: str) -> None:
    """An answer that reached the end-of-turn says stop and counts it; one at the limit says length."""
    rows = requests(40)
    worker = GenerateWorker(
        folder, ModelTable(), GenerationTable(dtype="float32"), Sampling(60, temperature=3.0), threads=1
    )
    answers = [a for row in worker(rows) for a in row["answers"]]
    assert {a["finish"] for a in answers} == {"stop", "length"}
    assert all((a["num_tokens"] == 60) if a["finish"] == "length" else (a["num_tokens"] <= 60) for a in answers)
    assert not any("<|end|>" in a["text"] for a in answers)
    codec: Any = worker.codec
    (drawn,) = decode(worker.model, [rows[0]["prompt_ids"]], [list(range(40))], worker.sampling, codec, 8192)
    (counted,) = worker([{"prompt_ids": rows[0]["prompt_ids"], "seeds": list(range(40))}])
    ends = [len(a.ids) + (1 if a.finished else 0) for a in drawn]
    assert [a["num_tokens"] for a in counted["answers"]] == ends and any(a.finished for a in drawn)


def test_a_score_worker_keeps_order_and_keys(folder: str) -> None:
    """Rows come back in their order with what they carried, in exact mode whatever the neighbours."""
    rows = [{"prompt_ids": p, "continuations": [[5], [6, 7]], "id": n} for n, p in enumerate(prompts_of(8, seed=6))]
    worker = ScoreWorker(folder, ModelTable(), GenerationTable(mode="exact", dtype="float32"), threads=1)
    whole = worker(rows)
    assert [set(row) for row in whole] == [{"id", "logps"}] * 8 and [row["id"] for row in whole] == list(range(8))
    assert whole == [worker([row])[0] for row in rows]
    assert all(sum(math.exp(x) for x in row["logps"]) < 1 for row in whole)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_gpu_holds_as_many_tokens_as_fit_half_of_what_is_free(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The widths that decide are read from the config of any family; a part of a GPU counts as a part."""
    model = network(family, torch.float32)
    shape = shape_of(model.config.get_text_config())
    keys = model.config.num_hidden_layers, shape.kv_width
    cache = DynamicCache()
    model(input_ids=torch.tensor([[1, 2, 3]]), past_key_values=cache)
    assert keys == (len(cache.layers), cache.layers[0].keys.shape[1] * cache.layers[0].keys.shape[3])
    table = GenerationTable(batch_tokens=16384)
    needed = max(f(shape, table, 96, 32) for f in (worker_memory.sampling_bytes, worker_memory.scoring_bytes))
    on_gpu = SimpleNamespace(device=torch.device("cuda"), config=model.config)
    for part, free in ((-1.0, 2 * needed), (1.0, 2 * needed), (0.5, 4 * needed)):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device, free=free: (math.ceil(free), 10**12))
        assert transformers_worker._tokens_in_flight(on_gpu, GenerationTable(gpus_per_worker=part)) == 16384
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device, free=free: (math.floor(0.99 * free), 10**12))
        assert transformers_worker._tokens_in_flight(on_gpu, GenerationTable(gpus_per_worker=part)) < 16384
    assert transformers_worker._tokens_in_flight(model, GenerationTable()) == worker_memory.TOKENS_ON_CPU == 16384
