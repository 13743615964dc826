"""LoRA: low-rank adapters on a model's linear layers, and weights with the trained adapters merged in.

The only import of PEFT. Knows no training settings.
"""

from __future__ import annotations

import collections
import logging
import re
import warnings
from collections.abc import Callable
from typing import Any

import torch
from transformers.pytorch_utils import Conv1D

from coalign.config import LoraTable, ModelTable
from coalign.errors import UserError
from coalign.models.export_checks import complaint_of_merge
from coalign.models.loaded_weights import first_line
from coalign.models.model_folder import load_model, on_cpu
from coalign.process import derive_seed

logger = logging.getLogger("coalign")

_LARGE = 0.05  # the share of all weights from which a matrix without adapters is worth a warning


def attach_lora(model: Any, table: LoraTable, seed: int = 0) -> Any:
    """Return the model with frozen weights and trainable low-rank adapters (LoRA, arXiv 2106.09685).

    `seed` alone decides their first weights; torch's random state is left as it was. Logs how many weights are trained
    and which large ones have no adapter. Raises UserError when an entry of `target_modules` names no layer, or one
    whose weight another layer shares: a merged update would change both, while training changed one.
    """
    adapted = _adapt(model, table, seed)
    _log_shares(adapted)
    return adapted


def _adapt(model: Any, table: LoraTable, seed: int) -> Any:
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        r=table.rank,
        lora_alpha=table.alpha,  # type: ignore[arg-type]  # peft only divides it, so a float works too
        lora_dropout=table.dropout,
        target_modules=table.target_modules or "all-linear",
        task_type="CAUSAL_LM",
    )
    linear = sorted({n.rpartition(".")[2] for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)})
    key, here = f"model.lora.target_modules={table.target_modules}", f"linear layers here: {', '.join(linear)}"
    places = collections.Counter(id(p) for _, p in model.named_parameters(remove_duplicate=False))
    try:
        with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # peft's on tied layers, which are refused below
            torch.manual_seed(derive_seed(seed, "lora"))
            adapted = get_peft_model(model, config)
    except Exception as error:  # peft raises many kinds for layers that it can't adapt
        if "lora_dropout" in str(error):
            raise UserError(
                f"model.lora.dropout={table.dropout}: peft has no dropout for experts in one tensor; set it to 0"
            ) from error
        raise UserError(f"{key}: {first_line(error).rstrip('(. ')}; {here}") from error
    tuner: Any = adapted.base_model
    names = tuner.targeted_module_names
    # peft turns names of experts that are fused into one tensor into names of that tensor.
    wanted = [target for target in table.target_modules if target in tuner.peft_config["default"].target_modules]
    lost = [target for target in wanted if not any(f".{name}".endswith(f".{target}") for name in names)]
    if lost:
        raise UserError(f"{key}: no layer that can be adapted is named {', '.join(lost)}; {here}")
    tied = [name for name in names if places[id(tuner.model.get_submodule(name).weight)] > 1]
    if tied:
        raise UserError(
            f"{key}: the weight of {tied[0]} is shared with another layer (tied embeddings), so an adapter on one of"
            " them can't be merged; leave it out"
        )
    return adapted


def _size(parameter: torch.nn.Parameter) -> int:
    """Return the number of weights of a parameter, which ZeRO-3 may have partitioned."""
    return int(getattr(parameter, "ds_numel", parameter.numel()))


def _log_shares(adapted: Any) -> None:
    """Log trained / all weights, and warn of large matrices that are no layer which `target_modules` could name."""
    base: Any = adapted.base_model.model
    names = [*adapted.base_model.targeted_module_names, *adapted.base_model.targeted_parameter_names]
    trained = sum(_size(p) for p in base.parameters() if p.requires_grad)
    total = sum(_size(p) for name, p in base.named_parameters() if ".lora_" not in name)
    logger.info(
        "LoRA trains %d adapter weights beside %d of the model (%.2f%%), on %d layers: %s",
        trained,
        total,
        100 * trained / max(1, total),
        len(names),
        ", ".join(sorted({name.removesuffix(".weight").rpartition(".")[2] for name in names})),
    )
    outside: collections.Counter[str] = collections.Counter()
    for place, module in base.named_modules():
        if isinstance(module, torch.nn.Linear | torch.nn.Embedding | Conv1D):
            continue
        for last, parameter in module.named_parameters(recurse=False):
            name = f"{place}.{last}".replace(".base_layer", "")
            if name in names or parameter.requires_grad or len(getattr(parameter, "ds_shape", parameter.shape)) < 2:
                continue
            outside[re.sub(r"\.\d+\.", ".N.", name)] += _size(parameter)
    large = [name for name, size in outside.most_common() if size >= _LARGE * total]
    if large:
        share = 100 * sum(outside[name] for name in large) / total
        logger.warning(
            "warning: %.0f%% of the model's weights have no adapters and stay as they are: %s",
            share,
            ", ".join(large),
        )


def merge_lora(
    source: str,
    table: ModelTable,
    adapters: dict[str, torch.Tensor],
    measure: Callable[[Any], torch.Tensor] | None = None,
) -> dict[str, torch.Tensor]:
    """Return merged weights W + alpha / rank * B A (arXiv 2106.09685, section 4.1) in the adapters' dtype.

    peft adds in float32, on a fresh copy of the model that training started from. `adapters` holds the trained
    parameters under their names in the model that `attach_lora` returned. Raises RuntimeError when what `measure`
    returns of a model, its log-probs of some tokens, isn't that of the adapters beside the weights.
    """
    dtype = next(iter(adapters.values())).dtype
    model = _adapt(load_model(source, on_cpu(table), torch.float32), table.lora, 0).eval()
    unknown = model.load_state_dict(adapters, strict=False).unexpected_keys
    assert not unknown, f"adapters of another model: {unknown[:3]}"
    before = []
    if measure is not None:
        before.append(measure(model))
        with model.disable_adapter():
            before.append(measure(model))
    merged: torch.nn.Module = model.merge_and_unload(safe_merge=True)
    complaint = complaint_of_merge(measure(merged), *before) if measure is not None else None
    if complaint:
        raise RuntimeError(f"the LoRA adapters were not merged rightly: {complaint}")
    return {n: t.detach().to(dtype if t.is_floating_point() else t.dtype) for n, t in merged.state_dict().items()}
