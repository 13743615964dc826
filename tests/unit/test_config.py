"""Configs in: every shipped file loads, the default one is complete, and each mistake gets one clear sentence."""

from __future__ import annotations

import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import jinja2
import pytest

from coalign import commandline as module
from coalign.commandline import DEFAULT_CONFIG, help_text, load, parse_command_line
from coalign.config import Config, GenerationTable, LoraTable, ModelTable, RunTable, cores_used, table_for_other_model
from coalign.config_values import changed_values, known_keys, table_values
from coalign.errors import UserError
from coalign.steps import STEP_TABLES

ROOT = Path(__file__).resolve().parents[2]
SHIPPED = sorted((ROOT / "configs").glob("*.toml"))
PROMISED = {"tiny", "one-gpu-24gb", "quickstart", "sni-mini", "vicuna-7b", "llama2-7b", "llama2-13b", "qwen3-4b"}
SET_BY_MAX_STEPS = {"sft.epochs", "align.epochs"}
TINY = 'run.name = "x"\nmodel.init = "random"\n'


def flat(values: dict[str, Any], prefix: str = "") -> set[str]:
    keys: set[str] = set()
    for key, value in values.items():
        # Inside [eval] models and [run] inputs the keys are the user's own names.
        is_table = isinstance(value, dict) and f"{prefix}{key}" not in ("eval.models", "run.inputs")
        keys |= flat(value, f"{prefix}{key}.") if is_table else {f"{prefix}{key}"}
    return keys


@pytest.fixture
def write(tmp_path: Path) -> Any:
    def write_config(text: str) -> Path:
        path = tmp_path / "demo.toml"
        path.write_text(text, encoding="utf-8")
        return path

    return write_config


def test_the_promised_configs_are_there() -> None:
    assert {path.stem for path in SHIPPED} >= PROMISED


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_shipped_config_loads(path: Path) -> None:
    config = load(path)
    assert (config.model.init == "random") != bool(config.model.path)
    if path.stem != DEFAULT_CONFIG.stem:
        assert config.run.name == path.stem, "a config's runs go to a folder of its own name"


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_files_that_a_shipped_config_names_exist(path: Path) -> None:
    config = load(path)
    named = [config.model.chat_template, *config.paraphrase.files]
    named += [config.data.path] if config.data.path.startswith("examples") else []
    missing = [name for name in named if name and not name.startswith("../") and not (ROOT / name).exists()]
    assert not missing


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_a_shipped_config_is_sparse(path: Path) -> None:
    """It holds what differs from the built-in defaults, so that nobody copies the values of a tiny model by mistake."""
    values = tomllib.loads(path.read_text(encoding="utf-8"))
    assert flat(values) <= set(known_keys())
    if path == DEFAULT_CONFIG:
        assert flat(values) == set(changed_values(load(path), tuple(Config.model_fields))) - SET_BY_MAX_STEPS


def test_lora_variant_in_the_comments_is_valid(write: Any) -> None:
    for path in SHIPPED:
        text = path.read_text(encoding="utf-8")
        if "# [model.lora]" not in text:
            continue
        before, _, after = text.partition("# [model.lora]\n")
        table, _, rest = after.partition("\n\n")
        config = load(write(f"{before}[model.lora]\n{table.replace('# ', '')}\n\n{rest}"))
        assert config.model.lora.enabled


MISTAKES = [
    ("[align]\nrank_wieght = 1.0", "unknown key 'align.rank_wieght'", "did you mean 'rank_weight'?"),
    ("[aling]\nmargin = 1.0", "unknown key 'aling'", "did you mean"),
    ("[run]\nseed = 'one'", 'run.seed="one"', "integer"),
    ("[run]\nseed = true", "run.seed=true", "integer"),
    ("[sft]\nbatch_rows = 0", "sft.batch_rows=0", "greater than or equal to 1"),
    ("[sample]\ntop_p = 1.5", "sample.top_p=1.5", "less than or equal to 1"),
    ("[align]\nloss = 'hing'", 'align.loss="hing"', "'hinge'"),
    ("[sft]\nlearning_rate = nan", "learning_rate", ""),
    ("[train]\nzero_stage = 4", "train.zero_stage=4", ""),
    ("[train]\noffload_parameters = true", "train.offload_parameters needs train.zero_stage=3, not 2", ""),
    ("[sft]\nepochs = 1.0\nmax_steps = 5", "sft.epochs=1 and sft.max_steps=5", "exactly one"),
    ("[sft]\nreplay_share = 0.2", "sft.replay=''", "give both"),
    ("[model]\npath = 'm'\ninit = 'random'", "model.path='m' contradicts model.init=\"random\"", "remove one"),
    ("[model.random]\nhidden_size = 100\nnum_heads = 3", "model.random.hidden_size=100", "not divisible"),
    ("[data]\npath = 'a'\n[[data.sources]]\npath = 'b'", "data.path='a' contradicts data.sources", "one of them"),
    ("[data]\nsft_share = 0.9", "leaves nothing for test", "less than 1"),
    ("[eval]\nmodels = {}", "eval.models is empty", ""),
    ("[generation]\nengine = 'vllm'\nmode = 'exact'", 'generation.mode="exact" contradicts', 'use mode="fast"'),
    ("[generation]\nengine = 'vllm'\n[sample]\ntemperature = 3", "sample.temperature=3 with", "2 at most"),
    ("[run\nname = 'x'", "malformed TOML", ""),
]


@pytest.mark.parametrize(("text", "problem", "hint"), MISTAKES, ids=[row[0].replace("\n", " ") for row in MISTAKES])
def test_mistake_gets_a_clear_sentence(write: Any, text: str, problem: str, hint: str) -> None:
    path = write(text)
    with pytest.raises(UserError) as caught:
        load(path)
    message = str(caught.value)
    assert problem in message and hint in message and "\n" not in message
    assert "demo.toml" in message


def test_missing_config(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such config file"):
        load(tmp_path / "none.toml")
    with pytest.raises(UserError, match="is a folder"):
        load(tmp_path)
    (tmp_path / "binary.toml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="byte 0 is not UTF-8"):
        load(tmp_path / "binary.toml")


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        (["a.toml", "b.toml"], "one config file was expected, not 2"),
        (["--verbose"], "unknown option '--verbose'"),
        (["=3"], "is not key=value"),
        (["run.name.first=3"], "'run.name.first'"),
        (["sft.batch_rows=none"], 'sft.batch_rows="none" in the command line (sft.batch_rows=none)'),
        (["sft.batchrows=4"], "did you mean 'batch_rows'?"),
    ],
    ids=str,
)
def test_mistake_on_the_command_line(words: list[str], problem: str) -> None:
    with pytest.raises(UserError) as caught:
        parse_command_line("sft", words)
    assert problem in str(caught.value)


def test_command_line_overrides(write: Any) -> None:
    path = str(write(TINY + "[sft]\nlearning_rate = 1e-4\n"))
    words = ["--local_rank=1", path, "run.seed=3", "sft.learning_rate=5e-7", "data.path=a=b", 'paraphrase.files=["f"]']
    config = parse_command_line("sft", words)
    assert (config.run.seed, config.run.name) == (3, "x")
    assert config.sft.learning_rate == 5e-7
    assert config.data.path == "a=b"
    assert config.paraphrase.files == ["f"]


def test_without_a_config_the_default_is_used() -> None:
    assert parse_command_line("eval", []) == load(DEFAULT_CONFIG)


def test_integer_fills_a_float_and_max_steps_replaces_epochs(write: Any) -> None:
    config = load(write("[sft]\nmax_steps = 5\n[align]\nrank_weight = 2\n"))
    assert (config.sft.max_steps, config.sft.epochs, config.align.rank_weight) == (5, 0.0, 2.0)


def test_models_of_eval_as_a_list(write: Any) -> None:
    config = load(write("[eval]\nmodels = ['base', 'out/a/model', 'out/b/model', 'elsewhere/a']\n"))
    named = {"base": "base", "a": "out/a/model", "b": "out/b/model", "a-2": "elsewhere/a"}
    assert config.eval.models == named and list(config.eval.models) == list(named)


def test_configs_are_frozen() -> None:
    with pytest.raises(ValueError, match="frozen"):
        Config().run.seed = 1  # type: ignore[misc]
    assert Config().eval.models is not Config().eval.models


def test_neutral_keys_are_left_out_of_what_decides_a_result() -> None:
    every, deciding = table_values(Config(), ("run",)), table_values(Config(), ("run",), with_neutral=False)
    assert "run.seed" in deciding and "run.folder" in every and "run.folder" not in deciding


def test_changed_values_hold_what_differs_from_the_defaults(write: Any) -> None:
    config = load(write(TINY))
    assert changed_values(config, ("run", "model")) == {"run.name": "x", "model.init": "random"}


@pytest.mark.parametrize("step", STEP_TABLES)
def test_help_names_every_key_of_the_step(step: str) -> None:
    text = help_text(step)
    config = Config()
    missing = [key for key in table_values(config, STEP_TABLES[step]) if f"  {key} = " not in text]
    assert not missing
    assert ("deepspeed" in text) == (step in ("sft", "align"))


def test_every_key_has_a_description() -> None:
    for name, field in Config.model_fields.items():
        table: Any = field.annotation
        for key, entry in table.model_fields.items():
            is_table = isinstance(entry.annotation, type) and issubclass(entry.annotation, module.Table)
            assert is_table or entry.description, f"{name}.{key} has no description"


def test_reading_a_config_imports_no_engine() -> None:
    code = (
        "import sys, coalign.commandline as c; c.load(c.DEFAULT_CONFIG);"
        " assert not {'torch', 'ray'} & sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", code], check=True, env={"PYTHONPATH": str(ROOT / "distributed")}, timeout=60)


@pytest.mark.parametrize(
    ("name", "prompt", "end"),
    [
        ("plain", "<s>### Instruction:\nHow?\n\n### Response:\n", "Like this.</s>"),
        ("vicuna", " USER: How? ASSISTANT:", " Like this.</s>"),
    ],
)
def test_chat_template_puts_the_answer_right_after_the_prompt(name: str, prompt: str, end: str) -> None:
    text = (ROOT / "configs" / "templates" / f"{name}.jinja").read_text(encoding="utf-8")
    template = jinja2.Environment(trim_blocks=True, lstrip_blocks=True).from_string(text)
    turns = [{"role": "user", "content": "How?"}, {"role": "assistant", "content": "Like this."}]
    tokens = {"bos_token": "<s>", "eos_token": "</s>"}
    asked = template.render(messages=turns[:1], add_generation_prompt=True, **tokens)
    answered = template.render(messages=turns, add_generation_prompt=False, **tokens)
    assert asked.startswith("<s>") and asked.endswith(prompt)
    assert answered == asked + end


def test_what_is_set_for_the_policy_does_not_hold_for_a_judge_from_elsewhere() -> None:
    """Template, special tokens, context and adapters are the policy's own; the rest stays."""
    own = {"chat_template": "t.jinja", "end_of_turn": "<e>", "pad_token": "<p>", "max_tokens": 9}
    policy = ModelTable(**own, lora=LoraTable(enabled=True), too_long="error", attention="eager")  # type: ignore[arg-type]
    assert table_for_other_model(policy) == ModelTable(too_long="error", attention="eager")


def test_cores_are_workers_times_threads() -> None:
    """No workers means this process, no threads torch's own choice: one each."""
    assert cores_used(GenerationTable(workers=3), RunTable(threads=2)) == 6
    assert cores_used(GenerationTable(workers=0), RunTable(threads=0)) == 1


def test_a_later_key_at_its_default_is_in_no_manifest() -> None:
    """Runs from before the key resume; another value is another setting."""
    values = table_values(Config(), ("model",), with_neutral=False)
    assert not {"model.thinking", "model.thought_tokens"} & values.keys() and "model.too_long" in values
    strip = Config.model_validate({"model": {"thinking": "strip"}})
    assert table_values(strip, ("model",), with_neutral=False)["model.thinking"] == "strip"
    assert "model.thinking" in table_values(Config(), ("model",))
    assert strip.model.answer_tokens(8) == 8 + 1024 and Config().model.answer_tokens(8) == 8
