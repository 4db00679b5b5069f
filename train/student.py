"""The student before training: the kept teacher layers, or random weights of the same shape."""

import copy

import torch
from transformers import PreTrainedModel

from patching.architectures.config import config_for
from patching.architectures.models import auto_class
from patching.assemble import assemble
from patching.blocks import LayerMap
from patching.recipe import initial_student
from train.sharding import with_room_for_weights


def new_student(
    teacher: PreTrainedModel, layer_map: LayerMap, random_initialization: bool = False
) -> PreTrainedModel:
    """A student in fp32 with tensors of its own. Random weights follow torch's global seed.

    From a teacher whose weights another rank holds (they are on the meta device) the student only
    has room for its weights.
    """
    recipe = initial_student(layer_map)
    if any(parameter.is_meta for parameter in teacher.parameters()):
        return with_room_for_weights(copy.deepcopy(assemble(recipe, teacher=teacher)).float())
    if random_initialization:
        config = config_for(recipe, {"teacher": teacher.config})
        return auto_class(config).from_config(
            config,
            dtype=torch.float32,
            attn_implementation=teacher.config._attn_implementation,
        )
    return copy.deepcopy(assemble(recipe, teacher=teacher)).float()


def drop_second_names(model: PreTrainedModel) -> None:
    """Leave an encoder's head one name of its bias, in place.

    The other one is no part of its forward pass: sharding refuses a parameter that lies in two
    groups, and data parallelism one without a gradient. Saved models have both again.
    """
    tied = dict(model._tied_weights_keys or {})
    for name, second in list(tied.items()):
        if name.endswith(".bias"):
            path, _, last = second.rpartition(".")
            delattr(model.get_submodule(path), last)
            del tied[name]
    model._tied_weights_keys = tied
    model.all_tied_weights_keys = model.get_expanded_tied_weights_keys(all_submodels=True)


def cast_parameters(model: torch.nn.Module, dtype: torch.dtype) -> None:
    """Cast a model's parameters in place and leave its buffers, unlike `.to(dtype)`.

    Rotary frequencies lie in buffers, and rounding them to bf16 changes every position.
    """
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
