"""A student for another teacher, as a sum of three checkpoints on disk.

    new student = initial student of the new teacher + (student - initial student of its teacher)

Tensors are read and written piece by piece, so no model is in memory. Sums are in float64, so that
the same teacher twice gives the same student again.
"""

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig

from patching.architectures.lookup import check_builds, read_config
from patching.blocks import LayerMap
from patching.checkpoints.companions import Companions
from patching.checkpoints.layout import Layout, layout_of, renumbered, tensors_of
from patching.checkpoints.origin import origin_of
from patching.checkpoints.safetensors_files import (
    ITEM_BYTES,
    StoredTensor,
    TensorOnDisk,
    read_exactly,
    write_all,
)
from patching.checkpoints.splice import (
    CASTS,
    TORCH_DTYPES,
    OtherLayout,
    Shard,
    Splice,
    cast,
    plan_splice,
)
from patching.checkpoints.stored_dtype import stored_dtype
from patching.family import MAX_SHARD_BYTES
from patching.files.outputs import check_space, environment, new_folder, write_json
from patching.patch_order import recommended_order
from patching.recipe import Reference, initial_student, whole_model
from patching.student_config import StudentConfig, read_student_config
from train.student import student_companions
from train.student_card import write_student_card

RECORD_FILE_NAME = "weight_delta.json"
PIECE_NUMBERS = 2**22
"""Numbers of a tensor in memory at once."""


@dataclass(frozen=True)
class Variant:
    """A teacher's tensors on disk, by the names it stores them under."""

    reference: Reference
    config: PreTrainedConfig
    layout: Layout
    on_disk: dict[str, TensorOnDisk]

    @classmethod
    def read(cls, flag: str, reference: Reference, num_layers: int) -> "Variant":
        """Read a teacher's config and the headers of its files.

        Raises ValueError if it does not have `num_layers` or cannot be read piece by piece.
        """
        config = read_config(flag, *reference, trust_remote_code=False)
        check_builds(flag, reference.name_or_path, config, trust_remote_code=False)
        found = config.get_text_config().num_hidden_layers
        if found != num_layers:
            raise ValueError(
                f"{flag}={reference.name_or_path}: it has {found} layers, and the student was made "
                f"from a teacher of {num_layers}"
            )
        dtype = stored_dtype(reference) or torch.float32
        layout = layout_of(config, dtype)
        shards = _plan_copy(flag, reference, config, layout, dtype).shards
        on_disk = {
            tensor.name: source
            for shard in shards
            for tensor, source in zip(shard.tensors, shard.sources)
        }
        return cls(reference, config, layout, on_disk)

    def of_initial_student(self, layer_map: LayerMap) -> dict[str, TensorOnDisk]:
        """Return the tensors of its initial student, by the student's names."""
        tensors = tensors_of(initial_student(layer_map), {"teacher": self.layout})
        return {of.tensor.name: self.on_disk[of.parent_name] for of in tensors}

    def layer(self, layer_idx: int) -> dict[str, TensorOnDisk]:
        """Return a layer's tensors, by the names they would have in the first layer."""
        names = [tensor.name for tensor in self.layout.parts[layer_idx]]
        return {renumbered(name, layer_idx, 0): self.on_disk[name] for name in names}


@dataclass(frozen=True)
class DeltaPlan:
    """A checked plan to write a new student."""

    layer_map: LayerMap
    student: Splice
    """The files of the student, which the new student's are like."""
    before: Variant
    after: Variant
    companions: Companions

    def cosines(self) -> dict[int, float]:
        """Return, for each student layer whose block has several teacher layers, the cosine between
        the differences that both teachers have from the kept layer to the mean of the others.
        """
        return {
            i: _cosine(_differences(self.before, block), _differences(self.after, block))
            for i, block in enumerate(self.layer_map.blocks)
            if len(block) > 1
        }

    def save(
        self, folder: Path, cosines: Mapping[int, float], arguments: Mapping[str, Any]
    ) -> None:
        """Write the new student to `folder`, which appears only when it is complete.

        Raises OSError if a file ends early or the disk is full, and OutOfRange if a number is too
        large for the dtype that the student is stored in.
        """
        check_space(folder, self.student.num_bytes)
        before = self.before.of_initial_student(self.layer_map)
        after = self.after.of_initial_student(self.layer_map)
        origin = origin_of(self.after.reference)
        student_config = StudentConfig(
            self.layer_map, recommended_order(self.after.config.model_type)
        )

        def write_sums(target: int, shard: Shard) -> None:
            for tensor, of_student in zip(shard.tensors, shard.sources):
                sources = (of_student, before[tensor.name], after[tensor.name])
                for piece in sums(tensor, *sources):
                    write_all(target, memoryview(piece.view(torch.uint8).numpy()))

        with new_folder(folder) as staging:
            self.student.write(staging, write_tensors=write_sums)
            student_config.save(staging)
            facts = {
                "initialized from": "the kept teacher layers",
                "training": "none: what distillation changed in a student of another variant of "
                "the teacher was added to the weights",
                "least cosine between the variants": f"{min(cosines.values(), default=1):.2f}",
            }
            write_student_card(
                staging,
                folder.resolve().name,
                origin,
                self.after.config,
                student_config,
                facts,
                held_out={},
            )
            record = {
                "arguments": dict(arguments),
                "cosine_by_layer": dict(cosines),
                "environment": environment(),
            }
            write_json(staging / RECORD_FILE_NAME, record)
            self.companions.write(staging)


def plan_delta(student: Reference, teacher_from: Reference, teacher_to: Reference) -> DeltaPlan:
    """Read configs and headers of all three models, and check that they fit.

    Raises ValueError if they do not, if files are damaged, or if they are not safetensors.
    """
    layer_map = read_student_config(*student).layer_map
    before = Variant.read("teacher_from", teacher_from, layer_map.num_teacher_layers)
    after = Variant.read("teacher_to", teacher_to, layer_map.num_teacher_layers)
    config = read_config("student", *student, trust_remote_code=False)
    check_builds("student", student.name_or_path, config, trust_remote_code=False)
    dtype = stored_dtype(student) or torch.float32
    splice = _plan_copy("student", student, config, layout_of(config, dtype), dtype)
    wanted = {tensor.name: tensor.shape for shard in splice.shards for tensor in shard.tensors}
    for flag, teacher in (("teacher_from", before), ("teacher_to", after)):
        of_teacher = teacher.of_initial_student(layer_map)
        found = {name: on_disk.tensor.shape for name, on_disk in of_teacher.items()}
        for name in [*wanted, *found]:
            if wanted.get(name) != found.get(name):
                raise ValueError(
                    f"{flag}={teacher.reference.name_or_path}: the student has {name} of shape "
                    f"{_shape(wanted.get(name))}, and the initial student of this teacher of shape "
                    f"{_shape(found.get(name))}; give teachers of the student's architecture"
                )
    companions = student_companions(teacher_to, after.config, layer_map, dtype, None)
    return DeltaPlan(layer_map, splice, before, after, companions)


def cosine_table(layer_map: LayerMap, cosines: Mapping[int, float]) -> str:
    """Return the cosines as text, one line for each student layer."""
    lines = ["student layer  teacher block  cosine"]
    for i, block in enumerate(layer_map.blocks):
        layers = f"{block.start}-{block.stop - 1}" if len(block) > 1 else f"{block.start}"
        lines.append(f"{i:13}  {layers:>13}  {f'{cosines[i]:.4f}' if i in cosines else '-':>6}")
    return "\n".join(lines)


def check_cosines(cosines: Mapping[int, float], min_cosine: float) -> None:
    """Raise ValueError, naming the layers, if cosines are below the least one."""
    # Written so that a cosine that is not a number is refused, too.
    if low := [i for i, cosine in cosines.items() if not cosine >= min_cosine]:
        names = ", ".join(f"{i} ({cosines[i]:.2f})" for i in low)
        raise ValueError(
            f"min_cosine={min_cosine:g}: the teachers differ too much in the blocks of student "
            f"layers {names}; distill a student of --teacher_to, or lower --min_cosine"
        )


def _plan_copy(
    flag: str, reference: Reference, config: PreTrainedConfig, layout: Layout, dtype: torch.dtype
) -> Splice:
    """Return the plan to copy a whole model, which says where each of its tensors is."""
    recipe = whole_model(config.get_text_config().num_hidden_layers)
    parent = "teacher"
    try:
        return plan_splice(
            recipe,
            {parent: config},
            {parent: layout},
            {parent: reference},
            dtype,
            MAX_SHARD_BYTES,
        )
    except OtherLayout as error:
        raise ValueError(f"{flag}={reference.name_or_path}: {error}") from error


def _shape(shape: tuple[int, ...] | None) -> str:
    return "none" if shape is None else str(list(shape))


def numbers(on_disk: TensorOnDisk) -> Iterator[Tensor]:
    """Yield a tensor's numbers in float64, piece by piece."""
    item = ITEM_BYTES[on_disk.tensor.dtype]
    file = os.open(on_disk.path, os.O_RDONLY)
    try:
        for start in range(on_disk.start, on_disk.stop, PIECE_NUMBERS * item):
            size = min(PIECE_NUMBERS * item, on_disk.stop - start)
            piece = read_exactly(file, start, size)
            yield torch.frombuffer(piece, dtype=TORCH_DTYPES[on_disk.tensor.dtype]).double()
    finally:
        os.close(file)


def sums(
    tensor: StoredTensor, student: TensorOnDisk, before: TensorOnDisk, after: TensorOnDisk
) -> Iterator[Tensor]:
    """Yield the numbers of a new student's tensor, in the dtype to write.

    Raises ValueError if some are not finite.
    """
    dtype = TORCH_DTYPES[tensor.dtype]
    if tensor.dtype not in CASTS:  # no weights
        for piece in numbers(after):
            yield piece.to(dtype)
        return
    pieces = zip(numbers(student), numbers(before), numbers(after), strict=True)
    for of_student, of_before, of_after in pieces:
        total = of_after + (of_student - of_before)
        if not total.isfinite().all():
            raise ValueError(
                f"{tensor.name} holds numbers that are not finite, in the student or in a teacher: "
                "download or save it again"
            )
        yield cast(total, dtype, tensor.name)


def _differences(teacher: Variant, block: range) -> Iterator[Tensor]:
    """Yield, piece by piece, the mean of a block's other layers minus its first layer, over the
    weights that all of them have: some layers may have experts and others not.
    """
    kept, *others = (teacher.layer(layer_idx) for layer_idx in block)
    for name in sorted(kept):
        tensor = kept[name].tensor
        shapes = {layer[name].tensor.shape if name in layer else None for layer in others}
        if tensor.dtype not in CASTS or shapes != {tensor.shape}:
            continue
        for of_kept, *of_others in zip(
            numbers(kept[name]), *(numbers(layer[name]) for layer in others), strict=True
        ):
            yield torch.stack(of_others).mean(0) - of_kept


def _cosine(one: Iterator[Tensor], other: Iterator[Tensor]) -> float:
    """Return the cosine between two long vectors, 0 if one of them is 0."""
    product = one_square = other_square = 0.0
    for a, b in zip(one, other, strict=True):
        product += float(a @ b)
        one_square += float(a @ a)
        other_square += float(b @ b)
    length = (one_square * other_square) ** 0.5
    return product / length if length else 0.0
