"""Distil a student from its teacher.

    torchrun --standalone --nnodes=1 --nproc-per-node=4 --module train.train \\
        --teacher_model_name_or_path TEACHER --save_directory DIR \\
        --dataset EleutherAI/the_pile_deduplicated --fsdp_config TEACHER

One process needs no torchrun: `python -m train.train ...`. The student lies directly in DIR, with
student_config.json (its kept layers), run.json (what made it) and loss.png beside the weights.
--dry_run says what a run would take; --resume_from_checkpoint last goes on with one that stopped;
--kept_layers auto --calibration TEXT chooses the kept layers by looking at the teacher.
"""

import dataclasses
import os
import signal
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import DistributedType
from datasets import IterableDataset
from transformers import AutoTokenizer, PreTrainedConfig, PreTrainedModel, set_seed
from transformers.training_args import ParallelMode

from patching.architectures.checks import check_logits_are_the_heads
from patching.architectures.lookup import max_positions, read_config
from patching.architectures.models import load_model, predicts_masked_tokens
from patching.arguments import CalibrationArguments
from patching.blocks import as_layer_list
from patching.cli.command_line import CommandLineParser, user_errors
from patching.files.outputs import check_writable, environment, follow_umask, write_json
from patching.patch_order import recommended_order
from patching.recipe import Reference
from patching.student_config import StudentConfig
from train.checkpoints import check_resumable, find_checkpoint
from train.choose_layers import choose_layers
from train.data import Rows, Share, load_rows
from train.data_args import DataArguments
from train.dry_run import plan
from train.masking import Masking
from train.model_args import ModelArguments
from train.plot import plot_terms
from train.sharding import check_layer_classes, reads_weights, without_weights
from train.speed import check_liger_knows
from train.student import cast_parameters, new_student
from train.trainer import DistillationTrainer
from train.training_args import DistillationArguments

RUN_FILE_NAME = "run.json"
PLOT_FILE_NAME = "loss.png"


def main(argv: list[str] | None = None) -> None:
    with user_errors():
        parser = CommandLineParser(
            (ModelArguments, DataArguments, DistillationArguments, CalibrationArguments),
            prog="train.train",
            description=__doc__,
        )
        model_args, data_args, args, text_args = parser.parse_args_into_dataclasses(argv)
        save_directory = Path(args.save_directory)
        check_save_directory(save_directory)
        teacher_name = model_args.teacher_model_name_or_path
        revision, trust = model_args.revision, model_args.trust_remote_code
        teacher_config = read_config("teacher", teacher_name, revision, trust)
        check_logits_are_the_heads(teacher_config)
        check_row_length(teacher_config, data_args.max_length)
        layer_map = model_args.layer_map(teacher_config)
        if model_args.chooses_layers:
            if problems := text_args.check_calibration("--kept_layers auto looks at text"):
                raise ValueError("; ".join(problems))
            layer_map, reasons = choose_layers(
                model_args,
                text_args.read_calibration(),
                args,
                teacher_config,
                AutoTokenizer.from_pretrained(
                    teacher_name, revision=revision, trust_remote_code=trust
                ),
            )
            print_on_main_process(args, reasons)
        elif text_args.calibration is not None:
            raise ValueError("--calibration belongs to --kept_layers auto")
        if args.dry_run:
            print_on_main_process(args, plan(teacher_config, layer_map, data_args, args))
            return
        shard_only_where_there_are_ranks(args)
        if args.fsdp:
            check_layer_classes(args.fsdp_config, teacher_config)
        if args.use_liger_kernel:
            check_liger_knows(teacher_config)
        tokenizer = AutoTokenizer.from_pretrained(
            teacher_name, revision=revision, trust_remote_code=trust
        )
        masking = Masking.of(tokenizer) if predicts_masked_tokens(teacher_config) else None
        with args.main_process_first(desc="tokenising"):
            share = Share(args.process_index, args.world_size)
            rows = load_rows(data_args, tokenizer, args.seed, share)
        check_schedule(args, rows)
        checkpoint = find_checkpoint(args.resume_from_checkpoint, args.output_dir)
        if checkpoint is not None:
            is_stream = isinstance(rows.train, IterableDataset)
            check_resumable(checkpoint, share, is_stream, is_sharded=bool(args.fsdp))
    print_on_main_process(
        args,
        f"student of {len(layer_map.kept)} layers from {layer_map.num_teacher_layers}: "
        f"{as_layer_list(layer_map.kept)}",
    )

    set_seed(args.seed)
    with user_errors():
        teacher = load_teacher(model_args, teacher_config, args)
    student = new_student(teacher, layer_map, model_args.random_initialization)
    cast_parameters(teacher, args.compute_dtype)
    trainer = DistillationTrainer(
        student,
        teacher,
        layer_map,
        args,
        masking,
        train_dataset=rows.train,
        eval_dataset=rows.held_out,
    )
    trainer.train(resume_from_checkpoint=checkpoint)
    if trainer.stop_on_sigterm.stopped:
        print_on_main_process(
            args,
            f"stopped by SIGTERM at step {trainer.state.global_step}; the same command with "
            "--resume_from_checkpoint last goes on from there",
        )
        sys.exit(128 + signal.SIGTERM)
    metrics = held_out_metrics(trainer)

    student_config = StudentConfig(layer_map, recommended_order(teacher_config.model_type))
    run = {
        "arguments": {
            **dataclasses.asdict(model_args),
            **dataclasses.asdict(data_args),
            **args.to_dict(),
            **dataclasses.asdict(text_args),
        },
        "student": student_config.to_dict(),
        "held_out": metrics,
        "log": trainer.state.log_history,
        "environment": environment(),
    }
    save_directory.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=save_directory, prefix=".incomplete-") as folder:
        staging = Path(folder)
        trainer.save_student(staging, getattr(torch, args.save_dtype))
        if args.should_save:
            tokenizer.save_pretrained(staging)
            student_config.save(staging)
            write_json(staging / RUN_FILE_NAME, run)
            plot_terms(trainer.state.log_history, staging / PLOT_FILE_NAME)
            follow_umask(staging)
            move_into_place(staging, save_directory)
    print_on_main_process(args, f"student saved in {save_directory}")


def load_teacher(
    model_args: ModelArguments, config: PreTrainedConfig, args: DistillationArguments
) -> PreTrainedModel:
    """The teacher in its own dtype; of sharded ranks only the first reads its weights.

    Raises ValueError where they are damaged or not all that the config calls for.
    """
    trust, attention = model_args.trust_remote_code, model_args.attn_implementation
    if not reads_weights(args):
        settings = {"trust_remote_code": trust, "attn_implementation": attention}
        return without_weights(config, dtype=args.compute_dtype, **settings)
    reference = Reference(model_args.teacher_model_name_or_path, model_args.revision)
    return load_model(reference, "auto", trust, attention)


def held_out_metrics(trainer: DistillationTrainer) -> dict[str, float]:
    """What the held-out rows say of the finished student; empty where none are held out."""
    if trainer.eval_dataset is None:
        return {}
    last = trainer.state.log_history[-2:]  # behind it only the summary of the training
    for line in last:
        if "eval_loss" in line and line["step"] == trainer.state.global_step:
            return {name: value for name, value in line.items() if name.startswith("eval_")}
    return trainer.evaluate()


def shard_only_where_there_are_ranks(args: DistillationArguments) -> None:
    """A documented command line holds --fsdp_config; a single process has nothing to shard, and
    accelerate does not shard on CPUs.
    """
    if not args.fsdp:
        return
    if args.parallel_mode != ParallelMode.DISTRIBUTED:
        reason = "on a single process: start it with torchrun"
    elif args.distributed_state.distributed_type == DistributedType.MULTI_CPU:
        reason = "on CPUs: every rank holds the whole student and teacher"
    else:
        return
    warnings.warn(f"--fsdp_config has no effect {reason}", stacklevel=2)
    args.fsdp = args.fsdp_plugin_args = None
    args.activation_checkpointing |= args.fsdp_config.get("activation_checkpointing", False)


def check_row_length(config: PreTrainedConfig, max_length: int) -> None:
    """Raise ValueError where rows are longer than the model's table of positions."""
    longest = max_positions(config)
    if longest is not None and max_length > longest:
        raise ValueError(
            f"max_length={max_length}: this {config.model_type} model has positions for {longest} "
            f"tokens, choose 2-{longest}"
        )


def check_schedule(args: DistillationArguments, rows: Rows) -> None:
    """Raise ValueError for a stream without a number of steps."""
    if isinstance(rows.train, IterableDataset) and args.max_steps < 0:
        raise ValueError("max_steps=-1: a stream has no length, name a number of --max_steps")


def check_save_directory(save_directory: Path) -> None:
    """Raise ValueError where the folder cannot be written to or holds a model already."""
    if (save_directory / "config.json").exists():
        raise ValueError(
            f"{save_directory} holds a model already: name another --save_directory, or remove it"
        )
    check_writable(save_directory)


def move_into_place(staging: Path, folder: Path) -> None:
    """Move a finished checkpoint into its folder, config.json last: without it nothing loads."""
    for path in sorted(staging.iterdir(), key=lambda path: path.name == "config.json"):
        os.replace(path, folder / path.name)


def print_on_main_process(args: DistillationArguments, text: Any) -> None:
    if args.process_index == 0:
        print(text, flush=True)


if __name__ == "__main__":
    main()
