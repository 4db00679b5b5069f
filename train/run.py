"""A run of training, from parsed flags to the saved student."""

import dataclasses
import signal
import sys
import tempfile
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import torch
from accelerate.utils import DistributedType
from datasets import IterableDataset
from transformers import (
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    set_seed,
)
from transformers.training_args import ParallelMode

from patching.architectures.lookup import max_positions, read_config
from patching.architectures.models import empty_model, load_model, predicts_masked_tokens
from patching.arguments import CalibrationArguments
from patching.blocks import as_layer_list
from patching.checkpoints.companions import Companions
from patching.cli.command_line import user_errors
from patching.files.outputs import environment, follow_umask, move_into_place, write_json
from patching.patch_order import recommended_order
from patching.recipe import Reference
from patching.running.logits import logit_change
from patching.student_config import StudentConfig
from train.checkpoints import check_resumable, find_checkpoint
from train.choose_layers import choose_layers
from train.data import Rows, Share, load_rows
from train.data_args import DataArguments
from train.dry_run import plan
from train.fp8 import check_fp8, use_fp8
from train.fsdp_config import check_layer_classes
from train.gradient_reduction import choose_reduction
from train.masking import Masking
from train.model_args import ModelArguments
from train.packing import check_separates_documents
from train.sharding import reads_weights, without_weights
from train.speed import check_liger_knows, reuse_freed_memory
from train.student import cast_parameters, new_student, student_companions
from train.teacher_cache import TeacherCache, settings_of
from train.trainer import DistillationTrainer
from train.training_args import DistillationArguments

RUN_FILE_NAME = "run.json"
PLOT_FILE_NAME = "loss.png"


def run(
    model_args: ModelArguments,
    data_args: DataArguments,
    args: DistillationArguments,
    text_args: CalibrationArguments,
) -> None:
    """Distill and save a student. What a user can get wrong ends the process with one line and exit
    code 2, almost all of it before weights load.
    """
    with user_errors():
        teacher_config = read_teacher_config(model_args, data_args.max_length)
        if data_args.packing == "documents":
            attention, max_length = model_args.attn_implementation, data_args.max_length
            check_separates_documents(teacher_config, attention, max_length)
        layer_map = model_args.layer_map(teacher_config)
        if model_args.chooses_layers:
            text = text_args.read_calibration()
            layer_map, reasons = choose_layers(model_args, text, args, teacher_config)
            print_on_main_process(args, reasons)
        if args.dry_run:
            print_on_main_process(
                args,
                plan(
                    teacher_config, layer_map, data_args, args, model_args.teacher_cache is not None
                ),
            )
            return
        check_acceleration(args, teacher_config)
        choose_reduction(args, teacher_config, layer_map, data_args.max_length)
        if model_args.teacher_fp8:
            check_fp8(args)
        tokenizer = AutoTokenizer.from_pretrained(
            model_args.teacher_model_name_or_path,
            revision=model_args.revision,
            trust_remote_code=model_args.trust_remote_code,
        )
        masking = Masking.of(tokenizer) if predicts_masked_tokens(teacher_config) else None
        companions = student_companions(
            Reference(model_args.teacher_model_name_or_path, model_args.revision),
            teacher_config,
            layer_map,
            getattr(torch, args.save_dtype),
            tokenizer,
            model_args.trust_remote_code,
        )
        rows, checkpoint = read_rows(data_args, args, tokenizer)
        cache = open_cache(model_args, args, teacher_config, tokenizer, rows)
    print_on_main_process(
        args,
        f"student of {len(layer_map.kept)} layers from {layer_map.num_teacher_layers}: "
        f"{as_layer_list(layer_map.kept)}",
    )

    set_seed(args.seed)
    with user_errors():
        teacher = load_teacher(model_args, teacher_config, args)
    student = new_student(teacher, layer_map, model_args.random_initialization)
    if cache is None:
        cast_parameters(teacher, args.compute_dtype)
        if model_args.teacher_fp8:
            use_fp8(teacher)
    else:
        teacher = None  # the student has copies of its layers
    if args.device.type == "cpu":
        reuse_freed_memory()
    trainer = DistillationTrainer(
        student,
        teacher,
        layer_map,
        args,
        masking,
        cache,
        train_dataset=rows.train,
        eval_dataset=rows.held_out,
    )
    trainer.train(resume_from_checkpoint=checkpoint)
    if trainer.stop_on_sigterm.stopped:
        exit_after_sigterm(trainer)
    student_config = StudentConfig(layer_map, recommended_order(teacher_config.model_type))
    save_run((model_args, data_args, args, text_args), trainer, student_config, companions)


def read_teacher_config(model_args: ModelArguments, max_length: int) -> PreTrainedConfig:
    """Return the teacher's config. Raises ValueError if it cannot be read, if its architecture is
    not supported or its logits cannot be reproduced, or if rows are longer than its table of
    positions.
    """
    name, revision = model_args.teacher_model_name_or_path, model_args.revision
    config = read_config("teacher", name, revision, model_args.trust_remote_code)
    logit_change(empty_model(config, trust_remote_code=model_args.trust_remote_code))  # raises
    longest = max_positions(config)
    if longest is not None and max_length > longest:
        raise ValueError(
            f"max_length={max_length}: this {config.model_type} model has positions for {longest} "
            f"tokens, choose 2-{longest}"
        )
    return config


def check_acceleration(args: DistillationArguments, teacher_config: PreTrainedConfig) -> None:
    """Switch FSDP off, with a warning, where there is nothing to shard. Raises ValueError if FSDP
    or Liger kernels do not fit the teacher's architecture.

    The documented command has `--fsdp_config`, but one process has nothing to shard, and accelerate
    does not shard on CPUs.
    """
    if args.fsdp:
        reason = None
        if args.parallel_mode != ParallelMode.DISTRIBUTED:
            reason = "on a single process: start it with torchrun"
        elif args.distributed_state.distributed_type == DistributedType.MULTI_CPU:
            reason = "on CPUs: every rank holds the whole student and teacher"
        if reason is None:
            check_layer_classes(args.fsdp_config, teacher_config)
        else:
            warnings.warn(f"--fsdp_config has no effect {reason}", stacklevel=2)
            args.fsdp = args.fsdp_plugin_args = None
            checkpointing = args.fsdp_config.get("activation_checkpointing", False)
            args.activation_checkpointing |= checkpointing
    if args.use_liger_kernel:
        check_liger_knows(teacher_config)


def read_rows(
    data_args: DataArguments, args: DistillationArguments, tokenizer: PreTrainedTokenizerBase
) -> tuple[Rows, str | None]:
    """Return the rows, and the checkpoint to resume from if there is one.

    Raises ValueError for unusable text, for a stream without a number of steps, and for a
    checkpoint that this run cannot resume from.
    """
    share = Share(args.process_index, args.world_size)
    with args.main_process_first(desc="tokenizing"):
        rows = load_rows(data_args, tokenizer, args.seed, share)
    is_stream = isinstance(rows.train, IterableDataset)
    if is_stream and args.max_steps < 0:
        raise ValueError("max_steps=-1: a stream has no length, give a number of --max_steps")
    checkpoint = find_checkpoint(args.resume_from_checkpoint, args.output_dir)
    if checkpoint is not None:
        check_resumable(checkpoint, share, is_stream, is_sharded=bool(args.fsdp))
    return rows, checkpoint


def open_cache(
    model_args: ModelArguments,
    args: DistillationArguments,
    config: PreTrainedConfig,
    tokenizer: PreTrainedTokenizerBase,
    rows: Rows,
) -> TeacherCache | None:
    """Return the cache of the teacher's predictions, if this run reads one.

    Raises ValueError unless the loss needs nothing else, and the cache holds these rows, made by
    the same teacher at the same temperature. A stream's rows are only known during training; their
    number is compared.
    """
    if model_args.teacher_cache is None:
        return None
    if args.loss_weights.cosine:
        raise ValueError(
            "teacher_cache: it has no hidden states, which the cosine term compares; add "
            "--use_cosine_loss False, or leave --teacher_cache out"
        )
    if not args.loss_weights.kl:
        raise ValueError("teacher_cache: only the KL term reads it, and that is off")
    reference = Reference(model_args.teacher_model_name_or_path, model_args.revision)
    cache = TeacherCache(model_args.teacher_cache)
    cache.check(settings_of(reference, config, tokenizer, args.temperature))
    cache.check_holds(rows.held_out or ())
    if not isinstance(rows.train, IterableDataset):
        cache.check_holds(rows.train)
    else:
        needed = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
        cache.check_has_rows(needed * args.max_steps)
    return cache


def load_teacher(
    model_args: ModelArguments, config: PreTrainedConfig, args: DistillationArguments
) -> PreTrainedModel:
    """Return the teacher in its own dtype. Of sharded ranks only the first reads its weights.

    Raises ValueError if its weights are damaged or incomplete.
    """
    trust, attention = model_args.trust_remote_code, model_args.attn_implementation
    if not reads_weights(args):
        settings = {"trust_remote_code": trust, "attn_implementation": attention}
        return without_weights(config, dtype=args.compute_dtype, **settings)
    reference = Reference(model_args.teacher_model_name_or_path, model_args.revision)
    return load_model(reference, "auto", trust, attention)


def exit_after_sigterm(trainer: DistillationTrainer) -> NoReturn:
    print_on_main_process(
        trainer.args,
        f"stopped by SIGTERM at step {trainer.state.global_step}; run the same command with "
        "--resume_from_checkpoint last to continue",
    )
    sys.exit(128 + signal.SIGTERM)


def save_run(
    flags: Sequence[Any],
    trainer: DistillationTrainer,
    student_config: StudentConfig,
    companions: Companions,
) -> None:
    """Save the student and what made it. Files appear in `save_directory` once all are written.

    `flags` are the groups of flags, for run.json. `companions` are the files from the teacher.
    """
    from train.plot import plot_terms  # imports matplotlib

    args, arguments = trainer.args, {}
    for group in flags:
        arguments |= group.to_dict() if group is args else dataclasses.asdict(group)
    values = {
        "arguments": arguments,
        "student": student_config.to_dict(),
        "held_out": held_out_metrics(trainer),
        "log": trainer.state.log_history,
        "environment": environment(),
    }
    save_directory = Path(args.save_directory)
    save_directory.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=save_directory, prefix=".incomplete-") as folder:
        staging = Path(folder)
        trainer.save_student(staging, getattr(torch, args.save_dtype))
        if args.should_save:
            companions.write(staging)
            student_config.save(staging)
            write_json(staging / RUN_FILE_NAME, values)
            plot_terms(trainer.state.log_history, staging / PLOT_FILE_NAME)
            follow_umask(staging)
            move_into_place(staging, save_directory)
    print_on_main_process(args, f"student saved in {save_directory}")


def held_out_metrics(trainer: DistillationTrainer) -> dict[str, float]:
    """Return the finished student's metrics on the held-out rows; empty if none are held out."""
    if trainer.eval_dataset is None:
        return {}
    last_lines = trainer.state.log_history[-2:]  # only the summary of training may come after it
    for line in last_lines:
        if "eval_loss" in line and line["step"] == trainer.state.global_step:
            return {name: value for name, value in line.items() if name.startswith("eval_")}
    return trainer.evaluate()


def print_on_main_process(args: DistillationArguments, text: str) -> None:
    if args.process_index == 0:
        print(text, flush=True)
