"""How the command lines meet their user: one line and exit code 2 for what the user can mend."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn

from transformers import HfArgumentParser

USER_ERRORS = (ValueError, OSError, ImportError)


class CommandLineParser(HfArgumentParser):
    """A parser whose complaints are one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message}; --help lists every flag\n")


@contextmanager
def user_errors(kinds: tuple[type[Exception], ...] = USER_ERRORS) -> Iterator[None]:
    """Turn what the user can mend into one line on stderr and exit code 2.

    For the checks before any weights load; what fails later is unexpected and keeps its traceback,
    but for what a disk or a network may do.
    """
    try:
        yield
    except kinds as error:
        message = " ".join(str(error).split()) or type(error).__name__
        print(f"error: {message}", file=sys.stderr)
        sys.exit(2)
