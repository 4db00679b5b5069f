"""Short texts that identify a model's files: weights, tokenizer and generation config."""

import hashlib
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from transformers.utils.hub import extract_commit_hash

from patching.files.hashes import file_hash
from patching.files.model_files import find_file
from patching.recipe import Reference

WEIGHTS = ("config.json", "*.safetensors*", "*.bin*", "*.py")
TOKENIZER = (
    *("tokenizer*", "vocab*", "merges.txt", "*.model", "*.tiktoken", "*.jinja"),
    *("added_tokens.json", "special_tokens_map.json", "chat_template*"),
)
GENERATION = ("generation_config.json",)
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
