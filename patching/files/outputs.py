"""Output files and folders that appear complete or not at all, and the record of what made them."""

import errno
import fcntl
import json
import math
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

PACKAGES = ("torch", "transformers", "datasets", "accelerate", "lm_eval", "safetensors")


def write_text(path: Path, text: str) -> None:
    """Write a text so that a reader finds the old one or the new one, never half of it."""
    write_bytes(path, text.encode())


def write_bytes(path: Path, content: bytes) -> None:
    """Write a temporary file next to `path` and rename it, so that a reader finds the old content
    or the new one, never half of it.
    """
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with open(descriptor, "wb") as file:
            file.write(content)
        os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def write_json(path: Path, values: Any) -> None:
    write_text(path, json_text(values))


def json_text(values: Any) -> str:
    """Return the text of a JSON file."""
    return json.dumps(values, indent=2, default=str) + "\n"


def write_together(folder: Path, contents: Mapping[str, bytes]) -> None:
    """Write files into a folder by their names. Raises ValueError, before it writes the first of
    them, if a folder has one of these names.
    """
    check_writable(folder, *contents)
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in contents.items():
        write_bytes(folder / name, content)


def printable(values: Any) -> Any:
    """Return JSON values whose texts can be written as UTF-8: lone surrogates become escapes.

    They come from file names in another encoding, and from damaged files.
    """
    if isinstance(values, Mapping):
        return {printable(key): printable(value) for key, value in values.items()}
    if isinstance(values, list | tuple):
        return [printable(value) for value in values]
    if isinstance(values, str):
        return values.encode("utf-8", "backslashreplace").decode("utf-8")
    return values


def finite_or_none(values: Any) -> Any:
    """Return JSON values with None in place of infinity and NaN, which JSON does not have."""
    if isinstance(values, Mapping):
        return {key: finite_or_none(value) for key, value in values.items()}
    if isinstance(values, list | tuple):
        return [finite_or_none(value) for value in values]
    return None if isinstance(values, float) and not math.isfinite(values) else values


def follow_umask(folder: Path) -> None:
    """Give a folder and its contents the permissions that the umask asks for.

    Temporary files, and weights written by safetensors, are readable by their owner alone.
    """
    mask = _umask()
    for path in (folder, *folder.rglob("*")):
        path.chmod((0o777 if path.is_dir() else 0o666) & ~mask)


def _umask() -> int:
    mask = os.umask(0o077)  # it can only be read by setting it
    os.umask(mask)
    return mask


def check_new_folder(path: Path) -> None:
    """Raise ValueError unless a new folder can be created at `path`, where nothing or an empty
    folder may be now. It may be a mount point, the current folder, or a link.
    """
    _nearest(path)  # raises for a path that leads nowhere
    if path.exists() and not path.is_dir():
        raise ValueError(f"{path} is a file: name a folder that does not exist yet")
    if path.is_dir() and not _is_empty(path):
        raise ValueError(f"{path} is not empty: name another folder, or remove this one first")
    check_writable(path)


def check_writable(path: Path, *names: str) -> None:
    """Raise ValueError unless files can be written to the folder `path`, which may not exist yet,
    no folder has the name of one of them, and cards and messages can name the path.
    """
    nearest = _nearest(path)
    try:
        f"{path} {path.resolve().name}".encode()
    except UnicodeEncodeError as error:
        name = os.fsencode(path).decode(errors="backslashreplace")
        raise ValueError(f"{name}: its name is not UTF-8, name another folder") from error
    if not nearest.is_dir():
        raise ValueError(
            f"{path} cannot be written to: {nearest} is not a folder, choose another one"
        )
    try:
        tempfile.TemporaryFile(dir=nearest).close()
    except OSError as error:
        raise ValueError(
            f"{path} cannot be written to: {error.strerror}, choose another folder"
        ) from error
    for file in (path / name for name in names):
        if file.is_dir() and not file.is_symlink():
            raise ValueError(
                f"{file} is a folder, and a file of this name is written: rename it, or choose "
                "another folder"
            )


def _nearest(path: Path) -> Path:
    """Return the path itself or the folder closest to it that exists, with links followed."""
    try:
        nearest = path.resolve()
        while not nearest.exists():
            nearest = nearest.parent
    except RuntimeError as error:
        raise ValueError(f"{path} is a link that leads to itself: name another folder") from error
    except OSError as error:  # a name that is too long
        raise ValueError(f"{path}: {error.strerror}, name another folder") from error
    return nearest


STAGING = ".incomplete-"
"""Part of the name of a folder that is still being filled."""


def _is_empty(folder: Path) -> bool:
    """Return whether a folder holds nothing but what a new file system or a killed run leaves."""
    names = [entry.name for entry in folder.iterdir()]
    return all(name == "lost+found" or name.startswith(STAGING) for name in names)


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """Yield a temporary folder to fill, in the file system of `path`. If the block succeeds, it is
    renamed to `path`, or its files are moved there if `path` is an empty folder, `config.json`
    last. If the block fails, it is removed.

    An empty folder is kept, because it may be a mount point or somebody's current folder. Leftovers
    of a killed run are removed by the next run with the same `path`.
    """
    path = path.resolve()
    exists = path.is_dir()
    place, prefix = (path, STAGING) if exists else (path.parent, f".{path.name}{STAGING}")
    place.mkdir(parents=True, exist_ok=True)
    for other in [entry for entry in place.iterdir() if entry.name.startswith(prefix)]:
        with _lock(other) as is_abandoned:
            if is_abandoned:
                shutil.rmtree(other, ignore_errors=True)
    staging = Path(tempfile.mkdtemp(dir=place, prefix=prefix))
    with _lock(staging):
        try:
            yield staging
            follow_umask(staging)
            if exists and not _is_empty(path):
                raise OSError(errno.ENOTEMPTY, "it is not empty any more")
            if exists:
                move_into_place(staging, path)
                staging.rmdir()
            else:
                os.replace(staging, path)  # an empty folder may be replaced, a full one may not
        except BaseException:
            shutil.rmtree(staging, ignore_errors=True)
            raise


def move_into_place(staging: Path, folder: Path) -> None:
    """Move a finished model into its folder, `config.json` last: without it nothing loads."""
    for path in sorted(staging.iterdir(), key=lambda path: path.name == "config.json"):
        if path.is_dir():  # a full folder, of an earlier model, cannot be replaced
            shutil.rmtree(folder / path.name, ignore_errors=True)
        os.replace(path, folder / path.name)


@contextmanager
def _lock(folder: Path) -> Iterator[bool]:
    """Lock a folder during the block. Yields False if another process holds the lock."""
    try:
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    except OSError:  # it is gone by now, or belongs to somebody else
        yield False
        return
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield True
    except BlockingIOError:
        yield False
    finally:
        os.close(descriptor)


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Wait until no other process is in such a block for the same folder.

    The lock is a file because network file systems cannot lock folders. Where they cannot lock at
    all, a warning says so.
    """
    with (folder / ".lock").open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError as error:
            warnings.warn(
                f"{folder} cannot be locked ({error.strerror}): run one command at a time in it",
                stacklevel=3,
            )
        yield


def check_space(path: Path, num_bytes: int) -> None:
    """Raise ValueError unless `num_bytes` are free on the disk of `path`."""
    free = shutil.disk_usage(_nearest(path)).free
    if free < num_bytes:
        raise ValueError(
            f"{path}: the weights take {num_bytes:,} bytes and {free:,} are free there, make "
            "room or name another folder"
        )


def num_ranks() -> int:
    """Number of processes that torchrun started, 1 without torchrun. Raises ValueError if a
    variable that tells of them holds no number.
    """
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
        text = os.environ.get(name, "1")
        try:
            int(text)
        except ValueError as error:
            raise ValueError(f"{name}={text}: torchrun sets this to a number, unset it") from error
    return int(os.environ.get("WORLD_SIZE", "1"))


def environment() -> dict[str, Any]:
    """Versions, commit, device and command line: what a run records alongside its arguments."""
    return {
        "command": sys.argv,
        "python": platform.python_version(),
        **{name: version(name) for name in PACKAGES},
        "commit": _commit(),
        "device": device_name(),
        "world_size": num_ranks(),
    }


def device_name() -> str:
    import torch  # takes a second, and command lines show their help without it

    return torch.cuda.get_device_name() if torch.cuda.is_available() else platform.machine()


def _commit() -> str | None:
    """The toolkit's own commit, with `-dirty` appended if files differ; None outside a checkout."""
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
