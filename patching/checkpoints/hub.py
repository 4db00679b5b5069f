"""Upload saved models to the hub, into private repositories unless `public` is set."""

from pathlib import Path

from huggingface_hub import HfApi


def check_can_push(repository: str, public: bool) -> None:
    """Raise ValueError or OSError if a push would fail, or would publish a model that is meant to
    be private. This creates nothing on the hub.
    """
    api = HfApi()
    api.whoami()
    if api.repo_exists(repository) and not public and not api.repo_info(repository).private:
        raise ValueError(
            f"--push_to_hub {repository}: this repository is public; add --public or choose another"
        )


def push(folder: Path, repository: str, public: bool) -> str:
    """Upload a saved model in one commit and return its address.

    Raises OSError, which says that the folder is complete, if the upload fails.
    """
    api = HfApi()
    try:
        address = api.create_repo(repository, private=not public, exist_ok=True)
        api.upload_folder(
            repo_id=address.repo_id, folder_path=folder, commit_message="Upload patched model"
        )
    except OSError as error:
        raise OSError(
            f"the model is complete in {folder}, but its upload failed ({error}); try again with "
            f"`hf upload {repository} {folder}`"
        ) from error
    return str(address)
