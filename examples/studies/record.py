"""What the studies share: their flags, the settings that a folder was made with, and the files that
say what was found.
"""

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from patching.files.outputs import environment, write_json, write_text
from patching.files.plot import save_figure
from train.checkpoints.identity import differences


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


def keep_settings(folder: Path, settings: dict[str, Any]) -> None:
    """Keep the settings that a folder is made with. Raise ValueError if it was made with others.

    Folders of earlier versions do not know all of them.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "settings.json"
    if path.is_file():
        before = json.loads(path.read_text())
        if found := differences(before, json.loads(json.dumps(settings))):
            raise ValueError(
                f"{folder} is of another run ({'; '.join(found)}): choose another --folder"
            )
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
