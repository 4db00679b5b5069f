"""Tasks that a sweep could not evaluate, and why: kept in its folder for later reports."""

from collections.abc import Mapping
from pathlib import Path

from patching.files.json_files import check_types, read_object
from patching.files.outputs import write_json

FILE_NAME = "failures.json"


def store_failures(folder: Path, failures: Mapping[str, str]) -> None:
    """Replace what the sweep before this one left in the folder."""
    if failures:
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / FILE_NAME, dict(failures))
    else:
        (folder / FILE_NAME).unlink(missing_ok=True)


def read_failures(folder: Path) -> dict[str, str]:
    """By task, why the last sweep into a folder could not evaluate it.

    Raises ValueError for a damaged file.
    """
    path = folder / FILE_NAME
    if not path.is_file():
        return {}
    found = read_object(path)
    try:
        check_types(found, dict[str, str], "it")
    except ValueError as error:
        raise ValueError(f"{path} holds no failures ({error}): remove it") from error
    return found
