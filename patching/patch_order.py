"""The order in which layers are patched, as users name it: `last`, `first`, a file, or the name of
a search.
"""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from patching.blocks import Order
from patching.files.json_files import load_json
from patching.matched_scale import MatchedScales

NAMED_ORDERS = ("last", "first")
WHOLE_PERIODS = "whole_periods"
"""The order that keeps kinds of layers where a period wants them: see `layer_pattern`."""
SEARCHED_ORDERS = ("klpatch", "block_influence")
"""Orders found by measuring a family on calibration text: see `patching.orders`."""

OLD_SPELLINGS = {"block-influence": "block_influence"}


def current_spelling(name: str) -> str:
    """The name of an order as it is written today."""
    return OLD_SPELLINGS.get(name, name)


class FoundOrder(NamedTuple):
    """An order, and what came with it."""

    order: Order
    settings: Mapping[str, Any] = {}
    """What a searched order was found with, which says for which family."""
    scales: MatchedScales | None = None
    """Factors that were measured along it."""


def read_order(order: Order | Sequence[int] | str | os.PathLike[str]) -> FoundOrder:
    """An order by name, as a list of student layers, or from a JSON file.

    The file holds a list, or an object with the list as `order`. The first layer of the list is
    patched at k = 1; `LayerMap.sequence` says what a list must hold.

    Raises ValueError if it is none of these.
    """
    if not isinstance(order, str | os.PathLike):
        return FoundOrder(order_from_json(list(order), "order"))
    if order in NAMED_ORDERS:
        return FoundOrder(order)
    path = Path(order)
    if not os.path.isfile(path):  # False also for a name that is too long
        raise ValueError(
            f"order={order}: choose last, first, {WHOLE_PERIODS}, or an existing JSON file such as "
            "the order.json of patching.orders; on a command line also "
            f"{' or '.join(SEARCHED_ORDERS)}"
        )
    try:
        values = load_json(path)
    except ValueError as error:
        raise ValueError(f"order={order}: the file is not JSON ({error})") from error
    whole = values if isinstance(values, dict) else {"order": values}
    found = order_from_json(whole.get("order"), f"order in {order}")
    settings, scales = whole.get("settings"), whole.get("scales")
    return FoundOrder(
        found,
        settings if isinstance(settings, dict) else {},
        None if scales is None else MatchedScales.from_dict(scales, f"order={order}"),
    )


def order_from_json(value: object, where: str) -> Order:
    """An order from JSON, a name or a list of layers. Raises ValueError starting with `where`."""
    if value in NAMED_ORDERS:
        return value
    if isinstance(value, list) and all(type(layer) is int for layer in value):
        return tuple(value)
    raise ValueError(f"{where}={value}: choose last or first, or write a list of student layers")


def recommended_order(model_type: str) -> Order:
    """The order the paper found to work for an architecture: Llamas from the first layer, all
    others from the last.
    """
    return "first" if model_type == "llama" else "last"
