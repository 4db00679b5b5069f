"""Write the checkpoint of a recipe from its parents on disk, without a model in memory.

The headers of both parents are read, the output files are planned, and the kernel copies the bytes
of each tensor under its new name. A tensor passes through memory only if its dtype changes or it is
rescaled, piece by piece.
"""

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from patching.architectures.checks import check_recipe
from patching.architectures.config import config_for
from patching.architectures.models import empty_model
from patching.architectures.rescaling import Rescaling
from patching.checkpoints.file_sizes import TensorBytes, file_slices
from patching.checkpoints.layout import DTYPE_NAMES, Layout, tensors_of
from patching.checkpoints.safetensors_files import (
    ITEM_BYTES,
    StoredTensor,
    TensorOnDisk,
    copy_bytes,
    header_of,
    read_exactly,
    read_header,
    write_all,
)
from patching.checkpoints.saved_config import runs_remote_code
from patching.files.model_files import read_json, weights_files
from patching.files.outputs import write_json
from patching.recipe import Parent, Recipe, Reference

CAST_BYTES = 2**24
"""Bytes in memory at once of a tensor that is not copied as it is."""

TORCH_DTYPES = {name: dtype for dtype, name in DTYPE_NAMES.items()}


class OtherLayout(ValueError):
    """A checkpoint that is valid but cannot be copied byte by byte, so it has to be loaded."""


class OutOfRange(ValueError):
    """A tensor holds numbers that are too large for the dtype asked for."""

    def __init__(self, name: str, dtype: torch.dtype) -> None:
        dtype_name = str(dtype).removeprefix("torch.")
        others = "float32" if dtype == torch.bfloat16 else "bfloat16 or float32"
        super().__init__(f"dtype={dtype_name}: {name} has numbers beyond its range, use {others}")


@dataclass(frozen=True)
class Shard:
    """A planned weights file: its tensors in sequence, where to copy each one from, and how some
    are rescaled.
    """

    file_name: str
    tensors: list[StoredTensor]
    sources: list[TensorOnDisk]
    rescalings: list[Rescaling | None]

    @property
    def content(self) -> tuple[object, ...]:
        """What decides the bytes of the file."""
        return (*self.tensors, *self.sources, *self.rescalings)

    @property
    def num_bytes(self) -> int:
        return len(header_of(self.tensors)) + sum(tensor.num_bytes for tensor in self.tensors)


@dataclass(frozen=True)
class Splice:
    """A checked plan: the config of a recipe's model and the files of its checkpoint."""

    config: PreTrainedConfig
    model_class: type[PreTrainedModel]
    shards: list[Shard]

    @property
    def num_bytes(self) -> int:
        """The exact size of all weights files."""
        return sum(shard.num_bytes for shard in self.shards)

    def write(
        self,
        folder: Path,
        same_files: Mapping[str, Path] | None = None,
        write_tensors: Callable[[int, Shard], None] | None = None,
    ) -> None:
        """Write the weights files, and an index if there are several. Those named in `same_files`
        exist there already and are linked, if the file system can. `write_tensors` appends other
        numbers for a shard's tensors than copies of its sources.

        Like `cp`, this lets the system decide when bytes reach the disk. Files only ever grow, so a
        file cut short by a power failure is too short for its header, and no loader accepts it.

        Raises OSError if a parent's file ends early or the disk is full, OutOfRange if a number is
        too large for the dtype.
        """
        for shard in self.shards:
            with suppress(OSError):
                if same_files and shard.file_name in same_files:
                    os.link(same_files[shard.file_name], folder / shard.file_name)
                    continue
            target = os.open(folder / shard.file_name, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
            try:
                write_all(target, header_of(shard.tensors))
                (write_tensors or _write_tensors)(target, shard)
            finally:
                os.close(target)
        if len(self.shards) > 1:
            index = {
                "metadata": {
                    "total_size": sum(t.num_bytes for shard in self.shards for t in shard.tensors)
                },
                "weight_map": {
                    tensor.name: shard.file_name
                    for shard in self.shards
                    for tensor in shard.tensors
                },
            }
            write_json(folder / SAFE_WEIGHTS_INDEX_NAME, index)


def plan_splice(
    recipe: Recipe,
    configs: Mapping[Parent, PreTrainedConfig],
    layouts: Mapping[Parent, Layout],
    references: Mapping[Parent, Reference],
    dtype: torch.dtype,
    max_shard_bytes: int,
) -> Splice:
    """Find every tensor of the recipe on disk, check its shape, and distribute the tensors over
    files.

    Raises OtherLayout if a parent has to be loaded instead, and ValueError if files are damaged,
    missing, or disagree with the config. Wrong values in a complete file go unnoticed, because the
    format has no checksums.
    """
    config = config_for(recipe, configs)
    if runs_remote_code(config, type(layouts[recipe.embedding].model)):
        raise OtherLayout("the model's code comes with its weights")
    model = empty_model(config, dtype)
    check_recipe(model, recipe, {parent: layouts[parent].model for parent in recipe.parents})
    if model._keep_in_fp32_modules or model._keep_in_fp32_modules_strict:
        raise OtherLayout(f"{type(model).__name__} keeps some of its tensors in another dtype")
    planned = tensors_of(recipe, layouts)
    _check_names(planned, Layout(model, layouts[recipe.embedding].architecture, False), config)

    on_disk = {
        parent: _tensors_on_disk(parent, references[parent], layouts[parent])
        for parent in sorted(recipe.parents)
    }
    sources: dict[str, TensorOnDisk] = {}
    rescalings = {tensor.name: rescaling for tensor, _, _, rescaling in planned}
    for tensor, parent, parent_name, _ in planned:
        found = on_disk[parent].get(parent_name)
        where = references[parent].name_or_path
        if found is None:
            raise ValueError(f"{where}: its weights lack {parent_name}")
        if found.tensor.shape != tensor.shape:
            raise ValueError(
                f"{where}: {parent_name} has shape {list(found.tensor.shape)} in the weights and "
                f"{list(tensor.shape)} in the config"
            )
        if found.tensor.dtype != tensor.dtype and not {found.tensor.dtype, tensor.dtype} <= CASTS:
            raise OtherLayout(
                f"{parent_name} is stored as {found.tensor.dtype}, which is not cast to "
                f"{tensor.dtype} here"
            )
        sources[tensor.name] = found
    files = plan_files([tensor for tensor, *_ in planned], max_shard_bytes)
    names = file_names(len(files))
    shards = [
        Shard(
            name,
            tensors,
            [sources[tensor.name] for tensor in tensors],
            [rescalings[tensor.name] for tensor in tensors],
        )
        for name, tensors in zip(names, files)
    ]
    return Splice(config, type(model), shards)


CASTS = {"F64", "F32", "F16", "BF16"}
"""Dtypes between which a tensor can be cast."""


def _check_names(planned: Sequence, layout: Layout, config: PreTrainedConfig) -> None:
    """Assert that the planned tensors are those that transformers would save for this model."""
    expected = {tensor.name: tensor for tensor in layout.tensors}
    left_out = layout.tied_names if config.tie_word_embeddings else {}
    assert {tensor.name: tensor for tensor, *_ in planned} == {
        name: tensor for name, tensor in expected.items() if name not in left_out
    }


def _tensors_on_disk(
    parent: Parent, reference: Reference, layout: Layout
) -> dict[str, TensorOnDisk]:
    """Return a parent's tensors by the names `save_pretrained` would store them under.

    The head of a tied parent is its embedding. Keys that `from_pretrained` ignores are left out.

    Raises OtherLayout or ValueError as `plan_splice` does.
    """
    stored_as = (read_json(reference, "config.json") or {}).get("model_type")
    if stored_as not in (None, layout.model.config.model_type):
        raise OtherLayout(f"the {parent} is stored as a {stored_as}")
    files = weights_files(reference)
    if files is None:
        raise OtherLayout(f"the {parent} has no safetensors files")
    stored = {tensor.name for tensor in layout.tensors}
    whole = {}
    for name in stored:
        memory_name, is_part = layout.memory_name(name)
        if not is_part:
            whole[memory_name] = name
    found: dict[str, TensorOnDisk] = {}
    for path in files:
        for key, on_disk in read_header(path).items():
            memory_name, is_part = layout.memory_name(key)
            if memory_name not in layout.memory and key not in stored:
                continue
            name = key if key in stored else whole.get(memory_name)
            if name is None or (is_part and key not in stored):
                raise OtherLayout(f"the {parent} stores {key} in another layout")
            if name in found:
                raise OtherLayout(f"the {parent} stores {name} twice, once as {key}")
            if on_disk.tensor.dtype not in ITEM_BYTES:
                raise ValueError(
                    f"{path}: {key} is stored as {on_disk.tensor.dtype}, use the original in a "
                    "floating-point dtype"
                )
            found[name] = on_disk
    if layout.is_tied:
        for head, embedding in layout.tied_names.items():
            if head in found and embedding in found and not _equal(found[head], found[embedding]):
                raise ValueError(
                    f"{reference.name_or_path}: its config ties the head to the embedding, but "
                    "its weights hold two different matrices; set tie_word_embeddings to false in "
                    "its config"
                )
            either = found.get(embedding) or found.get(head)
            if either is not None:
                found[head] = found[embedding] = either
    return found


def plan_files(tensors: Sequence[StoredTensor], max_shard_bytes: int) -> list[list[StoredTensor]]:
    """Distribute tensors in sequence over files of at most `max_shard_bytes`. A larger tensor gets
    its own file.
    """
    slices = file_slices(TensorBytes.of(tensors), max_shard_bytes)
    # The widest dtypes come first, so that every tensor is aligned in its file.
    return [sorted(tensors[part], key=lambda t: -ITEM_BYTES[t.dtype]) for part in slices]


def file_names(num_files: int) -> list[str]:
    """Return the names transformers gives to this many weights files."""
    if num_files == 1:
        return [SAFE_WEIGHTS_NAME]
    stem, suffix = SAFE_WEIGHTS_NAME.split(".")
    return [f"{stem}-{i + 1:05d}-of-{num_files:05d}.{suffix}" for i in range(num_files)]


def _write_tensors(target: int, shard: Shard) -> None:
    for path, wanted in _by_file(shard):
        source = os.open(path, os.O_RDONLY)
        try:
            for wanted_range in wanted:
                if wanted_range.is_copy:
                    copy_bytes(source, target, wanted_range.start, wanted_range.stop)
                else:
                    _write_changed(source, target, wanted_range)
        finally:
            os.close(source)


class ByteRange(NamedTuple):
    """Bytes of a parent's file, and what becomes of them."""

    start: int
    stop: int
    stored: str
    dtype: str
    rescaling: Rescaling | None
    name: str
    """The first tensor in it."""

    @property
    def is_copy(self) -> bool:
        return self.stored == self.dtype and self.rescaling is None


def _by_file(shard: Shard) -> Iterator[tuple[Path, list[ByteRange]]]:
    """Yield the files that a shard's tensors are copied from, in sequence, each with byte ranges.
    Adjacent ranges are merged if they are copied as they are.
    """
    path: Path | None = None
    ranges: list[ByteRange] = []
    for tensor, source, rescaling in zip(shard.tensors, shard.sources, shard.rescalings):
        if source.path != path:
            if path is not None:
                yield path, ranges
            path, ranges = source.path, []
        dtypes = (source.tensor.dtype, tensor.dtype)
        new = ByteRange(source.start, source.stop, *dtypes, rescaling, tensor.name)
        last = ranges[-1] if ranges else None
        if last and last.is_copy and new.is_copy and last[1:4] == (new.start, *dtypes):
            ranges[-1] = last._replace(stop=new.stop)
        else:
            ranges.append(new)
    if path is not None:
        yield path, ranges


def _write_changed(source: int, target: int, wanted: ByteRange) -> None:
    """Append a range of one file to another, cast, and then rescaled as in memory. Errors are those
    of `cast`.
    """
    start, stop = wanted.start, wanted.stop
    stored, dtype = TORCH_DTYPES[wanted.stored], TORCH_DTYPES[wanted.dtype]
    while start < stop:
        piece = read_exactly(source, start, min(CAST_BYTES, stop - start))
        given = torch.frombuffer(piece, dtype=stored)
        numbers = cast(given, dtype, wanted.name, wanted.rescaling)
        write_all(target, memoryview(numbers.view(torch.uint8).numpy()))
        start += len(piece)


def cast(
    given: Tensor, dtype: torch.dtype, name: str, rescaling: Rescaling | None = None
) -> Tensor:
    """Return a tensor in `dtype`, and then rescaled.

    Raises OutOfRange, with the tensor's `name`, if a number is too large for `dtype`.
    """
    numbers = given.to(dtype)
    if rescaling is not None:
        numbers = rescaling.of(numbers)
    if not numbers.isfinite().all() and (numbers.isinf() & ~given.isinf()).any():
        raise OutOfRange(name, dtype)
    return numbers


def _equal(one: TensorOnDisk, other: TensorOnDisk) -> bool:
    """Return whether two tensors on disk are the same, bit by bit."""
    if one.tensor[1:] != other.tensor[1:]:
        return False
    num_bytes = one.tensor.num_bytes
    with one.path.open("rb") as a, other.path.open("rb") as b:
        a.seek(one.start)
        b.seek(other.start)
        for start in range(0, num_bytes, CAST_BYTES):
            piece = min(CAST_BYTES, num_bytes - start)
            if a.read(piece) != b.read(piece):
                return False
    return True
