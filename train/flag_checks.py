"""What can be wrong with the flags of training by themselves."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch.optim import SGD
from transformers.utils import is_liger_kernel_available

from train.global_batch import batch_problems
from train.refused_flags import given_flags, refused_flags

if TYPE_CHECKING:
    from train.training_args import DistillationArguments

LARGEST_SEED = 2**32 - 1
"""The largest that NumPy takes."""

LEAST = dict.fromkeys(
    (
        "kl_loss_weight",
        "cosine_loss_weight",
        "learning_rate",
        "warmup_steps",
        "weight_decay",
        "adam_epsilon",
        "max_grad_norm",
        "logging_steps",
        "save_steps",
        "eval_steps",
    ),
    0,
) | dict.fromkeys(
    (
        "per_device_train_batch_size",
        "per_device_eval_batch_size",
        "gradient_accumulation_steps",
        "global_batch_tokens",
        "global_batch_rows",
        "dry_run_ranks",
        "fsdp_replicas",
        "order_budget",
    ),
    1,
)

FSDP_WORDS = ("full_shard", "shard_grad_op", "offload", "auto_wrap")
"""Older values of `--fsdp` that transformers turns into settings of FSDP2."""


def check_flags(args: DistillationArguments) -> None:
    """Raise ValueError with all problems of the flags of training, as they were given."""
    problems = [
        f"{name}={getattr(args, name)}: choose {minimum} or more"
        for name, minimum in LEAST.items()
        if getattr(args, name) is not None and not minimum <= getattr(args, name) < math.inf
    ]
    problems += [
        f"{name}={getattr(args, name)}: choose 0 or more, below 1"
        for name in ("adam_beta1", "adam_beta2")
        if not 0 <= getattr(args, name) < 1
    ]
    problems += seed_problems(seed=args.seed, data_seed=args.data_seed)
    problems += [
        f"{name}_steps=0: choose a number above 0, or --{name}_strategy no"
        for name in ("save", "eval")
        if getattr(args, f"{name}_steps") == 0
    ]
    if args.save_directory is None:
        problems.append("--save_directory is required: name the folder for the student")
    if not 0 < args.temperature < math.inf:
        problems.append(f"temperature={args.temperature}: choose a number above 0")
    if not args.loss_weights.active_terms:
        problems.append("every loss term is off: leave at least one on, with a weight above 0")
    if args.use_liger_kernel and not torch.cuda.is_available():
        problems.append("use_liger_kernel: its kernels need a CUDA GPU, leave it out")
    elif args.use_liger_kernel and not is_liger_kernel_available():
        problems.append("use_liger_kernel: install liger-kernel first, or leave it out")
    problems += (
        batch_problems(args)
        + length_problems(args)
        + precision_problems(args)
        + best_model_problems(args)
        + fsdp_problems(args)
        + compile_problems(args)
    )
    problems += refused_flags(args)
    if problems:
        raise ValueError("; ".join(problems))


def seed_problems(**seeds: int | None) -> list[str]:
    """Return problems with seeds, by the names of their flags."""
    return [
        f"{name}={seed}: choose 0 or more, at most {LARGEST_SEED:,}"
        for name, seed in seeds.items()
        if seed is not None and not 0 <= seed <= LARGEST_SEED
    ]


def length_problems(args: DistillationArguments) -> list[str]:
    steps, epochs = args.max_steps, args.num_train_epochs
    if steps is not None and (steps == 0 or steps < -1):
        return [f"max_steps={steps}: choose 1 or more, or -1 to count epochs"]
    if epochs is not None and not 0 < epochs < math.inf:
        return [f"num_train_epochs={epochs}: choose a number above 0"]
    if epochs and steps is not None and steps > 0:
        return [
            f"--max_steps {steps} and --num_train_epochs {epochs} both set the length: give one"
        ]
    return []


def precision_problems(args: DistillationArguments) -> list[str]:
    problems = []
    on_cpu = args.use_cpu or not torch.accelerator.is_available()
    if args.fp16 and on_cpu:
        problems.append("fp16 needs a GPU: leave it out, or use --bf16")
    if args.fp16 and args.bf16:
        problems.append("--fp16 and --bf16 are both on, and bf16 is the default: add --bf16 False")
    if args.ddp_timeout != type(args).ddp_timeout and on_cpu:
        problems.append("ddp_timeout has no effect on CPUs, leave it out")
    return problems


def best_model_problems(args: DistillationArguments) -> list[str]:
    """Return problems with choosing the best checkpoint by a held-out metric."""
    problems, metric = [], args.metric_for_best_model
    known = ["loss", *args.loss_weights.for_evaluation().active_terms]
    if metric is not None and metric.removeprefix("eval_") not in known:
        problems.append(f"metric_for_best_model={metric}: choose one of {', '.join(known)}")
    if args.load_best_model_at_end and args.save_only_model and (args.fsdp or args.fsdp_config):
        problems.append(
            "--load_best_model_at_end cannot read --save_only_model checkpoints of FSDP"
        )
    return problems


def fsdp_problems(args: DistillationArguments) -> list[str]:
    """Return problems with `--fsdp`, which transformers also reads as words."""
    if args.fsdp is False and args.fsdp_config:
        return ["--fsdp False has no effect with --fsdp_config, which shards by itself: give one"]
    words = args.fsdp.split() if isinstance(args.fsdp, str) else args.fsdp
    return [
        f"fsdp={word}: choose True, or set up FSDP2 with --fsdp_config and --fsdp_replicas"
        for word in (words if isinstance(words, list) else ())
        if word not in FSDP_WORDS
    ]


def compile_problems(args: DistillationArguments) -> list[str]:
    """Return problems with backends and modes that torch.compile does not have."""
    problems, backend, mode = [], args.torch_compile_backend, args.torch_compile_mode
    if backend is not None and backend not in (known := torch.compiler.list_backends(())):
        problems.append(f"torch_compile_backend={backend}: choose one of {', '.join(known)}")
    if mode is not None:
        from torch._inductor import list_mode_options  # takes a second

        if mode not in (known := list_mode_options()):
            problems.append(f"torch_compile_mode={mode}: choose one of {', '.join(known)}")
    return problems


def check_installed(args: DistillationArguments) -> None:
    """Raise ValueError or ImportError if a tracker or an optimizer needs a package that is not
    installed, or if a schedule does not have the arguments it is given. Called once the flags are
    complete.
    """
    from transformers import Trainer, get_scheduler
    from transformers.integrations import get_reporting_integration_callbacks

    for tracker in args.report_to:
        try:
            for callback in get_reporting_integration_callbacks([tracker]):
                callback()
        except (ValueError, RuntimeError, ImportError) as error:
            raise ValueError(f"report_to={tracker}: {error}") from error
    try:
        Trainer.get_optimizer_cls_and_kwargs(args)
    except (ValueError, ImportError) as error:
        raise ValueError(f"optim={args.optim.value}: {error}") from error
    schedule, settings = args.lr_scheduler_type.value, args.lr_scheduler_kwargs or {}
    try:
        get_scheduler(schedule, SGD([torch.zeros(1)]), 1, 2, scheduler_specific_kwargs=settings)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"lr_scheduler_kwargs={settings}: --lr_scheduler_type {schedule} needs others ({error})"
        ) from error


def needs_held_out_rows(args: DistillationArguments) -> list[str]:
    """Return the given flags that act on held-out rows alone."""
    schedule = args.lr_scheduler_type.value
    given = given_flags(args) & {"eval_steps", "eval_delay", "per_device_eval_batch_size"}
    return [
        *sorted(given),
        *(
            name
            for name, is_given in (
                ("eval_strategy epoch", args.eval_strategy.value == "epoch"),
                ("load_best_model_at_end", args.load_best_model_at_end),
                ("metric_for_best_model", args.metric_for_best_model is not None),
                ("save_strategy best", args.save_strategy.value == "best"),
                (f"lr_scheduler_type {schedule}", schedule in ("reduce_lr_on_plateau", "greedy")),
            )
            if is_given
        ),
    ]
