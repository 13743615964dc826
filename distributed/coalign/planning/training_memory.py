"""Memory a GPU needs in training, by formula: weights, gradients, optimizer states, activations, head, buffers.

Used by generation_memory, planning and sizing. Every formula names its source; none was fitted to a measurement. GB are
10^9 bytes. e is the bytes of an element: 2 in bfloat16, 4 in float32; h, f, q the widths of a layer, its MLP and all
query heads. Sources: "ZeRO" arXiv 1910.02054, "Offload" arXiv 2101.06840, "Korthikanti" arXiv 2205.05198, "DeepSpeed"
its code and defaults at 0.19.8, with the settings of engine.deepspeed_config.
"""

from __future__ import annotations

import dataclasses

from coalign.config import ModelTable, TrainTable
from coalign.models.shape import Shape, count_lora_parameters, count_parameters
from coalign.models.sizes import BLOCK_LOGITS_GPU, KEPT_LOGITS_GPU, MIN_COLUMNS
from coalign.models.worker_memory import Memory, Part, element_bytes, margin

BUCKET_ELEMENTS = 5 * 10**8  # DeepSpeed's reduce_bucket_size
LIVE_ELEMENTS = 10**9  # DeepSpeed's stage3_max_live_parameters and sub_group_size


@dataclasses.dataclass(frozen=True, slots=True)
class Training:
    """What decides the memory of a training step. `row_tokens` is the width of a row, which its mask has squared."""

    shape: Shape
    model: ModelTable
    train: TrainTable
    ranks: int
    row_tokens: int

    @property
    def element_bytes(self) -> int:
        """Return the bytes of an element; "auto" is bfloat16, since this is about GPUs."""
        return element_bytes(self.train.precision)

    @property
    def parameters(self) -> int:
        """Return the number of weights, adapters included."""
        return count_parameters(self.shape) + (self.trained if self.model.lora.enabled else 0)

    @property
    def trained(self) -> int:
        """Return the number of weights that are trained."""
        lora = self.model.lora
        return count_lora_parameters(self.shape, lora) if lora.enabled else count_parameters(self.shape)

    @property
    def batch_tokens(self) -> int:
        """Return the tokens of a micro-batch: a row that is longer than it is computed alone."""
        return max(self.train.micro_batch_tokens, self.row_tokens)

    def shared_by(self, first_stage: int) -> int:
        """Return among how many ranks something is split that ZeRO splits from `first_stage` on."""
        return self.ranks if self.train.zero_stage >= first_stage else 1


def weights_bytes(plan: Training) -> float:
    """Return e bytes a weight, split from ZeRO 3 on (ZeRO, section 5), none on the GPU when they are offloaded."""
    if plan.train.offload_parameters:
        return 0.0
    return plan.element_bytes * plan.parameters / plan.shared_by(3)


def gradients_bytes(plan: Training) -> float:
    """Return e bytes a trained weight, split from ZeRO 2 on (ZeRO, section 5).

    With an offloaded optimizer those that are split go to the host as they are reduced (Offload, section 4.1).
    """
    if plan.train.offload_optimizer and plan.train.zero_stage >= 2:
        return 0.0
    return plan.element_bytes * plan.trained / plan.shared_by(2)


def optimizer_bytes(plan: Training) -> float:
    """Return 12 bytes a trained weight, split from ZeRO 1 on: master weight and Adam's two moments in fp32.

    ZeRO, section 3.1 (K = 12). In float32 DeepSpeed keeps a master copy as well, but at stage 0, where there are 8.
    """
    if plan.train.offload_optimizer:
        return 0.0
    return _states_a_weight(plan) * plan.trained / plan.shared_by(1)


def _states_a_weight(plan: Training) -> int:
    return 8 if plan.train.zero_stage == 0 and plan.element_bytes == 4 else 12


def buffers_bytes(plan: Training) -> float:
    """Return what DeepSpeed sets aside to communicate, in e bytes an element.

    Stage 0: a flat copy of a bucket of gradients when there are several ranks. 1 to 3: the bucket, whole however small
    the model is. 2: the partition of gradients a second time, while micro-batches are added up. 3: weights that are
    gathered at once.
    """
    stage, e = plan.train.zero_stage, plan.element_bytes
    if stage == 0:
        return e * min(BUCKET_ELEMENTS, plan.trained) if plan.ranks > 1 else 0.0
    twice = gradients_bytes(plan) if stage == 2 else 0.0
    gathered = e * min(LIVE_ELEMENTS, plan.parameters) if stage == 3 else 0.0
    return e * BUCKET_ELEMENTS + twice + gathered


def step_bytes(plan: Training) -> float:
    """Return what the optimizer's step adds: gradients in fp32, at 1 and 2 flattened before, and a square root.

    4 bytes a weight that is updated at once for the gradient (below stage 3 none in float32), e for the flat copy, 4
    for torch's AdamW over lists of tensors. Stage 3 updates sub-groups. Nothing where the optimizer is offloaded.
    """
    stage, e = plan.train.zero_stage, plan.element_bytes
    if plan.train.offload_optimizer:
        return 0.0
    at_once = plan.trained / plan.shared_by(1)
    if stage == 3:
        at_once = min(at_once, LIVE_ELEMENTS)
    gradient = 0 if e == 4 and stage in (0, 1, 2) else 4
    return (gradient + (e if stage in (1, 2) else 0) + 4) * at_once


def layer_activation_bytes(shape: Shape, e: int, attention: str = "sdpa", row_tokens: int = 0) -> int:
    """Return the bytes a token that one layer keeps for its backward pass.

    Counted as Korthikanti does in section 4.1, tensor by tensor, without dropout (which is off), for what torch keeps
    of transformers' layers: an RMSNorm computes in fp32 (4h, e h before its scale, e h after); queries, keys, values
    and the result of attention, keys and values repeated for every query head, since masked attention wants them so;
    of a gated MLP four tensors, of a plain one its activation's input and output, more for GPT-2's GELU in small
    steps. Scores are kept by eager attention alone: in fp32, and once more in e.
    """
    h, q, kv, f = shape.hidden, shape.query_width, shape.kv_width, shape.intermediate
    if shape.gpt2:
        norms, mlp = 4 * e * (h + 1), (2 if shape.fused_gelu else 5) * e * f
    else:
        norms, mlp = 2 * ((4 + 2 * e) * h + 4), 4 * e * f
    small_norms = (4 + e) * (q + kv) + 4 * (shape.num_heads + shape.num_kv_heads) if shape.qk_norm else 0
    each_head = (4 + (e if e < 4 else 0)) * row_tokens if attention == "eager" else 4  # scores, or their logsumexp
    return norms + small_norms + 4 * e * q + each_head * shape.num_heads + mlp


def activation_bytes(plan: Training) -> float:
    """Return what the layers keep between forward and backward.

    With gradient checkpointing each keeps its input, e h a token (Korthikanti, section 5, full recomputation), and one
    at a time is computed again. Without, all keep everything. Both: embeddings, last norm, the mask (e T a token).
    """
    shape, e = plan.shape, plan.element_bytes
    layer = layer_activation_bytes(shape, e, plan.model.attention, plan.row_tokens)
    ends = e * shape.hidden + (2 * e if shape.gpt2 else 4 + 2 * e) * shape.hidden + e * plan.row_tokens
    if plan.train.gradient_checkpointing:
        return plan.batch_tokens * (shape.num_layers * e * shape.hidden + layer + ends)
    return plan.batch_tokens * (shape.num_layers * layer + ends)


def work_bytes(plan: Training) -> float:
    """Return what the backward pass of one layer holds beside: gradients of the MLP's three widest tensors and two h.

    An estimate of ours: the allocator frees them layer by layer.
    """
    shape = plan.shape
    return plan.batch_tokens * plan.element_bytes * (3 * shape.intermediate + 2 * shape.hidden)


def head_bytes(plan: Training) -> float:
    """Return what the fused head takes (fused_head.fused_logps), as if every position predicted a response token.

    Hidden states and their gradient, (2 e + 4) h a position; one block of logits in e, in fp32, once more for the
    exponential or in e for the product; those that are kept, in e; the head's gradient, e V h, where it is trained. A
    model that changes its logits afterwards has them in full, in e and in fp32, and their gradients.
    """
    shape, e, positions = plan.shape, plan.element_bytes, plan.batch_tokens
    trained = 0 if plan.model.lora.enabled else e * shape.vocabulary * shape.hidden
    if not shape.plain_head:
        return 2.0 * (e + 4) * positions * shape.vocabulary + trained
    columns = min(shape.vocabulary, max(BLOCK_LOGITS_GPU // positions, MIN_COLUMNS))
    kept = e * min(KEPT_LOGITS_GPU, positions * shape.vocabulary)
    return (2 * e + 4) * shape.hidden * positions + (2 * e + 4) * positions * columns + kept + trained


def host_bytes(plan: Training) -> float:
    """Return the host memory of the rank that needs most, rank 0, which writes and reopens the model.

    Offloaded: master weights, moments and gradients in fp32 and the gradients in e, each split (Offload, section 4);
    weights split. While loading every rank below stage 3 holds the whole model. Adapters are merged in fp32.
    """
    e, train = plan.element_bytes, plan.train
    held = 0.0
    if train.offload_optimizer:
        held += (12 + 4 + e) * plan.trained / plan.shared_by(1)
    if train.offload_parameters:
        held += e * plan.parameters / plan.ranks
    merged = 4 * plan.parameters if plan.model.lora.enabled else 0
    return held + 2 * e * plan.parameters + merged


def training_memory(plan: Training) -> Memory:
    """Return the table of one rank's memory in training."""
    train, e = plan.train, plan.element_bytes
    split = [f" / {plan.ranks}" if plan.shared_by(stage) > 1 else "" for stage in (1, 2, 3)]
    kept = "input of each layer + 1 layer" if train.gradient_checkpointing else f"{plan.shape.num_layers} layers"
    layer = layer_activation_bytes(plan.shape, e, plan.model.attention, plan.row_tokens)
    grads, states = gradients_bytes(plan), optimizer_bytes(plan)
    on_host = "on the host"
    parts = [
        Part("weights", weights_bytes(plan), on_host if train.offload_parameters else f"{e} bytes{split[2]}"),
        Part("gradients", grads, f"{e} bytes{split[1]}" if grads else on_host),
        Part("optimizer", states, f"{_states_a_weight(plan)} bytes{split[0]}" if states else on_host),
        Part("communication buffers", buffers_bytes(plan), f"DeepSpeed's defaults, ZeRO {train.zero_stage}"),
        Part("activations", activation_bytes(plan), f"{plan.batch_tokens} tokens, {kept} of {layer} bytes", "pass"),
        Part("backward of one layer", work_bytes(plan), "(3 f + 2 h) a token", "pass"),
        Part("head", head_bytes(plan), "hidden, a block of logits and those kept, gradient", "pass"),
        Part("optimizer's step", step_bytes(plan), "fp32 gradient, AdamW; not with the three above", "step"),
    ]
    return Memory((*parts, margin(parts, ("weights", "gradients", "optimizer"))), host_bytes(plan))
