"""Read JSON files, which may hold anything: damaged ones, and those of strangers."""

import json
import stat
from collections.abc import Callable
from dataclasses import is_dataclass
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, get_args, get_origin, get_type_hints

MOST_BYTES = 2**26
"""The largest JSON file that is read. The indices of the largest models have a third of it."""
MOST_BYTES_OF_RECORDS = 2**30
"""The same for files that grow with a run: its log, and what it has measured."""


def load_json(
    path: Path, most_bytes: int = MOST_BYTES, parse_int: Callable[[str], Any] | None = None
) -> Any:
    """Return what a JSON file holds. `parse_int` is that of `json.loads`.

    Raises ValueError if it is not JSON or nested too deeply. The same, before anything is read, for
    more than `most_bytes` and for what is no file, such as a pipe or a device, which may never end.
    Raises OSError if it cannot be read.
    """
    found = path.stat()
    if not stat.S_ISREG(found.st_mode):
        raise ValueError("it is not a regular file")
    if found.st_size > most_bytes:
        raise ValueError(f"it has {found.st_size:,} bytes, and at most {most_bytes:,} are read")
    try:
        return json.loads(path.read_text(encoding="utf-8"), parse_int=parse_int)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def read_object(
    path: Path, may_be_null: bool = False, most_bytes: int = MOST_BYTES
) -> dict[str, Any] | None:
    """Return the JSON object in a file that this toolkit wrote, None for a null where there may be
    one.

    Raises ValueError if the file holds anything else or more than `most_bytes`, OSError if it
    cannot be read.
    """
    try:
        values = load_json(path, most_bytes)
        if not isinstance(values, dict) and not (values is None and may_be_null):
            raise ValueError("it holds no JSON object")
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error}): remove it") from error
    return values


MOST_DIGITS = 18


def short_int(text: str) -> int:
    """Parse a whole number of JSON. Raises ValueError for one that no computer counts to."""
    if len(text.lstrip("-")) > MOST_DIGITS:
        raise ValueError(f"a number has {len(text)} digits")
    return int(text)


def check_types(value: Any, kind: Any, where: str) -> None:
    """Raise ValueError, starting with `where`, unless a value has the type that an annotation says.

    `kind` is a plain type, a list, a dict of texts, a union of these, or a dataclass of them. Whole
    numbers count as floats.
    """
    if kind is Any:
        return
    arguments = get_args(kind)
    if isinstance(kind, UnionType):
        if not any(has_type(value, each) for each in arguments):
            names = " or ".join(
                "null" if each is NoneType else getattr(each, "__name__", str(each))
                for each in arguments
            )
            raise ValueError(f"{where} is {type(value).__name__}, not {names}")
    elif is_dataclass(kind):
        if not isinstance(value, kind):
            raise ValueError(f"{where} is {type(value).__name__}, not {kind.__name__}")
        for name, of_field in get_type_hints(kind).items():
            check_types(getattr(value, name), of_field, f"{where}.{name}")
    else:
        plain = get_origin(kind) or kind
        allowed = (float, int) if plain is float else plain
        if not isinstance(value, allowed) or (isinstance(value, bool) and plain is not bool):
            raise ValueError(f"{where} is {type(value).__name__}, not {plain.__name__}")
        if plain is dict and arguments:
            for key, of_key in value.items():
                check_types(of_key, arguments[1], f"{where}[{key!r}]")
        elif plain is list and arguments:
            for i, item in enumerate(value):
                check_types(item, arguments[0], f"{where}[{i}]")


def has_type(value: Any, kind: Any) -> bool:
    """Return whether `check_types` accepts a value."""
    try:
        check_types(value, kind, "")
    except ValueError:
        return False
    return True
