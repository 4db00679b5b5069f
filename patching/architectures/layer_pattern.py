"""Kinds of layers that repeat with a period, such as one full attention after five sliding ones.

Some readers (mlx-lm, llama.cpp, older transformers) take a layer's kind from its position and such
a period, and know no lists with an entry per layer. A member of a family keeps the period only if
its layers happen to lie that way.
"""

from collections.abc import Sequence
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from transformers import PreTrainedConfig

from patching.architectures.table import PER_LAYER_LISTS
from patching.blocks import LayerMap, Order
from patching.patch_order import recommended_order

PATTERN_FIELDS = (
    "sliding_window_pattern",
    "_sliding_window_pattern",
    "no_rope_layer_interval",
    "full_attention_interval",
    "global_attn_every_n_layers",
)
"""Config fields that say how kinds of layers repeat. They are not read where a list is given."""


def kinds_of_layers(config: PreTrainedConfig) -> list[tuple[Any, ...]]:
    """Return what a config's lists say about each layer."""
    config = config.get_text_config()
    values = config.to_dict()
    lists = [values[name] for name in PER_LAYER_LISTS if values.get(name)]
    return [tuple(kinds) for kinds in zip(*lists)] or [()] * config.num_hidden_layers


def kinds_by_position(config: PreTrainedConfig) -> list[tuple[Any, ...]] | None:
    """Return what a reader takes the kinds of a config's layers for who goes by position. None if
    the architecture has no rule for that.
    """
    config = config.get_text_config()
    values = config.to_dict()
    lists = {name for name in PER_LAYER_LISTS if values.get(name)}
    try:
        by_position = type(config).from_dict(
            {name: value for name, value in values.items() if name not in lists}
        )
    except (StrictDataclassError, ValueError, TypeError):  # its class requires the lists
        return None
    if any(not by_position.to_dict().get(name) for name in lists):
        return None
    return kinds_of_layers(by_position)


def keeps_period(config: PreTrainedConfig) -> bool:
    """Return whether every layer has the kind that its position says. Of a multimodal model, this
    is about its text tower.
    """
    config = config.get_text_config()
    by_position = kinds_by_position(config)
    return by_position is None or by_position == kinds_of_layers(config)


def whole_periods(layer_map: LayerMap, kinds: Sequence[Any], first: bool) -> list[frozenset[int]]:
    """Return sets of patched layers, each within the next, whose models keep the teacher's period.

    `kinds` are the teacher's, one for each of its layers. The last set holds all patchable layers:
    its model is the teacher. From there, each set before leaves out as few layers as possible. Of
    equally few, it leaves out the last ones if `first` is true, else the first ones. All models
    that take part in the result have, at every position, the kind the teacher has there.
    """
    patched = frozenset(layer_map.patchable)
    chain = [patched]
    while (patched := _largest_within(layer_map, kinds, patched, first)) is not None:
        chain.insert(0, patched)
    return chain


def _largest_within(
    layer_map: LayerMap, kinds: Sequence[Any], allowed: frozenset[int], first: bool
) -> frozenset[int] | None:
    """Return the largest proper subset of `allowed` whose model keeps the period, None if there is
    none.
    """
    # For each depth so far, and whether a layer was left out: the best set of patched layers.
    best: dict[tuple[int, bool], tuple[int, ...]] = {(0, False): ()}
    for i, block in enumerate(layer_map.blocks):
        longer: dict[tuple[int, bool], tuple[int, ...]] = {}
        for (depth, left_out), patched in best.items():
            choices = [(block[:1], patched, left_out or i in allowed)]
            if i in allowed:
                choices.append((block, (*patched, i), left_out))
            for layers, chosen, left in choices:
                end = depth + len(layers)
                if [kinds[layer] for layer in layers] != list(kinds[depth:end]):
                    continue
                state = (end, left)
                if state not in longer or _rank(chosen, first) > _rank(longer[state], first):
                    longer[state] = chosen
        best = longer
    found = [patched for (_, left_out), patched in best.items() if left_out]
    if not found:
        return None
    return frozenset(max(found, key=lambda patched: _rank(patched, first)))


def _rank(patched: tuple[int, ...], first: bool) -> tuple[int, list[int]]:
    ends = [-i for i in patched] if first else sorted(patched, reverse=True)
    return len(patched), ends


def whole_periods_order(layer_map: LayerMap, config: PreTrainedConfig) -> Order:
    """Return an order along which as many sizes as possible keep the teacher's period.

    `config` is the teacher's. Where there is a choice, layers come as in the order recommended for
    the architecture.

    Raises ValueError if all layers are of one kind, or if no size but the teacher keeps the period.
    """
    kinds = kinds_of_layers(config.get_text_config())
    if len(set(kinds)) == 1 or not keeps_period(config):
        raise ValueError(
            "order=whole_periods: the kinds of this teacher's layers do not repeat with a period; "
            "choose last or first"
        )
    first = recommended_order(config.model_type) == "first"
    chain = whole_periods(layer_map, kinds, first)
    if len(chain) == 1:
        raise ValueError(
            "order=whole_periods: with these kept layers no size but the teacher has its layers "
            "where the period wants them; choose last or first, or train a student that keeps "
            "whole periods of layers"
        )
    order: list[int] = []
    for patched in chain:
        order += sorted(patched - set(order), reverse=not first)
    return tuple(order)
