"""Outcomes of earlier runs, kept so that a run that was cut off continues where it stopped.

An outcome is used again only if everything that it depends on is the same: the members, the token
ids, the engine, its packages and its runner, and what computes our own predictions.
"""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

import torch
import transformers

from examples.engines.agreement import Agreement
from examples.engines.check import Outcome, SavedMember
from examples.engines.engines import RUNNERS, Engine
from examples.engines.environments import ENVIRONMENTS, FOLDER
from patching.checkpoints.save import PROVENANCE_FILE_NAME

SUFFIXES = {".json", ".model", ".safetensors"}


class Record:
    """The outcomes of one engine for the members of one architecture, which were just saved."""

    def __init__(
        self, name: str, engine: Engine, members: Sequence[SavedMember], inputs: Sequence[Path]
    ) -> None:
        self._path = FOLDER / "outcomes" / f"{name}-{members[0].architecture}.json"
        self._made_by = _digest(engine, members, inputs)

    def read(self) -> list[Outcome] | None:
        """Return the outcomes, None if there are none of exactly these members."""
        if not self._path.exists():
            return None
        values = json.loads(self._path.read_text())
        if values["made_by"] != self._made_by:
            return None
        return [Outcome(Agreement(**agreement), None) for agreement in values["agreements"]]

    def write(self, outcomes: Sequence[Outcome]) -> None:
        """Keep the outcomes. What an engine rejects is tried again by the next run."""
        if any(outcome.agreement is None for outcome in outcomes):
            return
        agreements = [outcome.agreement._asdict() for outcome in outcomes]
        self._path.parent.mkdir(parents=True, exist_ok=True)
        part = self._path.with_suffix(".part")
        part.write_text(json.dumps({"made_by": self._made_by, "agreements": agreements}, indent=1))
        part.rename(self._path)


def _digest(engine: Engine, members: Sequence[SavedMember], inputs: Sequence[Path]) -> str:
    runners, environments = [engine.runner, "protocol.py"], [engine.environment]
    if engine.gguf:
        runners.append("convert_to_gguf.py")
        environments.append("transformers4")
    packages = [ENVIRONMENTS[name].requirements for name in environments]
    versions = transformers.__version__, torch.__version__
    digest = hashlib.sha256(repr((engine, packages, members, versions)).encode())
    files = [*(RUNNERS / name for name in runners), *inputs]
    for member in members:
        files += sorted(path for path in member.folder.iterdir() if is_read(path))
    for path in files:
        digest.update(path.name.encode() + hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()


def is_read(path: Path) -> bool:
    """Return whether engines read a file of a member, which is not so of what they are given it
    converted to, and of the record of what made it.
    """
    return path.suffix in SUFFIXES and path.name != PROVENANCE_FILE_NAME
