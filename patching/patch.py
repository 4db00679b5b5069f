"""Build the model of any size between a student and its teacher, with no further training.

In Python, `build_intermediate_model`. On the command line it is saved as an ordinary Hugging Face
checkpoint:

    python -m patching.patch --teacher_model_name_or_path TEACHER --student_model_name_or_path
    STUDENT \\
        --num_layers_to_patch 4 --save_directory DIR
"""

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from patching.assemble import assemble, count_parameters
from patching.command_line import CommandLineParser, user_errors
from patching.outputs import check_new_folder, environment, new_folder, write_json
from patching.pair import DTYPES, Pair, PairArguments
from patching.recipe import Recipe

PROVENANCE_FILE_NAME = "provenance.json"


@dataclass
class PatchArguments(PairArguments):
    num_layers_to_patch: int = field(
        kw_only=True, metadata={"help": "how many patchable student layers become teacher blocks"}
    )
    save_directory: Path = field(kw_only=True, metadata={"help": "new folder for the checkpoint"})
    dtype: str = field(
        default="auto",
        metadata={"help": "dtype of the saved weights, auto: the teacher's", "choices": DTYPES},
    )
    max_shard_size: str = field(
        default="5GB", metadata={"help": "largest weights file, as in save_pretrained"}
    )


def build_intermediate_model(
    teacher_name_or_path: str,
    student_name_or_path: str,
    num_layers_to_patch: int,
    patch_first_k_layers: bool | None = None,
    dtype: torch.dtype | str = "auto",
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The family's member of size k and its tokenizer, which pads on the left with a padding token.

    k = 0 is exactly the student, the largest k exactly the teacher (arXiv 2510.05064, section 2).
    `patch_first_k_layers` None leaves the order to student_config.json and the architecture; True
    patches from the first layer on, False from the last one back. `dtype` `auto` is the teacher's.

    Raises ValueError or OSError, before any weights load, for a k out of range, parents that do not
    fit together, and files that are not there.
    """
    order = {None: None, True: "first", False: "last"}[patch_first_k_layers]
    pair = Pair.from_pretrained(
        PairArguments(teacher_name_or_path, student_name_or_path, order=order)
    )
    recipe = pair.recipe(num_layers_to_patch)
    tokenizer = pair.tokenizer
    return load_and_assemble(pair, recipe, pair.dtype(dtype)), tokenizer


def load_and_assemble(pair: Pair, recipe: Recipe, dtype: torch.dtype) -> PreTrainedModel:
    """The recipe's model from whichever parents it needs."""
    return assemble(recipe, **pair.load(recipe.parents, dtype))


def main(argv: list[str] | None = None) -> None:
    with user_errors():
        parser = CommandLineParser(PatchArguments, prog="patching.patch", description=__doc__)
        (arguments,) = parser.parse_args_into_dataclasses(argv)
        check_new_folder(arguments.save_directory)
        pair = Pair.from_pretrained(arguments)
        recipe = pair.recipe(arguments.num_layers_to_patch)
        tokenizer = pair.tokenizer
    model = load_and_assemble(pair, recipe, pair.dtype(arguments.dtype))
    count = count_parameters(model.config, arguments.trust_remote_code)
    provenance = {
        "arguments": dataclasses.asdict(arguments),
        "order": pair.order,
        "patched_layers": sorted(
            pair.layer_map.patched_layers(arguments.num_layers_to_patch, pair.order)
        ),
        "recipe": recipe.to_dict(),
        "parameters": count._asdict(),
        "environment": environment(),
    }
    with new_folder(arguments.save_directory) as folder:
        model.save_pretrained(folder, max_shard_size=arguments.max_shard_size)
        tokenizer.save_pretrained(folder)
        write_json(folder / PROVENANCE_FILE_NAME, provenance)
    print(
        f"{arguments.save_directory}: {recipe.depth} layers, {count.stored / 1e6:.2f} M parameters "
        f"({count.both_counted / 1e6:.2f} M with embedding and head both counted)"
    )


if __name__ == "__main__":
    main()
