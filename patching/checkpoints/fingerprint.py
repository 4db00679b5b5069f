"""A short text that identifies a model's weights."""

import hashlib
from pathlib import Path

from transformers import PreTrainedConfig

SAMPLED_BYTES = 2**20
"""Bytes read at the beginning, in the middle and at the end of each weights file."""


def fingerprint(name_or_path: str, config: PreTrainedConfig) -> str:
    """Return a text that differs for other weights under the same name: the commit of a hub
    repository, or for a folder a hash of the config and samples of the weights.
    """
    folder = Path(name_or_path)
    if not folder.is_dir():
        return f"{name_or_path}@{config._commit_hash}"
    digest = hashlib.sha256((folder / "config.json").read_bytes())
    for path in sorted([*folder.glob("*.safetensors"), *folder.glob("*.bin")]):
        size = path.stat().st_size
        digest.update(f"{path.name} {size}".encode())
        with path.open("rb") as file:
            for start in (0, size // 2, max(0, size - SAMPLED_BYTES)):
                file.seek(start)
                digest.update(file.read(SAMPLED_BYTES))
    return f"{folder.name} {digest.hexdigest()[:16]}"
