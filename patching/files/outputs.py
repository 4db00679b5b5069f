"""What the command lines leave behind: files and folders that appear complete or not at all, and
what made them.
"""

import fcntl
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

PACKAGES = ("torch", "transformers", "datasets", "accelerate", "lm_eval", "safetensors")


def write_text(path: Path, text: str) -> None:
    """Write a file beside `path` and rename it: a reader finds the old text or the new, never half
    of it.
    """
    with tempfile.NamedTemporaryFile(
        "w", encoding="utf-8", dir=path.parent, prefix=f".{path.name}.", delete=False
    ) as file:
        file.write(text)
    os.chmod(file.name, 0o666 & ~_umask())
    os.replace(file.name, path)


def write_json(path: Path, values: Any) -> None:
    write_text(path, json.dumps(values, indent=2, default=str) + "\n")


def follow_umask(folder: Path) -> None:
    """Give a folder and all in it the permissions of files made the ordinary way: temporary ones,
    and weights as safetensors writes them, are their owner's alone.
    """
    mask = _umask()
    for path in (folder, *folder.rglob("*")):
        path.chmod((0o777 if path.is_dir() else 0o666) & ~mask)


def _umask() -> int:
    mask = os.umask(0o077)  # it can only be read by setting it
    os.umask(mask)
    return mask


def check_new_folder(path: Path) -> None:
    """Raise ValueError unless a folder can be made at `path`: nothing there yet, or an empty
    folder, and writable.
    """
    if path.exists() and not path.is_dir():
        raise ValueError(f"{path} is a file: name a folder that does not exist yet")
    if path.is_dir() and any(path.iterdir()):
        raise ValueError(f"{path} is not empty: name another folder, or remove this one first")
    check_writable(path)


def check_writable(path: Path) -> None:
    """Raise ValueError unless files can be made in the folder `path`, which need not exist yet."""
    nearest = path.absolute()
    while not nearest.exists():
        nearest = nearest.parent
    if not nearest.is_dir():
        raise ValueError(f"{path} cannot be written to: {nearest} is not a folder")
    try:
        tempfile.TemporaryFile(dir=nearest).close()
    except OSError as error:
        raise ValueError(
            f"{path} cannot be written to: {error.strerror}, choose another folder"
        ) from error


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """A folder to fill that takes the name `path` only when the block ends well; removed if it does
    not.

    What a killed run left behind is removed by the next one that names the same folder.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    prefix = f".{path.name}.incomplete-"
    for other in [entry for entry in path.parent.iterdir() if entry.name.startswith(prefix)]:
        with _lock(other) as is_abandoned:
            if is_abandoned:
                shutil.rmtree(other, ignore_errors=True)
    staging = Path(tempfile.mkdtemp(dir=path.parent, prefix=prefix))
    with _lock(staging):
        try:
            yield staging
            follow_umask(staging)
            os.replace(staging, path)  # an empty folder may be replaced, a full one may not
        except BaseException:
            shutil.rmtree(staging, ignore_errors=True)
            raise


@contextmanager
def _lock(folder: Path) -> Iterator[bool]:
    """Hold a folder against other processes during the block; False where one holds it already."""
    try:
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    except OSError:  # gone meanwhile, or not ours
        yield False
        return
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield True
    except BlockingIOError:
        yield False
    finally:
        os.close(descriptor)


def check_space(path: Path, num_bytes: int) -> None:
    """Raise ValueError unless so many bytes are free where `path` is to lie."""
    nearest = path.absolute()
    while not nearest.exists():
        nearest = nearest.parent
    free = shutil.disk_usage(nearest).free
    if free < num_bytes:
        raise ValueError(
            f"{path}: the weights take {num_bytes:,} bytes and {free:,} are free there, make "
            "room or "
            "name another folder"
        )


def num_ranks() -> int:
    """Processes that torchrun started of this command, 1 without it."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def environment() -> dict[str, Any]:
    """Versions, commit, device and command line: what a run records alongside its arguments."""
    import torch  # takes a second, and command lines show their help without it

    return {
        "command": sys.argv,
        "python": platform.python_version(),
        **{name: version(name) for name in PACKAGES},
        "commit": _commit(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else platform.machine(),
        "world_size": num_ranks(),
    }


def _commit() -> str | None:
    """The toolkit's own commit, `-dirty` behind it where files differ; None outside a checkout."""
    try:
        return subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            check=True,
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
