"""File systems of their own, for tests of full disks and mount points."""

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest


@contextmanager
def mounted(folder: Path, *options: str) -> Iterator[Path]:
    """Make a folder that is a tmpfs, with options of `mount`, as long as the block runs. Skips the
    test where none can be mounted.
    """
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", *options, "tmpfs", str(folder)]).returncode:
        pytest.skip("a tmpfs can only be mounted by root")
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)
