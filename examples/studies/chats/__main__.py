"""What students of a chat model should be distilled on, and when a weight delta will do.

    python -m examples.studies.chats --folder F --seeds 0,1,2

makes a small chat task, trains two chat teachers from the demo's teacher, and distills four
students for each seed: on text and then chats, on text alone, on chats alone, and one of the demo's
teacher, which `train.weight_delta` then moves to the chat teachers. Every family is evaluated on
chats and on text. The study goes on where it was stopped. It writes `chats.json`, `chats.md` and
`chats.png` to `--save_directory`, by default F. Any other flag is one of `train.train`, for all
students, such as `--max_steps 30`.
"""

import argparse
from pathlib import Path
from typing import Any

from examples.studies.chats.findings import (
    claims_of,
    claims_table,
    cosines,
    cosines_table,
    read_scores,
    scores_table,
    teacher_records,
)
from examples.studies.chats.picture import draw
from examples.studies.chats.students import SETTINGS, STUDENTS, make, training
from examples.studies.record import (
    GOES_ON,
    check_documents,
    check_training,
    keep_settings,
    parse_seeds,
    study_parser,
    write_record,
)
from patching.cli.command_line import run_command, user_errors
from patching.files.outputs import check_writable


def main(argv: list[str] | None = None) -> None:
    arguments, of_training = parser().parse_known_args(argv)
    folder = arguments.folder.resolve()
    settings = {"train.train": of_training, "documents": arguments.documents}
    with user_errors():
        seeds = parse_seeds(arguments.seeds)
        check_documents(arguments.documents)
        for name in STUDENTS:
            check_training(training(folder, name, seeds[0], of_training))
        check_writable(arguments.save_directory or folder)
        keep_settings(folder, {**settings, "distillation": SETTINGS})
    make(folder, seeds, of_training, arguments.documents)
    write_findings(folder, seeds, settings, arguments.save_directory or folder)


def write_findings(
    folder: Path, seeds: list[int], settings: dict[str, Any], save_directory: Path
) -> None:
    """Print and write what the sweeps of all seeds say."""
    scores = read_scores(folder, seeds)
    claims, of_teachers = claims_of(scores), cosines(folder, seeds[0])
    tables = [claims_table(claims), *map(scores_table, scores.values()), cosines_table(of_teachers)]
    values = {
        "seeds": seeds,
        "distillation": SETTINGS,
        "settings": settings,
        "teachers": teacher_records(folder),
        "claims": [claim._asdict() | {"here": claim.verdict} for claim in claims],
        "cosines": of_teachers,
        **scores,
    }
    write_record(save_directory, "chats", "\n\n".join(tables), draw(scores), values)


def parser() -> argparse.ArgumentParser:
    parser = study_parser("chats", __doc__)
    parser.add_argument(
        "--documents", type=int, default=None, help="documents of each task (default: all)"
    )
    return parser


if __name__ == "__main__":
    run_command(main, GOES_ON)
