"""Run an assembled model whose tensors are on several devices, as a `device_map` leaves them."""

import torch
from accelerate import dispatch_model
from transformers import PreTrainedModel

from patching.architectures.lookup import architecture_of


def dispatch(model: PreTrainedModel) -> PreTrainedModel:
    """Add hooks that move activations from device to device, if the model is on more than one.

    Raises ValueError if some weights were offloaded to CPU memory or disk by accelerate, where they
    cannot be shared between models.
    """
    devices = {parameter.device for parameter in model.parameters()}
    if torch.device("meta") in devices:
        raise ValueError(
            "device_map offloads some of the weights, and intermediate models share weights in "
            "memory: use more devices or a smaller dtype"
        )
    return model if len(devices) == 1 else dispatch_model(model, device_map_of(model))


def over_devices(model: PreTrainedModel) -> PreTrainedModel:
    """The model as it is if all of it is on one device, else with the hooks of `dispatch`."""
    is_spread = len({parameter.device for parameter in model.parameters()}) > 1
    return dispatch(model) if is_spread else model


def device_map_of(model: PreTrainedModel) -> dict[str, torch.device]:
    """The device of each layer, and of each module outside the layers that has parameters."""
    architecture = architecture_of(model.config)
    device_map: dict[str, torch.device] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        position = architecture.layer_of(name)
        block = name.rpartition(".")[0]
        if position is not None:
            block = f"{architecture.layers}.{position}"
        device_map.setdefault(block, parameter.device)
    return device_map
