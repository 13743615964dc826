"""The quickstart's base model: what it learned from, that no held-out wording was among it, and that it works."""

from __future__ import annotations

import random
from pathlib import Path

import corpus
import make_base
import make_world
import pytest
from score_base import score_following, score_judging

from coalign.config import GenerationTable, ModelTable
from coalign.encoding import Codec
from coalign.filtering import NearRepeats
from coalign.generation import GenerateWorker, Sampling, ScoreWorker
from coalign.models import load_tokenizer
from coalign.prompts import NO, YES
from coalign.text import normalise_input

BASE = make_base.HERE / "base"
MODEL = ModelTable(path=str(BASE), init="pretrained")


@pytest.fixture(scope="module")
def world() -> corpus.World:
    return corpus.World()


@pytest.fixture(scope="module")
def rows(world: corpus.World) -> list[corpus.Row]:
    return corpus.sample(corpus.Corpus(world), 40_000)


def held_out_texts() -> list[str]:
    return [text for own in make_world.read_wordings().values() for text in (*own.dev, *own.test)]


def test_nothing_like_a_held_out_wording_can_be_drawn(world: corpus.World) -> None:
    """Instructions and rewrite targets come from these two tables; neither repeats a held-out wording."""
    held_out = NearRepeats(corpus.MAX_SIMILARITY, held_out_texts())
    for task, texts in world.rewrites.items():
        assert len(set(texts)) == corpus.REWRITES
        assert not [text for text in texts if held_out.has_like(text)], task
    normal = {normalise_input(text) for text in held_out_texts()}
    assert not normal & {normalise_input(text) for texts in world.known.values() for text in texts}


def test_no_row_holds_a_held_out_wording(rows: list[corpus.Row]) -> None:
    seen = "\n".join(normalise_input(f"{row.prompt} {row.answer}") for row in rows)
    found = [text for text in held_out_texts() if normalise_input(text) in seen]
    assert not found


def test_no_sentence_is_like_a_held_out_wording(rows: list[corpus.Row]) -> None:
    held_out = NearRepeats(corpus.MAX_SIMILARITY, held_out_texts())
    said = {row.answer.partition(": ")[2].rpartition("? ")[0] for row in rows if row.kind == "sentence"}
    assert len(said) > 3000
    assert not [text for text in said if held_out.has_like(text) or held_out.has_like(f"{text}?")]


def test_a_sentence_that_the_grammar_makes_like_a_held_out_wording_is_drawn_again(
    world: corpus.World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the rules give: half of what they say here is a test wording, and none of it gets through."""
    test_wordings = [own.test[0].rstrip("?.") for own in make_world.read_wordings().values()]
    say = corpus.Grammar.say

    def often_held_out(grammar: corpus.Grammar, task: str, rng: random.Random) -> str:
        return rng.choice(test_wordings) if rng.random() < 0.5 else say(grammar, task, rng)

    monkeypatch.setattr(corpus.Grammar, "say", often_held_out)
    drawn = corpus.Corpus(world)
    said = [normalise_input(drawn.sentence().answer) for _ in range(200)]
    assert not [text for text in said if any(normalise_input(wording) in text for wording in test_wordings)]


def test_only_the_first_wordings_are_followed(rows: list[corpus.Row], world: corpus.World) -> None:
    known = {text for texts in world.known.values() for text in texts[: corpus.FOLLOWED]}
    followed = {row.prompt.partition("\n\n")[0] for row in rows if row.kind == "follow"}
    assert followed == known
    assert len(known) == corpus.FOLLOWED * len(make_world.ANSWERS)


def test_verdicts_are_right(rows: list[corpus.Row]) -> None:
    """With the gold answer shown, the verdict is yes exactly when both texts are the same; about half are."""
    checked = [row for row in rows if row.prompt.startswith("Expected: ")]
    for row in checked:
        gold, response = (line.partition(": ")[2] for line in row.prompt.splitlines()[:2])
        assert row.answer == (YES if gold == response else NO)
    assert 0.4 < sum(row.answer == YES for row in checked) / len(checked) < 0.6


def test_the_corpus_repeats(world: corpus.World, rows: list[corpus.Row]) -> None:
    assert corpus.sample(corpus.Corpus(world), 500) == rows[:500]
    assert corpus.sample(corpus.Corpus(world, seed=1), 500) != rows[:500]


def test_the_model_is_small_and_plain() -> None:
    assert (BASE / "model.safetensors").stat().st_size <= 9_000_000
    assert not [path for path in BASE.iterdir() if path.suffix in (".bin", ".pt", ".py")]


def test_it_is_asked_in_the_very_tokens_it_learned_from(rows: list[corpus.Row]) -> None:
    tokenizer = load_tokenizer(str(BASE), MODEL)
    codec, encoder = Codec(tokenizer, MODEL), make_base.Encoder(tokenizer)
    for row in [row for row in rows[:2000] if row.kind != "sentence"]:
        ids, weights, _ = encoder.encode(row)
        assert ids == [*codec.encode_prompt(row.prompt), *codec.encode_answer(row.answer)]
        assert len(ids) == len(weights) <= codec.max_tokens


@pytest.mark.parametrize(
    ("response", "right_so_far"),
    [
        ("cat dog owl", [1, 1, 1, 1]),
        ("cat owl dog", [1, 0, 0, 0]),
        ("cat dog", [1, 1, 0]),
        ("cat dog owl cow", [1, 1, 1, 0, 0]),
    ],
)
def test_the_probe_learns_how_far_a_response_is_right(response: str, right_so_far: list[int]) -> None:
    """After each word, and at the line's end, where it is known whether one is missing."""
    prompt = f"Expected: cat dog owl\nResponse: {response}\n\nIs the response correct? Answer Yes or No."
    row = corpus.Row("judge", prompt, "No", "cat dog owl")
    _, weights, agrees = make_base.Encoder(load_tokenizer(str(BASE), MODEL)).encode(row)
    assert [mark for mark in agrees if mark != make_base.NOT_PROBED] == right_so_far
    assert weights.count(make_base.RESPONSE_WEIGHT) == (3 if response == row.gold else 0)


def test_it_follows_what_it_was_taught() -> None:
    greedy = GenerateWorker(str(BASE), MODEL, GenerationTable(), Sampling(max_new_tokens=16), 1)
    means = score_following(greedy, inputs=2)["mean"]
    assert means["followed"] > 0.85
    assert means["followed"] > means["test"] + 0.2, "without room there is nothing to show"


def test_it_judges() -> None:
    """With the gold answer shown. One changed place in a list of words it notices more often than not, no more."""
    errors = score_judging(ScoreWorker(str(BASE), MODEL, GenerationTable(), 1), inputs=12)
    for name in ("one, right called wrong", "one, wrong called right", "list, right called wrong"):
        assert errors[f"correct, {name}"] <= 0.06, name
    assert errors["correct, list, wrong called right"] < 0.4


def test_training_repeats(tmp_path: Path, world: corpus.World) -> None:
    """Two short trainings give the same weights, and the loss falls."""
    import torch

    torch.use_deterministic_algorithms(True)
    try:
        results = []
        tokenizer = load_tokenizer(str(BASE), MODEL)
        for _ in range(2):
            model = make_base.make_model(len(tokenizer), seed=3)
            before = make_base.mean_loss(model, make_base.Encoder(tokenizer), corpus.Corpus(world, 5))
            make_base.train(model, make_base.Encoder(tokenizer), corpus.Corpus(world, 3), steps=6, tokens=512, seed=3)
            after = make_base.mean_loss(model, make_base.Encoder(tokenizer), corpus.Corpus(world, 5))
            results.append((after, model.state_dict()))
            assert after < before - 0.3
        for name, value in results[0][1].items():
            assert torch.equal(value, results[1][1][name]), name
    finally:
        torch.use_deterministic_algorithms(False)


def test_the_replayed_rows_are_those_of_the_script() -> None:
    assert (make_base.HERE / "replay.jsonl").read_text(encoding="utf-8") == corpus.replay_rows()
