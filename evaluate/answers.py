"""Generated answers that failed whatever their score: cut off before their end, or caught in a
loop. Small sizes often fail in these ways on tasks that they classify well.
"""

from collections.abc import Iterable
from typing import NamedTuple

LEAST_REPEATS = 4
LEAST_CHARACTERS = 32
"""A loop is the same text at least so many times, and at least so long altogether."""


class Answer(NamedTuple):
    text: str
    is_cut: bool
    """Whether it has as many tokens as it may have, and neither end-of-text nor a stop text."""


class Failures(NamedTuple):
    """How many of a model's answers to a task failed, and how."""

    answers: int
    cut: int
    looping: int
    failed: int
    """Those that were cut off or loop."""

    @classmethod
    def of(cls, answers: Iterable[Answer]) -> "Failures":
        found = [(answer.is_cut, is_loop(answer.text)) for answer in answers]
        return cls(
            answers=len(found),
            cut=sum(is_cut for is_cut, _ in found),
            looping=sum(loops for _, loops in found),
            failed=sum(is_cut or loops for is_cut, loops in found),
        )


def is_loop(text: str) -> bool:
    """Whether a text ends with the same words again and again."""
    text = text.rstrip()
    for length in range(1, len(text) // LEAST_REPEATS + 1):
        repeats = max(LEAST_REPEATS, -(-LEAST_CHARACTERS // length))
        if text.endswith(text[-length:] * repeats):
            return True
    return False
