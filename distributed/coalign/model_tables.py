"""[model] and the tables inside it: the model that everything starts from, adapters, the shape of a random model.

config.py hands them on. Knows neither files nor torch.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from coalign.tables import FilePath, Line, Lines, NonNegative, Positive, PositiveNumber, Share, Table
from coalign.tables import key as _field

MAX_RANDOM_WEIGHTS = 10**9  # of model.random


class LoraTable(Table):
    """[model.lora]: low-rank adapters instead of full fine-tuning."""

    enabled: bool = _field(False, "train adapters, merge them in fp32 at export")
    rank: Annotated[int, Field(ge=1, le=65536)] = _field(16, "rank of the update")
    alpha: PositiveNumber = _field(32.0, "scale numerator: the update is alpha / rank * B A")
    dropout: Share = _field(0.0, "adapter dropout, drawn from run.seed")
    target_modules: Lines = _field(
        [], "names of the layers, whole or their end (empty: all linear ones but the output head)"
    )


class RandomTable(Table):
    """[model.random]: the shape of a model with random weights (model.init = "random"), Llama architecture."""

    vocab_size: Annotated[int, Field(ge=300, le=10**7)] = _field(
        2048, "entries of the tokenizer trained on the prepared texts"
    )
    hidden_size: Positive = _field(128, "width")
    num_layers: Annotated[int, Field(ge=1, le=1000)] = _field(2, "decoder layers")
    num_heads: Positive = _field(4, "attention heads")
    intermediate_size: Positive = _field(256, "width inside the MLP")
    context: Positive = _field(512, "tokens of context")

    @property
    def num_weights(self) -> int:
        """Return about how many weights this shape has."""
        per_layer = 4 * self.hidden_size**2 + 3 * self.hidden_size * self.intermediate_size
        return self.num_layers * per_layer + self.vocab_size * self.hidden_size

    @model_validator(mode="after")
    def _check(self) -> RandomTable:
        if self.num_weights > MAX_RANDOM_WEIGHTS:
            raise ValueError(
                f"model.random asks for {self.num_weights:.3g} random weights, more than the"
                f" {MAX_RANDOM_WEIGHTS:.0e} allowed;"
                " lower hidden_size, num_layers, intermediate_size or vocab_size"
            )
        return self


class ModelTable(Table):
    """[model]: the model that everything starts from."""

    path: FilePath = _field("", "folder or hub name of a Hugging Face causal LM (with model.init = pretrained)")
    revision: Line = _field("main", "branch, tag or commit on the hub")
    init: Literal["pretrained", "random"] = _field(
        "pretrained", "random: untrained weights and a tokenizer trained on the prepared texts, made by prepare"
    )
    max_tokens: NonNegative = _field(0, "context to use, in tokens (0: what the model's config allows)")
    too_long: Literal["error", "drop"] = _field("drop", "what to do with a row longer than the context (never cut)")
    chat_template: FilePath = _field("", "file with a Jinja chat template to use instead of the model's")
    thinking: Literal["off", "keep", "strip"] = _field(
        "off",
        "thoughts before an answer (off: none, where the template can; keep: part of the answer; strip: taken off"
        " before answers are judged, compared or counted)",
        later=True,
    )
    thought_tokens: NonNegative = _field(
        1024, "with model.thinking keep or strip: tokens for a thought, beside those of the answer", later=True
    )
    end_of_turn: str = _field("", "token that ends an answer (empty: read from the chat template, else EOS)")
    pad_token: str = _field("", "token to pad with (empty: the tokenizer's, else its end-of-turn)")
    attention: Literal["sdpa", "eager", "flash_attention_2"] = _field("sdpa", "attention implementation")
    lora: LoraTable = Field(default_factory=LoraTable)
    random: RandomTable = Field(default_factory=RandomTable)

    def answer_tokens(self, max_new_tokens: int) -> int:
        """Return how many tokens may be sampled for an answer of `max_new_tokens`, with its thought."""
        return max_new_tokens + (self.thought_tokens if self.thinking != "off" else 0)

    @model_validator(mode="after")
    def _check(self) -> ModelTable:
        if self.init == "random" and self.path:
            raise ValueError(f'model.path={self.path!r} contradicts model.init="random"; remove one of them')
        if self.random.hidden_size % (2 * self.random.num_heads):
            raise ValueError(
                f"model.random.hidden_size={self.random.hidden_size} is not divisible by"
                f" 2 x num_heads={self.random.num_heads}; use {2 * self.random.num_heads * 8}"
            )
        return self


def table_for_other_model(model: ModelTable) -> ModelTable:
    """Return [model] for a judge from elsewhere: what is set for the policy's tokenizer and context is not its own."""
    own = {"chat_template": "", "end_of_turn": "", "pad_token": "", "max_tokens": 0, "lora": LoraTable()}
    return model.model_copy(update=own)
