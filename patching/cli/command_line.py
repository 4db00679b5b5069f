"""How the command lines meet their user: one line and exit code 2 for what the user can mend."""

import sys
from argparse import Action, ArgumentDefaultsHelpFormatter, RawDescriptionHelpFormatter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

from transformers.hf_argparser import HfArgumentParser

from patching.files.outputs import num_ranks

USER_ERRORS = (ValueError, OSError, ImportError)


class HelpFormatter(ArgumentDefaultsHelpFormatter, RawDescriptionHelpFormatter):
    """Examples as they are written, each flag under one name, defaults where there are any."""

    def _get_help_string(self, action: Action) -> str | None:
        return action.help if action.default is None else super()._get_help_string(action)

    def _format_action_invocation(self, action: Action) -> str:
        # Flags can be written with dashes for underscores too.
        names = [name for name in action.option_strings if "-" not in name.lstrip("-")]
        if not names:
            return super()._format_action_invocation(action)
        values = self._format_args(action, self._get_default_metavar_for_optional(action))
        return f"{', '.join(names)} {values}".rstrip()


class CommandLineParser(HfArgumentParser):
    """A parser whose complaints are one line, and whose usage is not every flag in a row."""

    def __init__(self, dataclass_types: Any = None, **kwargs: Any) -> None:
        settings = {"usage": "%(prog)s [flags]", "formatter_class": HelpFormatter}
        super().__init__(dataclass_types, **settings | kwargs)

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message}; --help lists every flag\n")


def check_one_process() -> None:
    """Raise ValueError under torchrun, for a command that has nothing to share out among ranks."""
    if (count := num_ranks()) > 1:
        raise ValueError(
            f"{count} processes were started and this command runs as one: leave out torchrun"
        )


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
