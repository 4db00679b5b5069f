"""TODO."""

import hashlib
from pathlib import Path

from transformers import (
    PreTrainedConfig,
)

SAMPLED_BYTES = 2**20


def fingerprint(name_or_path: str, config: PreTrainedConfig) -> str:
    """Tells a model's weights from others that lay at the same place: the commit of a hub
    repository, of a folder a hash over the config and parts of the weights.
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
