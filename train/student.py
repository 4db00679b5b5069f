"""The student: made from the teacher before training, and saved after it."""

import copy
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from patching.architectures.config import config_for
from patching.architectures.lookup import architecture_of
from patching.architectures.models import auto_class, empty_model
from patching.assemble import assemble
from patching.blocks import LayerMap
from patching.checkpoints.companions import Companions, plan_companions
from patching.checkpoints.saved_config import runs_remote_code
from patching.checkpoints.splice import cast
from patching.parents import Parents
from patching.recipe import Reference, initial_student
from train.sharding import with_room_for_weights


def new_student(
    teacher: PreTrainedModel, layer_map: LayerMap, random_initialization: bool = False
) -> PreTrainedModel:
    """Return a student in fp32 with its own tensors: copies of the kept teacher layers, or random
    weights, which follow torch's global seed.

    What surrounds the text tower of a multimodal student is frozen, because text does not reach it.

    If the teacher's weights are on another rank (its parameters are on the meta device), the
    student's weights are allocated but not filled.
    """
    student = _new_student(teacher, layer_map, random_initialization)
    for path in architecture_of(student.config).carried:
        student.get_submodule(path).requires_grad_(False)
    return student


def _new_student(
    teacher: PreTrainedModel, layer_map: LayerMap, random_initialization: bool
) -> PreTrainedModel:
    recipe = initial_student(layer_map)
    if any(parameter.is_meta for parameter in teacher.parameters()):
        return with_room_for_weights(copy.deepcopy(assemble(recipe, teacher=teacher)).float())
    if random_initialization:
        config = config_for(recipe, {"teacher": teacher.config})
        return auto_class(config).from_config(
            config,
            dtype=torch.float32,
            attn_implementation=teacher.config._attn_implementation,
            trust_remote_code=runs_remote_code(config, type(teacher)),
        )
    return copy.deepcopy(assemble(recipe, teacher=teacher)).float()


def drop_second_names(model: PreTrainedModel) -> None:
    """Remove, in place, the second name under which an encoder registers the bias of its head.

    The forward pass does not use it, but FSDP rejects a parameter that is in two groups, and DDP
    one without a gradient. Saved models have both names again. Causal models are left alone.
    """
    tied = dict(model._tied_weights_keys or {})
    biases = [name for name in tied if name.endswith(".bias")]
    for name in biases:
        path, _, last = tied.pop(name).rpartition(".")
        delattr(model.get_submodule(path), last)
    if biases:
        model._tied_weights_keys = tied
        model.all_tied_weights_keys = model.get_expanded_tied_weights_keys(all_submodels=True)


def cast_parameters(model: torch.nn.Module, dtype: torch.dtype) -> None:
    """Cast a model's parameters in place but not its buffers, unlike `.to(dtype)`.

    Rotary frequencies are buffers, and rounding them to bf16 would change every position.
    """
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)


def check_range(student: PreTrainedModel, dtype: torch.dtype) -> None:
    """Raise OutOfRange if a weight is too large to be saved in `dtype`."""
    if dtype == torch.float16:
        for name, tensor in student.state_dict().items():
            cast(tensor, dtype, name)


def student_companions(
    teacher: Reference,
    teacher_config: PreTrainedConfig,
    layer_map: LayerMap,
    dtype: torch.dtype,
    tokenizer: PreTrainedTokenizerBase | None,
    trust_remote_code: bool = False,
) -> Companions:
    """Read what a student's config.json, tokenizer and other files are made from: the teacher's.

    Raises ValueError or OSError as `plan_companions` does.
    """
    config = config_for(initial_student(layer_map), {"teacher": teacher_config})
    model_class = type(empty_model(config, dtype, trust_remote_code))
    parents = Parents({"teacher": teacher}, {"teacher": teacher_config}, dtype, torch.device("cpu"))
    return plan_companions(parents, config, model_class, dtype, tokenizer)


def save_student(
    student: PreTrainedModel, state_dict: dict[str, Tensor], folder: Path, dtype: torch.dtype
) -> None:
    """Write a trained student in `dtype`, as transformers does. `state_dict` holds its whole
    tensors, gathered from whatever wraps it.

    Raises OutOfRange before anything is written if a number is too large for `dtype`.
    """
    saved = empty_model(student.config, dtype, runs_remote_code(student.config, type(student)))
    if student.can_generate():
        saved.generation_config = student.generation_config
    state_dict = {
        (whole := name.replace("_checkpoint_wrapped_module.", "")): cast(tensor, dtype, whole)
        for name, tensor in state_dict.items()
    }
    for name, second in (saved._tied_weights_keys or {}).items():
        if name in state_dict and second not in state_dict:  # removed by `drop_second_names`
            state_dict[second] = state_dict[name].clone()
    saved.load_state_dict(state_dict, assign=True)
    saved.tie_weights()
    saved.save_pretrained(folder)
