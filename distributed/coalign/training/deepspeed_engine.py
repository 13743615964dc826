"""DeepSpeed behind the Engine protocol: sharded start, optimizer steps, checkpoints, gathered weights for an export.

The only import of DeepSpeed. Knows tensors and folders, no data and no losses.
"""

from __future__ import annotations

import contextlib
import datetime
import errno
import logging
import os
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from coalign.config import ModelTable, TrainTable
from coalign.errors import UserError
from coalign.models.attention import use_blocks
from coalign.models.lora import attach_lora
from coalign.models.model_folder import check_weights, load_model, pick_device, pick_dtype
from coalign.process import local_rank, rank, ranks_here, world_size
from coalign.runs.atomic_files import write_json
from coalign.training.checkpoints import read_checkpoint_meta, remove, write_checkpoint_meta
from coalign.training.rendezvous import meet

os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")
import deepspeed
from deepspeed.runtime.fp16.loss_scaler import LossScaler
from deepspeed.runtime.zero.config import ZeroStageEnum
from deepspeed.utils.tensor_fragment import fragment_address

logger = logging.getLogger("coalign")

RANK_ZERO_HOURS = 6  # the longest that other ranks wait while rank 0 digests a checkpoint or checks an export

# All classes that DeepSpeed's checkpoints hold beside tensors and plain values. None runs code of the file.
PICKLED_CLASSES = [LossScaler, ZeroStageEnum, fragment_address]
_WEIGHTS_ONLY, _NOT_WEIGHTS_ONLY = "TORCH_FORCE_WEIGHTS_ONLY_LOAD", "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"  # torch's names
_CONVERT = """
import torch
from deepspeed.checkpoint import ds_to_universal
from coalign.training.deepspeed_engine import PICKLED_CLASSES

torch.serialization.add_safe_globals(PICKLED_CLASSES)
ds_to_universal.main(ds_to_universal.parse_arguments())
"""


def init_ranks() -> torch.device:
    """Join the process group (one rank alone outside a launcher) and return this rank's device.

    Raises UserError when the launcher started more ranks on this node than it has GPUs.
    """
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    # All ranks of a node compare the same numbers, so its first rank is always among those that report the error.
    here = ranks_here()
    if torch.cuda.is_available() and here > torch.cuda.device_count():
        raise UserError(
            f"{here} ranks were started on this node, which shows {torch.cuda.device_count()} GPUs; start fewer ranks"
            " (deepspeed --num_gpus)"
        )
    device = pick_device(local_rank())
    if device.type == "cuda":
        torch.cuda.set_device(device)
    else:
        # Building this op takes a minute and a compiler, and gloo is as fast on one node.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    backend = "nccl" if device.type == "cuda" else "gloo"
    timeout = datetime.timedelta(hours=RANK_ZERO_HOURS)
    meet(backend, device, timeout)
    for key, value in {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}.items():
        os.environ.setdefault(key, value)  # DeepSpeed reads them
    deepspeed.init_distributed(backend, timeout=timeout, auto_mpi_discovery=False, verbose=False)
    return device


def deepspeed_config(train: TrainTable, dtype: torch.dtype) -> dict[str, Any]:
    """Return DeepSpeed's JSON config for our settings.

    `DeepSpeedEngine.backward` accumulates gradients itself, so the config has one micro-batch per step.
    """
    zero: dict[str, Any] = {"stage": train.zero_stage}
    if train.offload_optimizer:
        zero["offload_optimizer"] = {"device": "cpu"}
    if train.offload_parameters:
        zero["offload_param"] = {"device": "cpu"}
    if train.zero_stage == 3:
        zero["stage3_gather_16bit_weights_on_model_save"] = False
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": train.max_grad_norm,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "bf16": {"enabled": dtype is torch.bfloat16},
        "steps_per_print": 10**9,
        "wall_clock_breakdown": False,
    }


class DeepSpeedEngine:
    """Trains one model over all ranks; implements engine.Engine.

    `source` is the folder or hub name of the model that training starts from. Rank 0 writes DeepSpeed's config to
    `json_path`. `seed` decides the first weights of adapters. Raises UserError when the model can't be loaded or
    `model.lora.target_modules` can't be adapted.
    """

    def __init__(
        self, source: str, model: ModelTable, train: TrainTable, device: torch.device, json_path: Path, seed: int = 0
    ) -> None:
        self.device = device
        self.table = model
        self.train = train
        self.dtype = pick_dtype(train.precision, device)
        self.source = source
        self.json_path = json_path
        config = deepspeed_config(self.train, self.dtype)
        if rank() == 0:
            write_json(self.json_path, config)
        if self.train.zero_stage == 3:
            from transformers.integrations.deepspeed import HfDeepSpeedConfig

            check_weights(self.source, self.table)
            partitioned = HfDeepSpeedConfig(config)  # while it lives, each rank loads only its part of the weights
            network = load_model(self.source, self.table, self.dtype)
            del partitioned  # the model loaded later to check an export is whole again
        else:
            network = load_model(self.source, self.table, self.dtype)
        if self.device.type == "cuda" and self.train.pack_tokens:
            use_blocks(network)
        if self.table.lora.enabled:
            network = attach_lora(network, self.table.lora, seed)
        if self.train.gradient_checkpointing:
            network.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
            if self.table.lora.enabled:
                network.enable_input_require_grads()
        trained = [p for p in network.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(
            trained, lr=0.0, betas=(self.train.beta1, self.train.beta2), weight_decay=self.train.weight_decay
        )
        self._engine, self._optimizer, _, _ = deepspeed.initialize(
            model=network, optimizer=optimizer, config=config, dist_init_required=False
        )
        self._engine.train()

    @property
    def model(self) -> Any:
        """Return what to call for a forward pass."""
        return self._engine

    def backward(self, loss: Tensor, last: bool) -> None:
        """Add the gradient of this rank's share of the global loss; `last` marks the last micro-batch of an update."""
        self._engine.set_gradient_accumulation_boundary(last)
        self._engine.backward(loss * world_size())  # DeepSpeed averages over ranks; the loss is a sum over them
        if not last:
            self._engine.step()

    def step(self, learning_rate: float) -> float:
        """Update the weights and return the gradient norm before clipping."""
        for group in self._optimizer.param_groups:
            group["lr"] = learning_rate
        norm = None
        if self.train.zero_stage == 0:
            gradients = [p.grad for p in self._engine.module.parameters() if p.grad is not None]
            norm = torch.nn.utils.get_total_norm(gradients) if gradients else None
        self._engine.step()
        norm = norm if norm is not None else self._engine.get_global_grad_norm()
        return float(norm) if norm is not None else float("nan")

    def mean(self, values: Sequence[float]) -> list[float]:
        """Return each value averaged over the ranks."""
        total = torch.tensor(list(values), dtype=torch.float64, device=self.device)
        dist.all_reduce(total)
        return [float(v) for v in total / world_size()]

    def save(self, folder: Path, state: dict[str, Any]) -> None:
        """Write a checkpoint folder that appears once all its files are written and digested; called by every rank.

        Raises OSError when the disk is full.
        """
        temporary = folder.with_name(f".{folder.name}.tmp")
        if rank() == 0:
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.parent.mkdir(parents=True, exist_ok=True)
        dist.barrier()
        try:
            self._write(temporary, state)
        except (RuntimeError, OSError) as error:
            shutil.rmtree(temporary, ignore_errors=True)  # half a checkpoint would only waste space
            # Words of torch.save's errors when a file could not be written completely.
            if any(word in str(error) for word in ("inline_container", "iostream", "PytorchStreamWriter")):
                raise OSError(errno.ENOSPC, f"the checkpoint was not written: {error}", str(folder)) from error
            raise
        if rank() == 0:
            remove(folder)
            temporary.rename(folder)
        dist.barrier()

    def _write(self, folder: Path, state: dict[str, Any]) -> None:
        self._engine.save_checkpoint(
            str(folder.parent), tag=folder.name, save_latest=False, exclude_frozen_parameters=False
        )
        dist.barrier()
        if rank() == 0:
            write_checkpoint_meta(folder, state, self.train.zero_stage)

    def restore(self, folder: Path) -> dict[str, Any]:
        """Load a verified checkpoint, made by any number of ranks, and return the state saved with it.

        Raises RuntimeError when DeepSpeed can't load it or convert it to this number of ranks.
        """
        meta = read_checkpoint_meta(folder)
        if meta["world_size"] == world_size() or self.train.zero_stage == 0:
            self._load(folder.parent, folder.name)
        else:
            if rank() == 0:
                logger.info(
                    "the checkpoint was made by %d ranks and is converted for %d", meta["world_size"], world_size()
                )
                self._to_universal(folder)
            dist.barrier()
            # Set on this engine: a second one would stay in memory beside it, because DeepSpeed keeps a reference.
            self._engine._config.load_universal_checkpoint = True
            self._load(folder.parent / f".{folder.name}.universal", "all")
            self._engine._config.load_universal_checkpoint = False
            # DeepSpeed lets all sub-groups of stage 3 share one step tensor, and each would increment it.
            for moments in self._optimizer.optimizer.state.values():
                moments["step"] = torch.as_tensor(moments["step"]).clone()
            dist.barrier()
            if rank() == 0:
                shutil.rmtree(folder.parent / f".{folder.name}.universal", ignore_errors=True)
        state: dict[str, Any] = meta["state"]
        return state

    def _load(self, parent: Path, tag: str) -> None:
        try:
            with _weights_only():
                path, _ = self._engine.load_checkpoint(str(parent), tag=tag)
        except pickle.UnpicklingError as error:
            raise UserError(_foreign(parent / tag, str(error))) from error
        if path is None:
            raise RuntimeError(f"DeepSpeed could not load the checkpoint {parent / tag}")

    def _to_universal(self, folder: Path) -> None:
        """Convert a ZeRO checkpoint so that another number of ranks can load it."""
        target = folder.parent / f".{folder.name}.universal"
        shutil.rmtree(target, ignore_errors=True)
        command = [sys.executable, "-c", _CONVERT, "--input_folder", str(folder)]
        command += ["--output_folder", str(target / "all"), "--num_extract_workers", "1", "--num_merge_workers", "1"]
        command += ["--inject_missing_state"]
        with _weights_only():
            done = subprocess.run(command, capture_output=True, text=True, check=False)
        if "UnpicklingError" in done.stderr:
            raise UserError(_foreign(folder, done.stderr.partition("UnpicklingError: ")[2]))
        if done.returncode:
            raise RuntimeError(f"{folder} could not be converted for {world_size()} ranks:\n{done.stderr[-2000:]}")

    def gather_state(self) -> dict[str, Tensor]:
        """Return the full weights (with LoRA: the adapters) on rank 0's CPU; {} on other ranks."""
        module = self._engine.module
        lora = self.table.lora.enabled
        state: dict[str, Tensor] = {}
        if self.train.zero_stage < 3:
            if rank() == 0:
                state = {name: tensor.detach().cpu().clone() for name, tensor in module.state_dict().items()}
        else:
            for name, parameter in module.named_parameters(remove_duplicate=False):
                if lora and not parameter.requires_grad:
                    continue
                with deepspeed.zero.GatheredParameters([parameter]):
                    if rank() == 0:
                        state[name] = parameter.detach().cpu().clone()
            if rank() == 0:
                buffers = dict(module.named_buffers())
                state.update({n: buffers[n].detach().cpu().clone() for n in module.state_dict() if n in buffers})
        return {n: t for n, t in state.items() if ".lora_" in n} if lora else state


@contextlib.contextmanager
def _weights_only() -> Iterator[None]:
    """Let torch.load read tensors, plain values and PICKLED_CLASSES alone, unless the user's environment forbids that.

    DeepSpeed asks for whole pickles, which can run code, and somebody else may have put them into the run folder.
    """
    if os.environ.get(_NOT_WEIGHTS_ONLY):
        yield
        return
    before = os.environ.get(_WEIGHTS_ONLY)
    os.environ[_WEIGHTS_ONLY] = "1"
    try:
        with torch.serialization.safe_globals(PICKLED_CLASSES):
            yield
    finally:
        os.environ.pop(_WEIGHTS_ONLY)
        if before is not None:
            os.environ[_WEIGHTS_ONLY] = before


def _foreign(folder: Path, complaint: str) -> str:
    why = " ".join(complaint.split())[:200]
    return (
        f"{folder} holds a pickle that could run code, as no checkpoint of coalign does ({why}); remove it to resume"
        f" from the checkpoint before, or set {_NOT_WEIGHTS_ONLY}=1 if you trust everybody who can write there"
    )


def run_on_rank_zero(work: Callable[[], None]) -> None:
    """Run `work` on rank 0 alone while the others wait.

    When it fails, rank 0 raises its error and all other ranks raise SystemExit.
    """
    outcome = [0]  # the exit status of the other ranks; only rank 0 prints the error
    error: BaseException | None = None
    if rank() == 0:
        try:
            work()
        except (Exception, SystemExit) as caught:  # the other ranks must not wait forever
            error, outcome = caught, [2 if isinstance(caught, UserError) else 1]
    if dist.is_initialized() and world_size() > 1:
        dist.broadcast_object_list(outcome, src=0)
    if error is not None:
        raise error
    if outcome[0]:
        raise SystemExit(outcome[0])
