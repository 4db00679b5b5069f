"""Checks that layers can be moved: between two parents, and from a parent to a new position.

They compare configs and empty models on the meta device, so they take milliseconds and no memory.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from patching.architectures.config import depth_field
from patching.architectures.lookup import architecture_of
from patching.architectures.older_spellings import rotary_settings
from patching.architectures.table import MAY_DIFFER
from patching.recipe import Parent, Recipe

POSITION_ATTRIBUTE = "layer_idx"
"""The index of a layer's cache entries: the one attribute that may depend on a layer's position."""

_MODULE_INTERNALS = frozenset(vars(nn.Module())) | {"_is_hf_initialized"}


def signature(layer: nn.Module) -> dict[str, Any]:
    """Return the classes, shapes and plain attributes of a layer and of all modules in it, by name.

    Together with the values of its tensors they decide what the layer computes.
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
    """Raise ValueError unless `target`, given the tensors of `source`, computes what `source` does.

    The message names the first difference and begins with `what`: which layer went where.
    """
    here, there = signature(source), signature(target)
    for fact in here | there:
        if here.get(fact) != there.get(fact):
            raise ValueError(
                f"{what} would compute something else: {fact} is {here.get(fact)} where it "
                f"comes from and {there.get(fact)} where it would go, so this layer cannot be moved"
            )


def check_parents_match(student: PreTrainedConfig, teacher: PreTrainedConfig) -> None:
    """Raise ValueError, naming the fields that differ, unless the layers of the two models can be
    mixed.
    """
    if student.model_type != teacher.model_type:
        raise ValueError(
            f"the student is a {student.model_type} model and the teacher a {teacher.model_type} "
            "model: a student must have been distilled from this teacher"
        )
    pairs = [(student.get_text_config(), teacher.get_text_config())]
    if teacher.get_text_config() is not teacher:
        pairs.append((student, teacher))
    different = [text for pair in pairs for text in _differences(*pair)]
    if different:
        raise ValueError(
            f"{'; '.join(different)}: a student must have been distilled from this teacher"
        )


def _differences(student: PreTrainedConfig, teacher: PreTrainedConfig) -> Iterator[str]:
    student_values, teacher_values = student.to_dict(), teacher.to_dict()
    for values in (student_values, teacher_values):
        values["rope_parameters"] = rotary_settings(values.get("rope_parameters"))
        values.pop("text_config", None)  # compared on its own
        for name, value in values.items():
            if name.endswith("_config") and isinstance(value, dict):
                values[name] = {key: value[key] for key in value.keys() - MAY_DIFFER}
    # No forward pass reads a field that the class does not declare.
    declared = set(type(teacher)().to_dict())
    for name in sorted(declared - MAY_DIFFER - {depth_field(teacher)}):
        if student_values.get(name) != teacher_values.get(name):
            yield (
                f"{name} is {student_values.get(name)} in the student and "
                f"{teacher_values.get(name)} in the teacher"
            )


def check_recipe(
    model: PreTrainedModel, recipe: Recipe, parents: Mapping[Parent, PreTrainedModel]
) -> None:
    """Raise ValueError unless every layer computes in `model` what it computes in its parent, and
    all other tensors have the same shape in both.

    `model` is built from the config that `config_for` returns for the recipe. This finds layers
    that a config cannot express at their new position, in any architecture. Tensors are not read,
    so all models may be empty.
    """
    architecture = architecture_of(model.config)
    layers = model.get_submodule(architecture.layers)
    sources = {
        parent: parents[parent].get_submodule(architecture.layers) for parent in recipe.parents
    }
    for position, (parent, layer_idx, _) in enumerate(recipe.layers):
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
                    f"{tuple(tensor.shape)} in a model of {recipe.depth} layers and "
                    f"{tuple(shapes[parent].get(parent_name, ()))} in the {parent}, so layers of "
                    "this architecture cannot be moved"
                )
