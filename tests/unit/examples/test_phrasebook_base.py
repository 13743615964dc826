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
from coalign.generation.transformers_worker import GenerateWorker, Sampling, ScoreWorker
from coalign.models.codec import Codec
from coalign.models.model_folder import load_tokenizer
from coalign.prompts import NO, YES
from coalign.wordings.near_repeats import NearRepeats

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
    """Instructions and rewrite targets come from these two tables: nothing in them repeats or holds such a wording."""
    held_out = NearRepeats(corpus.MAX_SIMILARITY, held_out_texts())
    inside = [corpus.bare(text) for text in held_out_texts()]
    for task, texts in world.rewrites.items():
        assert len(set(texts)) == corpus.REWRITES
        assert not [text for text in texts if held_out.has_like(text)], task
    for text in [text for table in (world.rewrites, world.known) for texts in table.values() for text in texts]:
        words = corpus.bare(text)
        assert not [wording for wording in inside if wording in words], text


def test_no_row_holds_a_held_out_wording(rows: list[corpus.Row]) -> None:
    """Whatever stands before or after it, and whatever the punctuation."""
    seen = "|".join(corpus.bare(f"{row.prompt} {row.answer}") for row in rows)
    found = [text for text in held_out_texts() if corpus.bare(text) in seen]
    assert not found


@pytest.mark.parametrize(
    ("text", "shows"),
    [
        ("Delete the creature.", True),
        ("What comes out when you delete the creature?", True),
        ("What comes out when you delete the creatures?", False),
        ("Write the first word of the list.", False),
    ],
)
def test_a_held_out_wording_is_found_in_any_sentence(world: corpus.World, text: str, shows: bool) -> None:
    assert world.held_out.shows_in(text) is shows


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
    said = [corpus.bare(drawn.sentence().answer) for _ in range(200)]
    assert not [text for text in said if any(corpus.bare(wording) in text for wording in test_wordings)]


def test_only_the_first_wordings_are_followed(rows: list[corpus.Row], world: corpus.World) -> None:
    known = {text for texts in world.known.values() for text in texts[: corpus.FOLLOWED]}
    followed = {row.prompt.partition("\n\n")[0] for row in rows if row.kind == "follow"}
    assert followed == known
    assert len(known) == corpus.FOLLOWED * len(make_world.ANSWERS)


def test_verdicts_are_right(rows: list[corpus.Row]) -> None:
    """With the gold answer shown, the verdict is yes exactly when both texts are the same; about half are."""
    checked = [row for row in rows if "\nExpected: " in row.prompt]
    assert len(checked) > 3000
    for row in checked:
        gold, response = (line.partition(": ")[2] for line in row.prompt.splitlines()[-2:])
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
        ids, weights = encoder.encode(row)
        assert ids == [*codec.encode_prompt(row.prompt), *codec.encode_answer(row.answer)]
        assert len(ids) == len(weights) <= codec.max_tokens


def test_a_right_response_in_a_question_is_learned_as_well() -> None:
    """Its words alone, less than the verdict; a wrong one is only read."""
    encoder = make_base.Encoder(load_tokenizer(str(BASE), MODEL))
    question = "Is the response correct? Answer Yes or No.\n\nExpected: cat dog owl\nResponse: "
    verdict = [make_base.WEIGHTS["judge"]] * 2
    _, right = encoder.encode(corpus.Row("judge", f"{question}cat dog owl", "Yes", right=True))
    assert right[-6:] == [*[make_base.RESPONSE_WEIGHT] * 3, 0.0, *verdict]
    assert not any(right[:-6])
    _, wrong = encoder.encode(corpus.Row("judge", f"{question}cat owl dog", "No"))
    assert wrong[-2:] == verdict
    assert not any(wrong[:-2])


def test_it_follows_what_it_was_taught() -> None:
    greedy = GenerateWorker(str(BASE), MODEL, GenerationTable(), Sampling(max_new_tokens=16), 1)
    means = score_following(greedy, inputs=2)["mean"]
    assert means["followed"] > 0.85
    assert means["followed"] > means["test"] + 0.2, "without room there is nothing to show"


def test_it_judges() -> None:
    """With the gold answer shown, item by item as the quickstart asks: the target is 10 % of either error."""
    errors = score_judging(ScoreWorker(str(BASE), MODEL, GenerationTable(), 1), inputs=12)
    for question in ("correct, one", "correct by items, list", "type, one", "type, list"):
        for error in ("right called wrong", "wrong called right"):
            assert errors[f"{question}, {error}"] <= 0.1, (question, error)


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
