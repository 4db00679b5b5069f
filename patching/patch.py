"""Build the model of any size between a student and its teacher, with no further training.

In Python, `build_intermediate_model` and `iter_family`. On the command line it is saved as an
ordinary Hugging Face checkpoint, copied file to file without loading a model where that is
possible:

    python -m patching.patch --teacher_model_name_or_path TEACHER \\
        --student_model_name_or_path STUDENT --num_layers_to_patch 4 --save_directory DIR

The size may also be named by a limit (`--target_params 3.1B`, `--target_bytes 6GB`) or layer by
layer (`--patched_layers 3,5,16-18`); `--list` shows every size and builds nothing. `--order klpatch
--calibration TEXT` searches the order first; patching.orders does so once for all sizes.
"""

import dataclasses
import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from patching.architectures.models import predicts_masked_tokens
from patching.arguments import (
    DTYPES,
    CalibrationArguments,
    FamilyArguments,
    calibration_of,
    references,
)
from patching.assemble import assemble
from patching.blocks import Order, as_layer_list
from patching.checkpoints.hub import check_can_push, push
from patching.checkpoints.layout import Layout, layout_of
from patching.checkpoints.model_card import FILE_NAME as CARD_FILE_NAME
from patching.checkpoints.model_card import model_card, origin_of
from patching.checkpoints.sizes import Size, deepest_that_fits, size_of, table
from patching.checkpoints.splice import OtherLayout, Splice, generation_config_of, plan_splice
from patching.cli.command_line import CommandLineParser, check_one_process, user_errors
from patching.cli.units import bytes_text, count_text, parse_bytes, parse_count, parse_ranges
from patching.family import Family, usable_device
from patching.files.outputs import (
    check_new_folder,
    check_space,
    environment,
    new_folder,
    write_json,
    write_text,
)
from patching.orders.measurements import Measurements
from patching.orders.named_searches import searched_order
from patching.patch_order import SEARCHED_ORDERS
from patching.recipe import Parent, Recipe, patched_model
from patching.student_config import StudentConfig

PROVENANCE_FILE_NAME = "provenance.json"

WAYS_TO_NAME_A_SIZE = ("num_layers_to_patch", "target_params", "target_bytes", "patched_layers")


@dataclass
class PatchArguments(CalibrationArguments, FamilyArguments):
    num_layers_to_patch: int | None = field(
        default=None, metadata={"help": "how many patchable student layers become teacher blocks"}
    )
    target_params: str | None = field(
        default=None,
        metadata={"help": "the deepest member with at most so many stored parameters: 3.1B, 350M"},
    )
    target_bytes: str | None = field(
        default=None,
        metadata={"help": "the deepest member whose weights files fit: 6GB (10^9), 6GiB (2^30)"},
    )
    patched_layers: str | None = field(
        default=None, metadata={"help": "these student layers become teacher blocks: 3,5,16-18"}
    )
    list: bool = field(
        default=False,
        metadata={"help": "show every size of the family, from configs alone, and build nothing"},
    )
    json: bool = field(default=False, metadata={"help": "with --list: as JSON, numbers exact"})
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
        default=None, metadata={"help": "upload the checkpoint to this hub repository, private"}
    )
    public: bool = field(
        default=False, metadata={"help": "with --push_to_hub: anyone may see the repository"}
    )

    def __post_init__(self) -> None:
        named = [name for name in WAYS_TO_NAME_A_SIZE if getattr(self, name) is not None]
        flags = " or ".join(f"--{name}" for name in WAYS_TO_NAME_A_SIZE)
        problems = self.check_calibration()
        if self.list and named:
            problems.append(f"--list shows every size: leave out --{' and --'.join(named)}")
        elif not self.list and len(named) != 1:
            given = f", not both --{' and --'.join(named)}" if named else ""
            problems.append(f"name one size with {flags}{given}")
        if self.order in SEARCHED_ORDERS and self.patched_layers is not None:
            problems.append(f"--patched_layers names every layer: leave out --order {self.order}")
        if self.order not in SEARCHED_ORDERS and self.calibration is not None:
            problems.append(f"--calibration belongs to --order {' or '.join(SEARCHED_ORDERS)}")
        if self.list and self.push_to_hub:
            problems.append("--list builds nothing: leave out --push_to_hub")
        if not self.list and self.save_directory is None:
            problems.append("--save_directory says where the model goes: give it")
        if self.json and not self.list:
            problems.append("--json belongs to --list")
        if self.public and not self.push_to_hub:
            problems.append("--public belongs to --push_to_hub")
        if problems:
            raise ValueError("; ".join(problems))


class Member(NamedTuple):
    """One size of a family."""

    num_layers_to_patch: int
    recipe: Recipe
    model: PreTrainedModel


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
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The family's member of size k and its tokenizer, which pads on the left with a padding token.

    k = 0 is exactly the student, the largest k exactly the teacher (arXiv 2510.05064, section 2).
    Either parent may be a model in memory; the member then shares its tensors.
    `patch_first_k_layers` None leaves the order to `order`, student_config.json and the
    architecture; True patches from the first layer on, False from the last one back. `dtype` `auto`
    is the teacher's. `student_config` and `tokenizer` are read from where the models came from
    unless given; `kept_layers` says of a student without one which teacher layers it was made
    from. A DistilBERT becomes a BERT; an encoder's tokenizer pads on its own side.

    Raises ValueError or OSError, before any weights load, for a k out of range, parents that do not
    fit together, and files that are not there.
    """
    family = open_pair(
        teacher_name_or_path,
        student_name_or_path,
        patch_first_k_layers,
        order,
        revision,
        student_revision,
        student_config,
        kept_layers,
    )
    recipe = family.recipe(num_layers_to_patch)
    if tokenizer is None and not family.arguments.teacher_model_name_or_path:
        raise ValueError(
            "the teacher in memory does not say where it came from: give its tokenizer too"
        )
    tokenizer = family.tokenizer if tokenizer is None else tokenizer
    return assemble(recipe, **family.load(recipe.parents, family.dtype(dtype))), tokenizer


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
) -> Iterator[Member]:
    """Every size of a family in turn, or the given ones, over one copy of teacher and student in
    memory.

    Arguments and errors are those of `build_intermediate_model`; they are raised by the call,
    before the first member is asked for.
    """
    family = open_pair(
        teacher_name_or_path,
        student_name_or_path,
        patch_first_k_layers,
        order,
        revision,
        student_revision,
        student_config,
        kept_layers,
    )
    members = range(family.layer_map.max_layers_to_patch + 1) if sizes is None else sizes
    recipes = {k: family.recipe(k) for k in members}
    torch_dtype = family.dtype(dtype)

    def members_in_turn() -> Iterator[Member]:
        needed = set().union(*(recipe.parents for recipe in recipes.values()))
        parents = family.load(needed, torch_dtype)
        for k, recipe in recipes.items():
            yield Member(k, recipe, assemble(recipe, **parents))

    return members_in_turn()


def open_pair(
    teacher: str | PreTrainedModel,
    student: str | PreTrainedModel,
    patch_first_k_layers: bool | None,
    order: Order | None,
    revision: str | None,
    student_revision: str | None,
    student_config: StudentConfig | None,
    kept_layers: Sequence[int] | None = None,
) -> Family:
    """A pair of which either parent is a name or a model in memory."""
    if student_config is not None and kept_layers is not None:
        raise ValueError("student_config and kept_layers both name layers: give one of them")
    if patch_first_k_layers is not None and order is not None:
        raise ValueError("patch_first_k_layers and order both name an order: give one of them")
    if patch_first_k_layers is not None:
        order = "first" if patch_first_k_layers else "last"
    given: dict[Parent, str | PreTrainedModel] = {"teacher": teacher, "student": student}
    models = {
        parent: model for parent, model in given.items() if isinstance(model, PreTrainedModel)
    }
    names = {
        parent: model.name_or_path if isinstance(model, PreTrainedModel) else model
        for parent, model in given.items()
    }
    if not names["student"] and student_config is None and kept_layers is None:
        raise ValueError(
            "the student in memory does not say where it came from: give kept_layers, or "
            "student_config=StudentConfig(LayerMap(kept_layers, num_teacher_layers))"
        )
    arguments = FamilyArguments(
        names["teacher"],
        names["student"],
        kept_layers=None if kept_layers is None else as_layer_list(kept_layers),
        revision=revision,
        student_revision=student_revision,
    )
    return Family.of(arguments, models, student_config, order)


class Choice(NamedTuple):
    """The model a command line asks for."""

    recipe: Recipe
    num_layers_to_patch: int
    patched_layers: frozenset[int]
    size: Size


def main(argv: list[str] | None = None) -> None:
    with user_errors():
        check_one_process()
        parser = CommandLineParser(PatchArguments, prog="patching.patch", description=__doc__)
        (arguments,) = parser.parse_args_into_dataclasses(argv)
        max_shard_bytes = parse_bytes(arguments.max_shard_size, "max_shard_size")
        if not arguments.list:
            check_new_folder(arguments.save_directory)
        family = Family.from_pretrained(arguments)
        dtype = family.dtype(arguments.dtype)
        layouts = {
            parent: layout_of(config, dtype, arguments.trust_remote_code)
            for parent, config in family.configs.items()
        }
        if not arguments.list:  # a size that is not there is noticed before any search
            choose(arguments, family, layouts, dtype, max_shard_bytes)
        text = calibration_of(arguments)
        if text is not None:
            device = usable_device(None)
            measure = Measurements(
                family, text, dtype, lambda: family.load(["teacher", "student"], dtype, device)
            )
    if text is not None:
        family = dataclasses.replace(family, order=searched_order(measure))
        print(f"{arguments.order}: {as_layer_list(family.order)}", file=sys.stderr)
    with user_errors():
        if not arguments.list:
            choice = choose(arguments, family, layouts, dtype, max_shard_bytes)
            if arguments.push_to_hub:
                check_can_push(arguments.push_to_hub, arguments.public)
            tokenizer = family.tokenizer
            check_space(arguments.save_directory, choice.size.bytes_on_disk)
            plan = plan_or_model(choice.recipe, family, layouts, dtype, max_shard_bytes)
    if arguments.list:
        print(listing(family, layouts, dtype, max_shard_bytes, arguments.json))
        return
    with user_errors((OSError,)):
        try:
            with new_folder(arguments.save_directory) as folder:
                save(folder, arguments, family, choice, plan, tokenizer, max_shard_bytes)
        except OSError as error:
            reason = error.strerror or error
            raise OSError(
                f"{arguments.save_directory} could not be written ({reason}), and nothing is "
                "left of it"
            ) from error
    size = choice.size
    print(
        f"{arguments.save_directory}: k = {choice.num_layers_to_patch}, {size.depth} layers, "
        f"{count_text(size.parameters.stored)} parameters "
        f"({count_text(size.parameters.both_counted)} with embedding and head both counted), "
        f"{bytes_text(size.bytes_on_disk)}"
    )
    if arguments.push_to_hub:
        with user_errors():
            address = push(arguments.save_directory, arguments.push_to_hub, arguments.public)
        print(f"uploaded to {address}")


def listing(
    family: Family,
    layouts: dict[Parent, Layout],
    dtype: torch.dtype,
    max_shard_bytes: int,
    as_json: bool,
) -> str:
    """Every size of the family, as a table or as JSON."""
    sizes = family_sizes(family, layouts, dtype, max_shard_bytes)
    if not as_json:
        return table(sizes)
    members = [
        {
            "num_layers_to_patch": k,
            "patched_layers": sorted(family.layer_map.patched_layers(k, family.order)),
            **size.to_dict(),
        }
        for k, size in enumerate(sizes)
    ]
    dtype_name = str(dtype).removeprefix("torch.")
    return json.dumps({"order": family.order, "dtype": dtype_name, "members": members}, indent=2)


def family_sizes(
    family: Family, layouts: dict[Parent, Layout], dtype: torch.dtype, max_shard_bytes: int
) -> list[Size]:
    """The size of each member, k = 0 first."""
    return [
        size_of(family.recipe(k), layouts, dtype, max_shard_bytes)
        for k in range(family.layer_map.max_layers_to_patch + 1)
    ]


def choose(
    arguments: PatchArguments,
    family: Family,
    layouts: dict[Parent, Layout],
    dtype: torch.dtype,
    max_shard_bytes: int,
) -> Choice:
    """The one model that the flags name. Raises ValueError where there is none such."""
    if arguments.patched_layers is not None:
        patched = frozenset(parse_ranges(arguments.patched_layers, "patched_layers"))
        k = family.layer_map.num_patched(patched)
    else:
        if arguments.num_layers_to_patch is not None:
            k = arguments.num_layers_to_patch
        elif arguments.target_params is not None:
            limit = parse_count(arguments.target_params, "target_params")
            k = deepest_that_fits(
                family_sizes(family, layouts, dtype, max_shard_bytes),
                lambda size: size.parameters.stored,
                limit,
                f"target_params={arguments.target_params}",
                " parameters",
            )
        else:
            limit = parse_bytes(arguments.target_bytes, "target_bytes")
            k = deepest_that_fits(
                family_sizes(family, layouts, dtype, max_shard_bytes),
                lambda size: size.bytes_on_disk,
                limit,
                f"target_bytes={arguments.target_bytes}",
                " bytes",
            )
        patched = family.layer_map.patched_layers(k, family.order)
    recipe = patched_model(family.layer_map, patched)
    return Choice(recipe, k, patched, size_of(recipe, layouts, dtype, max_shard_bytes))


def plan_or_model(
    recipe: Recipe,
    family: Family,
    layouts: dict[Parent, Layout],
    dtype: torch.dtype,
    max_shard_bytes: int,
) -> Splice | PreTrainedModel:
    """How to copy the recipe's model file to file; where that cannot be done, the model itself.

    Raises ValueError where the parents' weights are damaged or do not fit their configs.
    """
    try:
        return plan_splice(
            recipe, family.configs, layouts, references(family.arguments), dtype, max_shard_bytes
        )
    except OtherLayout as reason:
        print(f"{reason}: the models are loaded instead of copied file to file")
        return assemble(recipe, **family.load(recipe.parents, dtype))


def save(
    folder: Path,
    arguments: PatchArguments,
    family: Family,
    choice: Choice,
    plan: Splice | PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    max_shard_bytes: int,
) -> None:
    """Fill a folder with the checkpoint and what describes it; what lets it load comes last."""
    recipe, size = choice.recipe, choice.size
    origins = {
        parent: origin_of(reference)
        for parent, reference in references(arguments).items()
        if parent in recipe.parents
    }
    title = arguments.push_to_hub or arguments.save_directory.name
    if isinstance(plan, Splice):
        plan.write(folder)
    tokenizer.save_pretrained(folder)
    config = family.configs["teacher"]
    write_text(folder / CARD_FILE_NAME, model_card(title, recipe, size, origins, config))
    provenance: dict[str, Any] = {
        "arguments": dataclasses.asdict(arguments),
        "order": family.order,
        "num_layers_to_patch": choice.num_layers_to_patch,
        "patched_layers": sorted(choice.patched_layers),
        "recipe": recipe.to_dict(),
        **size.to_dict(),
        "parents": {parent: origin._asdict() for parent, origin in origins.items()},
        "copied_file_to_file": isinstance(plan, Splice),
        "environment": environment(),
    }
    write_json(folder / PROVENANCE_FILE_NAME, provenance)
    if isinstance(plan, Splice):
        if not predicts_masked_tokens(config):
            generation_config_of(references(arguments)[recipe.embedding]).save_pretrained(folder)
        plan.config.save_pretrained(folder)
    else:
        try:
            plan.save_pretrained(folder, max_shard_size=max_shard_bytes)
        except SafetensorError as error:  # what it makes of a full disk
            raise OSError(str(error)) from error


if __name__ == "__main__":
    main()
