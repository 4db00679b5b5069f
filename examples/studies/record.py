"""What the studies share: their flags, the settings that a folder was made with, and the files that
say what was found.
"""

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from patching.files.json_files import read_object
from patching.files.outputs import check_new_folder, environment, write_json, write_text
from patching.files.plot import save_figure
from train.checkpoints.identity import differences
from train.train import parse_flags

MODELS = ("teacher", "student", "seed_*")
"""Folders of models that depend on the settings of a study."""
REMEDY = "choose another --folder"
GOES_ON = "the same command goes on"


def study_parser(name: str, description: str | None) -> argparse.ArgumentParser:
    """Return a parser with the flags of every study."""
    parser = argparse.ArgumentParser(
        prog=f"examples.studies.{name}",
        allow_abbrev=False,  # `--seed` is another flag
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--folder", type=Path, required=True, help="for models and results")
    parser.add_argument("--seeds", default="0,1,2", help="of the students")
    parser.add_argument("--save_directory", type=Path, help="for what was found")
    return parser


def parse_seeds(text: str) -> list[int]:
    """Parse the seeds of students. Raises ValueError unless they are different whole numbers."""
    try:
        seeds = [int(seed) for seed in text.split(",")]
        is_good = len(set(seeds)) == len(seeds) and min(seeds) >= 0 and max(seeds) < 2**32
    except ValueError:
        is_good = False
    if not is_good:
        raise ValueError(f"seeds={text}: give different whole numbers below 2^32, such as 0,1,2")
    return seeds


def check_documents(num_documents: int | None) -> None:
    if num_documents is not None and num_documents < 1:
        raise ValueError(f"documents={num_documents}: choose 1 or more, or leave it out for all")


def check_training(command: Sequence[object]) -> None:
    """Raise ValueError for flags that `train.train` does not take, or end with its message."""
    _, *arguments = command
    parse_flags([str(argument) for argument in arguments])


def keep_settings(folder: Path, settings: dict[str, Any], is_earlier: bool = False) -> None:
    """Keep the settings that a folder is made with. Raise ValueError if it was made with others, or
    if it is not of the study. They may change until a model is made with them.

    Folders of earlier versions do not know all of them. One `is_earlier` if it may know none.
    """
    path = folder / "settings.json"
    settings = json.loads(json.dumps(settings))
    if path.is_file():
        before = read_object(path)
        if others := before.keys() - settings.keys():
            raise ValueError(f"{path} has {min(others)}, so it is of something else: {REMEDY}")
        found = differences(before, settings)
        if found and any(path.is_dir() for name in MODELS for path in folder.glob(name)):
            raise ValueError(f"{folder} is of another run ({'; '.join(found)}): {REMEDY}")
    elif not is_earlier:
        check_new_folder(folder)
    folder.mkdir(parents=True, exist_ok=True)
    write_json(path, settings)


def write_record(
    folder: Path, name: str, text: str, figure: Figure, values: Mapping[str, Any]
) -> None:
    """Print tables, and write them, a picture and all values as `name`.md, .png and .json. The
    values are written with the environment.
    """
    print(f"\n{text}")
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / f"{name}.md", f"{text}\n")
    save_figure(figure, folder / f"{name}.png")
    made_in = {key: value for key, value in environment().items() if key != "command"}
    write_json(folder / f"{name}.json", {**values, "environment": made_in})
