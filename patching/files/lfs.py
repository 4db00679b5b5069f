"""Git LFS pointers: short texts that a clone holds in place of files that were not pulled."""

from pathlib import Path

START = b"version https://git-lfs"


def check_not_a_pointer(path: Path) -> None:
    """Raise ValueError if a file is a Git LFS pointer. A file that does not exist is none."""
    if not path.is_file():
        return
    with path.open("rb") as file:
        if file.read(len(START)) == START:
            raise ValueError(
                f"{path} is a Git LFS pointer, not the file itself: run `git lfs pull` where it is"
            )
