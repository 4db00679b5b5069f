"""Fetch the teacher, distill its student and evaluate all sizes.

    python -m examples.smollm2

Each part goes on where it was stopped when the command is given again. Flags that are not listed
by --help are passed on to `train.train`.
"""

import argparse

from examples.smollm2.distill import distill
from examples.smollm2.evaluate import evaluate
from examples.smollm2.fetch import fetch
from examples.smollm2.text import add_flags, choose_text, own_folder
from patching.cli.command_line import run_command, user_errors


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="examples.smollm2", description=__doc__.splitlines()[0])
    add_flags(parser)
    arguments, flags = parser.parse_known_args(argv)
    folder = arguments.save_directory.resolve()
    with user_errors():
        own_folder(folder).mark()
        text = choose_text(arguments.dataset, arguments.eval_dataset, folder)
        fetch(folder)
    distill(folder, text, arguments.kept_layers, flags)
    print(f"reports: {evaluate(folder, text, arguments.kept_layers)}")


if __name__ == "__main__":
    run_command(main, "the same command goes on")
