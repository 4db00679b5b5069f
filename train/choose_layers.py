"""`--kept_layers auto`: choose the kept layers by running the teacher on calibration text."""

from collections.abc import Iterator

import torch
from accelerate.utils import broadcast_object_list
from torch import Tensor
from transformers import PreTrainedConfig

from patching.architectures.config import config_for
from patching.architectures.models import load_model
from patching.assemble import count_parameters
from patching.blocks import LayerMap, as_layer_list
from patching.checkpoints.tokenizers import read_tokenizer
from patching.cli.units import count_text, parse_count
from patching.orders.kept_layers import mean_similarity, most_similar_layers
from patching.recipe import Reference, initial_student
from patching.running.calibration import Calibration
from patching.running.documents import attention_of_whole_texts
from patching.running.similarity import similarity_by_depth
from train.model_args import ModelArguments
from train.training_args import DistillationArguments, measuring_dtype


def choose_layers(
    model_args: ModelArguments,
    text: Calibration,
    args: DistillationArguments,
    config: PreTrainedConfig,
) -> tuple[LayerMap, str]:
    """Return the chosen layer map, and a comparison with the default one as text. The first rank
    runs the teacher and tells the others.

    Raises ValueError if no student has the wanted size, or if the teacher's weights are damaged.
    """
    default = model_args.layer_map(config)
    num_depths = config.get_text_config().num_hidden_layers + 1
    # With any similarities, to notice an impossible size before weights load.
    fitting_map(model_args, torch.zeros(num_depths, num_depths), config, len(default.kept))
    found: list[tuple[LayerMap, str] | None] = [None]
    if args.process_index == 0:
        reference = Reference(model_args.teacher_model_name_or_path, model_args.revision)
        trust = model_args.trust_remote_code
        tokenizer = read_tokenizer(reference, config, trust)
        attention = attention_of_whole_texts(model_args.attn_implementation)
        teacher = load_model(reference, measuring_dtype(args), trust, attention)
        batches = text.batches(tokenizer, config)
        similarity_JJ = similarity_by_depth(teacher.to(args.device), batches)
        chosen = fitting_map(model_args, similarity_JJ, config, len(default.kept))
        found = [(chosen, comparison(chosen, default, similarity_JJ, text.name))]
    if args.world_size > 1:
        broadcast_object_list(found)
    return found[0]


def fitting_map(
    model_args: ModelArguments, similarity_JJ: Tensor, config: PreTrainedConfig, num_default: int
) -> LayerMap:
    """Return the best layer map of the size that the flags ask for, by default `num_default` kept
    layers. `similarity_JJ` compares the teacher's hidden states at all pairs of depths.

    Raises ValueError if no student is that small.
    """
    longest = model_args.longest_block
    if model_args.target_params is None:
        num_kept = model_args.num_kept_layers
        return most_similar_layers(
            similarity_JJ, num_default if num_kept is None else num_kept, longest
        )
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
    """Return both maps with their mean similarity, as lines to print."""
    lines = [f"kept layers by similarity to the end of their blocks, on {text}:"]
    for name, layer_map in (("chosen", chosen), ("default", default)):
        lines.append(
            f"  {name:8} {as_layer_list(layer_map.kept)}: mean cosine "
            f"{mean_similarity(layer_map, similarity_JJ):.4f}, {len(layer_map.kept)} layers, "
            f"{layer_map.max_layers_to_patch} patchable"
        )
    return "\n".join(lines)
