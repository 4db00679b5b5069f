"""Build the model of a recipe from its parents in memory: initial students, baselines and patched
models alike.
"""

import copy
from collections.abc import MutableMapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel

from patching.architectures.checks import check_recipe
from patching.architectures.config import config_for
from patching.architectures.lookup import architecture_of
from patching.architectures.models import empty_model
from patching.checkpoints.generation_settings import filled
from patching.recipe import Parent, Recipe


def assemble(
    recipe: Recipe,
    *,
    teacher: PreTrainedModel | None = None,
    student: PreTrainedModel | None = None,
    rescaled: MutableMapping[Any, Tensor] | None = None,
    empty: MutableMapping[Parent, PreTrainedModel] | None = None,
) -> PreTrainedModel:
    """Return the model a recipe describes, in eval mode, sharing its tensors with its parents.

    Only tables such as rotary frequencies are copied, and neither parent changes. Training the
    result in place would change the parents, so copy it first. Both parents must have one dtype.
    Tensors that the recipe rescales are new. They are kept in `rescaled`, if it is given, so that
    several models of the same parents share them too. The parents' models without weights, which
    checks read, are likewise kept in `empty`.

    Raises ValueError if a parent or one of its layers is missing, if a parent's config ties head
    and embedding that differ, or if a layer would compute something else at its new position.
    """
    given: dict[Parent, PreTrainedModel | None] = {"teacher": teacher, "student": student}
    parents = {parent: model for parent, model in given.items() if model is not None}
    missing = sorted(recipe.parents - parents.keys())
    if missing:
        raise ValueError(f"the recipe takes layers from the {missing[0]}, which was not given")
    for parent in sorted(recipe.parents):
        check_tying(parent, parents[parent])
    base = parents[recipe.embedding]
    architecture = architecture_of(base.config)
    config = config_for(recipe, {parent: model.config for parent, model in parents.items()})
    config._attn_implementation = base.config._attn_implementation
    empty = {} if empty is None else empty
    with torch.device("meta"):
        model = type(base)(config)
        for parent in recipe.parents - empty.keys():
            empty[parent] = type(parents[parent])(copy.deepcopy(parents[parent].config))
    check_recipe(model, recipe, empty)

    tensors = {parent: parents[parent].state_dict() for parent in recipe.parents}
    state = {}
    rescaled = {} if rescaled is None else rescaled
    for name in model.state_dict():
        source = architecture.source_of(name, recipe)
        state[name] = tensors[source[0]][source[1]]
        if (rescaling := architecture.rescaling_of(name, recipe)) is not None:
            key = (*source, rescaling)
            if key not in rescaled:
                rescaled[key] = rescaling.of(state[name])
            state[name] = rescaled[key]
    if not config.tie_word_embeddings:
        # An encoder's head holds its bias under two names. If its parent was tied, both are one
        # tensor, which would be saved under one name only, and loading would lack the other.
        for name, other in (model._tied_weights_keys or {}).items():
            if {name, other} <= state.keys() and _share_memory(state[name], state[other]):
                state[name] = state[name].clone()
    model.load_state_dict(state, assign=True)

    # Buffers such as rotary frequencies are in no state dict and would stay on the meta device.
    buffers = {parent: dict(parents[parent].named_buffers()) for parent in recipe.parents}
    for name, _ in [*model.named_buffers()]:
        if name not in state:
            parent, parent_name = architecture.source_of(name, recipe)
            other = next(iter(recipe.parents - {parent}), parent)
            module_name, _, buffer_name = name.rpartition(".")
            buffer = _initial_buffer(buffers[parent], parent_name)
            if buffer is None:  # a table for a kind of attention that only the other parent has
                buffer = _initial_buffer(buffers[other], parent_name)
            module = model.get_submodule(module_name)
            module.register_buffer(buffer_name, buffer.clone(), persistent=False)
    if config.tie_word_embeddings:
        model.tie_weights()
    if base.can_generate():
        settings = [parents[name].generation_config.to_dict() for name in sorted(parents)]
        # The teacher's, which comes last, decides above all where text ends.
        model.generation_config = GenerationConfig.from_dict(filled(settings[-1], settings[0]))
    return model.eval()


def _share_memory(tensor: Tensor, other: Tensor) -> bool:
    return not tensor.is_meta and tensor.data_ptr() == other.data_ptr()


def _initial_buffer(buffers: dict[str, Tensor], name: str) -> Tensor | None:
    """Return a buffer as it was when its model was built: dynamic rotary frequencies change with
    the longest text the model has read.
    """
    path, _, last = name.rpartition(".")
    if last.endswith("inv_freq") and not last.endswith("original_inv_freq"):
        original = f"{path}.{last.removesuffix('inv_freq')}original_inv_freq"
        if original in buffers:
            return buffers[original]
    return buffers.get(name)


def check_tying(parent: Parent, model: PreTrainedModel) -> None:
    """Raise ValueError if a model's config ties head and embedding, and they are two different
    matrices.
    """
    if not model.config.tie_word_embeddings:
        return
    head, embedding = model.get_output_embeddings().weight, model.get_input_embeddings().weight
    if head is not embedding and not torch.equal(head, embedding):
        raise ValueError(
            f"the {parent}'s config ties its head to its embedding, but they are two different "
            "matrices: set tie_word_embeddings to False in its config"
        )


class ParameterCount(NamedTuple):
    """The number of a model's parameters, counted in two ways."""

    stored: int
    """Distinct parameters, as a checkpoint stores them: a tied matrix counts once."""
    both_counted: int
    """Embedding and head both counted, even if tied. This grows with depth and is used in plots."""


def count_parameters(config: PreTrainedConfig, trust_remote_code: bool = False) -> ParameterCount:
    """Count the parameters of a config's language model, without its weights."""
    model = empty_model(config, trust_remote_code=trust_remote_code)
    stored = sum(parameter.numel() for parameter in model.parameters())
    tied = model.all_tied_weights_keys
    return ParameterCount(stored, stored + sum(model.get_parameter(name).numel() for name in tied))
