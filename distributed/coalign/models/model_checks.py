"""Whether a live model computes what both engines take for granted: causal rows, exact padding, a plain KV cache.

Asked on a few made-up tokens before anything is trained or sampled. Knows no files and no texts. Shape suffixes: T
tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from coalign.errors import UserError
from coalign.models.attention import LOGP_TOLERANCE, bare
from coalign.models.logprobs import evaluation_mode
from coalign.models.rows import left_pad

LONG, SHORT, STEPS = 48, 9, 3  # tokens: of the longer row, of the shorter one, and of those that are added one by one
NARROW_TOLERANCE = 0.25  # nats, in dtypes narrower than float32, where experts may change by rounding


def has_plain_cache(config: Any) -> bool:
    """Return whether the cache of a model with this config holds every token's keys and values, and nothing else."""
    layers = DynamicCache(config=config).layers
    return all(type(layer) in (DynamicLayer, DynamicSlidingWindowLayer) for layer in layers)


def check_model(model: Any, pad_id: int, folder: str, samples: bool) -> None:
    """Raise UserError when a model can't be trained and scored in rows or, with `samples`, can't be sampled from.

    A row must have the same log-probs alone, at the left of further tokens, and behind padding. Steps with a KV cache
    must give those of the whole row. Under ZeRO-3 every rank calls this.
    """
    family = bare(model).config.model_type
    kind = f"{'an' if family[0] in 'aeio' else 'a'} {family}"
    with torch.no_grad(), evaluation_mode(model):
        if complaint := _said(lambda: _complaint_of_rows(model, pad_id)):
            raise UserError(f"{folder}: {kind} model can't be used here: {complaint}; use another model")
        if samples and not has_plain_cache(bare(model).config):
            raise UserError(
                f"{folder}: {kind} model keeps more than keys and values of its tokens, which sampling can't move"
                ' between rows; use a model with attention in every layer, or generation.engine="vllm" if vLLM has it'
            )
        if samples and (complaint := _said(lambda: _complaint_of_cache(model, pad_id))):
            raise UserError(f"{folder}: {kind} model can't be sampled from: {complaint}; use another model")


def _said(ask: Callable[[], str]) -> str:
    """Return a complaint; an error of the model's own code is one too."""
    try:
        return ask()
    except (UserError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # from transformers' code of one of hundreds of families
        return f"it fails with {type(error).__name__}: {str(error).strip()}".partition("\n")[0]


def _complaint_of_rows(model: Any, pad_id: int) -> str:
    ids = _made_up(model)
    alone_TV = _logps(model, [ids[:SHORT]], pad_id)[0]
    long_TV, padded_TV = _logps(model, [ids[:LONG], ids[:SHORT]], pad_id)
    if _differ(long_TV[:SHORT], alone_TV, model):
        return "its tokens see later ones"
    if _differ(padded_TV[-SHORT:], alone_TV, model):
        return "it ignores the mask of padding, so that a row depends on the rows beside it"
    return ""


def _complaint_of_cache(model: Any, pad_id: int) -> str:
    """Compare steps after padded prompts with whole rows."""
    ids = _made_up(model)
    prompts, added = [ids[:SHORT], ids[SHORT : SHORT + 4]], ids[LONG - STEPS :]
    whole_TV = torch.cat([_logps(model, [[*prompt, *added]], pad_id)[0][-STEPS:] for prompt in prompts])
    inputs, cache, stepped = left_pad(prompts, pad_id, bare(model).device), DynamicCache(), []
    model(**inputs, past_key_values=cache, use_cache=True)
    for k, token in enumerate(added, start=1):
        mask_BT = torch.nn.functional.pad(inputs["attention_mask"], (0, k), value=1)
        logits_B1V = model(
            input_ids=torch.full((len(prompts), 1), token, device=mask_BT.device),
            attention_mask=mask_BT,
            position_ids=inputs["position_ids"][:, -1:] + k,
            past_key_values=cache,
            use_cache=True,
        ).logits
        stepped.append(_log_softmax(logits_B1V[:, -1]))
    stepped_TV = torch.stack(stepped, dim=1).flatten(0, 1)
    return "steps with its KV cache differ from whole rows" if _differ(stepped_TV, whole_TV, model) else ""


def _differ(found_TV: Tensor, expected_TV: Tensor, model: Any) -> bool:
    """Return whether log-probs of the likeliest tokens differ by more than rounding, on average."""
    top_T1 = expected_TV.argmax(-1, keepdim=True)
    difference = (found_TV.gather(1, top_T1) - expected_TV.gather(1, top_T1)).abs().mean()
    dtype = next(bare(model).parameters()).dtype
    return not float(difference) <= LOGP_TOLERANCE.get(dtype, NARROW_TOLERANCE)  # NaN differs


def _made_up(model: Any) -> list[int]:
    """Return LONG token ids, few of them equal."""
    vocabulary = bare(model).config.get_text_config().vocab_size
    return [(7919 * k + 13) % vocabulary for k in range(1, LONG + 1)]


def _logps(model: Any, rows: Sequence[Sequence[int]], pad_id: int) -> list[Tensor]:
    """Return each row's log-probs of every token after each position: (T, V), padding included."""
    return list(_log_softmax(model(**left_pad(rows, pad_id, bare(model).device), use_cache=False).logits))


def _log_softmax(logits: Tensor) -> Tensor:
    return logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)
