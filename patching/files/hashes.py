"""Hashes of files. Every byte counts.

Those of large files are kept in Hugging Face's cache of assets, by the file's size and times, so
that each file is read once.
"""

import hashlib
from contextlib import suppress
from pathlib import Path

from huggingface_hub import cached_assets_path

from patching.files.json_files import read_object
from patching.files.outputs import write_json

KEPT_FROM_BYTES = 2**20
"""Hashes of smaller files are not kept."""


def file_hash(path: Path) -> str:
    """SHA-256 of a file. That of a large one is taken from the cache while the file's size and
    times are the same.
    """
    found = path.stat()
    if found.st_size < KEPT_FROM_BYTES:
        return _read_hash(path)
    name = hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:32]
    now = {"size": found.st_size, "mtime": found.st_mtime_ns, "ctime": found.st_ctime_ns}
    try:
        kept_at = cached_assets_path("boomerang", "files", "sha256") / f"{name}.json"
        kept = read_object(kept_at) if kept_at.is_file() else {}
    except (OSError, ValueError):  # no such place, or half a file of somebody else
        return _read_hash(path)
    if now.items() <= kept.items():
        return kept["sha256"]
    of_file = _read_hash(path)
    with suppress(OSError):  # a cache that cannot be written to
        write_json(kept_at, {"path": str(path.resolve()), **now, "sha256": of_file})
    return of_file


def _read_hash(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
