"""Check the paper's claims on the demo's teacher, with several seeds.

    python -m examples.studies.claims --folder F --seeds 0,1,2

distills eleven students of the shipped teacher for each seed and evaluates their families. It goes
on where it was stopped, and `--sweeps` does a part of it. It prints what all seeds have by then and
writes that to `claims.json`, `claims.md` and `claims.png` in `--save_directory`, by default F. Any
other flag is one of `train.train`, for all students, such as `--max_steps 30`.
"""

import argparse
import json
from pathlib import Path
from typing import Any

from examples.stdlib.demo import DISTILLATION
from examples.studies.claims.findings import (
    ACCURACY,
    BITS,
    claims_of,
    claims_table,
    read_lines,
    scores_table,
)
from examples.studies.claims.picture import draw
from examples.studies.claims.students import SWEEPS, make, missing_sweeps, students_of, training
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
    sweeps = arguments.sweeps.split(",")
    with user_errors():
        seeds = parse_seeds(arguments.seeds)
        if unknown := sorted(set(sweeps) - set(SWEEPS)):
            raise ValueError(f"sweeps={unknown[0]}: choose from {', '.join(SWEEPS)}")
        check_documents(arguments.documents)
        for name in sorted({name for sweep in sweeps for name in students_of(sweep)}):
            check_training(training(folder, name, seeds[0], of_training))
        check_writable(arguments.save_directory or folder)
        settings = {"train.train": of_training, "documents": arguments.documents}
        keep_settings(folder, {**settings, "distillation": DISTILLATION})
    make(folder, seeds, sweeps, of_training, arguments.documents)
    write_findings(folder, seeds, settings, arguments.save_directory or folder)
    if missing := missing_sweeps(folder, seeds):
        print("not evaluated yet:", ", ".join(str(path.relative_to(folder)) for path in missing))


def write_findings(
    folder: Path, seeds: list[int], settings: dict[str, Any], save_directory: Path
) -> None:
    """Print and write what the sweeps say that all seeds have."""
    lines, accuracy = (read_lines(folder, seeds, score) for score in (BITS, ACCURACY))
    claims = claims_of(lines)
    text = "\n\n".join([claims_table(claims), scores_table(lines), scores_table(accuracy)])
    laco = folder / f"seed_{seeds[0]}" / "results/all_terms/laco.json"
    values = {
        "seeds": seeds,
        "distillation": DISTILLATION,
        "settings": settings,
        "claims": [claim._asdict() | {"here": claim.verdict} for claim in claims],
        "bits_per_byte": lines,
        "next_line_accuracy": accuracy,
        "laco": json.loads(laco.read_text())["laco"] if laco.is_file() else None,
    }
    write_record(save_directory, "claims", text, draw(lines), values)


def parser() -> argparse.ArgumentParser:
    parser = study_parser("claims", __doc__)
    parser.add_argument(
        "--documents", type=int, default=None, help="documents of each task (default: all)"
    )
    parser.add_argument("--sweeps", default=",".join(SWEEPS), help="a part of the sweeps")
    return parser


if __name__ == "__main__":
    run_command(main, GOES_ON)
