"""Make a student for a variant of a teacher, such as its chat model, without training.

    python -m train.weight_delta --student STUDENT --teacher_from BASE --teacher_to CHAT \\
        --save_directory DIR

The new student is the initial student of --teacher_to plus what distillation changed in --student,
an existing student of --teacher_from. Files are read piece by piece, and no model is loaded.

First the command prints, for each student layer that stands for several teacher layers, how alike
both teachers are there: the cosine between the differences, in each teacher, from the kept layer to
the others of its block. Below --min_cosine in any layer nothing is written, because distillation
would have to change the two students differently.
"""

from dataclasses import asdict, dataclass, field
from pathlib import Path

from patching.cli.command_line import CommandLineParser, check_one_process, run_command, user_errors
from patching.files.outputs import check_new_folder


@dataclass
class WeightDeltaArguments:
    _argument_group_name = "the students and their teachers"

    student: str = field(metadata={"help": "the student of --teacher_from"})
    teacher_from: str = field(metadata={"help": "the teacher that the student was distilled from"})
    teacher_to: str = field(metadata={"help": "the variant of it to make a student for"})
    save_directory: str = field(metadata={"help": "new folder for the new student"})
    min_cosine: float = field(
        default=0.73,
        metadata={"help": "least cosine between the two teachers in each layer, -1 to accept any"},
    )
    student_revision: str | None = field(
        default=None,
        metadata={"help": "the student's branch, tag or commit (default: main)"},
    )
    teacher_from_revision: str | None = field(
        default=None, metadata={"help": "the same for --teacher_from"}
    )
    teacher_to_revision: str | None = field(
        default=None, metadata={"help": "the same for --teacher_to"}
    )

    def __post_init__(self) -> None:
        if not -1 <= self.min_cosine <= 1:
            raise ValueError(f"min_cosine={self.min_cosine:g}: choose a cosine from -1 to 1")


def main(argv: list[str] | None = None) -> None:
    with user_errors():
        parser = CommandLineParser(
            WeightDeltaArguments, prog="train.weight_delta", description=__doc__
        )
        (arguments,) = parser.parse_args_into_dataclasses(argv)
        check_one_process()
        check_new_folder(Path(arguments.save_directory))

        # Imported here, so that --help and wrong flags do not wait for models.
        from patching.recipe import Reference
        from train.delta import check_cosines, cosine_table, plan_delta

        plan = plan_delta(
            Reference(arguments.student, arguments.student_revision),
            Reference(arguments.teacher_from, arguments.teacher_from_revision),
            Reference(arguments.teacher_to, arguments.teacher_to_revision),
        )
        cosines = plan.cosines()
        print(cosine_table(plan.layer_map, cosines), flush=True)
        check_cosines(cosines, arguments.min_cosine)
        plan.save(Path(arguments.save_directory), cosines, asdict(arguments))
    print(f"student saved in {arguments.save_directory}")


if __name__ == "__main__":
    run_command(main)
