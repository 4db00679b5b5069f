"""Files of a model, in its folder or its hub repository: where they lie, JSON among them, and
weights that are pickles.
"""

import json
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers.utils import WEIGHTS_INDEX_NAME, WEIGHTS_NAME, cached_file

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
        values = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
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
    path = cached_file(
        reference.name_or_path,
        file_name,
        revision=reference.revision,
        _raise_exceptions_for_missing_entries=False,
    )
    return None if path is None else Path(path)


def pickled_files(reference: Reference) -> list[Path]:
    """Return a model's `.bin` files, empty if it has none.

    Raises ValueError if their index is damaged or names a file that does not exist.
    """
    path = find_file(reference, WEIGHTS_NAME)
    if path is not None:
        return [path]
    index = read_json(reference, WEIGHTS_INDEX_NAME)
    if index is None:
        return []
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(n, str) for n in weight_map.values()):
        raise ValueError(f"{WEIGHTS_INDEX_NAME} of {reference.name_or_path} is damaged")
    found = {name: find_file(reference, name) for name in sorted(set(weight_map.values()))}
    if missing := [name for name, path in found.items() if path is None]:
        raise ValueError(
            f"{reference.name_or_path}: {missing[0]} is missing, but its index names it"
        )
    return list(found.values())


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
