"""Distill a student from a teacher.

    TEACHER=Qwen/Qwen3-4B-Base
    torchrun --standalone --nnodes=1 --nproc-per-node=4 --module train.train \\
        --teacher_model_name_or_path $TEACHER --save_directory student \\
        --dataset EleutherAI/the_pile_deduplicated --fsdp_config $TEACHER

A single process needs no torchrun: `python -m train.train ...`. The trained student is saved in
--save_directory, with student_config.json (its kept layers), run.json (arguments, log and
environment) and loss.png. --sft_dataset CHATS trains on chats after the text. --dry_run prints what
a run would need, --resume_from_checkpoint last continues a run that was stopped, and --kept_layers
auto --calibration TEXT chooses the kept layers by running the teacher.
"""

from pathlib import Path
from typing import Any

from patching.arguments import CalibrationArguments
from patching.cli.command_line import CommandLineParser, run_command, user_errors
from patching.files.outputs import check_writable, num_ranks
from train.chats.arguments import ChatArguments
from train.data_args import DataArguments
from train.model_args import ModelArguments
from train.training_args import DistillationArguments


def main(argv: list[str] | None = None) -> None:
    with user_errors():
        flags = parse_flags(argv)

    # Imported here, so that --help and wrong flags do not wait for the trainer.
    from train.run import run

    run(*flags)


def parse_flags(argv: list[str] | None) -> tuple[Any, ...]:
    """Return all flags in the groups that declare them. Raises ValueError for those that do not go
    together, and ends the command for those that do not exist.
    """
    groups = (
        ModelArguments,
        DataArguments,
        ChatArguments,
        DistillationArguments,
        CalibrationArguments,
    )
    num_ranks()  # raises for a launch that transformers could not read
    parser = CommandLineParser(groups, prog="train.train", description=__doc__)
    model_args, data_args, chat_args, args, text_args = parser.parse_args_into_dataclasses(argv)
    check_calibration(model_args, text_args)
    if args.order_budget is not None and not data_args.measure_order:
        raise ValueError("order_budget has no effect with --measure_order False, leave it out")
    check_save_directory(Path(args.save_directory), args.resumes)
    return model_args, data_args, chat_args, args, text_args


def check_calibration(model_args: ModelArguments, text_args: CalibrationArguments) -> None:
    """Raise ValueError unless there is calibration text exactly if the kept layers are chosen."""
    if model_args.chooses_layers:
        if problems := text_args.check_calibration("--kept_layers auto needs text"):
            raise ValueError("; ".join(problems))
    elif text_args.calibration is not None:
        raise ValueError("--calibration only applies with --kept_layers auto")


def check_save_directory(save_directory: Path, may_be_finished: bool) -> None:
    """Raise ValueError if the folder cannot be written to, or already holds a model. A resumed run
    may have finished, which `train.saving` recognizes.
    """
    if (save_directory / "config.json").exists() and not may_be_finished:
        raise ValueError(
            f"{save_directory} already holds a model: name another --save_directory, or remove it"
        )
    check_writable(save_directory)


if __name__ == "__main__":
    run_command(main, "add --resume_from_checkpoint last to go on from the newest checkpoint")
