"""Study matched scale on trained pairs: does it help, why, and what else would?

    python -m examples.studies.scale demo --folder F --seeds 0,1,2

trains what is missing of a pair in F (`demo` is the shipped teacher; `llama` and `gpt_neox` also
train a teacher), searches orders and factors on calibration text, and scores all models on held-out
text. It goes on where it was stopped. It prints what is found about all pairs that F holds by then,
and writes that to `scale.json`, `scale.md` and `scale.png` in `--save_directory`, by default F.
"""

import argparse
from pathlib import Path

from examples.stdlib.demo import DISTILLATION
from examples.studies.orders import PAIRS, check_text
from examples.studies.record import GOES_ON, keep_settings, parse_seeds, study_parser, write_record
from examples.studies.scale.findings import findings_of
from examples.studies.scale.pairs import SETTINGS, STUDENTS, make
from examples.studies.scale.picture import draw
from examples.studies.scale.tables import all_tables
from patching.cli.command_line import run_command, user_errors
from patching.files.outputs import check_writable


def main(argv: list[str] | None = None) -> None:
    arguments = parser().parse_args(argv)
    folder = arguments.folder.resolve()
    with user_errors():
        seeds = parse_seeds(arguments.seeds)
        students = arguments.students.split(",")
        if unknown := sorted(set(students) - set(STUDENTS)):
            raise ValueError(f"students={unknown[0]}: choose from {', '.join(STUDENTS)}")
        check_text(PAIRS[arguments.pair]["text"], folder / arguments.pair)
        check_writable(arguments.save_directory or folder)
        settings = {"teacher_steps": arguments.steps, "student_steps": arguments.student_steps}
        keep_settings(folder / arguments.pair, {**settings, "distillation": DISTILLATION})
    make(arguments.pair, folder, seeds, students, arguments.steps, arguments.student_steps)
    write_findings(folder, seeds, arguments.save_directory or folder)


def write_findings(folder: Path, seeds: list[int], save_directory: Path) -> None:
    """Print and write what is found about the pairs that have all seeds."""
    pairs = [found for pair in PAIRS if (found := findings_of(pair, folder, seeds))]
    values = {
        "seeds": seeds,
        "distillation": DISTILLATION,
        "of_pairs": {pair: PAIRS[pair]["student"] | SETTINGS.get(pair, {}) for pair in PAIRS},
        "pairs": pairs,
    }
    write_record(save_directory, "scale", all_tables(pairs), draw(pairs), values)


def parser() -> argparse.ArgumentParser:
    parser = study_parser("scale", __doc__)
    parser.add_argument("pair", choices=PAIRS)
    parser.add_argument(
        "--students",
        default=",".join(STUDENTS),
        help="plain, with the length term, with chosen layers",
    )
    parser.add_argument("--steps", type=int, default=1000, help="training steps of the teacher")
    parser.add_argument(
        "--student_steps", type=int, default=DISTILLATION["max_steps"], help="of each student"
    )
    return parser


if __name__ == "__main__":
    run_command(main, GOES_ON)
