"""From a recipe and its parents in memory to a model. Initial students, baselines and patched
models all come from here.
"""

import copy
from typing import NamedTuple

import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from patching.families import config_for, family_of
from patching.recipe import Parent, Recipe


def assemble(
    recipe: Recipe,
    *,
    teacher: PreTrainedModel | None = None,
    student: PreTrainedModel | None = None,
) -> PreTrainedModel:
    """The model a recipe describes, in eval mode, sharing its tensors with its parents.

    Nothing is copied and neither parent changes; training the result in place would change them, so
    copy it first. Parents share one dtype.

    Raises ValueError if the recipe needs a parent that was not given.
    """
    given: dict[Parent, PreTrainedModel | None] = {"teacher": teacher, "student": student}
    parents = {parent: model for parent, model in given.items() if model is not None}
    missing = sorted(recipe.parents - parents.keys())
    if missing:
        raise ValueError(f"the recipe takes layers from the {missing[0]}, which was not given")
    base = parents[recipe.embedding]
    family = family_of(base.config)
    config = config_for(recipe, {parent: model.config for parent, model in parents.items()})
    config._attn_implementation = base.config._attn_implementation
    with torch.device("meta"):
        model = type(base)(config)

    tensors = {parent: parents[parent].state_dict() for parent in recipe.parents}
    state = {}
    for name in model.state_dict():
        parent, parent_name = family.source_of(name, recipe)
        state[name] = tensors[parent][parent_name]
    model.load_state_dict(state, assign=True)

    # Rotary frequencies and the like are in no state dict and would stay on the meta device.
    for name, _ in [*model.named_buffers()]:
        if name not in state:
            parent, parent_name = family.source_of(name, recipe)
            module_name, _, buffer_name = name.rpartition(".")
            module = model.get_submodule(module_name)
            module.register_buffer(
                buffer_name, parents[parent].get_buffer(parent_name), persistent=False
            )
    if config.tie_word_embeddings:
        model.tie_weights()
    model.generation_config = copy.deepcopy(base.generation_config)
    return model.eval()


class ParameterCount(NamedTuple):
    stored: int
    """Distinct parameters, a tied matrix once: what a checkpoint holds."""
    both_counted: int
    """Embedding and head always both: grows with depth, the axis of plots."""


def count_parameters(config: PreTrainedConfig, trust_remote_code: bool = False) -> ParameterCount:
    """Both counts of a causal language model, from its config alone."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    stored = sum(parameter.numel() for parameter in model.parameters())
    tied_again = model.get_output_embeddings().weight.numel() if config.tie_word_embeddings else 0
    return ParameterCount(stored, stored + tied_again)
