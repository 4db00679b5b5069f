"""Matched scale: for sizes of a family, the factor by which each run of student layers is rescaled.

The cosine loss does not see lengths. Where student layers meet teacher layers, the residual stream
may be too short or too long for what follows. So each run of student layers gets a factor, chosen
per size by KL from the teacher on calibration text (`patching.orders.scales`). This is what such a
search finds, as order.json and student_config.json hold it. `patching.recipe.with_scales` says what
a factor changes.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class SetScale:
    """What was found for one set of patched layers."""

    patched_layers: frozenset[int]
    factors: Mapping[int, float]
    """By the first student layer of each run. A run that gains nothing beyond the error has 1."""
    start: Mapping[int, float]
    """Median length ratios, teacher over student, from which the search started."""
    kl_before: float
    """KL from the teacher without factors, in nats per token."""
    kl: float
    gain_error: float
    """Standard error of the difference of the two, over documents."""

    def to_dict(self) -> dict[str, Any]:
        return {
            "patched_layers": sorted(self.patched_layers),
            "factors": {str(run): factor for run, factor in sorted(self.factors.items())},
            "start": {str(run): round(ratio, 4) for run, ratio in sorted(self.start.items())},
            "kl_before": self.kl_before,
            "kl": self.kl,
            "gain_error": self.gain_error,
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "SetScale":
        """Raises an error for anything that `to_dict` does not write."""
        factors, start = (
            {int(run): float(factor) for run, factor in values[name].items()}
            for name in ("factors", "start")
        )
        if not all(0 < factor < math.inf for factor in factors.values()):
            raise ValueError(f"factors {factors}: choose numbers above 0")
        layers = values["patched_layers"]
        if not all(type(layer) is int for layer in layers):
            raise ValueError(f"patched_layers {layers}: write whole numbers")
        numbers = (float(values[name]) for name in ("kl_before", "kl", "gain_error"))
        return cls(frozenset(layers), factors, start, *numbers)


@dataclass(frozen=True)
class MatchedScales:
    """The factors of some sets of patched layers, and the text they were found on."""

    sets: Mapping[frozenset[int], SetScale]
    found_on: Mapping[str, Any]

    @classmethod
    def of(cls, sets: Iterable[SetScale], found_on: Mapping[str, Any]) -> "MatchedScales":
        return cls({found.patched_layers: found for found in sets}, found_on)

    def before(self, others: "MatchedScales | None") -> "MatchedScales":
        """Return these factors, and those of `others` for all other sets."""
        return (
            self if others is None else MatchedScales({**others.sets, **self.sets}, self.found_on)
        )

    def factors(self, patched_layers: frozenset[int]) -> Mapping[int, float]:
        """Return the factors of a set's runs that are not 1. Empty for a set without any."""
        found = self.sets.get(patched_layers)
        factors = found.factors if found else {}
        return {run: factor for run, factor in factors.items() if factor != 1}

    def to_dict(self) -> dict[str, Any]:
        sets = sorted(self.sets.values(), key=lambda found: sorted(found.patched_layers))
        return {"found_on": dict(self.found_on), "sets": [found.to_dict() for found in sets]}

    @classmethod
    def from_dict(cls, values: Any, where: str) -> "MatchedScales":
        """Return what `to_dict` wrote. Raises ValueError that begins with `where` for anything
        else.
        """
        try:
            sets = [SetScale.from_dict(found) for found in values["sets"]]
            return cls.of(sets, dict(values["found_on"]))
        except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
            raise ValueError(
                f"{where}: scales cannot be read ({type(error).__name__}: {error}); search them "
                "again with patching.orders, or add --match_scale False"
            ) from error

    def described(self, patched_layers: frozenset[int]) -> dict[str, Any] | None:
        """Return what a saved model records about its factors, None if it has none."""
        if not self.factors(patched_layers):
            return None
        return self.sets[patched_layers].to_dict() | {"found_on": dict(self.found_on)}
