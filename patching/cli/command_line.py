"""What the command lines share: parsing, progress, one line with exit code 2 for what a user can
fix, and one line on Ctrl-C.
"""

import os
import signal
import sys
import threading
from argparse import Action, ArgumentDefaultsHelpFormatter, RawDescriptionHelpFormatter
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import Field
from inspect import get_annotations
from io import TextIOWrapper
from typing import Any, NoReturn

from huggingface_hub.errors import HTTPError
from transformers.hf_argparser import HfArgumentParser

from patching.blocks import as_layer_list
from patching.files.outputs import num_ranks

USER_ERRORS = (ValueError, OSError, HTTPError, ImportError, FloatingPointError)


class HelpFormatter(ArgumentDefaultsHelpFormatter, RawDescriptionHelpFormatter):
    """Show examples as written, each flag under one name, and every default."""

    def _get_help_string(self, action: Action) -> str | None:
        if not action.option_strings or action.dest == "help" or "default" in (action.help or ""):
            return action.help
        if action.const is False:  # argparse would show the default of --no_FLAG as that of FLAG
            return f"the same as --{action.dest} False"
        if action.default in (None, []):
            return f"{action.help} ({'required' if action.required else 'no default'})"
        return super()._get_help_string(action)

    def _format_action_invocation(self, action: Action) -> str:
        # Every flag also works with dashes in place of underscores.
        names = [name for name in action.option_strings if "-" not in name.lstrip("-")]
        if not names:
            return super()._format_action_invocation(action)
        values = self._format_args(action, self._get_default_metavar_for_optional(action))
        return f"{', '.join(names)} {values}".rstrip()


class CommandLineParser(HfArgumentParser):
    """A parser with one-line errors, usage that does not list every flag, and flags in the groups
    of the dataclasses that declare them.
    """

    def __init__(self, dataclass_types: Any = None, **kwargs: Any) -> None:
        settings = {"usage": "%(prog)s [flags]", "formatter_class": HelpFormatter}
        super().__init__(dataclass_types, **settings | kwargs)

    def add_argument_group(self, title: str | None = None, *args: Any, **kwargs: Any) -> Any:
        groups = {group.title: group for group in self._action_groups}
        return groups.get(title) or super().add_argument_group(title, *args, **kwargs)

    def _add_dataclass_arguments(self, dtype: type) -> None:
        self._titles = {
            name: parent.__dict__.get("_argument_group_name")
            for parent in reversed(dtype.__mro__)
            for name in get_annotations(parent)
        }
        super()._add_dataclass_arguments(dtype)

    def _parse_dataclass_field(self, parser: Any, field: Field) -> None:
        title = self._titles[field.name]
        group = parser if title is None else self.add_argument_group(title)
        HfArgumentParser._parse_dataclass_field(group, field)

    def parse_args_into_dataclasses(self, *args: Any, **kwargs: Any) -> tuple[Any, ...]:
        *parsed, unknown = super().parse_args_into_dataclasses(
            *args, return_remaining_strings=True, **kwargs
        )
        if unknown:
            self.error(f"unrecognized arguments: {' '.join(unknown)}")
        return tuple(parsed)

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {one_line(message)}; --help lists every flag\n")


def check_one_process() -> None:
    """Raise ValueError under torchrun, for a command that cannot share its work among ranks."""
    if (count := num_ranks()) > 1:
        raise ValueError(
            f"{count} processes were started, and this command runs as one: leave out torchrun"
        )


def print_search_step(name: str, k: int, patched_layers: Collection[int], kl: float) -> None:
    """Print what a search of orders chose at size k, on stderr."""
    layers = as_layer_list(sorted(patched_layers))
    print(f"{name}, k = {k}: patched {layers}, KL {kl:.4f}", file=sys.stderr, flush=True)


LONGEST_WORD = 400
LONGEST_MESSAGE = 4000


def one_line(message: str) -> str:
    """Return a message as one line. The middle of what is very long is left out, first of single
    words, such as numbers and lists of layers: what is wrong with these comes after them, and what
    to do about it last.
    """
    return _cut(" ".join(_cut(word, LONGEST_WORD) for word in message.split()), LONGEST_MESSAGE)


def _cut(text: str, longest: int) -> str:
    half = longest // 2
    return text if len(text) <= longest else f"{text[:half]}...{text[-half:]}"


@contextmanager
def user_errors(kinds: tuple[type[Exception], ...] = USER_ERRORS) -> Iterator[None]:
    """Turn what a user can fix into one line on stderr and exit code 2.

    This is for the checks before any weights load. What fails later is unexpected and keeps its
    traceback, unless it comes from a disk or a network.
    """
    try:
        yield
    except kinds as error:
        print(f"error: {one_line(str(error)) or type(error).__name__}", file=sys.stderr)
        sys.exit(2)


def _keep_interrupts(ignored: Any) -> None:
    """Send Ctrl-C once more if it arrived where Python ignores exceptions, such as in the callback
    of a weak reference: the command would run on.
    """
    if not issubclass(ignored.exc_type, KeyboardInterrupt):
        sys.__unraisablehook__(ignored)
        return
    main_thread = threading.main_thread().ident
    # From another thread, and later: here it would be ignored again.
    again = threading.Timer(0.01, signal.pthread_kill, (main_thread, signal.SIGINT))
    again.daemon = True
    again.start()


def run_command(main: Callable[[], None], next_time: str = "nothing half-written is left") -> None:
    """Run a command line. Ctrl-C ends it with one line, which says what the same command does
    `next_time`. Pressed again, Ctrl-C ends the process at once. A pipe that nobody reads any more,
    as after `| head`, ends it without a word.
    """
    sys.unraisablehook = _keep_interrupts
    if isinstance(sys.stdout, TextIOWrapper):  # what a terminal cannot show is no reason to fail
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        try:
            main()
        finally:
            print(end="", flush=True)
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # the work is done
    except BrokenPipeError:
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)
        print(flush=True)  # ends the process as it ends any program, if the pipe is this one
        raise
    except KeyboardInterrupt:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        if os.environ.get("RANK", "0") == "0":
            print(f"stopped by Ctrl-C: {next_time}", file=sys.stderr)
        sys.stdout.flush()
        # Ends as a signal ends any program, so that a shell's loop stops too.
        os.kill(os.getpid(), signal.SIGINT)
