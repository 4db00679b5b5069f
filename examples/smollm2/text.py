"""Which text the example distills on, and which text it keeps for measuring.

The first of these that applies: the text named on the command line, the folder `english` in the
folder that the environment variable BOOMERANG_DATA names, the source of Python's standard library.
"""

import argparse
import os
from pathlib import Path
from typing import NamedTuple

from examples.own_folder import OwnFolder, Sign
from examples.stdlib.corpus import write_corpus

SIGNS = {
    "teacher": Sign("README.md", "examples.smollm2.fetch"),
    "corpus": Sign("heldout.jsonl", '{"module": '),
    "tasks": Sign("stdlib_next_line.yaml", "task: stdlib_next_line"),
}
"""What shows that an earlier version of the example, which left no mark, made a folder."""


class Text(NamedTuple):
    train: str
    """A file, a folder or a hub dataset, as `train.train --dataset` takes it."""
    held_out: str | None
    """The same for text that no model was distilled on. None if there is none."""


def data_folder() -> Path | None:
    """The folder that BOOMERANG_DATA names, None if it names none."""
    name = os.environ.get("BOOMERANG_DATA")
    return Path(name) if name and Path(name).is_dir() else None


def own_folder(folder: Path) -> OwnFolder:
    """Return the folder of the example. Raises ValueError if it is anybody else's."""
    return OwnFolder(folder, "smollm2.json", SIGNS, needed=["teacher"])


def choose_text(dataset: str | None, eval_dataset: str | None, folder: Path) -> Text:
    """Return the text to use. That of the standard library is written to `folder/corpus`.

    Raises ValueError if only held-out text is named.
    """
    if dataset is not None:
        return Text(dataset, eval_dataset)
    if eval_dataset is not None:
        raise ValueError(f"eval_dataset={eval_dataset}: name the text to train on with --dataset")
    data = data_folder()
    if data is not None and (data / "english" / "train.jsonl").is_file():
        return Text(*(str(data / "english" / f"{part}.jsonl") for part in ("train", "heldout")))
    corpus = folder / "corpus"
    write_corpus(corpus)
    return Text(str(corpus / "train.jsonl"), str(corpus / "heldout.jsonl"))


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags that every command of the example has."""
    parser.add_argument("--save_directory", type=Path, default=Path("smollm2_output"))
    parser.add_argument(
        "--dataset", help="text to distill on, as train.train takes it (default: see the module)"
    )
    parser.add_argument("--eval_dataset", help="text of the same kind to measure on")
    parser.add_argument(
        "--kept_layers",
        choices=("default", "auto"),
        default="default",
        help="which layers the student keeps, see train.train",
    )


def student_folder(folder: Path, kept_layers: str) -> Path:
    return folder / ("student" if kept_layers == "default" else f"student_{kept_layers}")
