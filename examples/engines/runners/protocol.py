"""What all runners share: which members to read, which tokens to run, and the files they write.

    python RUNNER.py --tokens tokens.npy --prompts prompts.npy --new_tokens 48 MEMBER=OUTPUT ...

A runner is executed by the Python of its engine's environment, where nothing of this toolkit is
installed. This file needs only numpy. `OUTPUT` becomes a folder with `logits.npy`, or `top1.npy`
if the engine does not give all logits, and `greedy.npy`. If the engine rejects the member, it holds
`refusal.txt` instead, with the reason.

Shapes: R rows, T positions, V vocabulary, P prompts, N new tokens.
"""

import argparse
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

import numpy as np


class Model(Protocol):
    """A member loaded by an engine."""

    def predict(self, tokens_RT: np.ndarray) -> dict[str, np.ndarray]:
        """Return `logits` (R, T, V) in float32, or `top1` (R, T), for the token after each
        position.
        """

    def greedy(self, prompts_PT: np.ndarray, new_tokens: int) -> np.ndarray:
        """Return the likeliest continuation of each prompt, shape (P, N), ignoring end of text."""


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser()
    parser.add_argument("--tokens", type=Path, required=True)
    parser.add_argument("--prompts", type=Path, required=True)
    parser.add_argument("--new_tokens", type=int, required=True)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("members", nargs="+", metavar="MEMBER=OUTPUT")
    return parser


def run(arguments: argparse.Namespace, load: Callable[[Path], Model]) -> None:
    tokens_RT, prompts_PT = np.load(arguments.tokens), np.load(arguments.prompts)
    for pair in arguments.members:
        member, output = map(Path, pair.split("=", 1))
        output.mkdir(parents=True)
        model = None  # an engine may have room for one model at a time
        try:
            model = load(member)
            arrays = model.predict(tokens_RT)
            arrays["greedy"] = model.greedy(prompts_PT, arguments.new_tokens)
        except Exception as error:  # any exception is the engine's answer
            traceback.print_exc()
            lines = str(error).strip().splitlines() or [""]
            (output / "refusal.txt").write_text(f"{type(error).__name__}: {lines[0]}\n")
            continue
        for name, array in arrays.items():
            np.save(output / f"{name}.npy", array)
