"""Random Llamas to measure: from one for the tests, by 10M and 100M parameters, to 0.5B and 7B; random token ids."""

from __future__ import annotations

import dataclasses
import random
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from coalign.config import RandomTable

PAD, STOP, FIRST = 0, 2, 8  # FIRST: the lowest token of texts
COUNTED = 128  # tokens from FIRST on, left to rows that count with them
CONTEXT = 1024
Ids = list[int]


@dataclasses.dataclass(frozen=True)
class Shape:
    """Size of a Llama with tied embeddings."""

    name: str
    vocabulary: int
    hidden: int
    layers: int
    heads: int
    intermediate: int


SMALL = Shape("10M", 4096, 320, 7, 5, 896)  # 10.2M parameters
LARGE = Shape("100M", 32000, 768, 11, 12, 2048)  # 102M parameters
TINY = Shape("tiny", 512, 32, 2, 2, 48)
HALF = Shape("0.5B", 32000, 1024, 28, 16, 4096)  # 503M
SEVEN = Shape("7B", 32000, 4096, 32, 32, 11008)  # 6.6B


class Codec:
    """What decoding and scoring read of a codec."""

    pad_id = PAD

    def __init__(self, *stop_ids: int) -> None:
        self.stop_ids = list(stop_ids)


def make_network(shape: Shape, device: str = "cpu", dtype: torch.dtype = torch.float32, tied: bool = True) -> Any:
    """Return a network with random weights, the same every time on a device."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=shape.vocabulary,
        hidden_size=shape.hidden,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        intermediate_size=shape.intermediate,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=tied,
        pad_token_id=PAD,
        bos_token_id=1,
        eos_token_id=STOP,
    )
    with torch.device(device):
        return AutoModelForCausalLM.from_config(config, dtype=dtype).eval()


def make_counting_network(shape: Shape) -> Any:
    """Return a network that counts down: after token FIRST + n comes FIRST + n - 1, and after FIRST the stop token.

    So a prompt's last token decides how long the answer is, and no engine knows it before. The embeddings of the
    COUNTED tokens are so long that no layer turns them, and the head finds each one's successor by its direction.
    """
    network = make_network(shape, tied=False)
    with torch.no_grad():
        counted = network.get_input_embeddings().weight[FIRST : FIRST + COUNTED]
        counted *= 1000.0
        successors = [STOP, *range(FIRST, FIRST + COUNTED - 1)]
        network.get_output_embeddings().weight[successors] = 10.0 * torch.nn.functional.normalize(counted)
    return network


def random_ids(source: random.Random, length: int, shape: Shape) -> Ids:
    """Return token ids of a text, none of the COUNTED."""
    return [source.randrange(FIRST + COUNTED, shape.vocabulary) for _ in range(length)]


def make_folder(folder: Path, shape: Shape, seed: int = 0) -> Path:
    """Write a model folder of that shape, with a tokenizer trained on made-up words, for rows that start processes."""
    from coalign.models.random_model import make_random_model

    source = random.Random(0)
    parts = [a + b for a in "bdfgklmnprstvz" for b in ("a", "e", "i", "o", "u", "an", "er", "is", "ol", "ut")]
    texts = (" ".join(made_up_word(source, parts) for _ in range(20)) for _ in range(2000))
    table = RandomTable(
        vocab_size=shape.vocabulary,
        hidden_size=shape.hidden,
        num_layers=shape.layers,
        num_heads=shape.heads,
        intermediate_size=shape.intermediate,
        context=CONTEXT,
    )
    make_random_model(folder / "model", texts, table, seed)
    return folder / "model"


def made_up_word(source: random.Random, parts: list[str]) -> str:
    """Return a word of two to four parts."""
    return "".join(source.choice(parts) for _ in range(source.randint(2, 4)))
