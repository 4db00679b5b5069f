"""Every flag of transformers' TrainingArguments, with the paper's settings as defaults, and the
flags of saving, `--dry_run` and the loss.
"""

import os
from dataclasses import dataclass, field

import torch
from transformers import TrainingArguments
from transformers.utils import is_liger_kernel_available

from train.loss import LossWeights

SAVE_DTYPES = ("float32", "bfloat16", "float16")

FSDP_DEFAULTS = {"cpu_ram_efficient_loading": True, "state_dict_type": "SHARDED_STATE_DICT"}
"""One rank reads the weights, and each rank writes its own share of a checkpoint."""


@dataclass
class DistillationArguments(TrainingArguments):
    """Flags of training. The defaults are those of arXiv 2510.05064, which trained on 4 ranks."""

    _argument_group_name = "training: flags of transformers, of saving, --dry_run and the loss"

    save_directory: str | None = field(
        default=None, metadata={"help": "folder for the trained student (required)"}
    )
    output_dir: str | None = field(
        default=None,
        metadata={"help": "folder for checkpoints (default: save_directory/checkpoints)"},
    )
    save_dtype: str = field(
        default="float32",
        metadata={"help": "dtype of the saved student", "choices": SAVE_DTYPES},
    )

    dry_run: bool = field(
        default=False,
        metadata={"help": "print what the run would need, from configs alone, and exit"},
    )
    dry_run_ranks: int | None = field(
        default=None,
        metadata={"help": "number of ranks that --dry_run assumes (default: those it runs on)"},
    )

    use_cross_entropy: bool = field(
        default=True, metadata={"help": "train on the next or masked token"}
    )
    use_kl_loss: bool = field(
        default=True, metadata={"help": "train on the teacher's distribution of that token"}
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
        default=0.01, metadata={"help": "warm-up steps, or their share of all steps if below 1"}
    )
    max_steps: int = field(
        default=500, metadata={"help": "optimizer steps; -1 to use --num_train_epochs"}
    )
    per_device_train_batch_size: int = field(default=2, metadata={"help": "rows per micro-batch"})
    gradient_accumulation_steps: int = field(
        default=256, metadata={"help": "micro-batches per optimizer step and rank"}
    )
    bf16: bool = field(default=True, metadata={"help": "compute in bf16; weights stay in fp32"})
    seed: int = field(default=0, metadata={"help": "seed of all random numbers"})
    logging_steps: float = field(default=10, metadata={"help": "steps between log lines"})
    save_steps: float = field(default=100, metadata={"help": "steps between checkpoints"})
    save_total_limit: int | None = field(default=1, metadata={"help": "checkpoints to keep"})
    eval_strategy: str = field(
        default="steps", metadata={"help": "when to evaluate on held-out rows: steps, epoch or no"}
    )
    eval_steps: float | None = field(
        default=100, metadata={"help": "steps between evaluations on held-out rows"}
    )
    ddp_find_unused_parameters: bool | None = field(
        default=False, metadata={"help": "search for parameters without gradients (there are none)"}
    )
    torch_compile: bool | None = field(
        default=None, metadata={"help": "compile layers and loss (default: on CUDA GPUs)"}
    )
    fsdp_config: dict | str | None = field(
        default=None,
        metadata={
            "help": "shard with FSDP: an existing .json file as in transformers, or a model whose "
            "layers are to be wrapped, usually the teacher"
        },
    )

    def __post_init__(self) -> None:
        self._check()
        if self.output_dir is None:
            self.output_dir = os.path.join(self.save_directory, "checkpoints")
        # Rows hold only what the loss needs, which the student's own signature does not list.
        self.remove_unused_columns = False
        if not torch.accelerator.is_available():
            self.use_cpu = True  # without it transformers refuses bf16 on a CPU
        if self.torch_compile is None:
            self.torch_compile = torch.cuda.is_available()
        if self.fsdp_config:
            from train.fsdp_config import read_fsdp_config  # imports models, which takes a second

            self.fsdp = self.fsdp or True  # transformers ignores the config without it
            self.fsdp_config = FSDP_DEFAULTS | read_fsdp_config(self.fsdp_config)
            if self.activation_checkpointing or self.gradient_checkpointing:
                # FSDP's own checkpointing does not gather a layer a second time.
                self.fsdp_config["activation_checkpointing"] = True
                self.activation_checkpointing = self.gradient_checkpointing = None
        super().__post_init__()

    def _check(self) -> None:
        """Raise ValueError with all problems of these flags."""
        least = dict.fromkeys(
            ("kl_loss_weight", "cosine_loss_weight", "learning_rate", "warmup_steps"), 0
        ) | dict.fromkeys(
            ("per_device_train_batch_size", "gradient_accumulation_steps", "dry_run_ranks"), 1
        )
        problems = [
            f"{name}={getattr(self, name)}: choose {minimum} or more"
            for name, minimum in least.items()
            if getattr(self, name) is not None and getattr(self, name) < minimum
        ]
        if self.save_directory is None:
            problems.append("--save_directory is required: name the folder for the student")
        if self.temperature <= 0:
            problems.append(f"temperature={self.temperature}: choose a number above 0")
        if not self.loss_weights.active_terms:
            problems.append("every loss term is off: leave at least one on, with a weight above 0")
        if self.use_liger_kernel and not torch.cuda.is_available():
            problems.append("use_liger_kernel: its kernels need a CUDA GPU, leave it out")
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
            compile_backend=self.torch_compile_backend if self.torch_compile else None,
        )
