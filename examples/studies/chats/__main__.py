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
import json
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
from examples.studies.chats.students import SETTINGS, make
from examples.studies.claims.__main__ import keep_settings
from patching.cli.command_line import user_errors
from patching.files.outputs import environment, write_json, write_text
from patching.files.plot import save_figure


def main(argv: list[str] | None = None) -> None:
    arguments, of_training = parser().parse_known_args(argv)
    folder = arguments.folder.resolve()
    seeds = [int(seed) for seed in arguments.seeds.split(",")]
    settings = {"train.train": of_training, "documents": arguments.documents}
    with user_errors():
        keep_settings(folder, settings)
    make(folder, seeds, of_training, arguments.documents)
    write_findings(folder, seeds, settings, arguments.save_directory or folder)


def write_findings(
    folder: Path, seeds: list[int], settings: dict[str, Any], save_directory: Path
) -> None:
    """Print and write what the sweeps of all seeds say."""
    scores = read_scores(folder, seeds)
    claims, of_teachers = claims_of(scores), cosines(folder, seeds[0])
    tables = [claims_table(claims), *map(scores_table, scores.values()), cosines_table(of_teachers)]
    text = "\n\n".join(tables)
    print(f"\n{text}")
    save_directory.mkdir(parents=True, exist_ok=True)
    write_text(save_directory / "chats.md", f"{text}\n")
    save_figure(draw(scores), save_directory / "chats.png")
    values = {
        "seeds": seeds,
        "distillation": SETTINGS,
        "settings": settings,
        "environment": {key: value for key, value in environment().items() if key != "command"},
        "teachers": teacher_records(folder),
        "claims": [claim._asdict() | {"here": claim.verdict} for claim in claims],
        "cosines": of_teachers,
        **scores,
    }
    write_json(save_directory / "chats.json", json.loads(json.dumps(values)))


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="examples.studies.chats",
        allow_abbrev=False,  # `--seed` is another flag
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--folder", type=Path, required=True, help="for models and results")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument(
        "--documents", type=int, default=None, help="documents of each task (default: all)"
    )
    parser.add_argument("--save_directory", type=Path, help="for what was found")
    return parser


if __name__ == "__main__":
    main()
