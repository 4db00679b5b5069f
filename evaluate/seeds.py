"""The seeds of lm-eval's `--seed`."""

import random
from typing import NamedTuple

import numpy
import torch
from lm_eval.defaults import DEFAULT_OTHER_SEED, DEFAULT_RANDOM_SEED


class Seeds(NamedTuple):
    """One seed for each generator. None leaves it as it is."""

    python: int | None = DEFAULT_RANDOM_SEED
    numpy: int | None = DEFAULT_OTHER_SEED
    torch: int | None = DEFAULT_OTHER_SEED
    fewshot: int | None = DEFAULT_OTHER_SEED
    """Draws the examples in prompts."""

    def set(self) -> None:
        """Seed all generators but that of examples, which each task has its own of."""
        if self.python is not None:
            random.seed(self.python)
        if self.numpy is not None:
            numpy.random.seed(self.numpy)
        if self.torch is not None:
            torch.manual_seed(self.torch)


DEFAULT_SEEDS = Seeds()
