"""What the phrasebook's base model learns from: following, rewriting, judging, and plain sentences about word lists.

Everything is drawn from make_world.py, wordings.txt and rewrites.txt by one seeded generator. Held-out wordings (dev
and test) are read only to keep everything like them out; tests/unit/examples/test_phrasebook_base.py checks that.
"""

from __future__ import annotations

import itertools
import json
import random
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from make_world import ANSWERS, CATEGORY, VOCABULARY, WORDS, Wordings, draw_input, read_wordings

from coalign.prompts import NO, NUM_VARIANTS, YES, correct_question, paraphrase_prompt, type_question
from coalign.wordings.near_repeats import NearRepeats

HERE = Path(__file__).resolve().parent
FOLLOWED = 4  # the base model learns to follow this many wordings of each task, the Definition first
REWRITES = 1500  # different rewrites per task
MAX_SIMILARITY = 0.7  # 3-gram overlap with a held-out wording from which a rewrite is left out
LISTS = ("reverse", "drop_first", "drop_last", "swap_ends", "remove_animal", "double_first")
# Copying and changing one place takes longer to learn than naming one word.
FOLLOW_WEIGHT = {"reverse": 2, "drop_first": 2, "drop_last": 2, "swap_ends": 3, "remove_animal": 3, "second_last": 2}
SHARES = {"follow": 0.34, "rewrite": 0.14, "judge": 0.3, "sentence": 0.22}
# Of the judge's questions: about one item beside the gold one, the whole answer beside it, without gold, the type.
QUESTIONS = {"item": 0.25, "correct": 0.1, "correct without gold": 0.4, "type": 0.25}
# The last updates: comparing answers that are no words of a list, which the first part leaves half learned.
LAST_SHARES = {"follow": 0.2, "rewrite": 0.1, "judge": 0.7}
LAST_QUESTIONS = {"short": 0.5, "item": 0.15, "correct without gold": 0.15, "type": 0.2}
SHORT = ("count_words", "letter_count", "has_animal", "has_food", "first_letter", "category_first")
_REFERENCE = re.compile(r"<(\w+)>")
_REPEATED = re.compile(r"\b(\w+) \1\b")


@dataclass(frozen=True)
class Row:
    """One piece of training text: what stands before the learned part, and the learned part; "" before a sentence.

    `right` says that a judge's question ends with the right response: its words are learned a little as well.
    """

    kind: str
    prompt: str
    answer: str
    right: bool = False


class Grammar:
    """The rules of rewrites.txt: texts for one task, in words."""

    def __init__(self, path: Path = HERE / "rewrites.txt") -> None:
        self.shared: dict[str, list[str]] = {}
        self.tasks: dict[str, dict[str, list[str]]] = {}
        rules = self.shared
        for line in path.read_text(encoding="utf-8").splitlines():
            if line.startswith("["):
                rules = self.tasks.setdefault(line.strip("[]"), {})
            elif line and not line.startswith("#"):
                name, _, alternatives = line.partition(" = ")
                rules[name] = [text.strip() for text in alternatives.split(" | ")]
        assert list(self.tasks) == list(ANSWERS), "rewrites.txt must name every task once, in make_world.py's order"

    def expand(self, task: str, text: str, rng: random.Random) -> str:
        """Return a text with every <name> replaced by one of its alternatives."""
        own = self.tasks[task]
        while match := _REFERENCE.search(text):
            chosen = rng.choice(own.get(match[1]) or self.shared[match[1]])
            text = text[: match.start()] + chosen + text[match.end() :]
        return text

    def rewrite(self, task: str, rng: random.Random) -> str:
        """Return one whole instruction."""
        own = self.tasks[task]
        forms = [name for name in ("THING", "ASK", "WHAT", "DO", "FREE") if name in own]
        weights = [{"THING": 4, "ASK": 3, "WHAT": 2, "DO": 4, "FREE": 3}[name] for name in forms]
        form = rng.choices(forms, weights)[0]
        return tidy(self.expand(task, f"<say_{form.lower()}>", rng))

    def say(self, task: str, rng: random.Random) -> str:
        """Return words for what the task is about, as they stand in a statement."""
        if "THING" not in self.tasks[task]:
            return self.expand(task, "<is_there>", rng)
        return self.expand(task, f"<{rng.choice(('THING', 'THING', 'ASK', 'WHAT'))}>", rng)


def tidy(text: str) -> str:
    """Return a text as one would type it: articles, punctuation, a capital in front."""
    text = re.sub(r"\ba (?=[aeio])", "an ", text)
    text = re.sub(r"\ban (?=[^aeiou])", "a ", text)
    text = re.sub(r" (?=[.,;:?!]|'s)", "", text)
    text = _REPEATED.sub(r"\1", re.sub(r",(?: ?,)+", ",", text))
    text = re.sub(r"[.,;:]+(?=[.?])", "", text)
    return text[:1].upper() + text[1:]


class HeldOut:
    """The wordings that the base model must not see: dev and test, of all tasks."""

    def __init__(self, wordings: Iterable[Wordings]) -> None:
        texts = [text for own in wordings for text in (*own.dev, *own.test)]
        self.near = NearRepeats(MAX_SIMILARITY, texts)
        self._bare = re.compile("|".join(re.escape(bare(text)) for text in texts))

    def shows_in(self, text: str) -> bool:
        """Return whether a text nearly repeats one of them, or contains one, whatever the punctuation."""
        return self.near.has_like(text) or bool(self._bare.search(bare(text)))


def bare(text: str) -> str:
    """Return the words of a text in lower case between blanks, without punctuation."""
    return f" {' '.join(re.findall(r'[a-z0-9]+', text.lower()))} "


class World:
    """The wordings that the base model may see, by task."""

    def __init__(self, seed: int = 0) -> None:
        self.grammar = Grammar()
        wordings = read_wordings()
        self.known = {task: own.train for task, own in wordings.items()}
        self.held_out = HeldOut(wordings.values())
        self.rewrites = {task: self._rewrites(task, seed) for task in ANSWERS}

    def _rewrites(self, task: str, seed: int) -> list[str]:
        """Return different rewrites, none of them like a held-out wording of any task."""
        rng = random.Random(f"rewrites {seed} {task}")
        found: dict[str, None] = {}
        for _ in range(40 * REWRITES):
            text = self.grammar.rewrite(task, rng)
            if 3 <= len(text.split()) <= 22 and not self.held_out.shows_in(text):
                found.setdefault(text)
                if len(found) == REWRITES:
                    return list(found)
        raise AssertionError(f"rewrites.txt has too few ways to ask for {task}")


def kind_of(answer: str) -> str:
    """Return what type of answer a text is."""
    words = answer.split()
    if answer.isdigit():
        return "number"
    if answer in ("yes", "no"):
        return "yes_no"
    if len(words) == 1 and len(answer) == 1:
        return "letter"
    if answer in WORDS:
        return "category"
    return "word" if len(words) == 1 else "words"


def applicable(words: list[str]) -> list[str]:
    """Return the tasks that have exactly one answer for a list."""
    categories = {CATEGORY[word] for word in words}
    return [task for task in ANSWERS if categories >= _NEEDED.get(task, set())]


_NEEDED = {task: {task} for task in ("animal", "colour", "food", "country")} | {"remove_animal": {"animal"}}


def damaged(words: list[str], pool: list[str], rng: random.Random) -> str:
    """Return a list of words with one place changed."""
    words = list(words)
    place, how = rng.randrange(len(words)), rng.random()
    if how < 0.35:
        words[place] = rng.choice(pool)
    elif how < 0.5 and len(words) > 1:
        del words[place]
    elif how < 0.8 and len(words) > 1:
        other = rng.choice([index for index in range(len(words)) if index != place])
        words[place], words[other] = words[other], words[place]
    else:
        words.insert(place, rng.choice(pool))
    return " ".join(words)


def wrong_answer(task: str, words: list[str], gold: str, rng: random.Random, hard: float = 0.85) -> str:
    """Return an answer that is not the gold one; with probability `hard` one of the same type."""
    for _ in range(30):
        other = rng.random() < 0.55
        if rng.random() >= hard or other:
            answers = [ANSWERS[name](words) for name in applicable(words)]
            alike = [answer for answer in answers if kind_of(answer) == kind_of(gold)]
            answer = rng.choice(alike if other and alike else answers)
        else:
            answer = _near_miss(words, gold, rng)
        if answer and answer != gold:
            return answer
    return "no" if gold != "no" else "yes"


def _near_miss(words: list[str], gold: str, rng: random.Random) -> str:
    """Return a text of the gold answer's type."""
    kind = kind_of(gold)
    if kind == "number":
        return str(max(1, int(gold) + rng.choice((-2, -1, -1, 1, 1, 2))))
    if kind == "yes_no":
        return "no" if gold == "yes" else "yes"
    if kind == "letter":
        return rng.choice([*(word[0] for word in words), rng.choice("abcdefghijklmnoprstvwyz")])
    if kind == "category":
        return rng.choice([CATEGORY[rng.choice(words)], rng.choice(list(WORDS))])
    if kind == "word":
        outside = rng.choice(WORDS[CATEGORY[gold]]) if gold in CATEGORY else rng.choice(VOCABULARY)
        return rng.choice([rng.choice(words), rng.choice(words), outside, f"{gold} {rng.choice(words)}"])
    return damaged(gold.split(), words, rng)


class Corpus:
    """Rows without end, drawn by one seed."""

    def __init__(self, world: World, seed: int | str = 0, last: bool = False) -> None:
        self.world = world
        self.rng = random.Random(f"corpus {seed}")
        self._shares = LAST_SHARES if last else SHARES
        self._questions = LAST_QUESTIONS if last else QUESTIONS
        self._makers: dict[str, Callable[[], Row]] = {
            "follow": self.follow,
            "rewrite": self.rewrite,
            "judge": self.judge,
            "sentence": self.sentence,
        }
        self._followed = [task for task in ANSWERS for _ in range(FOLLOW_WEIGHT.get(task, 1))]

    def __iter__(self) -> Iterator[Row]:
        kinds, shares = list(self._shares), list(self._shares.values())
        while True:
            yield self._makers[self.rng.choices(kinds, shares)[0]]()

    def _draw(self, tasks: list[str] | None = None) -> tuple[str, list[str], str]:
        task = self.rng.choice(tasks or list(ANSWERS))
        words = draw_input(self.rng, task)
        return task, words, ANSWERS[task](words)

    def follow(self) -> Row:
        """Return an instruction in one of a few wordings, and the answer."""
        task, words, gold = self._draw(self._followed)
        wording = self.rng.choice(self.world.known[task][:FOLLOWED])
        return Row("follow", f"{wording}\n\n{' '.join(words)}", gold)

    def rewrite(self) -> Row:
        """Return a request for a rewrite, and one; what is rewritten is itself a known wording or a rewrite."""
        task = self.rng.choice(list(ANSWERS))
        source = self.rng.choice(self.world.known[task] if self.rng.random() < 0.5 else self.world.rewrites[task])
        target = self.rng.choice(self.world.rewrites[task])
        labels = ["no", "yes"] if task in ("has_animal", "has_food") else []
        return Row("rewrite", paraphrase_prompt(source, labels, self.rng.randrange(NUM_VARIANTS)), target)

    def judge(self) -> Row:
        """Return one of the judge's questions about a right or wrong answer, and the verdict."""
        asked = self.rng.choices(list(self._questions), list(self._questions.values()))[0]
        lists = asked != "short" and self.rng.random() < 0.5
        task, words, gold = self._draw(list(SHORT) if asked == "short" else list(LISTS) if lists else None)
        wording = self.rng.choice(self.world.known[task][: self.rng.choice((1, 1, FOLLOWED))])
        listed = " ".join(words)
        if asked == "type":
            answer = wrong_answer(task, words, gold, self.rng, hard=0.3) if self.rng.random() < 0.7 else gold
            verdict = kind_of(answer) == kind_of(gold)
            return Row(
                "judge", type_question(wording, listed, answer), YES if verdict else NO, verdict and answer == gold
            )
        right = self.rng.random() < 0.5
        if asked == "item" and task in LISTS:
            gold = self.rng.choice(gold.split())
            answer = gold if right else self.rng.choice([w for w in (*words, *VOCABULARY[:: len(words)]) if w != gold])
        else:
            answer = gold if right else wrong_answer(task, words, gold, self.rng)
        question = correct_question(wording, listed, answer, None if asked == "correct without gold" else gold)
        return Row("judge", question, YES if right else NO, right)

    def sentence(self) -> Row:
        """Return a statement about a list in the grammar's words: what they mean, not how to obey them."""
        task, words, gold = self._draw()
        said = f"{self.world.grammar.say(task, self.rng)} ?"
        while self.world.held_out.shows_in(tidy(said)):
            said = f"{self.world.grammar.say(task, self.rng)} ?"
        return Row("sentence", "", tidy(f"{' '.join(words)} : {said} {gold}"))


def sample(corpus: Corpus, count: int) -> list[Row]:
    """Return the next rows of a corpus."""
    return list(itertools.islice(corpus, count))


def replay_rows(count: int = 3000) -> str:
    """Return the judge's questions with their verdicts as JSONL, for sft.replay."""
    corpus = Corpus(World(), seed=7, last=True)
    rows = (
        {"instruction": row.prompt, "input": "", "output": row.answer} for row in (corpus.judge() for _ in range(count))
    )
    return "".join(json.dumps(row, separators=(",", ":")) + "\n" for row in rows)


if __name__ == "__main__":
    (HERE / "replay.jsonl").write_text(replay_rows(), encoding="utf-8", newline="\n")
