"""Upload saved models to the hub, into private repositories unless `public` is set."""

import json
from collections.abc import Collection
from pathlib import Path

from huggingface_hub import CommitOperationAdd, HfApi, ModelCard

from patching.checkpoints.origin import CARD_FILE_NAME, shareable
from patching.checkpoints.save import PROVENANCE_FILE_NAME


def check_can_push(repository: str, public: bool) -> None:
    """Raise ValueError or OSError if a push would fail, or would publish a model that is meant to
    be private. This creates nothing on the hub.
    """
    api = HfApi()
    repository = whole_name(api, repository)
    if not public and api.repo_exists(repository) and is_public(api, repository):
        raise ValueError(
            f"--push_to_hub {repository}: this repository is public; add --public or choose another"
        )


def whole_name(api: HfApi, repository: str) -> str:
    """Return the name with its owner, who is the user if it has none. The hub would look for such
    a name among the oldest models, which have no owner.
    """
    user = api.whoami()["name"]
    return repository if "/" in repository else f"{user}/{repository}"


def is_public(api: HfApi, repository: str) -> bool:
    return not api.repo_info(repository).private


def push(
    folder: Path,
    repository: str,
    public: bool,
    message: str = "Upload patched model",
    names: Collection[str] | None = None,
) -> str:
    """Upload a saved model in one commit and return its address. The uploaded provenance.json lacks
    what it says about this machine. If a folder may hold other files, `names` are the model's.

    Raises OSError, which says what is complete and where, if the hub refuses the card or the upload
    fails.
    """
    api = HfApi()
    there = "nothing was created on the hub"
    try:
        ModelCard.load(folder / CARD_FILE_NAME).validate(repo_type="model")
        repository = whole_name(api, repository)
        existed = api.repo_exists(repository)
        if existed and not public and is_public(api, repository):
            raise ValueError(f"{repository} has become public, and --public was not given")
        address = api.create_repo(repository, private=not public, exist_ok=True)
        there = f"{repository} on the hub is " + ("as it was" if existed else "new and still empty")
        api.create_commit(address.repo_id, uploads(folder, names), commit_message=message)
    except (OSError, ValueError) as error:
        kept = names is not None
        chosen = names if kept else [PROVENANCE_FILE_NAME]
        flags = "".join(f" --{'include' if kept else 'exclude'} '{name}'" for name in chosen)
        flags += "" if public else " --private"
        raise OSError(
            f"the model is complete in {folder}, but its upload failed ({error}); {there}; try "
            f"again with `hf upload {repository} {folder}{flags}`"
        ) from error
    return str(address)


def uploads(folder: Path, names: Collection[str] | None = None) -> list[CommitOperationAdd]:
    """Return what to upload of a saved model's folder: the files of these names, or all of them,
    without what is local in one.
    """
    operations = []
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        name = path.relative_to(folder).as_posix()
        if names is not None and name not in names:
            continue
        content: Path | bytes = path
        if path.name == PROVENANCE_FILE_NAME:
            values = shareable(json.loads(path.read_text(encoding="utf-8")))
            content = (json.dumps(values, indent=2) + "\n").encode()
        operations.append(CommitOperationAdd(name, content))
    return operations
