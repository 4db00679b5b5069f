"""Build the model of any size between a student and its teacher, with no further training.

In Python, use `build_intermediate_model` and `iter_family`, or `patching.family.Family`. On the
command line, the model is saved as an ordinary Hugging Face checkpoint, copied from file to file
without loading a model wherever that is possible:

    python -m patching.patch --teacher_model_name_or_path TEACHER \\
        --student_model_name_or_path STUDENT --num_layers_to_patch 4 --save_directory DIR

The size may also be named by a limit (`--target_params 3.1B`, `--target_bytes 6GB`, or
`--target_memory 6GB --context 8192` for weights and key-value cache) or layer by layer
(`--patched_layers 3,5,16-18`). `--num_layers_to_patch 1,3,5` or `all` writes a folder for each
size. `--list` shows every size and builds nothing. `--order klpatch --calibration TEXT` searches
the order first; patching.orders does so once for all sizes.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from patching.arguments import DTYPES, CalibrationArguments, FamilyArguments
from patching.cli.command_line import (
    CommandLineParser,
    check_one_process,
    print_search_step,
    run_command,
    user_errors,
)
from patching.cli.units import bytes_text, count_text, parse_bytes
from patching.files.outputs import check_new_folder
from patching.patch_order import SEARCHED_ORDERS
from patching.size_arguments import SizeArguments

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from patching.blocks import Order
    from patching.checkpoints.save import SavePlan
    from patching.checkpoints.sizes import Size
    from patching.family import Family, Member
    from patching.student_config import StudentConfig


@dataclass
class PatchArguments(SizeArguments, CalibrationArguments, FamilyArguments):
    _argument_group_name = "what to save"

    list: bool = field(
        default=False,
        metadata={"help": "list every size of the family, from configs alone, and build nothing"},
    )
    json: bool = field(default=False, metadata={"help": "with --list: print exact numbers as JSON"})
    save_directory: Path | None = field(
        default=None, metadata={"help": "new folder for the checkpoint"}
    )
    dtype: str = field(
        default="auto",
        metadata={"help": "dtype of the saved weights, auto: the teacher's", "choices": DTYPES},
    )
    max_shard_size: str = field(
        default="5GB", metadata={"help": "largest weights file: 5GB, 500MB, 2GiB"}
    )
    push_to_hub: str | None = field(
        default=None,
        metadata={"help": "upload the checkpoint to this hub repository, privately"},
    )
    public: bool = field(
        default=False, metadata={"help": "with --push_to_hub: make the repository public"}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        problems = self.check_calibration() + self.check_size(self.list)
        if self.searches_order and self.patched_layers is not None:
            problems.append(f"--patched_layers names every layer: leave out --order {self.order}")
        if not self.searches_order and self.calibration is not None:
            problems.append(f"--calibration belongs to --order {' or '.join(SEARCHED_ORDERS)}")
        if self.list and self.push_to_hub:
            problems.append("--list builds nothing: leave out --push_to_hub")
        if not self.list and self.save_directory is None:
            problems.append("--save_directory is required: name a folder for the model")
        if self.json and not self.list:
            problems.append("--json belongs to --list")
        if self.push_to_hub and self.names_several:
            problems.append("--push_to_hub uploads one model: name one size")
        if self.public and not self.push_to_hub:
            problems.append("--public belongs to --push_to_hub")
        if problems:
            raise ValueError("; ".join(problems))


def build_intermediate_model(
    teacher_name_or_path: str | PreTrainedModel,
    student_name_or_path: str | PreTrainedModel,
    num_layers_to_patch: int,
    patch_first_k_layers: bool | None = None,
    dtype: torch.dtype | str = "auto",
    *,
    order: Order | None = None,
    revision: str | None = None,
    student_revision: str | None = None,
    student_config: StudentConfig | None = None,
    kept_layers: Sequence[int] | None = None,
    match_scale: bool = True,
    tokenizer: PreTrainedTokenizerBase | None = None,
    trust_remote_code: bool = False,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Return the family's member of size k and its tokenizer, which pads on the left with a padding
    token.

    k = 0 is exactly the student, the largest k exactly the teacher (arXiv 2510.05064, section 2).
    `patch_first_k_layers` True patches from the first layer on and False from the last one back;
    None leaves the order to `order`, student_config.json and the architecture. `tokenizer` is the
    teacher's unless given. A DistilBERT becomes a BERT, and an encoder's tokenizer keeps its
    padding side. The other arguments, and the models in memory that either name may be, are those
    of `Family.from_pretrained`.

    Raises ValueError or OSError, before any weights load, for a k out of range, parents that do not
    fit together, and missing files.
    """
    family = _open(
        teacher_name_or_path,
        student_name_or_path,
        patch_first_k_layers,
        order,
        dtype=dtype,
        revision=revision,
        student_revision=student_revision,
        student_config=student_config,
        kept_layers=kept_layers,
        match_scale=match_scale,
        trust_remote_code=trust_remote_code,
    )
    family.recipe(num_layers_to_patch)  # raises for a k out of range
    tokenizer = family.tokenizer if tokenizer is None else tokenizer
    return family.model(num_layers_to_patch), tokenizer


def iter_family(
    teacher_name_or_path: str | PreTrainedModel,
    student_name_or_path: str | PreTrainedModel,
    sizes: Iterable[int] | None = None,
    patch_first_k_layers: bool | None = None,
    dtype: torch.dtype | str = "auto",
    *,
    order: Order | None = None,
    revision: str | None = None,
    student_revision: str | None = None,
    student_config: StudentConfig | None = None,
    kept_layers: Sequence[int] | None = None,
    match_scale: bool = True,
    trust_remote_code: bool = False,
) -> Iterator[Member]:
    """Iterate over every size of a family, or the given ones, with one copy of teacher and student
    in memory.

    Arguments and errors are those of `build_intermediate_model`. Errors are raised by the call, not
    by the first iteration.
    """
    family = _open(
        teacher_name_or_path,
        student_name_or_path,
        patch_first_k_layers,
        order,
        dtype=dtype,
        revision=revision,
        student_revision=student_revision,
        student_config=student_config,
        kept_layers=kept_layers,
        match_scale=match_scale,
        trust_remote_code=trust_remote_code,
    )
    chosen = list(range(len(family)) if sizes is None else sizes)
    for k in chosen:
        family.recipe(k)  # raises for a k out of range
    return (family[k] for k in chosen)


def _open(
    teacher: str | PreTrainedModel,
    student: str | PreTrainedModel,
    patch_first_k_layers: bool | None,
    order: Order | None,
    **how: Any,
) -> Family:
    from patching.family import Family

    if patch_first_k_layers is not None:
        if order is not None:
            raise ValueError("patch_first_k_layers and order both name an order: give one of them")
        order = "first" if patch_first_k_layers else "last"
    return Family.from_pretrained(teacher, student, order, **how)


def main(argv: list[str] | None = None) -> None:
    with user_errors():
        check_one_process()
        parser = CommandLineParser(PatchArguments, prog="patching.patch", description=__doc__)
        (arguments,) = parser.parse_args_into_dataclasses(argv)
        max_shard_bytes = parse_bytes(arguments.max_shard_size, "max_shard_size")
        if not arguments.list and not arguments.names_several:
            check_new_folder(arguments.save_directory)
        family = arguments.open_family(dtype=arguments.dtype)
        if not arguments.list:  # a size that does not exist is noticed before any search
            folders_of(arguments, arguments.members(family, max_shard_bytes))
        elif arguments.context is not None:
            from patching.checkpoints.sizes import check_cached_text

            check_cached_text(family.configs["teacher"], arguments.context, arguments.batch)
        if arguments.searches_order:
            family, measure = searching(arguments, family)
    if arguments.searches_order:
        from patching.orders.findings import searched_order

        with user_errors((FloatingPointError,)):
            order = searched_order(measure, arguments.order, print_search_step)
        family = family.with_order(order)
        print(f"{arguments.order}: {','.join(map(str, family.order))}", file=sys.stderr)
    if arguments.list:
        print(listing(arguments, family, max_shard_bytes))
        return
    save(arguments, family, max_shard_bytes)


def searching(arguments: PatchArguments, family: Family):
    """The family on the accelerator if there is one, and what its order is searched with."""
    from patching.devices import usable_device, warn_if_slow
    from patching.orders.measurements import Measurements

    if problems := arguments.check_calibration(f"--order {arguments.order} is measured on text"):
        raise ValueError("; ".join(problems))
    text = arguments.read_calibration()
    device = usable_device(None)
    warn_if_slow(device, family.dtype, "the order.json of patching.orders --dtype float32")
    family = arguments.open_family(dtype=family.dtype, device=device)
    return family, Measurements(family, text)


def folders_of(arguments: PatchArguments, members: Iterable[int | None]) -> list[Path]:
    """The folder of each member that the flags name. Raises ValueError if one cannot be made. One
    of several may hold a model, which `saved_before` looks at.
    """
    folder = arguments.save_directory
    folders = [folder if k is None else folder / f"k{k}" for k in members]
    for path in folders:
        if not (arguments.names_several and (path / "config.json").is_file()):
            check_new_folder(path)
    return folders


def saved_before(
    arguments: PatchArguments, plans: Sequence[SavePlan], folders: Sequence[Path]
) -> set[Path]:
    """The folders in which the same command, stopped before it had saved all sizes, saved one.
    Raises ValueError for any other folder that is not empty.
    """
    if not arguments.names_several:
        return set()
    made_by = asdict(arguments)
    saved = {path for plan, path in zip(plans, folders) if plan.is_saved_in(path, made_by)}
    for path in folders:
        if path not in saved:
            check_new_folder(path)
    return saved


def save(arguments: PatchArguments, family: Family, max_shard_bytes: int) -> None:
    """Save the members that the flags name, and upload the one if they ask for that."""
    from patching.checkpoints.hub import check_can_push, push
    from patching.checkpoints.save import plan_save, same_files
    from patching.checkpoints.splice import OutOfRange

    repository = arguments.push_to_hub
    with user_errors():
        members = arguments.members(family, max_shard_bytes)
        folders = folders_of(arguments, members)
        if repository:
            check_can_push(repository, arguments.public)
        plans = [
            plan_save(family, patched_layers, folder, max_shard_bytes)
            for patched_layers, folder in zip(members.values(), folders)
        ]
        saved = saved_before(arguments, plans, folders)
        same = same_files(plans, folders, saved)
    for reason in {plan.reason_to_load for plan in plans} - {None}:
        print(f"{reason}: the models are loaded instead of copied file to file")
    name = repository or arguments.save_directory.resolve().name
    for k, plan, folder, existing in zip(members, plans, folders, same):
        if folder in saved:
            print(f"{folder}: k = {k} is saved already", flush=True)
            continue
        with user_errors((OSError, OutOfRange)):
            plan.save(folder, name if k is None else f"{name}-k{k}", asdict(arguments), existing)
        print(summary(plan, folder), flush=True)
    if repository:
        with user_errors():
            address = push(folder, repository, arguments.public)
        print(f"uploaded to {address}")


def summary(plan: SavePlan, folder: Path) -> str:
    """One line about a member that was saved."""
    size = plan.size
    active = (
        "" if has_no_experts([size]) else f"{count_text(size.active_parameters)} active per token, "
    )
    return (
        f"{folder}: k = {plan.num_layers_to_patch}, {size.depth} layers, "
        f"{count_text(size.parameters.stored)} parameters ({active}"
        f"{count_text(size.parameters.both_counted)} with embedding and head both counted), "
        f"{bytes_text(size.bytes_on_disk)}"
    )


def listing(arguments: PatchArguments, family: Family, max_shard_bytes: int) -> str:
    """Every size of the family, as a table or as JSON."""
    sizes = family.sizes(max_shard_bytes)
    context, batch = arguments.context, arguments.batch
    if not arguments.json:
        return table(sizes, context, batch)
    members = []
    for k, size in enumerate(sizes):
        values = {"num_layers_to_patch": k, "patched_layers": sorted(family.patched_layers(k))}
        if context is not None:
            values["memory_bytes"] = size.memory_bytes(context, batch)
        members.append(values | size.to_dict())
    dtype_name = str(family.dtype).removeprefix("torch.")
    whole = {"order": family.order, "dtype": dtype_name, "members": members}
    if context is not None:
        whole |= {"context": context, "batch": batch}
    return json.dumps(whole, indent=2)


def has_no_experts(sizes: Iterable[Size]) -> bool:
    return all(size.active_parameters == size.parameters.stored for size in sizes)


def table(sizes: Sequence[Size], context: int | None, batch: int) -> str:
    """The sizes of a family as text, k = 0 first. Memory is a column if `context` is given, and
    active parameters are one if not all are active.
    """
    columns = {
        "k": [str(k) for k in range(len(sizes))],
        "layers": [str(size.depth) for size in sizes],
        "parameters": [count_text(size.parameters.both_counted) for size in sizes],
        "stored": [count_text(size.parameters.stored) for size in sizes],
        "active": [count_text(size.active_parameters) for size in sizes],
        "on disk": [bytes_text(size.bytes_on_disk) for size in sizes],
        "memory": [bytes_text(size.memory_bytes(context or 1, batch)) for size in sizes],
        "KV cache per token": [bytes_text(size.kv_cache_bytes_per_token) for size in sizes],
        "FLOPs per token": [count_text(size.flops_per_token) for size in sizes],
    }
    if has_no_experts(sizes):
        del columns["active"]
    if context is None:
        del columns["memory"]
    widths = {name: max(map(len, (name, *cells))) for name, cells in columns.items()}
    rows = [
        dict(zip(columns, columns)),
        *(dict(zip(columns, row)) for row in zip(*columns.values())),
    ]
    return "\n".join(
        "  ".join(row[name].rjust(width) for name, width in widths.items()) for row in rows
    )


if __name__ == "__main__":
    run_command(main)
