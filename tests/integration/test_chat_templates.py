"""Chat templates through the recipes: a trained end of turn that generate obeys, thoughts that are taken off."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from integration.bad_inputs import World

pytestmark = pytest.mark.deepspeed
PRETRAINED = ("model.init=pretrained", "model.path=my-model")
CHATML = (
    "{% for m in messages %}{{ '<|user|>' + m['role'] + '\n' + m['content'] + '<|assistant|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|user|>assistant\n' }}{% endif %}"
)
R1 = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}{{ '<|user|>' + m['content'] }}{% else %}"
    "{{ '<|assistant|>' + m['content'].split('</think>')[-1] + '<|end|>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|><think>\n' }}{% endif %}"
)


def give_template(world: World, template: str) -> None:
    """Put a copy of the run's starting model with another chat template at my-model, and remove what it would train."""
    world.remove("sft", "sample", "judge", "rank", "align")
    shutil.copytree(world.run_folder / "prepare/model", world.folder / "my-model")
    world.write("my-model/chat_template.jinja", template)


def rows_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def test_generate_stops_at_the_trained_end_of_turn(run: World) -> None:
    """The template ends a turn with a token that isn't EOS: the exported configs name both, so any server stops."""
    import torch
    from transformers import AutoModelForCausalLM

    give_template(run, CHATML)  # <|assistant|>, id 3, ends its turns
    done = run.run("sft", *PRETRAINED)
    assert done.code == 0, done.stderr
    exported = run.run_folder / "sft/model"
    model = AutoModelForCausalLM.from_pretrained(exported)
    assert model.generation_config.eos_token_id == [3, 4] and model.config.eos_token_id == [3, 4]
    for name in ("config.json", "generation_config.json"):
        assert json.loads((exported / name).read_text("utf-8"))["eos_token_id"] == [3, 4]
    end = torch.tensor([3])
    model.lm_head.register_forward_hook(lambda head, inputs, logits: logits.index_fill(-1, end, 1e4))
    assert model.generate(torch.tensor([[5, 6]]), max_new_tokens=9, do_sample=False)[0].tolist() == [5, 6, 3]


def test_thoughts_are_sampled_and_taken_off(run: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model that always thinks, through all steps: what it thinks reaches no response, verdict or answer."""
    give_template(run, R1)
    refused = run.run("sft", *PRETRAINED)
    assert refused.code == 2 and len(refused.errors) == 1 and 'model.thinking="strip"' in refused.errors[0]
    strip = (*PRETRAINED, "model.thinking=strip", "model.thought_tokens=6")
    done = run.run("sft", *strip)
    assert done.code == 0, done.stderr
    card = (run.run_folder / "sft/model/README.md").read_text("utf-8")
    assert "Answers were sampled with thoughts" in card and "<|assistant|>" in card and "enable_thinking=True" in card
    manifest = run.manifest("sft")
    assert manifest["config"]["model.thinking"] == "strip" and manifest["date"] == run.manifest("prepare")["date"]

    seen: list[Any] = []
    monkeypatch.setattr("coalign.generation.transformers_worker.decode", pretend_to_think(seen))
    assert run.run("sample", *strip).code == 0
    responses = rows_of(run.run_folder / "sample/responses.jsonl")
    assert {r["text"] for r in responses} == {"red", ""} and {r["finish"] for r in responses} == {"stop", "length"}
    assert all("think" not in (r["canonical"] or "") and r["num_tokens"] <= 4 for r in responses)
    assert seen and {sampling.max_new_tokens for sampling in seen} == {10}
    for step in ("judge", "rank", "align", "eval"):
        done = run.run(
            step, *strip, *(["eval.folder=answers", "eval.models=['base', 'align']"] if step == "eval" else [])
        )
        assert done.code == 0, done.stderr
    verdicts = rows_of(run.run_folder / "judge/verdicts.jsonl")
    assert {(v["text"], v["rule"]) for v in verdicts if v["finish"] == "length"} == {("", "empty")}
    assert {row["text"] for row in rows_of(run.folder / "answers/answers.jsonl")} == {"red"}


def pretend_to_think(seen: list[Any]) -> Callable[..., Any]:
    """Return a decode that thinks, and of two answers gives one and is cut off within the thought of the other."""
    from coalign.models.codec import GeneratedIds

    def decode(model: Any, prompts: Any, seeds: Any, sampling: Any, codec: Any, *_: Any) -> Any:
        seen.append(sampling)
        assert all(codec.tokenizer.decode(ids).endswith("<|assistant|><think>\n") for ids in prompts)
        said = codec.encode_plain("it is blue, or green</think>\n\nred"), codec.encode_plain("it is blue, or")
        return [[GeneratedIds(said[i % 2], i % 2 == 0) for i, _ in enumerate(one)] for one in seeds]

    return decode


def test_a_system_message_of_chat_data_stays_one(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """From the rows through wordings of files to the prompts that are sampled."""
    rows = [
        {"task": task, "messages": [system(text), {"role": "user", "content": word}, answer(word)]}
        for task, text in (("first", "Say the first word."), ("last", "Say the last word."))
        for word in (f"{a} {b}" for a in "abcdefg" for b in "hijklmn")
    ]
    world.write("rows.jsonl", "\n".join(map(json.dumps, rows)))
    wordings = [
        {"task": task, "id": f"w{number}", "text": f"Give me the {task} of the words, by way {number}, please."}
        for task in ("first", "last")
        for number in range(8)
    ]
    world.write("wordings.jsonl", "\n".join(map(json.dumps, wordings)))
    settings = ("data.path=rows.jsonl", "model.chat_template=t.jinja")
    world.write("t.jinja", CHATML)
    for step in ("prepare", "paraphrase", "sft"):
        done = world.run(step, *settings)
        assert done.code == 0, done.stderr
    assert all(task["system"] for task in rows_of(world.run_folder / "prepare/tasks.jsonl"))
    assert {w["kind"] for w in rows_of(world.run_folder / "paraphrase/wordings.jsonl")} == {"system"}

    seen: list[str] = []

    def decode(model: Any, prompts: Any, seeds: Any, sampling: Any, codec: Any, *_: Any) -> Any:
        from coalign.models.codec import GeneratedIds

        seen.extend(map(codec.tokenizer.decode, prompts))
        return [[GeneratedIds(codec.encode_plain("a"), True) for _ in one] for one in seeds]

    monkeypatch.setattr("coalign.generation.transformers_worker.decode", decode)
    assert world.run("sample", *settings).code == 0
    assert seen and all(re.fullmatch(SYSTEM_TURN, text) for text in seen), seen[0]


SYSTEM_TURN = (
    r"(<s>)?<\|user\|>system\n(Say|Give)[^<]*\.<\|assistant\|>\n<\|user\|>user\n\w \w<\|assistant\|>\n"
    r"<\|user\|>assistant\n"
)


def system(text: str) -> dict[str, str]:
    return {"role": "system", "content": text}


def answer(words: str) -> dict[str, str]:
    return {"role": "assistant", "content": words[0]}
