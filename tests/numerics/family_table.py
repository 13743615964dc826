"""What coalign can do with each family of models, found by doing it with a tiny one: `make families`.

Loads, trains, exports, samples and scores by the functions that the steps call. Writes docs/models.md; with names of
families on the command line it prints their rows instead.
"""

from __future__ import annotations

import dataclasses
import logging
import re
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
import transformers
from transformers import AutoModelForCausalLM

from coalign.config import GenerationTable, LogTable, LoraTable, ModelTable, TrainTable
from coalign.errors import UserError
from coalign.generation.sampling import Sampling
from coalign.generation.transformers_worker import GenerateWorker, ScoreWorker
from coalign.models.codec import Codec
from coalign.models.logprobs import token_logps
from coalign.models.model_checks import check_model
from coalign.models.model_folder import load_codec, load_model
from coalign.training.deepspeed_engine import DeepSpeedEngine, init_ranks
from coalign.training.dev_measure import greedy_in_step
from coalign.training.export import export, try_export
from coalign.training.layout_checks import settle_layout
from coalign.training.loop import TrainingPlan, train
from coalign.training.micro_batches import Item, collate
from coalign.training.objectives import sft_objective
from numerics.families import all_families, make_tiny, num_parameters

PAGE = Path(__file__).resolve().parents[2] / "docs" / "models.md"
MOST_PARAMETERS = 30_000_000  # of a model that counts as tiny
COLUMNS = ("full", "LoRA", "packed rows", "shared prompts", "sample", "score", "export")
_WORDS = ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
_TRAIN = TrainTable(zero_stage=0, eval_every=0, checkpoint_every=0)


@dataclasses.dataclass(frozen=True)
class Row:
    """What a family can do: a word for each of COLUMNS, or the reason why it is refused before the first update."""

    family: str
    cells: tuple[str, ...] = ()
    refusal: str = ""

    def line(self) -> str:
        """Return the row of the table."""
        if self.refusal:
            return f"| `{self.family}` | {self.refusal} |"
        return f"| `{self.family}` | {' | '.join(self.cells)} |"


def try_family(family: str, folder: Path) -> Row:
    """Return what a tiny model of the family can do. Raises what would end a step in a traceback."""
    base = folder / "base"
    make_tiny(family, base)
    name = str(base)
    try:
        codec = load_codec(name, ModelTable())
        settled, trained = {}, {}
        for kind in ("full", "lora"):
            engine, settled[kind] = _trained(name, kind == "lora", codec, folder / kind)
            trained[kind] = sorted(n for n, p in engine.model.module.named_parameters() if p.requires_grad)
            _compare(engine, folder / kind / "model", base, codec)
        shared = settle_layout(engine, _groups(codec), codec.pad_id, _TRAIN, groups=True).shared_prefix
    except UserError as error:
        return Row(family, refusal=_reason(str(error), name))
    _sample(folder / "full" / "model", codec)
    _score(folder / "full" / "model", codec)
    experts = any(".experts" in n or "expert" in n for n in trained["full"])
    adapted = any("expert" in n for n in trained["lora"])
    lora = "yes" if not experts else "yes, experts too" if adapted else "yes, experts stay frozen"
    cells = ("yes", lora, _yes(settled["full"].pack_tokens != 0), _yes(shared), "yes", "yes", "yes")
    return Row(family, cells)


def _yes(able: bool) -> str:
    return "yes" if able else "no: rows of their own"


def _reason(message: str, folder: str) -> str:
    return message.removeprefix(f"{folder}: ").partition(";")[0].replace("|", "\\|")


def _items(codec: Codec) -> list[Item]:
    """Return rows of several lengths."""
    asked = [" ".join(_WORDS[: 2 + k % 5]) for k in range(12)]
    return [
        Item(f"row{k}", tuple(codec.encode_prompt(text)), (tuple(codec.encode_answer(_WORDS[k % 10])),))
        for k, text in enumerate(asked)
    ]


def _groups(codec: Codec) -> list[Item]:
    """Return groups of several responses."""
    answers = tuple(tuple(codec.encode_answer(word)) for word in _WORDS[:4])
    return [dataclasses.replace(item, responses=answers, rewards=(2, 1, 0, 0)) for item in _items(codec)[:4]]


def _trained(source: str, lora: bool, codec: Codec, folder: Path) -> tuple[DeepSpeedEngine, TrainTable]:
    """Train a few updates as stage 1 does, export to FOLDER/model, and return the engine and the settings used."""
    folder.mkdir()
    table, items = ModelTable(lora=LoraTable(enabled=lora, rank=2)), _items(codec)
    engine = DeepSpeedEngine(source, table, _TRAIN, torch.device("cpu"), folder / "deepspeed.json", 0)
    check_model(engine.model, codec.pad_id, source, samples=True)
    settings = settle_layout(engine, items, codec.pad_id, _TRAIN, groups=False)
    try_export(engine, folder / "shards" / "untrained", codec, items)
    plan = TrainingPlan(items, sft_objective(), 4, 1e-2, codec.pad_id, 0)
    train(engine, plan, settings, LogTable(tensorboard=False), folder)
    export(engine, folder / "model", codec, items)
    return engine, settings


def _compare(engine: DeepSpeedEngine, folder: Path, base: Path, codec: Codec) -> None:
    """Assert that a user who opens the folder has the trained model, and that training changed it."""
    batch = collate(_items(codec)[:3], codec.pad_id, False)
    reopened = AutoModelForCausalLM.from_pretrained(folder).eval()
    with torch.no_grad():
        live_N = token_logps(engine.model, batch)
        assert torch.allclose(token_logps(reopened, batch), live_N, atol=1e-3)
        untouched_N = token_logps(load_model(str(base), ModelTable(), torch.float32), batch)
    assert float((live_N - untouched_N).abs().mean()) > 1e-2


def _sample(folder: Path, codec: Codec) -> None:
    """Assert that greedy samples from the cache are those of whole rows."""
    options = (str(folder), ModelTable(), GenerationTable())
    worker = GenerateWorker(*options, Sampling(6, 0.0, 1.0, 0), 0)
    prompts = [list(item.prompt) for item in _items(codec)[:3]]
    answers = worker([{"prompt_ids": prompt, "seeds": [0, 1]} for prompt in prompts])
    slow = greedy_in_step(worker.model, prompts, 6, codec, lambda flag: flag)
    expected = [codec.describe_answer(answer.ids, answer.finished) for answer in slow]
    assert [row["answers"] for row in answers] == [[one, one] for one in expected]


def _score(folder: Path, codec: Codec) -> None:
    """Assert that scores in shared rows are those of one row each."""
    options = (str(folder), ModelTable(), GenerationTable())
    worker = ScoreWorker(*options, 0)
    asked = [
        {"prompt_ids": list(item.prompt), "continuations": [list(response) for response in item.responses]}
        for item in _groups(codec)
    ]
    found = torch.tensor([row["logps"] for row in worker(asked)])
    worker.exact = True
    assert torch.allclose(found, torch.tensor([row["logps"] for row in worker(asked)]), atol=1e-3)


def rows_of(families: Sequence[str]) -> Iterator[Row]:
    """Yield a row for each family that can be made tiny: sizes that do not fit one another fail in the model's code."""
    for family in families:
        if 0 < num_parameters(family) <= MOST_PARAMETERS:
            with tempfile.TemporaryDirectory() as folder:
                row = try_family(family, Path(folder))
            if "can't be used here: it fails with" not in row.refusal:
                yield row


def page(rows: Sequence[Row], text: str) -> str:
    """Return docs/models.md with these rows in the places of the former ones."""
    able = [f"| model_type | {' | '.join(COLUMNS)} |", "|---" * (len(COLUMNS) + 1) + "|"]
    refused = ["| model_type | reason |", "|---|---|"]
    for row in rows:
        (refused if row.refusal else able).append(row.line())
    for name, lines in {"able": able, "refused": refused}.items():
        marks = re.compile(f"<!-- {name}.*? -->.*?<!-- end -->", re.S)
        written = f"<!-- {name} with transformers {transformers.__version__} -->\n\n" + "\n".join(lines)
        text = marks.sub(lambda _, written=written: f"{written}\n\n<!-- end -->", text)
    return text


def main(names: Sequence[str]) -> None:
    """Print the rows of some families, or write the page of all."""
    logging.getLogger("coalign").setLevel(logging.ERROR)
    init_ranks()
    rows = []
    for row in rows_of(names or all_families()):
        print(row.line(), flush=True)
        rows.append(row)
    if not names:
        PAGE.write_text(page(rows, PAGE.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
