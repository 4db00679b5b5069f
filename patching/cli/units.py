"""Numbers as users write and read them: counts, bytes, layers and sizes."""

import re
from decimal import Decimal

NUMBER = r"(\d{1,18}(?:\.\d{0,18})?)"
PREFIXES = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}
BINARY_PREFIXES = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


def parse_bytes(text: str, name: str) -> int:
    """Parse bytes from `6GB` (10^9 each), `6GiB` (2^30 each) or a plain number.

    Raises ValueError, starting with the flag's `name`, for anything else.
    """
    found = re.fullmatch(rf"{NUMBER}\s*(?:([KMGT]?)(i?)B)?", text.strip(), re.IGNORECASE)
    if found:
        number, prefix, binary = found[1], (found[2] or "").upper(), found[3]
        if not binary or prefix:
            factors = BINARY_PREFIXES if binary else PREFIXES
            num_bytes = int(Decimal(number) * factors[prefix])
            if num_bytes > 0:
                return num_bytes
    raise ValueError(f"{name}={text}: write a size such as 500MB, 6GB or 6GiB")


COUNT_SUFFIXES = {"": 1, "K": 10**3, "M": 10**6, "B": 10**9, "T": 10**12}


def parse_count(text: str, name: str) -> int:
    """Parse a number of parameters from `3.1B`, `350M` or plain digits.

    Raises ValueError, starting with the flag's `name`, for anything else.
    """
    found = re.fullmatch(rf"{NUMBER}\s*([KMBT]?)", text.strip(), re.IGNORECASE)
    if found and (count := int(Decimal(found[1]) * COUNT_SUFFIXES[found[2].upper()])) > 0:
        return count
    raise ValueError(f"{name}={text}: write a number of parameters such as 350M or 3.1B")


UNKNOWN = "unknown"


def count_text(count: int | None) -> str:
    """Format a count for people: `4.02 B`, `135.27 M`, or `unknown` for None."""
    if count is None:
        return UNKNOWN
    return _scaled(count, {"T": 10**12, "B": 10**9, "M": 10**6, "K": 10**3})


def bytes_text(num_bytes: int | None) -> str:
    """Format bytes for people, in decimal units: `8.05 GB`, or `unknown` for None."""
    if num_bytes is None:
        return UNKNOWN
    return _scaled(num_bytes, {"TB": 10**12, "GB": 10**9, "MB": 10**6, "KB": 10**3, "B": 1})


def _scaled(value: int, units: dict[str, int]) -> str:
    for unit, factor in units.items():
        if value >= factor:
            return f"{value} {unit}" if factor == 1 else f"{value / factor:.2f} {unit}"
    return str(value)


def parse_sizes(text: str, max_layers_to_patch: int) -> list[int]:
    """Parse sizes from `4`, `1,3,5`, `0-5` (inclusive) or `all` into increasing k, each once.

    Raises ValueError for anything else, and for a size outside 0..max_layers_to_patch.
    """
    if text.strip() == "all":
        return list(range(max_layers_to_patch + 1))
    sizes = set(parse_ranges(text, "num_layers_to_patch"))
    outside = sorted(k for k in sizes if k > max_layers_to_patch)
    if outside:
        raise ValueError(
            f"num_layers_to_patch={text}: this student has {max_layers_to_patch} patchable layers, "
            f"choose 0-{max_layers_to_patch}"
        )
    return sorted(sizes)


LARGEST_NUMBER = 99_999
"""Largest layer or size that is read, and most of them, so that no range takes all memory."""


def parse_ranges(text: str, name: str) -> list[int]:
    """Parse numbers and inclusive ranges such as `0,2,4-7`, in the order given.

    Raises ValueError, starting with the flag's `name`, for anything else.
    """
    numbers: list[int] = []
    for part in text.split(","):
        start, dash, stop = (piece.strip() for piece in part.partition("-"))
        if not start.isdecimal() or (dash and not stop.isdecimal()):
            raise ValueError(f"{name}={text}: write numbers and ranges such as 4, 1,3,5 or 0-5")
        first, last = parse_number(start, name), parse_number(stop or start, name)
        if last < first:
            raise ValueError(f"{name}={text}: write numbers and ranges such as 4, 1,3,5 or 0-5")
        numbers.extend(range(first, last + 1))
        if len(numbers) > LARGEST_NUMBER:
            raise ValueError(f"{name}: choose at most {LARGEST_NUMBER:,} numbers")
    return numbers


def parse_number(text: str, name: str) -> int:
    """Parse a layer or a size, which may be negative to be refused by its range.

    Raises ValueError, starting with the flag's `name`, for anything else and for numbers that no
    model has.
    """
    sign, digits = ("-", text[1:]) if text.startswith("-") else ("", text)
    if not digits.isdecimal():
        raise ValueError(f"{name}={text}: write a number such as 4")
    if len(digits.lstrip("0")) > len(str(LARGEST_NUMBER)):
        raise ValueError(f"{name}={text[:40]}: choose numbers of at most {LARGEST_NUMBER:,}")
    return int(sign + digits)
