"""Every flag of transformers' TrainingArguments, with the paper's settings as defaults, and the
flags of saving, `--dry_run` and the loss.
"""

import os
import warnings
from dataclasses import dataclass, field

import torch
from transformers import TrainingArguments

from train.flag_checks import check_flags
from train.global_batch import DEFAULT_MICRO_BATCHES, DEFAULT_ROWS
from train.loss_weights import CHAT_COSINE_WEIGHT, COSINE_WEIGHT, LossWeights

SAVE_DTYPES = ("float32", "bfloat16", "float16")
DEFAULT_STEPS = 500
DEFAULT_EPOCHS = 3.0

FSDP_DEFAULTS = {"cpu_ram_efficient_loading": True, "state_dict_type": "SHARDED_STATE_DICT"}
"""One rank reads the weights, and each rank writes its own share of a checkpoint."""


@dataclass
class PaperArguments(TrainingArguments):
    """The flags of transformers. The defaults are those of arXiv 2510.05064, which trained on 4
    ranks.
    """

    learning_rate: float = field(default=3e-4, metadata={"help": "peak learning rate"})
    adam_beta2: float = field(default=0.95, metadata={"help": "beta2 of AdamW"})
    weight_decay: float = field(default=0.1, metadata={"help": "weight decay of AdamW"})
    lr_scheduler_type: str = field(default="cosine", metadata={"help": "learning rate schedule"})
    warmup_steps: float = field(
        default=0.01, metadata={"help": "warm-up steps, or their share of all steps if below 1"}
    )
    max_steps: int | None = field(
        default=None,
        metadata={
            "help": f"optimizer steps (default: {DEFAULT_STEPS}, or as --num_train_epochs asks)"
        },
    )
    num_train_epochs: float | None = field(
        default=None,
        metadata={
            "help": "passes over local text, instead of --max_steps (with --max_steps -1: "
            f"{DEFAULT_EPOCHS:g})"
        },
    )
    per_device_train_batch_size: int | None = field(
        default=None, metadata={"help": f"rows per micro-batch (default: {DEFAULT_ROWS})"}
    )
    gradient_accumulation_steps: int | None = field(
        default=None,
        metadata={
            "help": f"micro-batches per optimizer step and rank (default: {DEFAULT_MICRO_BATCHES})"
        },
    )
    bf16: bool = field(default=True, metadata={"help": "compute in bf16; weights stay in fp32"})
    seed: int = field(default=0, metadata={"help": "seed of all random numbers"})
    logging_steps: float = field(default=10, metadata={"help": "steps between log lines"})
    logging_nan_inf_filter: bool = field(
        default=False,
        metadata={"help": "not available: a loss that is not finite stops the run"},
    )
    remove_unused_columns: bool = field(
        default=False, metadata={"help": "not available: rows hold only what the loss reads"}
    )
    include_num_input_tokens_seen: bool = field(
        default=False, metadata={"help": "not available: every line of the log has tokens_seen"}
    )
    push_to_hub: bool = field(
        default=False,
        metadata={"help": "upload the finished student, never checkpoints, to --hub_model_id"},
    )
    hub_model_id: str | None = field(
        default=None,
        metadata={"help": "hub repository for the student (default: named as save_directory)"},
    )
    data_seed: int | None = field(
        default=None,
        metadata={"help": "seed of held-out documents and the order of text (default: --seed)"},
    )
    save_steps: float = field(default=100, metadata={"help": "steps between checkpoints"})
    save_total_limit: int | None = field(default=1, metadata={"help": "checkpoints to keep"})
    eval_strategy: str = field(
        default="steps", metadata={"help": "when to evaluate on held-out rows: steps, epoch or no"}
    )
    eval_steps: float | None = field(
        default=100, metadata={"help": "steps between evaluations on held-out rows"}
    )
    eval_on_start: bool = field(
        default=True,
        metadata={"help": "evaluate on held-out rows before the first step too"},
    )
    ddp_find_unused_parameters: bool | None = field(
        default=False, metadata={"help": "search for parameters without gradients (there are none)"}
    )
    torch_compile: bool | None = field(
        default=None,
        metadata={
            "help": "compile layers and the elementwise passes of the loss (default: on CUDA GPUs, "
            "and on CPUs in long runs)"
        },
    )
    fsdp_config: dict | str | None = field(
        default=None,
        metadata={
            "help": "shard with FSDP: an existing .json file as in transformers, or a model whose "
            "layers are to be wrapped, usually the teacher"
        },
    )


@dataclass
class DistillationArguments(PaperArguments):
    """All flags of training."""

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

    order_budget: int | None = field(
        default=None,
        metadata={
            "help": "with --measure_order: most models to measure, each on the documents set aside "
            "(default: as many as take the FLOPs of the training, at most 1,000)"
        },
    )

    global_batch_tokens: int | None = field(
        default=None,
        metadata={
            "help": "tokens per optimizer step over all ranks, instead of "
            "--per_device_train_batch_size and --gradient_accumulation_steps"
        },
    )
    global_batch_rows: int | None = field(
        default=None, metadata={"help": "the same, as a number of rows"}
    )

    fsdp_replicas: int = field(
        default=1,
        metadata={
            "help": "with --fsdp_config: groups of ranks that each share a whole copy of the "
            "models, such as one per node (HSDP)"
        },
    )

    public: bool = field(
        default=False, metadata={"help": "with --push_to_hub: make the repository public"}
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
    cosine_loss_weight: float | None = field(
        default=None,
        metadata={
            "help": f"weight of the cosine term (default: {COSINE_WEIGHT:g}, with --sft_dataset "
            f"{CHAT_COSINE_WEIGHT:g})"
        },
    )
    temperature: float = field(
        default=1.0, metadata={"help": "temperature of the KL term", "aliases": ["--T"]}
    )

    def __post_init__(self) -> None:
        self.fsdp = {"true": True, "false": False}.get(str(self.fsdp).lower(), self.fsdp)
        check_flags(self)
        if self.output_dir is None:
            self.output_dir = os.path.join(self.save_directory, "checkpoints")
        if self.per_device_train_batch_size is None:
            self.per_device_train_batch_size = DEFAULT_ROWS
        if self.gradient_accumulation_steps is None:
            self.gradient_accumulation_steps = DEFAULT_MICRO_BATCHES
        if self.max_steps is None:
            self.max_steps = -1 if self.num_train_epochs else DEFAULT_STEPS
        if self.max_steps > 0:
            self.num_train_epochs = 0.0
        elif not self.num_train_epochs:
            self.num_train_epochs = DEFAULT_EPOCHS
        if self.save_strategy == "best" and self.metric_for_best_model is None:
            self.metric_for_best_model = "loss"
        self.hub_private_repo = not self.public  # of trackers' dashboards
        self.greater_is_better = False  # transformers would take eval_kl for an accuracy
        if not torch.accelerator.is_available():
            self.use_cpu = True  # without it transformers refuses bf16 on a CPU
        is_chosen = self.torch_compile is None
        self.compiles_if_long = is_chosen and not torch.accelerator.is_available()
        if is_chosen:
            self.torch_compile = torch.cuda.is_available()
        if self.fsdp or self.fsdp_config:
            from train.fsdp_config import read_fsdp_config  # imports models, which takes a second

            self.fsdp = self.fsdp or True  # transformers ignores the config without it
            whole = {"state_dict_type": "FULL_STATE_DICT"} if self.save_only_model else {}
            self.fsdp_config = FSDP_DEFAULTS | whole | read_fsdp_config(self.fsdp_config or {})
            if self.activation_checkpointing or self.gradient_checkpointing:
                # FSDP's own checkpointing does not gather a layer a second time.
                self.fsdp_config["activation_checkpointing"] = True
                self.activation_checkpointing = self.gradient_checkpointing = None
        super().__post_init__()
        self.compiles_if_long &= not self.torch_compile  # which a backend or a mode asks for
        if self.n_gpu > 1:
            launcher = f"torchrun --standalone --nproc-per-node={self.n_gpu} --module train.train"
            warnings.warn(
                f"one process uses one of {self.n_gpu} GPUs, start `{launcher}` to use all",
                stacklevel=2,
            )
            self._n_gpu = 1  # otherwise Trainer would wrap the student in DataParallel

    @property
    def compute_dtype(self) -> torch.dtype:
        if self.bf16:
            return torch.bfloat16
        return torch.float16 if self.fp16 else torch.float32

    @property
    def resumes(self) -> bool:
        return (self.resume_from_checkpoint or "false").lower() != "false"

    @property
    def text_seed(self) -> int:
        return self.seed if self.data_seed is None else self.data_seed

    @property
    def loss_weights(self) -> LossWeights:
        weight = self.cosine_loss_weight
        return LossWeights(
            cross_entropy=float(self.use_cross_entropy),
            kl=self.kl_loss_weight * self.use_kl_loss,
            cosine=(COSINE_WEIGHT if weight is None else weight) * self.use_cosine_loss,
            temperature=self.temperature,
            compile_backend=self.torch_compile_backend if self.torch_compile else None,
        )


def measuring_dtype(args: DistillationArguments) -> torch.dtype | str:
    """Return the dtype in which models are measured before and after training: the teacher's own,
    or fp32 if training computes in fp32.
    """
    return torch.float32 if args.compute_dtype == torch.float32 else "auto"
