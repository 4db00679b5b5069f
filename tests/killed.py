"""Command lines in processes that can be killed at any moment: forked from one that has imported
everything, so that a try takes as long as the command itself.
"""

import multiprocessing
import os
import random
import sys
import time
from collections.abc import Mapping, Sequence
from importlib import import_module
from multiprocessing.process import BaseProcess
from pathlib import Path


def run(module: str, words: Sequence[str], log: str, environment: Mapping[str, str]) -> None:
    """Run a command line in this process, with its output in a file."""
    os.environ |= environment
    with open(log, "a", buffering=1) as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.argv = [module, *words]
    import_module(module).main(list(words))


class Command:
    """A command line to start, and to kill."""

    def __init__(self, module: str, words: Sequence[object], log: Path) -> None:
        self.module, self.words, self.log = module, [str(word) for word in words], log
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(["killed_imports"])

    def start(self, **environment: str) -> BaseProcess:
        process = self._context.Process(
            target=run, args=(self.module, self.words, str(self.log), environment)
        )
        process.start()
        return process

    def finish(self, **environment: str) -> float:
        """Run to the end and return the seconds it took."""
        start = time.monotonic()
        process = self.start(**environment)
        process.join()
        assert process.exitcode == 0, self.log.read_text()[-3000:]
        return time.monotonic() - start

    def kill_within(self, seconds: float, **environment: str) -> bool:
        """Kill it at a random moment. Return whether it was still running."""
        process = self.start(**environment)
        time.sleep(random.uniform(0, seconds))
        is_running = process.is_alive()
        process.kill()
        process.join()
        return is_running


def ranks_of(command: Command, port: int) -> list[BaseProcess]:
    """Start two ranks as torchrun does."""
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2"}
    return [
        command.start(**address, RANK=rank, LOCAL_RANK=rank, LOCAL_WORLD_SIZE="2", GROUP_RANK="0")
        for rank in ("0", "1")
    ]
