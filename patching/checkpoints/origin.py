"""Where a saved model's parents came from, and under which licenses, as far as that is known."""

from pathlib import Path
from typing import Any, NamedTuple

import yaml
from huggingface_hub.repocard import metadata_load
from transformers.utils import cached_file
from transformers.utils.hub import extract_commit_hash

from patching.checkpoints.fingerprint import fingerprint
from patching.recipe import Parent, Reference

CARD_FILE_NAME = "README.md"
ABSENT_IS_FINE = {
    "_raise_exceptions_for_missing_entries": False,
    "_raise_exceptions_for_connection_errors": False,
}


class License(NamedTuple):
    """A license as a card's metadata states it."""

    id: str | tuple[str, ...]
    """The hub's name of it, or `other`."""
    name: str | None = None
    """What `other` is called."""
    link: str | None = None

    @property
    def metadata(self) -> dict[str, Any]:
        values = {
            "license": list(self.id) if isinstance(self.id, tuple) else self.id,
            "license_name": self.name,
            "license_link": self.link,
        }
        return {name: value for name, value in values.items() if value is not None}

    def __str__(self) -> str:
        title = self.name or (", ".join(self.id) if isinstance(self.id, tuple) else self.id)
        return title if self.link is None else f"{title} ({self.link})"


BOTH_LICENSES = License("other", "those-of-both-parents")
"""What is claimed if the parents state different ones."""


def license_of_all(licenses: list[License | None]) -> License | None:
    """Return the license of a model made from parents with these. None is claimed unless every
    parent states one.
    """
    if not licenses or None in licenses:
        return None
    return licenses[0] if len(set(licenses)) == 1 else BOTH_LICENSES


class Origin(NamedTuple):
    """Where a parent came from."""

    repository: str | None
    """On the hub; None for a folder and for a model in memory."""
    revision: str | None
    commit: str | None
    """The hub's commit; None for a folder."""
    fingerprint: str | None
    """A hash of a folder's config and samples of its weights."""
    license: License | None
    """The license that the parent's own card states."""

    @property
    def title(self) -> str:
        """The parent's name for other people: never a folder's."""
        return self.repository or "a local model"

    def to_dict(self) -> dict[str, Any]:
        return self._asdict() | {"license": self.license and self.license.metadata}


def origin_of(reference: Reference) -> Origin:
    """Read where a parent came from. What it does not say stays None."""
    name_or_path, revision = reference
    if not name_or_path:
        return Origin(None, None, None, None, None)
    card = cached_file(name_or_path, CARD_FILE_NAME, revision=revision, **ABSENT_IS_FINE)
    stated = _license(card)
    folder = Path(name_or_path)
    if folder.is_dir():
        has_config = (folder / "config.json").is_file()
        own = fingerprint(reference).split()[-1] if has_config else None
        return Origin(None, None, None, own, stated)
    path = cached_file(name_or_path, "config.json", revision=revision, **ABSENT_IS_FINE)
    return Origin(name_or_path, revision, extract_commit_hash(path, None), None, stated)


def _license(card: str | None) -> License | None:
    if card is None:
        return None
    try:
        metadata = metadata_load(card) or {}
    except (ValueError, OSError, yaml.YAMLError):  # a card is free text and may hold anything
        return None
    stated, name, link = (metadata.get(f"license{part}") for part in ("", "_name", "_link"))
    if isinstance(stated, list) and stated:
        stated = tuple(map(str, stated))
    elif not isinstance(stated, str) or not stated:
        return None
    return License(stated, name and str(name), link and str(link))


def shareable(provenance: dict[str, Any]) -> dict[str, Any]:
    """Return the part of a provenance.json that says nothing about the machine it was made on."""
    return {name: value for name, value in provenance.items() if name not in LOCAL_FIELDS}


LOCAL_FIELDS = ("arguments", "environment", "local_parents")
"""Fields of provenance.json with paths, the command line and the device, to run it again here."""


def local_names(references: dict[Parent, Reference]) -> dict[Parent, str]:
    """Return the parents that are folders, by their paths."""
    names = {parent: reference.name_or_path for parent, reference in references.items()}
    return {parent: name for parent, name in names.items() if name and Path(name).is_dir()}
