"""Command lines in processes that can be stopped at any moment: forked from one that has imported
everything, so that a try takes as long as the command itself.
"""

import multiprocessing
import os
import random
import signal
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from importlib import import_module
from multiprocessing.process import BaseProcess
from pathlib import Path

from conftest import ROOT

from patching.cli.command_line import run_command

IMPORTS = "killed_imports"


def run(module: str, words: Sequence[str], log: str, environment: Mapping[str, str]) -> None:
    """Run a command line in this process, with its output in a file."""
    os.environ |= environment
    with open(log, "a", buffering=1) as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.argv = [module, *words]
    # What multiprocessing does in its children is not what a shell does.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    run_command(import_module(module).main)


def check_imports() -> None:
    assert IMPORTS in sys.modules


class Command:
    """A command line to start, and to stop."""

    def __init__(self, module: str, words: Sequence[object], log: Path) -> None:
        self.module, self.words, self.log = module, [str(word) for word in words], log
        self._context = multiprocessing.get_context("forkserver")
        # The server is only told what to import, not where from, and ignores what it cannot find.
        os.environ["PYTHONPATH"] = os.pathsep.join(map(str, (ROOT / "tests", ROOT)))
        self._context.set_forkserver_preload([IMPORTS])

    def start(self, **environment: str) -> BaseProcess:
        process = self._context.Process(
            target=run, args=(self.module, self.words, str(self.log), environment)
        )
        process.start()
        return process

    def finish(self, **environment: str) -> float:
        """Run to the end and return the seconds it took."""
        check = self._context.Process(target=check_imports)
        check.start()
        check.join()  # everything is imported by then
        assert check.exitcode == 0
        start = time.monotonic()
        process = self.start(**environment)
        process.join()
        assert process.exitcode == 0, self.log.read_text()[-3000:]
        return time.monotonic() - start

    def killed_within(self, seconds: float, num_times: int) -> Iterator[bool]:
        """Kill it at random moments until it was killed `num_times`. Yields after each try whether
        it was still running.
        """
        num_kills = 0
        while num_kills < num_times:
            process = self.start()
            time.sleep(random.uniform(0, seconds))
            was_running = process.is_alive()
            process.kill()
            process.join()
            num_kills += was_running
            yield was_running


def ranks_of(command: Command, port: int, **environment: str) -> list[BaseProcess]:
    """Start two ranks as torchrun does."""
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2"}
    environment |= address
    return [
        command.start(
            **environment, RANK=rank, LOCAL_RANK=rank, LOCAL_WORLD_SIZE="2", GROUP_RANK="0"
        )
        for rank in ("0", "1")
    ]
