"""The sequence in which layers are patched, as users name it: `last`, `first`, a file, or the name
of a search.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from patching.blocks import Order

NAMED_ORDERS = ("last", "first")
SEARCHED_ORDERS = ("klpatch", "block-influence")
"""Orders that are found by measuring a pair on calibration text: `patching.orders`."""


def parse_order(text: str) -> Order:
    """An order by name, or from a JSON file: a list of student layers, or an object that holds it
    as `order`.

    The first layer of the list is patched at k = 1; `LayerMap.sequence` says what a list must hold.
    Whoever searched for the order may keep what was found beside it in the object.

    Raises ValueError where the text is no name and no such file.
    """
    if text in NAMED_ORDERS:
        return text
    path = Path(text)
    if not path.is_file():
        raise ValueError(
            f"--order {text}: choose last, first, {', '.join(SEARCHED_ORDERS)}, or a "
            "JSON file that is there"
        )
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"--order {text}: the file is not JSON ({error})") from error
    order = values.get("order") if isinstance(values, dict) else values
    return as_order(order, f"order in {text}")


def found_for(text: str) -> Mapping[str, Any]:
    """What the file of a searched order says of the pair it was found for; nothing of an order that
    is no such file.
    """
    if text in (*NAMED_ORDERS, *SEARCHED_ORDERS):
        return {}
    values = json.loads(Path(text).read_text(encoding="utf-8"))
    settings = values.get("settings") if isinstance(values, dict) else None
    return settings if isinstance(settings, dict) else {}


def as_order(value: object, where: str) -> Order:
    """An order from JSON, a name or a list of layers. Raises ValueError, beginning with `where`."""
    if value in NAMED_ORDERS:
        return value
    if isinstance(value, list) and all(type(layer) is int for layer in value):
        return tuple(value)
    raise ValueError(f"{where}={value}: choose last or first, or write a list of student layers")
