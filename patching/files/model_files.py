"""Files of a model, in its folder or its hub repository: where they lie, JSON among them, and
weights.
"""

import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from huggingface_hub.errors import HTTPError
from transformers.utils import (
    SAFE_WEIGHTS_INDEX_NAME,
    SAFE_WEIGHTS_NAME,
    WEIGHTS_INDEX_NAME,
    WEIGHTS_NAME,
    cached_file,
)
from transformers.utils.hub import cached_files

from patching.files.json_files import load_json
from patching.files.lfs import check_not_a_pointer
from patching.recipe import Reference


def read_json(reference: Reference, file_name: str) -> dict[str, Any] | None:
    """Return a JSON object from a model's folder or repository, None if the model has no such
    file or does not say where it came from.

    Raises ValueError if the file is not a JSON object, OSError if the model cannot be reached.
    """
    path = find_file(reference, file_name)
    if path is None:
        return None
    try:
        values = load_json(path)
    except ValueError as error:
        check_not_a_pointer(path)
        raise ValueError(f"{path} is not JSON ({error}): download or save it again") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path} holds no JSON object: download or save it again")
    return values


def find_file(reference: Reference, file_name: str) -> Path | None:
    """Return where one of a model's files lies on this disk, None if the model does not have it.

    Raises OSError if the model cannot be reached.
    """
    if not reference.name_or_path:
        return None
    try:
        path = cached_file(
            reference.name_or_path,
            file_name,
            revision=reference.revision,
            _raise_exceptions_for_missing_entries=False,
        )
    except HTTPError as error:  # a connection that breaks is no OSError
        raise OSError(f"{reference.name_or_path}: {error}") from error
    return None if path is None else Path(path)


def pickled_files(reference: Reference) -> list[Path]:
    """Return a model's `.bin` files, empty if it has none.

    Raises ValueError if their index is damaged or names a file that does not exist.
    """
    path = find_file(reference, WEIGHTS_NAME)
    if path is not None:
        return [path]
    index = find_file(reference, WEIGHTS_INDEX_NAME)
    return [] if index is None else files_of_index(reference, index)


def weights_files(reference: Reference) -> list[Path] | None:
    """Return a model's safetensors files, from a folder or the hub. None if it has none.

    Raises ValueError if an index is damaged or names a file that does not exist.
    """
    path = find_file(reference, SAFE_WEIGHTS_NAME)
    if path is not None:
        return [path]
    index = find_file(reference, SAFE_WEIGHTS_INDEX_NAME)
    return None if index is None else files_of_index(reference, index)


def files_of_index(reference: Reference, index: Path) -> list[Path]:
    """Return the weights files that an index names.

    Raises ValueError if the index is damaged, names a file elsewhere, or one that does not exist.
    """
    try:
        names = set(load_json(index)["weight_map"].values())
        if not names or any(Path(name).name != name or name == ".." for name in names):
            raise ValueError("it must name files in its own folder")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        check_not_a_pointer(index)
        raise ValueError(f"{index} is damaged: {error}; download or save it again") from error
    found = cached_files(  # all at once, so that the hub's are downloaded side by side
        reference.name_or_path,
        sorted(names),
        revision=reference.revision,
        _raise_exceptions_for_missing_entries=False,
    )
    files = [Path(path) for path in found or []]
    if missing := sorted(names - {file.name for file in files}):
        raise ValueError(
            f"{reference.name_or_path}: {', '.join(missing)} is missing, but its index names it"
        )
    return files


def fault_of_pickles(paths: Sequence[Path]) -> ValueError | None:
    """Return what is wrong with `.bin` files that could not be loaded as tensors alone, None if
    each is a file that PyTorch writes.

    PyTorch's own messages recommend to run the code in such a file, which is never done here.
    """
    for path in paths:
        try:
            check_not_a_pointer(path)
        except ValueError as error:
            return error
        if not zipfile.is_zipfile(path):
            return ValueError(
                f"{path} is damaged: it is not a file of PyTorch weights, or only a part of one; "
                "download or save it again"
            )
    return None
