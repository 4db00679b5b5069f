"""Every flag of transformers' TrainingArguments with the paper's settings as defaults, and the
loss's own.
"""

import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, TrainingArguments
from transformers.utils import is_liger_kernel_available

from patching.architectures.distilbert import as_bert_config
from patching.architectures.lookup import architecture_of
from patching.architectures.models import empty_model
from train.loss import LossWeights

FSDP_DEFAULTS = {"cpu_ram_efficient_loading": True, "state_dict_type": "SHARDED_STATE_DICT"}
"""Weights are read on one rank; each rank writes its own share of a checkpoint."""


@dataclass
class DistillationArguments(TrainingArguments):
    """Defaults are those of arXiv 2510.05064 on 4 ranks: 500 steps of 2048 rows."""

    _argument_group_name = "training: flags of transformers, then saving, --dry_run and the loss"

    save_directory: str | None = field(
        default=None, metadata={"help": "where the student is saved (required)"}
    )
    output_dir: str | None = field(
        default=None,
        metadata={"help": "where checkpoints are kept, by default save_directory/checkpoints"},
    )
    save_dtype: str = field(
        default="float32",
        metadata={
            "help": "dtype of the saved student",
            "choices": ("float32", "bfloat16", "float16"),
        },
    )

    dry_run: bool = field(
        default=False,
        metadata={"help": "say what the run would take, from configs alone, and end"},
    )
    dry_run_ranks: int | None = field(
        default=None,
        metadata={"help": "ranks that --dry_run counts on, by default those it runs on"},
    )

    use_cross_entropy: bool = field(default=True, metadata={"help": "learn from the next token"})
    use_kl_loss: bool = field(
        default=True, metadata={"help": "learn from the teacher's distribution of the next token"}
    )
    kl_loss_weight: float = field(default=0.1, metadata={"help": "weight of the KL term"})
    use_cosine_loss: bool = field(
        default=True, metadata={"help": "align hidden states with the teacher's"}
    )
    cosine_loss_weight: float = field(default=2.0, metadata={"help": "weight of the cosine term"})
    temperature: float = field(
        default=1.0, metadata={"help": "temperature of the KL term", "aliases": ["--T"]}
    )

    learning_rate: float = field(default=3e-4, metadata={"help": "peak learning rate"})
    adam_beta2: float = field(default=0.95, metadata={"help": "beta2 of AdamW"})
    weight_decay: float = field(default=0.1, metadata={"help": "weight decay of AdamW"})
    lr_scheduler_type: str = field(default="cosine", metadata={"help": "learning rate schedule"})
    warmup_steps: float = field(
        default=0.01, metadata={"help": "steps of warm-up, below 1 a share of all steps"}
    )
    max_steps: int = field(
        default=500, metadata={"help": "optimiser steps; -1: --num_train_epochs counts"}
    )
    per_device_train_batch_size: int = field(default=2, metadata={"help": "rows per micro-batch"})
    gradient_accumulation_steps: int = field(
        default=256, metadata={"help": "micro-batches per optimiser step and rank"}
    )
    bf16: bool = field(default=True, metadata={"help": "compute in bf16, weights stay in fp32"})
    seed: int = field(default=0, metadata={"help": "seed of everything random"})
    logging_steps: float = field(default=10, metadata={"help": "steps between log lines"})
    save_steps: float = field(default=100, metadata={"help": "steps between checkpoints"})
    save_total_limit: int | None = field(default=1, metadata={"help": "checkpoints kept"})
    eval_strategy: str = field(
        default="steps", metadata={"help": "when held-out rows are measured: steps, epoch or no"}
    )
    eval_steps: float | None = field(
        default=100, metadata={"help": "steps between measurements of the held-out rows"}
    )
    ddp_find_unused_parameters: bool | None = field(
        default=False, metadata={"help": "search for parameters without gradient; there are none"}
    )
    fsdp_config: dict | str | None = field(
        default=None,
        metadata={
            "help": "shard with FSDP: an existing .json file as in transformers, or any model, "
            "whose layers are then wrapped"
        },
    )

    def __post_init__(self) -> None:
        self._check()
        if self.output_dir is None:
            self.output_dir = os.path.join(self.save_directory, "checkpoints")
        # Rows hold only what the loss needs; the student's signature does not know the half of it.
        self.remove_unused_columns = False
        if not torch.accelerator.is_available():
            self.use_cpu = True  # transformers takes bf16 on a CPU only when told that one is meant
        if self.fsdp_config:
            self.fsdp = self.fsdp or True  # transformers ignores the config without it
            self.fsdp_config = FSDP_DEFAULTS | read_fsdp_config(self.fsdp_config)
            if self.activation_checkpointing or self.gradient_checkpointing:
                # FSDP's own, which does not gather a layer a second time.
                self.fsdp_config["activation_checkpointing"] = True
                self.activation_checkpointing = self.gradient_checkpointing = None
        super().__post_init__()
        if self.fsdp:
            # Sum gradients in shards; else every rank holds whole ones until the step's end.
            kwargs = self.accelerator_config.gradient_accumulation_kwargs or {}
            self.accelerator_config.gradient_accumulation_kwargs = {
                "sync_each_batch": True
            } | kwargs

    def _check(self) -> None:
        problems = []
        if self.save_directory is None:
            problems.append("--save_directory is required: name the folder for the student")
        if self.temperature <= 0:
            problems.append(f"temperature={self.temperature}: choose a number above 0")
        for name in ("kl_loss_weight", "cosine_loss_weight"):
            if getattr(self, name) < 0:
                problems.append(f"{name}={getattr(self, name)}: choose 0 or more")
        if not any(self.loss_weights[:3]):
            problems.append("every loss term is off: leave at least one on, with a weight above 0")
        for name in ("per_device_train_batch_size", "gradient_accumulation_steps"):
            if getattr(self, name) < 1:
                problems.append(f"{name}={getattr(self, name)}: choose 1 or more")
        if self.learning_rate < 0:
            problems.append(f"learning_rate={self.learning_rate}: choose 0 or more")
        if self.warmup_steps < 0:
            problems.append(f"warmup_steps={self.warmup_steps}: choose 0 or more")
        if self.dry_run_ranks is not None and self.dry_run_ranks < 1:
            problems.append(f"dry_run_ranks={self.dry_run_ranks}: choose 1 or more")
        if self.use_liger_kernel and not torch.cuda.is_available():
            problems.append("use_liger_kernel: there is no CUDA GPU for its kernels, leave it out")
        elif self.use_liger_kernel and not is_liger_kernel_available():
            problems.append("use_liger_kernel: install liger-kernel first, or leave it out")
        if self.max_steps == 0 or self.max_steps < -1:
            problems.append(f"max_steps={self.max_steps}: choose 1 or more, or -1 to count epochs")
        if problems:
            raise ValueError("; ".join(problems))

    @property
    def compute_dtype(self) -> torch.dtype:
        if self.bf16:
            return torch.bfloat16
        return torch.float16 if self.fp16 else torch.float32

    @property
    def loss_weights(self) -> LossWeights:
        return LossWeights(
            cross_entropy=float(self.use_cross_entropy),
            kl=self.kl_loss_weight * self.use_kl_loss,
            cosine=self.cosine_loss_weight * self.use_cosine_loss,
            temperature=self.temperature,
        )


def read_fsdp_config(fsdp_config: dict | str) -> dict:
    """A config as it is, as text, in a file, or for the layers of the model that is named.

    Raises ValueError for what is none of these, and for FSDP1, which cannot shard the teacher.
    """
    values: Any = fsdp_config
    if isinstance(fsdp_config, str):
        text = fsdp_config
        if not text.startswith("{"):
            if not fsdp_config.endswith(".json"):
                return {"transformer_layer_cls_to_wrap": layer_classes(fsdp_config)}
            if not os.path.isfile(fsdp_config):
                raise ValueError(
                    f"fsdp_config={fsdp_config}: no such file; name a .json file or a model"
                )
            text = Path(fsdp_config).read_text(encoding="utf-8")
        try:
            values = json.loads(text)
        except ValueError as error:
            raise ValueError(f"fsdp_config={fsdp_config} is not JSON: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"fsdp_config={fsdp_config}: write an object of settings")
    values = {name.removeprefix("fsdp_"): value for name, value in values.items()}
    if str(values.get("version", 2)) != "2":
        raise ValueError(f"fsdp_config: version={values['version']}: choose 2, or leave it out")
    return values


def layer_classes(model_name_or_path: str) -> list[str]:
    """Class names of a language model's layers."""
    try:
        config = as_bert_config(AutoConfig.from_pretrained(model_name_or_path))
    except (OSError, ValueError) as error:
        raise ValueError(
            f"fsdp_config={model_name_or_path}: neither a .json file nor a model that can be read "
            f"here ({error})"
        ) from error
    path = architecture_of(config).layers  # or a line that says why there are none
    layers = empty_model(config).get_submodule(path)
    return sorted({type(layer).__name__ for layer in layers})
