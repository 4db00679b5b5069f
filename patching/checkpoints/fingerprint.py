"""Short texts that identify a model's files: weights, tokenizer and generation config.

Every byte counts. Hashes of large files are kept in Hugging Face's cache of assets, by the file's
size and times, so that each file is read once.
"""

import hashlib
import json
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

from huggingface_hub import cached_assets_path
from transformers.utils.hub import extract_commit_hash

from patching.files.model_files import find_file
from patching.files.outputs import write_json
from patching.recipe import Reference

WEIGHTS = ("config.json", "*.safetensors*", "*.bin*", "*.py")
TOKENIZER = (
    *("tokenizer*", "vocab*", "merges.txt", "*.model", "*.tiktoken", "*.jinja"),
    *("added_tokens.json", "special_tokens_map.json", "chat_template*"),
)
GENERATION = ("generation_config.json",)
KEPT_FROM_BYTES = 2**20
"""Hashes of smaller files are not kept."""
NUM_THREADS = 4


def fingerprint(reference: Reference, patterns: Iterable[str] = WEIGHTS) -> str:
    """Return a text that differs for other files under the same name: the commit of a hub
    repository, or for a folder a hash of its files that match `patterns`.
    """
    folder = Path(reference.name_or_path)
    if not folder.is_dir():
        return f"{reference.name_or_path}@{commit_of(reference)}"
    paths = sorted({path for pattern in patterns for path in folder.glob(pattern)})
    with ThreadPoolExecutor(NUM_THREADS) as pool:
        hashes = pool.map(file_hash, paths)
    digest = hashlib.sha256()
    for path, of_file in zip(paths, hashes):
        digest.update(f"{path.name} {of_file}\n".encode())
    return f"{folder.resolve().name} {digest.hexdigest()[:16]}"


def commit_of(reference: Reference) -> str | None:
    """Return the commit of a hub repository from where its config.json lies, None if that does not
    say. Raises OSError if the repository cannot be reached.
    """
    path = find_file(reference, "config.json")
    return None if path is None else extract_commit_hash(str(path), None)


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
        kept = json.loads(kept_at.read_text(encoding="utf-8")) if kept_at.is_file() else {}
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
