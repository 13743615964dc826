"""The configuration: one frozen pydantic model per TOML table, unknown keys refused, every field with its unit.

Recipes see the whole Config; functions are given the tables or values that they need. Knows neither files nor torch.
"""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from coalign.model_tables import LoraTable as LoraTable
from coalign.model_tables import ModelTable as ModelTable
from coalign.model_tables import RandomTable as RandomTable
from coalign.model_tables import table_for_other_model as table_for_other_model
from coalign.steps import STEP_TABLES
from coalign.tables import (
    MAX_COUNT,
    MAX_NUMBER,
    FilePath,
    FilePaths,
    Line,
    NamedPaths,
    NonNegative,
    NonNegativeNumber,
    Positive,
    PositiveNumber,
    RunName,
    Share,
    SlurmTable,
    SourcePath,
    Temperature,
)
from coalign.tables import Table as Table
from coalign.tables import key as _field
from coalign.training_tables import AlignTable as AlignTable
from coalign.training_tables import SftTable as SftTable
from coalign.training_tables import StageTable as StageTable
from coalign.training_tables import TrainTable as TrainTable

VLLM_MAX_TEMPERATURE = 2.0


class RunTable(Table):
    """[run]: where results go, and the seed."""

    folder: FilePath = _field("runs", "folder of all runs", neutral=True)
    name: RunName = _field("default", "this run's folder inside run.folder", neutral=True)
    seed: Annotated[int, Field(ge=0, le=2**63 - 1)] = _field(0, "seed of everything random")
    inputs: NamedPaths = _field({}, 'complete steps to take from other runs, e.g. {sft = "runs/A"}', neutral=True)
    round: Positive = _field(1, "round n samples and judges with the model aligned in round n - 1", neutral=True)
    threads: Annotated[int, Field(ge=0, le=4096)] = _field(
        1, "CPU threads per rank or worker (0: torch chooses; another number may change last digits)", neutral=True
    )

    @model_validator(mode="after")
    def _check(self) -> RunTable:
        unknown = [name for name in self.inputs if name not in STEP_TABLES]
        if unknown:
            near = difflib.get_close_matches(unknown[0], STEP_TABLES, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"the steps are {', '.join(STEP_TABLES)}"
            raise ValueError(f"run.inputs names {unknown[0]!r}, which is no step; {hint}")
        return self


class SourceTable(Table):
    """[[data.sources]]: one source of a mixture."""

    path: SourcePath = Field(description="folder, file or hub name")
    format: Literal["auto", "sni", "jsonl", "messages", "hf"] = _field("auto", "how to read it")
    name: Line = _field("", "configuration name of a hub dataset")
    split: Line = _field("train", "split of a Hugging Face dataset")
    max_rows: NonNegative = _field(0, "rows to take, in hash order (0: all)")


class AnswerFormTable(Table):
    """[data.answer_form.TASK]: what counts when a task's answers are compared; "*" stands for all other tasks."""

    case: bool = _field(False, "whether case counts (unset: where gold answers differ by it alone, such as mW and MW)")
    space: bool = _field(False, "whether line breaks and blanks count (unset: where gold answers differ by lines)")
    numbers: bool = _field(False, "whether 1,000 and 1000 differ")


class DataTable(Table):
    """[data]: tasks and inputs, and how they are split."""

    path: FilePath = _field("", "one source: Super-NaturalInstructions folder, JSONL file or folder, hub name")
    format: Literal["auto", "sni", "jsonl", "messages", "hf"] = _field("auto", "how to read data.path")
    sources: list[SourceTable] = _field([], "several sources mixed, instead of data.path")
    sft_share: Share = _field(0.4, "share of input texts for stage 1")
    align_share: Share = _field(0.3, "share of input texts for sampling and stage 2")
    dev_share: Share = _field(0.1, "share of input texts for choices; the rest is test")
    unseen_tasks: list[str] = _field([], "tasks kept out of training, beside the source's own test split")
    only_tasks: list[str] = _field([], "tasks to take, by name (empty: all)")
    max_tasks: NonNegative = _field(0, "tasks to take, in hash order (0: all)")
    max_sft_inputs: NonNegative = _field(0, "stage-1 inputs per task (0: all)")
    max_align_inputs: NonNegative = _field(0, "stage-2 inputs per task (0: all)")
    max_dev_inputs: NonNegative = _field(0, "dev inputs per task (0: all)")
    max_test_inputs: NonNegative = _field(0, "test inputs per task (0: all)")
    answer_form: dict[str, AnswerFormTable] = _field(
        {}, 'what counts when answers are compared, by task ("*": all others), e.g. {units = {case = true}}'
    )
    max_labels: NonNegative = _field(20, "a task with at most this many different answers is a label task")

    @model_validator(mode="after")
    def _check(self) -> DataTable:
        if self.path and self.sources:
            raise ValueError(f"data.path={self.path!r} contradicts data.sources; use one of them")
        total = self.sft_share + self.align_share + self.dev_share
        if total >= 1.0:
            raise ValueError(
                f"data.sft_share + align_share + dev_share = {total:.3g} leaves nothing for test; use less than 1"
            )
        return self


class ParaphraseTable(Table):
    """[paraphrase]: wordings of every instruction."""

    num_wordings: Annotated[int, Field(ge=0, le=10_000)] = _field(
        10, "training wordings per task to ask the model for (0: only files)"
    )
    num_dev: NonNegative = _field(2, "dev wordings per task, files first")
    num_test: NonNegative = _field(6, "test wordings per task, files first (4 are needed to report CR)")
    files: FilePaths = _field([], "JSONL files of wordings written by people")
    max_attempts: Annotated[int, Field(ge=1, le=10_000)] = _field(3, "rewrites to ask the model for per wording wanted")
    temperature: Temperature = _field(1.0, "sampling temperature")
    top_p: Annotated[float, Field(gt=0, le=1)] = _field(0.95, "nucleus sampling mass")
    max_new_tokens: Positive = _field(256, "tokens per rewrite, at most")
    min_length_ratio: Share = _field(0.3, "a rewrite under this share of the original's words is too short")
    max_length_ratio: Annotated[float, Field(ge=1, le=MAX_NUMBER)] = _field(
        3.0, "a rewrite over this multiple is too long"
    )
    max_similarity: Share = _field(0.9, "word 3-gram overlap (Jaccard) from which two wordings nearly repeat")


class GenerationTable(Table):
    """[generation]: the workers that generate and score."""

    engine: Literal["transformers", "vllm"] = _field(
        "transformers", "vllm: an optional package, faster on GPUs; other texts for the same seeds, no exact mode"
    )
    mode: Literal["exact", "fast"] = _field(
        "fast", "exact: a text never depends on its batch neighbours; fast: larger batches, equal up to rounding"
    )
    workers: Annotated[int, Field(ge=0, le=100_000)] = _field(
        2, "Ray actors (0: in this process, without Ray)", neutral=True
    )
    gpus_per_worker: NonNegativeNumber = _field(
        -1.0,
        "GPUs per worker, asked of Ray; with 2 or more a model is spread over them (-1: one if there is any)",
        neutral=True,
    )
    shard_size: Positive = _field(64, "prompts per shard, the unit of work, retry and resume")
    batch_tokens: NonNegative = _field(
        0,
        "tokens in flight per batch, prompt and new ones of all rows (0: 16384 on a CPU, half of a GPU's memory)",
    )
    repetition_penalty: Annotated[float, Field(ge=1, le=100)] = _field(
        1.0, "makes tokens of the prompt and of the answer so far less likely, such as 1.1 (1: off)"
    )
    dtype: Literal["auto", "float32", "bfloat16"] = _field("auto", "auto: bfloat16 on GPU, float32 on CPU")
    ray_address: Line = _field("", "address of a Ray cluster (empty: RAY_ADDRESS, else a private one)", neutral=True)
    ray_wait_seconds: PositiveNumber = _field(
        600.0, "how long to wait for CPUs and GPUs that others hold, for training ranks too", neutral=True
    )
    ray_grows: bool = _field(
        False, "the cluster is autoscaling: wait for nodes that it does not have yet", neutral=True
    )

    @model_validator(mode="before")
    @classmethod
    def _automatic_gpus(cls, values: Any) -> Any:
        if isinstance(values, dict) and values.get("gpus_per_worker") == -1:
            values = {key: value for key, value in values.items() if key != "gpus_per_worker"}
        return values

    @model_validator(mode="after")
    def _check(self) -> GenerationTable:
        if self.gpus_per_worker > 1 and self.gpus_per_worker % 1:
            raise ValueError(
                f"generation.gpus_per_worker={self.gpus_per_worker:g}: above 1 Ray gives whole GPUs; use"
                f" {self.gpus_per_worker // 1 + 1:g}, or a part of one"
            )
        if self.engine == "vllm" and self.mode == "exact":
            raise ValueError(
                'generation.mode="exact" contradicts generation.engine="vllm", which batches as it sees fit; use'
                ' mode="fast", or engine="transformers"'
            )
        return self


class SampleTable(Table):
    """[sample]: the model answers each align input under several wordings."""

    wordings_per_input: Positive = _field(4, "training wordings drawn per input (W)")
    samples: Annotated[int, Field(ge=1, le=10_000)] = _field(4, "responses per wording (K)")
    temperature: Temperature = _field(1.0, "sampling temperature")
    top_p: Annotated[float, Field(gt=0, le=1)] = _field(1.0, "nucleus sampling mass")
    top_k: NonNegative = _field(0, "most likely tokens to draw from (0: all)")
    max_new_tokens: Positive = _field(64, "tokens per response, at most")


class JudgeTable(Table):
    """[judge]: self-reward."""

    model: FilePath = _field("sft", '"sft", "base" or a model folder')
    gold: bool = _field(True, "false: no gold answers are used; the judge and the agreement over wordings decide")
    item_separator: str = _field(
        "",
        "what separates the items of list answers, judged one by one with gold (empty: answers are judged whole)",
    )
    type_question: bool = _field(True, "ask whether the response is of the right type (false: a control arm)")
    allow_weak: bool = _field(False, "continue when balanced accuracy or AUC is below judge.min_quality", neutral=True)
    min_quality: Share = _field(0.65, "balanced accuracy and AUC below which the step stops", neutral=True)
    audit_share: Share = _field(
        0.1, "share of exact matches and known-wrong answers that are judged only to measure the judge"
    )
    max_dev_inputs: Positive = _field(100, "dev inputs on which the thresholds are fitted")


class RankTable(Table):
    """[rank]: verdicts to groups."""

    rewards: Literal["judge", "exact", "permuted", "gold"] = _field(
        "judge", "exact, permuted (among an input's responses) and gold (the gold answer alone) are control arms"
    )
    pool: Literal["all", "own"] = _field("all", "own: only responses written under the group's wording (control arm)")
    without_gold: Literal["agreement", "judge"] = _field(
        "agreement", "the best answer: what most wordings said, of the right type; judge: of those it calls correct"
    )
    min_agreement: Share = _field(0.5, "without gold: share of an input's wordings that must have said the best answer")
    min_wording_agreement: Share = _field(
        0.0, "drop a generated wording whose share of right responses is below this part of its task's share (0: off)"
    )
    max_candidates: Annotated[int, Field(ge=2, le=MAX_COUNT)] = _field(
        8, "responses per group; the best and the gold answer are kept, then by reward"
    )
    wordings_per_input: NonNegative = _field(0, "groups per input (0: one per wording it was sampled under)")


class EvalTable(Table):
    """[eval]: greedy answers to held-out inputs under held-out wordings."""

    models: NamedPaths = _field(
        {"base": "base", "sft": "sft", "align": "align"}, "table name -> step or model folder, in order"
    )
    split: Literal["test", "dev"] = _field("test", "which inputs and wordings; dev for every choice")
    agreement: FilePath = _field("exact", "exact, rouge_l>=0.7 or a judge model's folder")
    allow_weak: bool = _field(False, "continue when the judge of agreement is below eval.min_quality", neutral=True)
    min_quality: Share = _field(0.65, "balanced accuracy and AUC that a judge of agreement must reach", neutral=True)
    wordings_file: FilePath = _field("", "JSONL of wordings to use instead of the run's held-out ones")
    folder: FilePath = _field("", "where to write (empty: the run's eval folder)", neutral=True)
    max_inputs: NonNegative = _field(0, "inputs per task (0: all)")
    max_wordings: NonNegative = _field(0, "wordings per task (0: all)")
    max_new_tokens: Positive = _field(64, "tokens per answer, at most")
    noise_inputs: NonNegative = _field(50, "inputs per noise floor (0: none)")
    noise_samples: Annotated[int, Field(ge=2, le=10_000)] = _field(8, "repeats of one wording per noise floor")
    num_bootstrap: Annotated[int, Field(ge=1, le=100_000)] = _field(2000, "resamples of the two-level bootstrap")

    @model_validator(mode="before")
    @classmethod
    def _list_of_folders(cls, values: Any) -> Any:
        """Accept eval.models as a list: steps by their own name, folders by their last part."""
        if isinstance(values, dict) and isinstance(values.get("models"), list):
            named: dict[str, str] = {}
            for item in values["models"]:
                path = Path(str(item))
                name = path.parent.name if path.name == "model" and path.parent.name else path.name
                unique, count = name, 2
                while unique in named:
                    unique, count = f"{name}-{count}", count + 1
                named[unique] = str(item)
            values = {**values, "models": named}
        return values

    @model_validator(mode="after")
    def _check(self) -> EvalTable:
        if not self.models:
            raise ValueError("eval.models is empty; name at least one step or model folder")
        return self


class LogTable(Table):
    """[log]: what is written while a step runs."""

    level: Literal["debug", "info", "warning", "error"] = _field("info", "least severe message shown", neutral=True)
    every: Positive = _field(10, "updates between printed training lines (metrics.jsonl has every one)", neutral=True)
    tensorboard: bool = _field(True, "write TensorBoard event files", neutral=True)
    wandb: bool = _field(False, "log to Weights & Biases, when it is installed", neutral=True)


class Config(Table):
    """The whole configuration."""

    run: RunTable = Field(default_factory=RunTable)
    model: ModelTable = Field(default_factory=ModelTable)
    data: DataTable = Field(default_factory=DataTable)
    paraphrase: ParaphraseTable = Field(default_factory=ParaphraseTable)
    generation: GenerationTable = Field(default_factory=GenerationTable)
    train: TrainTable = Field(default_factory=TrainTable)
    sft: SftTable = Field(default_factory=SftTable)
    sample: SampleTable = Field(default_factory=SampleTable)
    judge: JudgeTable = Field(default_factory=JudgeTable)
    rank: RankTable = Field(default_factory=RankTable)
    align: AlignTable = Field(default_factory=AlignTable)
    eval: EvalTable = Field(default_factory=EvalTable)
    log: LogTable = Field(default_factory=LogTable)
    slurm: SlurmTable = Field(default_factory=SlurmTable)

    @model_validator(mode="after")
    def _check(self) -> Config:
        if self.model.attention == "flash_attention_2" and (self.train.shared_prefix or self.train.pack_tokens):
            raise ValueError(
                'model.attention="flash_attention_2" takes no mask of shared prefixes or packed rows; set'
                ' train.shared_prefix=false and train.pack_tokens=0, or model.attention="sdpa"'
            )
        hot = [name for name in ("paraphrase", "sample") if getattr(self, name).temperature > VLLM_MAX_TEMPERATURE]
        if self.generation.engine == "vllm" and hot:
            raise ValueError(
                f'{hot[0]}.temperature={getattr(self, hot[0]).temperature:g} with generation.engine="vllm", which takes'
                f" {VLLM_MAX_TEMPERATURE:g} at most"
            )
        return self


def cores_used(generation: GenerationTable, run: RunTable) -> int:
    """Return the CPU cores that a step of workers keeps busy."""
    return max(1, generation.workers) * max(1, run.threads)
