"""The demo's text: the source of Python's standard library, one document per module.

Every machine that runs the toolkit has it, and it is real text by many authors. A hash of its
*name* decides whether a module is held out. The modules that the shipped teacher never saw
therefore stay held out in every Python version.

    python -m examples.stdlib.corpus --save_directory demo/corpus
"""

import argparse
import hashlib
import json
import sysconfig
import tokenize
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

HELD_OUT_PERMILLE = 40
GENERATED_TABLE = "generated from 'MAPPINGS"


class Module(NamedTuple):
    name: str
    """Dotted name, such as `json.decoder`. A package's name leaves out `__init__`."""
    text: str
    """Source, decoded as its coding cookie says, with newlines as `\\n`."""


def is_held_out(module_name: str) -> bool:
    """Whether a module is kept out of all training. Only its name decides."""
    digest = hashlib.sha256(module_name.encode()).digest()
    return int.from_bytes(digest[:4], "big") % 1000 < HELD_OUT_PERMILLE


def iter_modules(root: Path | None = None) -> Iterator[Module]:
    """The modules of the standard library in name order. Files that do not decode are skipped.

    `root` is the library's folder, by default the running interpreter's. Also skipped are installed
    packages, the build record of this machine (`_sysconfigdata_*`) and the generated character
    tables of `encodings`: these are so alike that a held-out one would not be unseen text.
    """
    root = root or Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        if {"site-packages", "dist-packages"} & set(relative.parts):
            continue
        if relative.name.startswith("_sysconfigdata_"):
            continue
        parts = relative.with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        try:
            with tokenize.open(path) as file:
                text = file.read()
        except (
            SyntaxError,
            UnicodeDecodeError,
        ):  # some of the library's tests are broken sources on purpose
            continue
        if text.strip() and GENERATED_TABLE not in text[:300]:
            yield Module(name, text)


def write_corpus(save_directory: Path) -> dict[str, int]:
    """Write `train.jsonl` and `heldout.jsonl`, with a `module` and a `text` per line.

    Return the bytes of text in each.
    """
    save_directory.mkdir(parents=True, exist_ok=True)
    sizes_bytes = {"train.jsonl": 0, "heldout.jsonl": 0}
    with (
        open(save_directory / "train.jsonl", "w", encoding="utf-8") as train,
        open(save_directory / "heldout.jsonl", "w", encoding="utf-8") as held_out,
    ):
        for module in iter_modules():
            file = held_out if is_held_out(module.name) else train
            file.write(json.dumps({"module": module.name, "text": module.text}) + "\n")
            sizes_bytes[Path(file.name).name] += len(module.text.encode())
    return sizes_bytes


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--save_directory", type=Path, required=True)
    for name, size_bytes in write_corpus(parser.parse_args().save_directory).items():
        print(f"{name}: {size_bytes / 1e6:.1f} MB of source")
