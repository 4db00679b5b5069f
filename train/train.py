"""Distill a student from a teacher.

    TEACHER=Qwen/Qwen3-4B-Base
    torchrun --standalone --nnodes=1 --nproc-per-node=4 --module train.train \\
        --teacher_model_name_or_path $TEACHER --save_directory student \\
        --dataset EleutherAI/the_pile_deduplicated --fsdp_config $TEACHER

A single process needs no torchrun: `python -m train.train ...`. The trained student is saved in
--save_directory, with student_config.json (its kept layers), run.json (arguments, log and
environment) and loss.png. --dry_run prints what a run would need, --resume_from_checkpoint last
continues a run that was stopped, and --kept_layers auto --calibration TEXT chooses the kept layers
by running the teacher.
"""

from pathlib import Path

from patching.cli.command_line import user_errors
from patching.files.outputs import check_writable
from train.flags import parse_flags


def main(argv: list[str] | None = None) -> None:
    with user_errors():
        flags = parse_flags(argv, __doc__)
        check_save_directory(Path(flags.training.save_directory))

    # Imported here, so that --help and wrong flags do not wait for the trainer.
    from train.run import run

    run(flags)


def check_save_directory(save_directory: Path) -> None:
    """Raise ValueError if the folder cannot be written to or already holds a model."""
    if (save_directory / "config.json").exists():
        raise ValueError(
            f"{save_directory} already holds a model: name another --save_directory, or remove it"
        )
    check_writable(save_directory)


if __name__ == "__main__":
    main()
