"""Scores of single documents, kept because all sizes answer the same ones: a difference between two
sizes is far more certain than the two scores are.

A model's are in one NumPy archive, `documents/NAME.npz`, in arrays named `TASK/METRIC,FILTER` with
one row per document.
"""

import io
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy
from numpy.typing import NDArray

from patching.files.outputs import write_bytes

Documents = dict[str, NDArray[numpy.float64]]
FOLDER = "documents"
LARGEST_BYTES = 2**30
"""Of a model's arrays: some 100 million scores. A small damaged archive may hold far more."""


def documents_of(samples: Mapping[str, Iterable[Mapping[str, Any]]]) -> Documents:
    """The metrics in lm-eval's samples by task, for each metric that is a number for every
    document, or a pair of numbers: a sum and the weight it is divided by.
    """
    found: dict[str, list[Any]] = {}
    for task, of_task in samples.items():
        for sample in of_task:
            for metric in sample["metrics"]:
                found.setdefault(f"{task}/{metric},{sample['filter']}", []).append(sample[metric])
    arrays = {}
    for key, values in found.items():
        try:
            array = numpy.asarray(values, dtype=numpy.float64)
        except (TypeError, ValueError):  # texts, or lists of different lengths
            continue
        if is_of_documents(array):
            arrays[key] = array
    return arrays


def is_of_documents(array: NDArray) -> bool:
    """Whether an array has one number for each document, or a pair of them."""
    return array.dtype.kind == "f" and array.ndim > 0 and array.shape[1:] in ((), (2,))


def read_documents(folder: Path, name: str) -> Documents:
    """What is kept of the model `name` in a sweep's folder.

    Raises ValueError for a damaged file.
    """
    path = folder / FOLDER / f"{name}.npz"
    if not path.is_file():
        return {}
    try:
        with zipfile.ZipFile(path) as packed:
            num_bytes = sum(entry.file_size for entry in packed.infolist())
        if num_bytes > LARGEST_BYTES:
            raise ValueError(f"its arrays take {num_bytes:,} bytes")
        with numpy.load(path, allow_pickle=False) as archive:
            found = dict(archive)
        for key, array in found.items():
            if not is_of_documents(array):
                raise ValueError(f"{key} has shape {array.shape} and type {array.dtype}")
    except Exception as error:  # archives and arrays are damaged in many ways
        raise ValueError(f"{path} is damaged ({error}): remove it") from error
    return found


def add_documents(folder: Path, name: str, found: Documents) -> None:
    """Add to what is kept of the model `name`. The caller holds the folder's lock."""
    (folder / FOLDER).mkdir(parents=True, exist_ok=True)
    path = folder / FOLDER / f"{name}.npz"
    kept = read_documents(folder, name)
    archive = io.BytesIO()
    numpy.savez_compressed(archive, **kept | found)
    write_bytes(path, archive.getvalue())
