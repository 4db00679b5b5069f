"""The numbers that a search has measured, and the file they are kept in."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from patching.blocks import as_layer_list
from patching.files.json_files import MOST_BYTES_OF_RECORDS, check_types, load_json
from patching.files.outputs import finite_or_none, write_json
from patching.orders.scales import Point, RowSums
from patching.orders.search import PatchedLayers


@dataclass
class Measured:
    settings: Mapping[str, Any]
    """What the numbers depend on: `num_teacher_layers` and `kept_layers`, text and weights."""
    path: Path | None
    """None if they are not kept."""
    kl: dict[PatchedLayers, float] = field(default_factory=dict)
    """Mean KL of the model of a set, in nats per token; infinity if it is not a number."""
    rows: dict[Point, RowSums] = field(default_factory=dict)
    """KL of a rescaled model, summed over the tokens of each row of text."""
    influences: list[float] | None = None
    """Block influence of each teacher layer."""
    ratios: list[float] | None = None
    """Median ratio of lengths before each student layer, teacher over student."""

    @classmethod
    def open(cls, settings: Mapping[str, Any], path: Path | None) -> "Measured":
        """Read the file if there is one. Raises ValueError if it is damaged, or was made with other
        settings.
        """
        if path is None or not path.is_file():
            return cls(settings, path)
        try:
            stored = load_json(path, MOST_BYTES_OF_RECORDS)
            before = dict(stored["settings"])
            kl = {_layers(layers): _finite(value) for layers, value in stored["kl"].items()}
            rows = {
                _point(name): [*map(_finite, sums)] for name, sums in stored.get("rows", {}).items()
            }
            influences, ratios = stored["block_influence"], stored.get("length_ratios")
            for name, values in (("block_influence", influences), ("length_ratios", ratios)):
                check_types(values, list[float] | None, name)
            if len({len(sums) for sums in rows.values()}) > 1 or [] in rows.values():
                raise ValueError("rows have different numbers of texts")
        except (ValueError, LookupError, TypeError, AttributeError, ArithmeticError) as error:
            raise ValueError(f"{path} is damaged ({error}): remove it") from error
        for name, value in settings.items():
            if before.get(name) != value:
                raise ValueError(
                    f"{path} was measured with {name}={before.get(name)}, not {value}: choose "
                    "another folder, or the same settings"
                )
        for name, values, num_layers in (
            ("block_influence", influences, settings["num_teacher_layers"]),
            ("length_ratios", ratios, len(settings["kept_layers"])),
        ):
            if values is not None and len(values) != num_layers:
                raise ValueError(
                    f"{path} is damaged ({len(values)} numbers in {name} for {num_layers} layers): "
                    "remove it"
                )
        return cls(settings, path, kl, rows, influences, ratios)

    def write(self) -> None:
        if self.path is None:
            return
        values = {
            "settings": self.settings,
            "block_influence": self.influences,
            "length_ratios": self.ratios,
            "kl": {as_layer_list(sorted(patched)): value for patched, value in self.kl.items()},
            "rows": {point_name(point): sums for point, sums in self.rows.items()},
        }
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_json(self.path, finite_or_none(values))


def point_name(point: Point) -> str:
    """Return the name of a rescaled model: `3,4 x 1.21` for the set {3, 4} with one factor."""
    factors = " ".join(map(str, point.factors))
    return f"{as_layer_list(sorted(point.patched_layers))} x {factors}"


def _point(name: str) -> Point:
    layers, _, factors = name.partition(" x ")
    return Point(_layers(layers), tuple(map(float, factors.split())))


def _layers(text: str) -> PatchedLayers:
    return frozenset(map(int, filter(None, text.split(","))))


def _finite(value: float | None) -> float:
    return math.inf if value is None else float(value)
