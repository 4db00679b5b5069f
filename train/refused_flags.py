"""Flags of transformers' TrainingArguments that would do nothing here, and what to do instead."""

from __future__ import annotations

import json
from dataclasses import MISSING, fields
from typing import TYPE_CHECKING, Any

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

OPTIMIZERS = (
    "adamw_torch", "adamw_torch_fused", "adafactor", "sgd", "adagrad", "rmsprop",
    "adamw_torch_4bit", "adamw_torch_8bit", "adamw_bnb_8bit", "adamw_8bit", "ademamix",
    "ademamix_8bit", "lion_32bit", "lion_8bit", "paged_adamw_32bit", "paged_adamw_8bit",
    "paged_ademamix_32bit", "paged_ademamix_8bit", "paged_lion_32bit", "paged_lion_8bit",
    "rmsprop_bnb", "rmsprop_bnb_8bit", "rmsprop_bnb_32bit", "stable_adamw",
)  # fmt: skip
"""Values of `--optim` that work with this trainer. The others update layer by layer during the
backward pass, keep the weights to save apart from those that train, or need other hardware.
"""
WITHOUT_OPTIONS = ("adamw_torch", "adamw_torch_fused", "adafactor")
"""Optimizers that read no `--optim_args`."""

NEEDED = {
    "activation_checkpointing_kwargs": ("activation_checkpointing", "gradient_checkpointing"),
    "gradient_checkpointing_kwargs": ("activation_checkpointing", "gradient_checkpointing"),
    "liger_kernel_config": ("use_liger_kernel",),
    "hub_model_id": ("push_to_hub",),
    "public": ("push_to_hub",),
    "dry_run_ranks": ("dry_run",),
}
"""Flags that act only together with one of others."""

DDP_ONLY = ("ddp_bucket_cap_mb", "ddp_broadcast_buffers", "ddp_static_graph")
OF_TRACKERS = {
    "run_name": (),  # of any tracker
    "project": ("trackio",),
    "trackio_space_id": ("trackio",),
    "trackio_bucket_id": ("trackio",),
    "trackio_static_space_id": ("trackio",),
}
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
    for name, others in NEEDED.items():
        if name in given and not given & {*others}:
            problems.append(f"{name} only applies with --{others[0]}")
    if args.fsdp or args.fsdp_config:
        for name in ("activation_checkpointing_kwargs", "gradient_checkpointing_kwargs", *DDP_ONLY):
            if name in given:
                problems.append(f"{name} has no effect with --fsdp_config, leave it out")
    optimizer = getattr(args.optim, "value", args.optim)
    if optimizer not in OPTIMIZERS:
        problems.append(f"optim={optimizer}: choose one of {', '.join(OPTIMIZERS)}")
    elif "optim_args" in given and optimizer in WITHOUT_OPTIONS:
        problems.append(f"optim_args has no effect with --optim {optimizer}, leave it out")
    sampling = getattr(args.train_sampling_strategy, "value", args.train_sampling_strategy)
    if sampling not in ("random", "sequential", "group_by_length"):
        problems.append(
            f"train_sampling_strategy={sampling}: choose random, sequential or group_by_length"
        )
    problems += accelerator_problems(args.accelerator_config)
    trackers = {args.report_to} if isinstance(args.report_to, str) else {*(args.report_to or ())}
    trackers -= {"none"}
    for name, needed in OF_TRACKERS.items():
        if name in given and not (trackers & {*needed, "all"} if needed else trackers):
            problems.append(f"{name} only applies with --report_to {' '.join(needed) or 'TRACKER'}")
    return problems


def accelerator_problems(config: Any) -> list[str]:
    """Return the settings of `--accelerator_config`, a dict or JSON text, that would not act."""
    values = json.loads(config) if isinstance(config, str) and config.startswith("{") else config
    if isinstance(values, str):
        return [f"accelerator_config={values}: give its JSON itself"]
    if not isinstance(values, dict):  # None, or complete already
        return []
    return [
        f"accelerator_config: {name} is not available: rows are shared among ranks so that their "
        "number changes no result"
        for name in sorted(values.keys() - {"gradient_accumulation_kwargs"})
    ]
