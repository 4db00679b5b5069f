"""`--kept_layers auto`: the layers chosen from the teacher on calibration text, before training."""

from collections.abc import Iterator

import torch
from accelerate.utils import broadcast_object_list
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from patching.architectures.config import config_for
from patching.architectures.models import load_model
from patching.assemble import count_parameters
from patching.blocks import LayerMap, as_layer_list
from patching.cli.units import count_text, parse_count
from patching.orders.kept_layers import mean_similarity, most_similar_layers
from patching.recipe import Reference, initial_student
from patching.running.calibration import Calibration
from patching.running.similarity import similarity_by_depth
from train.model_args import ModelArguments
from train.training_args import DistillationArguments


def choose_layers(
    model_args: ModelArguments,
    text: Calibration,
    args: DistillationArguments,
    config: PreTrainedConfig,
    tokenizer: PreTrainedTokenizerBase,
) -> tuple[LayerMap, str]:
    """The chosen map, and what to tell of it. The first rank reads the teacher for all.

    Raises ValueError where no student has that size, and where the teacher's weights are damaged.
    """
    default = model_args.layer_map(config)
    num_depths = config.num_hidden_layers + 1
    # A size that is not there is noticed before weights load.
    fitting_map(model_args, torch.zeros(num_depths, num_depths), config, len(default.kept))
    found: list[tuple[LayerMap, str] | None] = [None]
    if args.process_index == 0:
        reference = Reference(model_args.teacher_model_name_or_path, model_args.revision)
        teacher = load_model(
            reference, "auto", model_args.trust_remote_code, model_args.attn_implementation
        ).to(args.device)
        similarity_JJ = similarity_by_depth(teacher, text.batches(tokenizer, config))
        chosen = fitting_map(model_args, similarity_JJ, config, len(default.kept))
        found = [(chosen, comparison(chosen, default, similarity_JJ, text.name))]
    if args.world_size > 1:
        broadcast_object_list(found)
    return found[0]


def fitting_map(
    model_args: ModelArguments, similarity_JJ: Tensor, config: PreTrainedConfig, default: int
) -> LayerMap:
    """The best map of as many layers as the flags say; `default` where they do not."""
    longest = model_args.longest_block
    if model_args.target_params is None:
        num_kept = default if model_args.num_kept_layers is None else model_args.num_kept_layers
        return most_similar_layers(similarity_JJ, num_kept, longest)
    limit = parse_count(model_args.target_params, "target_params")
    for layer_map in _from_largest(similarity_JJ, longest):
        student = config_for(initial_student(layer_map), {"teacher": config})
        size = count_parameters(student, model_args.trust_remote_code).stored
        if size <= limit:
            return layer_map
    raise ValueError(
        f"target_params={model_args.target_params}: the smallest student"
        f"{'' if longest is None else f' with blocks of at most {longest} layers'} has "
        f"{count_text(size)} parameters"
    )


def _from_largest(similarity_JJ: Tensor, longest_block: int | None) -> Iterator[LayerMap]:
    num_layers = len(similarity_JJ) - 1
    fewest = 1 if longest_block is None else -(-num_layers // longest_block)
    for num_kept in range(num_layers, fewest - 1, -1):
        yield most_similar_layers(similarity_JJ, num_kept, longest_block)


def comparison(chosen: LayerMap, default: LayerMap, similarity_JJ: Tensor, text: str) -> str:
    """Both maps with the measure that decided."""
    lines = [f"kept layers by similarity to the end of their blocks, on {text}:"]
    for name, layer_map in (("chosen", chosen), ("default", default)):
        lines.append(
            f"  {name:8} {as_layer_list(layer_map.kept)}: mean cosine "
            f"{mean_similarity(layer_map, similarity_JJ):.4f}, {len(layer_map.kept)} layers, "
            f"{layer_map.max_layers_to_patch} patchable"
        )
    return "\n".join(lines)
