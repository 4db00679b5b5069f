"""Saved models on the hub: private unless their owner says otherwise."""

from pathlib import Path

from huggingface_hub import HfApi


def check_can_push(repository: str, public: bool) -> None:
    """Raise ValueError or OSError where a push would fail, or would publish what was not meant to
    be.

    Nothing is made there yet.
    """
    api = HfApi()
    api.whoami()
    if api.repo_exists(repository) and not public and not api.repo_info(repository).private:
        raise ValueError(
            f"--push_to_hub {repository}: this repository is public; add --public, or name another"
        )


def push(folder: Path, repository: str, public: bool) -> str:
    """Upload a saved model as one commit; its address.

    Raises OSError, saying that the folder is complete, where the hub does not take it.
    """
    api = HfApi()
    try:
        address = api.create_repo(repository, private=not public, exist_ok=True)
        api.upload_folder(
            repo_id=address.repo_id, folder_path=folder, commit_message="Upload patched model"
        )
    except OSError as error:
        raise OSError(
            f"the model is complete in {folder}, and its upload failed ({error}); "
            f"`hf upload {repository} {folder}` tries again"
        ) from error
    return str(address)
