"""Which parameters are experts, and how many of them a token uses, as transformers declares it.
What chooses them is known by its name.

The decorator `use_experts_implementation` marks the modules that hold all experts of a layer. The
number of dimensions says nothing: convolutions have three too.
"""

from collections.abc import Iterator

from torch import nn
from transformers import PreTrainedModel

MARK = "is_concatenated"
"""An attribute that the decorator sets on every module it marks. They also have `num_experts`."""
NUM_CHOSEN = ("num_experts_per_tok", "moe_topk")
"""Config fields for the number of experts that a token uses."""
NUM_EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
"""Config fields for the number of experts in a layer."""
ROUTER_NAMES = frozenset({"gate", "router", "router_gate"})
"""What the modules that choose experts are called. No architecture has a field for them, and some
have several layers.
"""


def expert_modules(model: PreTrainedModel) -> Iterator[tuple[str, nn.Module]]:
    """Iterate over the modules that hold experts, with their names."""
    return ((name, module) for name, module in model.named_modules() if MARK in vars(module))


def is_in_router(module_name: str) -> bool:
    """Whether a module, given by its dotted name, chooses experts or is part of what does."""
    return not ROUTER_NAMES.isdisjoint(module_name.split("."))


def expert_shares(model: PreTrainedModel) -> dict[str, float] | None:
    """Return the share of each expert module's parameters that a token uses, by the module's name.

    None if it is not known: the config says that there are experts or how many are chosen, and the
    model's modules or the config do not say the rest.
    """
    config = model.config.get_text_config()
    modules = dict(expert_modules(model))
    if not modules:
        has_experts = any((getattr(config, name, None) or 0) > 1 for name in NUM_EXPERTS)
        return None if has_experts else {}
    chosen = [getattr(config, name, None) for name in NUM_CHOSEN]
    num_chosen = next((number for number in chosen if number is not None), None)
    if num_chosen is None:
        return None
    return {name: num_chosen / module.num_experts for name, module in modules.items()}
