"""How the examples run the toolkit's command lines: one after the other, each printed first."""

import importlib
import shlex
import signal
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

ROOT = Path(__file__).parents[1]
SECONDS_TO_STOP = 10
"""How long a command may take to end after Ctrl-C."""
IN_FP32 = {
    "train.train": ("--bf16", "False"),
    "evaluate.evaluate": ("--dtype", "float32"),
    "patching.orders": ("--dtype", "float32"),
}
"""The flag that makes a command compute in fp32."""


def run(module: str, *arguments: object) -> None:
    """Print and run `python -m module arguments` in a process of its own, which leaves no memory
    behind.

    If the command fails, the example ends with its exit code: it has said why. Ctrl-C ends both.
    """
    words = printed(module, arguments)
    process = subprocess.Popen([sys.executable, "-m", module, *words], cwd=ROOT)
    try:
        code = process.wait()
    except KeyboardInterrupt:  # the terminal has sent it to the command, too
        with suppress(subprocess.TimeoutExpired):
            try:
                process.wait(SECONDS_TO_STOP)
            finally:
                process.kill()
        raise
    if code == -signal.SIGINT:
        raise KeyboardInterrupt
    if code < 0:
        reason = f"signal {-code} ({signal.strsignal(-code)})"
        hint = ", as when memory runs out" if code == -signal.SIGKILL else ""
        print(f"error: {module} was ended by {reason}{hint}", file=sys.stderr)
        sys.exit(128 - code)  # as a shell has it
    if code:
        sys.exit(code)


def run_here(module: str, *arguments: object) -> None:
    """Print and run `python -m module arguments` in this process, which saves its imports."""
    importlib.import_module(module).main(printed(module, arguments))


def printed(module: str, arguments: Sequence[object]) -> list[str]:
    """Print a command line, and return the words after the module. It computes in fp32 on a machine
    that takes many times as long in bf16.
    """
    words = [str(argument) for argument in arguments]
    if module in IN_FP32:
        from patching.devices import has_no_avx512, usable_device  # imports torch, which is slow

        flag, value = IN_FP32[module]
        if flag not in words and has_no_avx512(usable_device(None)):
            words += [flag, value]
    print(f"\n$ python -m {module} {shlex.join(words)}", flush=True)
    return words
