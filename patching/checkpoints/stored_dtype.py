"""The dtype that a model's weights are stored in, from the files' headers."""

from collections import Counter
from pathlib import Path

import torch
from huggingface_hub import constants, get_safetensors_metadata
from huggingface_hub.errors import NotASafetensorsRepoError
from transformers.modeling_utils import load_state_dict

from patching.checkpoints.layout import DTYPE_NAMES
from patching.checkpoints.safetensors_files import read_header
from patching.checkpoints.splice import TORCH_DTYPES
from patching.files.model_files import fault_of_pickles, pickled_files, weights_files
from patching.recipe import Reference


def stored_dtype(reference: Reference) -> torch.dtype | None:
    """Return the floating-point dtype of most of a model's numbers, None if there are no weights.

    Of a repository on the hub, only the headers are downloaded, unless it has no safetensors.

    Raises ValueError if a file is damaged, OSError if the model cannot be reached.
    """
    numbers = _numbers_by_dtype(reference)
    floating = {
        TORCH_DTYPES[name]: count
        for name, count in numbers.items()
        if name in TORCH_DTYPES and TORCH_DTYPES[name].is_floating_point
    }
    return max(floating, key=floating.get, default=None)


def _numbers_by_dtype(reference: Reference) -> Counter[str]:
    """Return how many numbers a model stores in each dtype, by safetensors' names."""
    name_or_path, revision = reference
    if not Path(name_or_path).is_dir() and not constants.HF_HUB_OFFLINE:
        try:
            metadata = get_safetensors_metadata(name_or_path, revision=revision)
            return Counter(metadata.parameter_count)
        except NotASafetensorsRepoError:
            return _of_pickle(reference)
    files = weights_files(reference)
    if files is None:
        return _of_pickle(reference)
    numbers: Counter[str] = Counter()
    for path in files:
        for on_disk in read_header(path).values():
            numbers[on_disk.tensor.dtype] += on_disk.tensor.num_elements
    return numbers


def _of_pickle(reference: Reference) -> Counter[str]:
    """Return the same for a model in `.bin` files, from the first of several."""
    paths = pickled_files(reference)[:1]
    if not paths:
        return Counter()
    try:
        tensors = load_state_dict(str(paths[0]), map_location="meta", weights_only=True)
    except Exception as error:  # torch's unpickler raises anything on a damaged file
        raise fault_of_pickles(paths) or ValueError(
            f"{paths[0]} cannot be read: it holds more than tensors, which is never run"
        ) from error
    numbers: Counter[str] = Counter()
    for tensor in tensors.values():
        if isinstance(tensor, torch.Tensor) and tensor.dtype in DTYPE_NAMES:
            numbers[DTYPE_NAMES[tensor.dtype]] += tensor.numel()
    return numbers
