"""Write the phrasebook, a closed world of word lists in which consistency can be measured exactly.

Twenty tasks share one kind of input (3 to 6 words out of 200, eight categories), so that only the instruction says
what to do, and every answer is unique. The files are a function of this script and wordings.txt alone.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
INSTANCES_PER_TASK = 120
TRAIN_WORDINGS = 10  # of the first twelve, the Definition included; the others are for dev
SHORTEST, LONGEST = 3, 6

WORDS_BY_CATEGORY = {
    "animal": "cat dog horse cow sheep goat pig lion tiger bear wolf fox rabbit mouse rat monkey zebra camel eagle owl"
    " duck frog snake whale shark",
    "colour": "red blue green yellow black white brown pink purple grey violet scarlet crimson beige turquoise gold"
    " silver navy teal indigo maroon cyan magenta ivory lilac",
    "food": "bread cheese apple banana rice soup cake pasta egg butter honey potato tomato carrot onion pizza salad"
    " sausage cookie pear grape lemon mango yogurt bacon",
    "tool": "hammer saw drill wrench pliers shovel rake axe chisel screwdriver ladder spade trowel clamp mallet crowbar"
    " hoe pickaxe sander anvil lathe ruler scissors hacksaw tongs",
    "country": "france spain italy germany poland greece norway sweden finland denmark japan china india brazil chile"
    " peru mexico canada egypt kenya ghana nigeria cuba iran portugal",
    "clothing": "shirt coat hat scarf glove sock shoe boot dress skirt jacket sweater jeans belt tie vest blouse sandal"
    " cap apron hoodie cloak mitten slipper robe",
    "furniture": "table chair sofa bed desk shelf wardrobe stool bench cupboard couch dresser armchair bookcase cradle"
    " crib bureau cabinet ottoman hammock futon sideboard lamp mattress nightstand",
    "vehicle": "car bus train bicycle truck boat ship plane tram taxi van lorry scooter motorbike tractor helicopter"
    " ferry canoe yacht rocket ambulance submarine rickshaw minibus sledge",
}
WORDS = {category: tuple(text.split()) for category, text in WORDS_BY_CATEGORY.items()}
CATEGORY = {word: category for category, words in WORDS.items() for word in words}
VOCABULARY = sorted(CATEGORY)
# A list holds at most one word of each of these, so that "the animal" is one word.
ASKED_FOR = ("animal", "colour", "food", "country")


def _member(category: str) -> Callable[[list[str]], str]:
    return lambda words: next(word for word in words if CATEGORY[word] == category)


def _whether(category: str) -> Callable[[list[str]], str]:
    return lambda words: "yes" if any(CATEGORY[word] == category for word in words) else "no"


ANSWERS: dict[str, Callable[[list[str]], str]] = {
    "first_word": lambda words: words[0],
    "last_word": lambda words: words[-1],
    "second_word": lambda words: words[1],
    "second_last": lambda words: words[-2],
    "count_words": lambda words: str(len(words)),
    "reverse": lambda words: " ".join(reversed(words)),
    "drop_first": lambda words: " ".join(words[1:]),
    "drop_last": lambda words: " ".join(words[:-1]),
    "swap_ends": lambda words: " ".join([words[-1], *words[1:-1], words[0]]),
    "animal": _member("animal"),
    "colour": _member("colour"),
    "food": _member("food"),
    "country": _member("country"),
    "has_animal": _whether("animal"),
    "has_food": _whether("food"),
    "double_first": lambda words: f"{words[0]} {words[0]}",
    "first_letter": lambda words: words[0][0],
    "letter_count": lambda words: str(len(words[0])),
    "category_first": lambda words: CATEGORY[words[0]],
    "remove_animal": lambda words: " ".join(word for word in words if CATEGORY[word] != "animal"),
}
REQUIRED = {"animal": "animal", "colour": "colour", "food": "food", "country": "country", "remove_animal": "animal"}
ASKED_WHETHER = {"has_animal": "animal", "has_food": "food"}


def draw_input(random_state: random.Random, task: str) -> list[str]:
    """Return 3 to 6 distinct words on which the task has exactly one answer (has_*: half of them yes)."""
    length = random_state.randint(SHORTEST, LONGEST)
    required, banned = REQUIRED.get(task), None
    if task in ASKED_WHETHER:
        category = ASKED_WHETHER[task]
        required, banned = (category, None) if random_state.random() < 0.5 else (None, category)
    words = [random_state.choice(WORDS[required])] if required else []
    while len(words) < length:
        word = random_state.choice(VOCABULARY)
        category = CATEGORY[word]
        taken = category in ASKED_FOR and any(CATEGORY[other] == category for other in words)
        if word not in words and category != banned and not taken:
            words.append(word)
    random_state.shuffle(words)
    return words


def make_task(task: str, definition: str) -> dict[str, Any]:
    """Return one task in the Super-NaturalInstructions format."""
    seed = hashlib.sha256(f"phrasebook {task}".encode()).digest()
    random_state = random.Random(seed)
    lists: list[list[str]] = []
    while len(lists) < INSTANCES_PER_TASK:
        words = draw_input(random_state, task)
        if words not in lists:
            lists.append(words)
    return {
        "Contributors": ["coalign"],
        "Source": ["phrasebook (generated)"],
        "Categories": ["Word Lists"],
        "Definition": [definition],
        "Input_language": ["English"],
        "Output_language": ["English"],
        "Instruction_language": ["English"],
        "Instances": [
            {"id": f"{task}-{index:03d}", "input": " ".join(words), "output": [ANSWERS[task](words)]}
            for index, words in enumerate(lists)
        ],
    }


@dataclasses.dataclass(frozen=True)
class Wordings:
    """The ways to ask for one task; the first of `train` is its Definition."""

    train: list[str]
    dev: list[str]
    test: list[str]


def read_wordings(path: Path = HERE / "wordings.txt") -> dict[str, Wordings]:
    """Return the wordings of every task."""
    wordings: dict[str, Wordings] = {}
    text = "".join(line for line in path.read_text(encoding="utf-8").splitlines(True) if not line.startswith("#"))
    for section in text.split("[")[1:]:
        task, _, body = section.partition("]\n")
        known, test, dev = (block.splitlines() for block in body.strip().split("\n\n"))
        assert (len(known), len(test), len(dev)) == (12, 12, 2), task
        wordings[task] = Wordings(known[:TRAIN_WORDINGS], known[TRAIN_WORDINGS:] + dev, test)
    assert list(wordings) == list(ANSWERS), "wordings.txt must name every task once, in the script's order"
    return wordings


def wording_rows(wordings: dict[str, Wordings]) -> list[dict[str, str]]:
    """Return the flat rows of wordings.jsonl; the Definition is left out, it is in the task file."""
    rows = []
    for task, own in wordings.items():
        texts = [(text, split) for split in ("train", "dev", "test") for text in getattr(own, split)]
        for index, (text, split) in enumerate(texts):
            if index:
                rows.append({"task": task, "id": f"phrasebook:{task}:{index:02d}", "text": text, "split": split})
    return rows


def _dump(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))


def make_files() -> dict[str, str]:
    """Return {path below the folder: content} of everything this script writes."""
    wordings = read_wordings()
    rows = wording_rows(wordings)
    files = {
        "wordings.jsonl": "".join(_dump(row) + "\n" for row in rows),
        "held_out.jsonl": "".join(_dump(row) + "\n" for row in rows if row["split"] != "train"),
    }
    for task, own in wordings.items():
        files[f"tasks/{task}.json"] = _dump(make_task(task, own.train[0])).replace('{"id"', '\n{"id"') + "\n"
    return files


def main() -> None:
    """Write the files below --out (this folder by default)."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--out", type=Path, default=HERE, help="folder to write to")
    out: Path = parser.parse_args().out
    for name, content in make_files().items():
        path = out / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content, encoding="utf-8", newline="\n")


if __name__ == "__main__":
    main()
