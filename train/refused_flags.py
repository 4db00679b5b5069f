"""Flags of transformers' TrainingArguments that would do nothing, here at all or together with
others, and what to do instead.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import MISSING, fields
from typing import TYPE_CHECKING, Any, NamedTuple

from train.json_flags import CHECKPOINTING_KWARGS, json_problems

if TYPE_CHECKING:
    from train.training_args import DistillationArguments

TRAINER_EVALUATION = (
    "held-out rows are evaluated by the distillation loss, which has no predictions"
)
UPLOAD = "only the finished student is uploaded, once"
LOADING = "rows are tokenized before they are read, and a thread fetches the next step"

REFUSED = {
    "auto_find_batch_size": "it would change the number of rows per step, choose a batch size",
    "average_tokens_across_devices": "the loss is always a mean over the tokens of all ranks",
    "batch_eval_metrics": TRAINER_EVALUATION,
    "bf16_full_eval": "evaluation computes in the dtype of training",
    "dataloader_drop_last": "every row counts, and short steps are weighted by their tokens",
    "dataloader_in_order": LOADING,
    "dataloader_multiprocessing_context": LOADING,
    "dataloader_num_workers": LOADING,
    "dataloader_persistent_workers": LOADING,
    "dataloader_pin_memory": LOADING,
    "dataloader_prefetch_factor": LOADING,
    "debug": "a loss or gradient that is not finite already stops the run",
    "deepspeed": "shard with --fsdp_config",
    "do_eval": "use --eval_strategy",
    "do_predict": "use evaluate.evaluate",
    "do_train": "this command always trains",
    "enable_jit_checkpoint": "SIGTERM already leaves a checkpoint",
    "eval_accumulation_steps": TRAINER_EVALUATION,
    "eval_do_concat_batches": TRAINER_EVALUATION,
    "eval_use_gather_object": TRAINER_EVALUATION,
    "fp16_full_eval": "evaluation computes in the dtype of training",
    "greater_is_better": "every metric here is better the lower it is",
    "hub_always_push": UPLOAD,
    "hub_private_repo": "repositories are private unless --public is given",
    "hub_revision": "the student is uploaded to the main branch",
    "hub_strategy": UPLOAD,
    "hub_token": "log in with `hf auth login` or set HF_TOKEN, run.json records the command line",
    "ignore_data_skip": "a resumed run continues with the rows that come next",
    "include_for_metrics": TRAINER_EVALUATION,
    "include_num_input_tokens_seen": "every line of the log has tokens_seen",
    "label_names": "the labels are the text's own tokens",
    "label_smoothing_factor": "the cross entropy is that of the tokens, raise --kl_loss_weight",
    "length_column_name": "lengths are those of the rows",
    "local_rank": "start several processes with torchrun",
    "logging_nan_inf_filter": "a loss that is not finite stops the run",
    "optim_target_modules": "it belongs to optimizers that are not available here",
    "parallelism_config": "shard with --fsdp_config",
    "prediction_loss_only": TRAINER_EVALUATION,
    "remove_unused_columns": "rows hold only what the loss reads",
    "restore_callback_states_from_checkpoint": "no callback here has a state to restore",
    "save_on_each_node": "all nodes must see one file system",
    "use_cache": "training computes no token twice",
}
"""Why a flag is refused, by name."""

_NO_OPTIONS = (
    "adamw_torch", "adamw_torch_fused", "adafactor", "adamw_bnb_8bit", "adamw_8bit", "lion_32bit",
    "lion_8bit", "paged_adamw_32bit", "paged_adamw_8bit", "paged_lion_32bit", "paged_lion_8bit",
    "rmsprop_bnb", "rmsprop_bnb_8bit", "rmsprop_bnb_32bit",
)  # fmt: skip
OPTIMIZERS = dict.fromkeys(_NO_OPTIONS, ()) | {
    "sgd": ("momentum", "dampening", "nesterov"),
    "adagrad": ("lr_decay", "eps"),
    "rmsprop": ("momentum", "alpha", "eps", "centered"),
    **dict.fromkeys(
        ("adamw_torch_4bit", "adamw_torch_8bit"), ("block_size", "bf16_stochastic_round")
    ),
    **dict.fromkeys(
        ("ademamix", "ademamix_8bit", "paged_ademamix_32bit", "paged_ademamix_8bit"),
        ("beta1", "beta2", "beta3", "alpha", "eps", "t_alpha", "t_beta3"),
    ),
    "stable_adamw": ("max_lr", "kahan_sum", "decouple_lr"),
}
"""Values of `--optim` that work with this trainer, and the keys of `--optim_args` that act. The
others update layer by layer during the backward pass, keep the weights to save apart from those
that train, or need other hardware. Weight decay is always that of `--weight_decay`.
"""
WITHOUT_MOMENTS = (
    "sgd", "adafactor", "adagrad", "rmsprop", "rmsprop_bnb", "rmsprop_bnb_8bit", "rmsprop_bnb_32bit"
)  # fmt: skip
"""Optimizers that read neither `--adam_beta1` and `--adam_beta2` nor `--adam_epsilon`."""
LION = ("lion_32bit", "lion_8bit", "paged_lion_32bit", "paged_lion_8bit")
"""Optimizers that read the betas alone."""


class Silent(NamedTuple):
    """Flags that do nothing together with others."""

    flags: tuple[str, ...]
    is_silent: Callable[[DistillationArguments], bool]
    because: str
    """The rest of a message that begins with the flag. `{NAME}` is the value of a flag."""


def _value(flag: Any) -> Any:
    """Return the value of a flag that may have been parsed into an enumeration already."""
    return getattr(flag, "value", flag)


NAME_RUNS = ("comet_ml", "dagshub", "mlflow", "swanlab", "trackio", "wandb")
"""Trackers that know names of runs."""
DDP_ONLY = ("ddp_bucket_cap_mb", "ddp_broadcast_buffers", "ddp_static_graph")
IN_CONTEXT = (
    Silent(
        CHECKPOINTING_KWARGS,
        lambda args: not (args.activation_checkpointing or args.gradient_checkpointing),
        "only applies with --activation_checkpointing",
    ),
    Silent(
        (*CHECKPOINTING_KWARGS, *DDP_ONLY, "ddp_find_unused_parameters"),
        lambda args: bool(args.fsdp or args.fsdp_config),
        "has no effect with --fsdp_config, leave it out",
    ),
    Silent(
        ("liger_kernel_config",),
        lambda args: not args.use_liger_kernel,
        "only applies with --use_liger_kernel",
    ),
    Silent(
        ("hub_model_id", "public"),
        lambda args: not args.push_to_hub,
        "only applies with --push_to_hub",
    ),
    Silent(("dry_run_ranks",), lambda args: not args.dry_run, "only applies with --dry_run"),
    Silent(
        ("torch_compile_backend", "torch_compile_mode"),
        lambda args: args.torch_compile is False,
        "only applies without --torch_compile False",
    ),
    Silent(
        ("torch_compile_mode",),
        lambda args: args.torch_compile_backend not in (None, "inductor"),
        "only applies with --torch_compile_backend inductor",
    ),
    Silent(
        ("adam_beta1", "adam_beta2", "adam_epsilon"),
        lambda args: _value(args.optim) in WITHOUT_MOMENTS,
        "has no effect with --optim {optim}, leave it out",
    ),
    Silent(
        ("adam_epsilon",),
        lambda args: _value(args.optim) in LION,
        "has no effect with --optim {optim}, leave it out",
    ),
    Silent(
        ("warmup_steps",),
        lambda args: (
            args.warmup_steps > 0
            and _value(args.lr_scheduler_type) in ("constant", "reduce_lr_on_plateau", "greedy")
        ),
        "has no effect with --lr_scheduler_type {lr_scheduler_type}, leave it out",
    ),
    Silent(
        ("lr_scheduler_kwargs",),
        lambda args: _value(args.lr_scheduler_type) in ("constant", "constant_with_warmup"),
        "has no effect with --lr_scheduler_type {lr_scheduler_type}, leave it out",
    ),
    Silent(
        ("logging_steps",),
        lambda args: _value(args.logging_strategy) != "steps",
        "has no effect with --logging_strategy {logging_strategy}, leave it out",
    ),
    Silent(
        ("eval_steps",),
        lambda args: _value(args.eval_strategy) != "steps",
        "has no effect with --eval_strategy {eval_strategy}, leave it out",
    ),
    Silent(
        ("eval_delay", "metric_for_best_model", "load_best_model_at_end"),
        lambda args: _value(args.eval_strategy) == "no",
        "has no effect with --eval_strategy no, leave it out",
    ),
    Silent(
        ("metric_for_best_model",),
        lambda args: (
            _value(args.save_strategy) == "no"
            and _value(args.lr_scheduler_type) not in ("reduce_lr_on_plateau", "greedy")
        ),
        "has no effect with --save_strategy no, leave it out",
    ),
    Silent(
        ("save_strategy",),
        lambda args: _value(args.save_strategy) == "best" and _value(args.eval_strategy) == "no",
        "best only applies with --eval_strategy steps or epoch",
    ),
    Silent(
        ("save_steps",),
        lambda args: _value(args.save_strategy) != "steps",
        "has no effect with --save_strategy {save_strategy}, leave it out",
    ),
    Silent(
        ("save_total_limit",),
        lambda args: _value(args.save_strategy) == "no",
        "has no effect with --save_strategy no, leave it out",
    ),
    Silent(
        ("run_name",),
        lambda args: not _trackers(args) & {*NAME_RUNS, "all"},
        f"only applies with --report_to {', '.join(NAME_RUNS[:-1])} or {NAME_RUNS[-1]}",
    ),
    Silent(
        ("project", "trackio_space_id", "trackio_bucket_id", "trackio_static_space_id"),
        lambda args: not _trackers(args) & {"trackio", "all"},
        "only applies with --report_to trackio",
    ),
)
"""Flags that would do nothing together with other flags. What the machine or the launch makes
silent, `ignored_flags` says. A loss term that is switched off may keep its weight, so that a switch
can be added to any command.
"""

ON_SEVERAL_PROCESSES = (
    *DDP_ONLY, "ddp_backend", "ddp_find_unused_parameters", "log_level_replica", "log_on_each_node",
)  # fmt: skip
"""Flags that a single process has no use for. They are left in place, with a warning, so that one
command serves any number of processes.
"""

NOTHING = (None, "", [])
"""Values that say the same: the parser turns one into another."""


def given_flags(args: DistillationArguments) -> set[str]:
    """Return the names of all flags that differ from their defaults."""
    given = set()
    for field in fields(args):
        value = getattr(args, field.name)
        default = field.default if field.default_factory is MISSING else field.default_factory()
        if value != default and not (value in NOTHING and default in NOTHING):
            given.add(field.name)
    return given


def refused_flags(args: DistillationArguments) -> list[str]:
    """Return one line per flag that is given and would not act. Called before transformers fills
    in values of its own.
    """
    given = given_flags(args)
    if args.greater_is_better is False:
        given.discard("greater_is_better")
    problems = [f"{name} is not available: {REFUSED[name]}" for name in sorted(given & {*REFUSED})]
    values = {name: _value(getattr(args, name)) for name in given}
    problems += [
        f"{name} {row.because.format_map(values)}"
        for row in IN_CONTEXT
        for name in row.flags
        if name in given and row.is_silent(args)
    ]
    problems += optimizer_problems(args) + json_problems(args)
    sampling = _value(args.train_sampling_strategy)
    if sampling not in ("random", "sequential", "group_by_length"):
        problems.append(
            f"train_sampling_strategy={sampling}: choose random, sequential or group_by_length"
        )
    return problems


def ignored_flags(args: DistillationArguments, is_single: bool) -> list[str]:
    """Return one line per flag that is given and that this launch or machine has no use for."""
    given = given_flags(args)
    lines = [
        f"--{name} has no effect on a single process"
        for name in ON_SEVERAL_PROCESSES
        if name in given and is_single
    ]
    if is_single and args.accelerator_config.gradient_accumulation_kwargs:
        lines.append("--accelerator_config has no effect on a single process")
    if "torch_empty_cache_steps" in given and args.device.type == "cpu":
        lines.append("--torch_empty_cache_steps has no effect on CPUs")
    return lines


def optimizer_problems(args: DistillationArguments) -> list[str]:
    """Return problems with `--optim` and the keys of `--optim_args`."""
    optimizer = _value(args.optim)
    if optimizer not in OPTIMIZERS:
        return [f"optim={optimizer}: choose one of {', '.join(OPTIMIZERS)}"]
    if not args.optim_args:
        return []
    known = OPTIMIZERS[optimizer]
    if not known:
        return [f"optim_args has no effect with --optim {optimizer}, leave it out"]
    problems = []
    for pair in args.optim_args.replace(" ", "").split(","):
        key, _, value = pair.partition("=")
        if key not in known:
            problems.append(
                f"optim_args: {key} has no effect with --optim {optimizer}, choose from "
                f"{', '.join(known)}"
            )
        elif not _is_number_or_switch(value):
            problems.append(f"optim_args: `{pair}` is not {key}=VALUE with a number, True or False")
    return problems


def _is_number_or_switch(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return text.lower() in ("true", "false")
    return True


def _trackers(args: DistillationArguments) -> set[str]:
    given = args.report_to
    return ({given} if isinstance(given, str) else {*(given or ())}) - {"none"}
