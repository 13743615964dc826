"""Memory per GPU in training, in bytes, by formula: weights, gradients, optimizer states, activations, head, buffers.

Each formula names its source; none was fitted to a measurement. e is the bytes of an element: 2 in bfloat16, 4 in
float32. h, f and q are the widths of a layer, of its MLP and of all query heads, V the entries of the vocabulary, T the
tokens of a row. Sources: "ZeRO" arXiv 1910.02054, "Offload" arXiv 2101.06840, "Korthikanti" arXiv 2205.05198;
"DeepSpeed" is its code and defaults at 0.19.8, with the settings of training/deepspeed_engine.deepspeed_config.
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
class TrainingSetup:
    """What decides the memory of a training step; `row_tokens` is the width of a row, and of its square mask."""

    shape: Shape
    model: ModelTable
    train: TrainTable
    ranks: int
    row_tokens: int

    @property
    def element_bytes(self) -> int:
        """Return the bytes of an element; "auto" is bfloat16, as on a GPU."""
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
        """Return the tokens of a micro-batch; a longer row is a micro-batch by itself."""
        return max(self.train.micro_batch_tokens, self.row_tokens)

    def shared_by(self, first_stage: int) -> int:
        """Return the number of ranks over which ZeRO shards what it shards from `first_stage` on."""
        return self.ranks if self.train.zero_stage >= first_stage else 1


def weights_bytes(setup: TrainingSetup) -> float:
    """Return e bytes per weight, sharded at ZeRO 3 (ZeRO, section 5); none on the GPU when they are offloaded."""
    if setup.train.offload_parameters:
        return 0.0
    return setup.element_bytes * setup.parameters / setup.shared_by(3)


def gradients_bytes(setup: TrainingSetup) -> float:
    """Return e bytes per trained weight, sharded from ZeRO 2 on (ZeRO, section 5).

    With an offloaded optimizer, sharded gradients move to the host as they are reduced (Offload, section 4.1).
    """
    if setup.train.offload_optimizer and setup.train.zero_stage >= 2:
        return 0.0
    return setup.element_bytes * setup.trained / setup.shared_by(2)


def optimizer_bytes(setup: TrainingSetup) -> float:
    """Return 12 bytes per trained weight, sharded from ZeRO 1 on: master weight and Adam's two moments in fp32.

    ZeRO, section 3.1 (K = 12). DeepSpeed keeps a master copy in float32 too, except at stage 0: 8 bytes there.
    """
    if setup.train.offload_optimizer:
        return 0.0
    return _states_per_weight(setup) * setup.trained / setup.shared_by(1)


def _states_per_weight(setup: TrainingSetup) -> int:
    return 8 if setup.train.zero_stage == 0 and setup.element_bytes == 4 else 12


def buffers_bytes(setup: TrainingSetup) -> float:
    """Return DeepSpeed's communication buffers, e bytes per element.

    Stage 0: a flat copy of a bucket of gradients when there are several ranks. Stages 1 to 3: a whole bucket, however
    small the model is. Stage 2 adds this rank's gradients once more, for accumulation over micro-batches. Stage 3 adds
    the weights that are gathered at one time.
    """
    stage, e = setup.train.zero_stage, setup.element_bytes
    if stage == 0:
        return e * min(BUCKET_ELEMENTS, setup.trained) if setup.ranks > 1 else 0.0
    twice = gradients_bytes(setup) if stage == 2 else 0.0
    gathered = e * min(LIVE_ELEMENTS, setup.parameters) if stage == 3 else 0.0
    return e * BUCKET_ELEMENTS + twice + gathered


def step_bytes(setup: TrainingSetup) -> float:
    """Return what the optimizer's step adds (DeepSpeed): gradients in fp32, their flat copy, AdamW's square roots.

    Per weight of those that are updated together: 4 bytes for the gradient (none in float32 below stage 3), e for the
    flat copy at stages 1 and 2, 4 for torch's AdamW over lists of tensors. Stage 3 updates one sub-group after another.
    Nothing where the optimizer is offloaded.
    """
    stage, e = setup.train.zero_stage, setup.element_bytes
    if setup.train.offload_optimizer:
        return 0.0
    at_once = setup.trained / setup.shared_by(1)
    if stage == 3:
        at_once = min(at_once, LIVE_ELEMENTS)
    gradient = 0 if e == 4 and stage in (0, 1, 2) else 4
    return (gradient + (e if stage in (1, 2) else 0) + 4) * at_once


def layer_activation_bytes(shape: Shape, e: int, attention: str = "sdpa", row_tokens: int = 0) -> int:
    """Return the bytes per token that one layer keeps for its backward pass.

    The tensors are counted one by one as in Korthikanti, section 4.1, without dropout (which is off), as torch keeps
    them of transformers' layers. An RMSNorm computes in fp32: 4 h, e h before its scale, e h after. Attention keeps
    queries, keys, values and its result; keys and values are repeated for every query head, as masked attention needs
    them. A gated MLP keeps four tensors. A plain one keeps its activation's input and output, and more for a GELU
    computed in small steps, as in GPT-2. Only eager attention keeps scores: in fp32, and once more in e.
    """
    h, q, kv, f = shape.hidden, shape.query_width, shape.kv_width, shape.intermediate
    if shape.gpt2:
        norms, mlp = 4 * e * (h + 1), (2 if shape.fused_gelu else 5) * e * f
    else:
        norms, mlp = 2 * ((4 + 2 * e) * h + 4), 4 * e * f
    small_norms = (4 + e) * (q + kv) + 4 * (shape.num_heads + shape.num_kv_heads) if shape.qk_norm else 0
    each_head = (4 + (e if e < 4 else 0)) * row_tokens if attention == "eager" else 4  # scores, or their logsumexp
    return norms + small_norms + 4 * e * q + each_head * shape.num_heads + mlp


def activation_bytes(setup: TrainingSetup) -> float:
    """Return what the layers keep between forward and backward.

    With gradient checkpointing each layer keeps its input, e h per token (Korthikanti, section 5, full recomputation),
    and one layer at a time is recomputed. Without it all layers keep everything. Both keep embeddings, last norm and
    the mask, e T per token.
    """
    shape, e = setup.shape, setup.element_bytes
    layer = layer_activation_bytes(shape, e, setup.model.attention, setup.row_tokens)
    ends = e * shape.hidden + (2 * e if shape.gpt2 else 4 + 2 * e) * shape.hidden + e * setup.row_tokens
    if setup.train.gradient_checkpointing:
        return setup.batch_tokens * (shape.num_layers * e * shape.hidden + layer + ends)
    return setup.batch_tokens * (shape.num_layers * layer + ends)


def work_bytes(setup: TrainingSetup) -> float:
    """Return what the backward pass of one layer adds: gradients of the MLP's three widest tensors and of two of h.

    Our own estimate: the allocator frees them layer by layer.
    """
    shape = setup.shape
    return setup.batch_tokens * setup.element_bytes * (3 * shape.intermediate + 2 * shape.hidden)


def head_bytes(setup: TrainingSetup) -> float:
    """Return what the fused head takes (models/fused_head.fused_logps) if every position predicts a response token.

    Hidden states and their gradient: (2 e + 4) h per position. One block of logits: in e, in fp32, and once more for
    the exponential (fp32) or the product (e). The logits that are kept: in e. The head's gradient, where it is trained:
    e V h. A model that changes its logits afterwards has all of them, in e and in fp32, and their gradients.
    """
    shape, e, positions = setup.shape, setup.element_bytes, setup.batch_tokens
    trained = 0 if setup.model.lora.enabled else e * shape.vocabulary * shape.hidden
    if not shape.plain_head:
        return 2.0 * (e + 4) * positions * shape.vocabulary + trained
    columns = min(shape.vocabulary, max(BLOCK_LOGITS_GPU // positions, MIN_COLUMNS))
    kept = e * min(KEPT_LOGITS_GPU, positions * shape.vocabulary)
    return (2 * e + 4) * shape.hidden * positions + (2 * e + 4) * positions * columns + kept + trained


def host_bytes(setup: TrainingSetup) -> float:
    """Return the host memory of rank 0, which needs most, since it writes the model and opens it again.

    Offloaded are master weights, moments and gradients in fp32 and the gradients in e, each sharded (Offload, section
    4), and the sharded weights. While loading, every rank below stage 3 holds the whole model. Adapters are merged in
    fp32.
    """
    e, train = setup.element_bytes, setup.train
    held = 0.0
    if train.offload_optimizer:
        held += (12 + 4 + e) * setup.trained / setup.shared_by(1)
    if train.offload_parameters:
        held += e * setup.parameters / setup.ranks
    merged = 4 * setup.parameters if setup.model.lora.enabled else 0
    return held + 2 * e * setup.parameters + merged


def training_memory(setup: TrainingSetup) -> Memory:
    """Return the memory of one rank in training, part by part."""
    train, e = setup.train, setup.element_bytes
    split = [f" / {setup.ranks}" if setup.shared_by(stage) > 1 else "" for stage in (1, 2, 3)]
    kept = "input of each layer + 1 layer" if train.gradient_checkpointing else f"{setup.shape.num_layers} layers"
    layer = layer_activation_bytes(setup.shape, e, setup.model.attention, setup.row_tokens)
    grads, states = gradients_bytes(setup), optimizer_bytes(setup)
    on_host = "on the host"
    parts = [
        Part("weights", weights_bytes(setup), on_host if train.offload_parameters else f"{e} bytes{split[2]}"),
        Part("gradients", grads, f"{e} bytes{split[1]}" if grads else on_host),
        Part("optimizer", states, f"{_states_per_weight(setup)} bytes{split[0]}" if states else on_host),
        Part("communication buffers", buffers_bytes(setup), f"DeepSpeed's defaults, ZeRO {train.zero_stage}"),
        Part("activations", activation_bytes(setup), f"{setup.batch_tokens} tokens, {kept} of {layer} bytes", "pass"),
        Part("backward of one layer", work_bytes(setup), "(3 f + 2 h) per token", "pass"),
        Part("head", head_bytes(setup), "hidden, a block of logits and those kept, gradient", "pass"),
        Part("optimizer's step", step_bytes(setup), "fp32 gradient, AdamW; not with the three above", "step"),
    ]
    return Memory((*parts, margin(parts, ("weights", "gradients", "optimizer"))), host_bytes(setup))
