"""A model without weights, built from its config alone: what transformers itself says about an
architecture.

It lies on torch's meta device, so it takes milliseconds and no memory at any size.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from patching.architectures.config import depth_field
from patching.architectures.lookup import (
    architecture_of,
)
from patching.architectures.table import (
    LOGIT_FIELDS,
    MAY_DIFFER,
)
from patching.recipe import Parent, Recipe

POSITION_ATTRIBUTE = "layer_idx"
"""Where a layer's cache entries go: the one thing about a layer that its position may decide."""

_MODULE_INTERNALS = frozenset(vars(nn.Module())) | {"_is_hf_initialized"}


def signature(layer: nn.Module) -> dict[str, Any]:
    """All that decides what a layer computes, but for the numbers in its tensors and its position.

    Classes, shapes and plain attributes of the layer and everything inside it, by name.
    """
    return dict(_facts(layer))


def _facts(layer: nn.Module) -> Iterator[tuple[str, Any]]:
    for name, module in layer.named_modules():
        prefix = f"{name}." if name else ""
        yield f"{prefix}class", type(module).__qualname__
        for tensors in (
            module.named_parameters(recurse=False),
            module.named_buffers(recurse=False),
        ):
            for tensor_name, tensor in tensors:
                yield f"{prefix}{tensor_name}.shape", tuple(tensor.shape)
        for attribute, value in vars(module).items():
            if attribute in _MODULE_INTERNALS or attribute == POSITION_ATTRIBUTE:
                continue
            if value is None or isinstance(value, bool | int | float | str | tuple):
                yield f"{prefix}{attribute}", value


def check_same_layer(source: nn.Module, target: nn.Module, what: str) -> None:
    """Raise ValueError, naming the first difference, unless `target` computes what `source` does,
    given its tensors.

    `what` begins the message: which layer went where.
    """
    here, there = signature(source), signature(target)
    for fact in here | there:
        if here.get(fact) != there.get(fact):
            raise ValueError(
                f"{what} would compute something else: {fact} is {here.get(fact)} where it "
                "comes from and "
                f"{there.get(fact)} where it would go, so this architecture cannot be cut and "
                "joined there"
            )


def changes_logits(config: PreTrainedConfig) -> list[str]:
    """Config fields that make logits something else than the head's output, such as
    `final_logit_softcapping=30.0`.
    """
    return [
        f"{name}={getattr(config, name)}"
        for name, neutral in LOGIT_FIELDS.items()
        if getattr(config, name, neutral) not in (neutral, None)
    ]


def check_parents_match(student: PreTrainedConfig, teacher: PreTrainedConfig) -> None:
    """Raise ValueError, naming the fields, unless layers of one model can stand between layers of
    the other.
    """
    if student.model_type != teacher.model_type:
        raise ValueError(
            f"the student is a {student.model_type} model and the teacher a {teacher.model_type} "
            "model: a student must have been distilled from this teacher"
        )
    student_values, teacher_values = student.to_dict(), teacher.to_dict()
    declared = set(
        type(teacher)().to_dict()
    )  # what only a config file holds, no forward pass reads
    names = declared - MAY_DIFFER - {depth_field(teacher)}
    different = [
        f"{name} is {student_values.get(name)} in the student and {teacher_values.get(name)} "
        "in the teacher"
        for name in sorted(names)
        if student_values.get(name) != teacher_values.get(name)
    ]
    if different:
        raise ValueError(
            f"{'; '.join(different)}: a student must have been distilled from this teacher"
        )


def check_recipe(
    model: PreTrainedModel, recipe: Recipe, parents: Mapping[Parent, PreTrainedModel]
) -> None:
    """Raise ValueError unless every layer computes in `model` what it does in its parent, and all
    fits.

    `model` is the recipe's, built from `config_for`. All of them may be empty: tensors are not
    read. What a config cannot express about a layer at its new position shows up here, whatever the
    architecture.
    """
    architecture = architecture_of(model.config)
    layers = model.get_submodule(architecture.layers)
    sources = {
        parent: parents[parent].get_submodule(architecture.layers) for parent in recipe.parents
    }
    for position, (parent, layer_idx) in enumerate(recipe.layers):
        check_same_layer(
            sources[parent][layer_idx],
            layers[position],
            f"model_type={model.config.model_type}: layer {layer_idx} of the {parent} at "
            f"position {position}",
        )
    shapes = {
        parent: {name: tensor.shape for name, tensor in parents[parent].state_dict().items()}
        for parent in recipe.parents
    }
    for name, tensor in model.state_dict().items():
        if architecture.layer_of(name) is None:
            parent, parent_name = architecture.source_of(name, recipe)
            if shapes[parent].get(parent_name) != tensor.shape:
                raise ValueError(
                    f"model_type={model.config.model_type}: {name} has shape "
                    f"{tuple(tensor.shape)} in a model of "
                    f"{recipe.depth} layers and {tuple(shapes[parent].get(parent_name, ()))} in "
                    f"the {parent}, so this "
                    "architecture cannot be cut and joined"
                )


CHANGES_OF_LOGITS = ("final_logit_softcapping", "logit_scale", "logits_scaling")
"""Config fields that say the logits are not what the head gives."""


def check_logits_are_the_heads(config: PreTrainedConfig) -> None:
    """Raise ValueError for a model that caps or scales its logits behind the head: here they are
    computed from the head's weight alone.
    """
    for name in CHANGES_OF_LOGITS:
        if getattr(config, name, None) not in (None, 1):
            raise ValueError(
                f"{name}={getattr(config, name)} in the {config.model_type} config: logits that "
                "are capped or scaled behind the head are not supported"
            )
