"""What TRL does for the rows "trl-sft" and "trl-dpo": `python trl_updates.py SPEC.json`, in TRL's own environment.

Prints one JSON object: CPU and wall seconds of the updates after the first, and loss and gradient norm of all. Stands
alone: nothing of coalign is installed there. peer_rows.py writes the spec and says why TRL is set up so.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer


class Clock(TrainerCallback):
    """Adds up what updates after the first take: from their first forward pass until the optimizer has stepped.

    What comes between is not counted: reading and collating rows, and the log.
    """

    def __init__(self) -> None:
        self.cpu_seconds = self.wall_seconds = 0.0

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Start."""
        self.began = time.process_time(), time.monotonic()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Stop; the first update warms up."""
        if state.global_step > 1:
            self.cpu_seconds += time.process_time() - self.began[0]
            self.wall_seconds += time.monotonic() - self.began[1]


class IdsDPOTrainer(DPOTrainer):  # type: ignore[misc]
    """Takes token ids, where DPOTrainer would encode texts."""

    def _prepare_dataset(self, dataset: Any, *_: Any, **__: Any) -> Any:
        return dataset


def settings_of(spec: dict[str, Any], folder: str) -> dict[str, Any]:
    """Return the arguments of either trainer: an epoch is one update on all rows, and nothing is done beside it."""
    settings = {
        "output_dir": folder,
        "per_device_train_batch_size": spec["batch"],
        "gradient_accumulation_steps": len(spec["rows"]),  # more than there are batches: an update takes all of them
        "num_train_epochs": 1 + spec["updates"],
        "learning_rate": 0.0,
        "bf16": False,
        "use_cpu": True,
        "gradient_checkpointing": False,  # TRL's default spares memory for time
        "train_sampling_strategy": "sequential",
        "logging_steps": 1,  # after the clock has stopped
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
    }
    return settings | dict(spec["options"])


def load(folder: str) -> Any:
    """Return a model in float32."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="sdpa")


def make_trainer(spec: dict[str, Any], folder: str) -> Any:
    """Return the trainer of a spec: of pairs where it names a reference model, else of rows."""
    rows, settings = Dataset.from_list(spec["rows"]), settings_of(spec, folder)
    same = {"model": load(spec["model"]), "processing_class": AutoTokenizer.from_pretrained(spec["model"])}
    if "reference" not in spec:
        return SFTTrainer(args=SFTConfig(**settings), train_dataset=rows, **same)
    args = DPOConfig(precompute_ref_log_probs=True, **settings)
    return IdsDPOTrainer(args=args, train_dataset=rows, ref_model=load(spec["reference"]), **same)


def main(path: str) -> None:
    """Train as the spec says."""
    spec = json.loads(Path(path).read_text(encoding="utf-8"))
    torch.set_num_threads(spec["threads"])
    clock = Clock()
    with tempfile.TemporaryDirectory() as folder:
        trainer = make_trainer(spec, folder)
        trainer.add_callback(clock)
        trainer.train()
    log = [entry for entry in trainer.state.log_history if "loss" in entry]
    found = {
        "seconds": clock.cpu_seconds,
        "wall_seconds": clock.wall_seconds,
        "losses": [entry["loss"] for entry in log],
        "grad_norms": [entry["grad_norm"] for entry in log],
        "batches": len(trainer.get_train_dataloader()),
    }
    print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main(sys.argv[-1])
