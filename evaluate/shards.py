"""A sweep in shards, for machines that share nothing: `--shard 2/8` evaluates the second of eight
parts, and `evaluate.report` puts the shards' folders together again.

Parts are pairs of a task and a model, all models of a task one after the other. A shard is a slice
of them, so its models share as many layers as possible.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import NamedTuple, TypeVar

from evaluate.result import LM_EVAL_KEYS, Result

T = TypeVar("T")
OWN_ARGUMENTS = ("shard", "save_directory", "device")
"""Arguments in which the shards of one sweep may differ."""


class Shard(NamedTuple):
    number: int
    """From 1."""
    count: int

    @classmethod
    def parse(cls, text: str) -> Shard:
        """`2/8`. Raises ValueError for anything else."""
        number, _, count = text.partition("/")
        if not (number.isdecimal() and count.isdecimal() and 1 <= int(number) <= int(count)):
            raise ValueError(f"shard={text}: write i/n, with i from 1 to n, such as 2/8")
        return cls(int(number), int(count))

    def of(self, parts: Sequence[T]) -> Sequence[T]:
        """This shard's slice of all parts."""
        start, stop = ((i * len(parts)) // self.count for i in (self.number - 1, self.number))
        return parts[start:stop]


WHOLE = Shard(1, 1)


MOST_NAMED = 9
"""Missing shards that a message names."""


class Shards(NamedTuple):
    """The folders of one sweep."""

    folders: list[Path]
    """In the sequence of their shards. A sweep that was not sharded has one."""
    missing: str
    """Shards without a folder, in words: the first of them, and how many others."""


def shards_of(results: Mapping[Path, Mapping[str, Result]]) -> list[Shards]:
    """The folders that belong to one sweep each, by the arguments their results were made with."""
    by_sweep: dict[str, dict[Path, Shard | None]] = {}
    for folder, of_folder in results.items():
        arguments = [run.arguments for of in of_folder.values() for run in of.runs.values()]
        shards = {of.get("shard") for of in arguments}
        key, shard = str(folder), None
        if len(shards) == 1 and None not in shards:
            shard = Shard.parse(shards.pop())
            others = [
                {name: value for name, value in of.items() if name not in OWN_ARGUMENTS}
                for of in arguments
            ]
            key = json.dumps([shard.count, others[0]], sort_keys=True, default=str)
        by_sweep.setdefault(key, {})[folder] = shard
    found = []
    for of_sweep in by_sweep.values():
        folders = sorted(of_sweep, key=lambda folder: (of_sweep[folder] or WHOLE, folder))
        found.append(
            Shards(folders, missing_shards([shard for shard in of_sweep.values() if shard]))
        )
    return found


def missing_shards(there: Sequence[Shard]) -> str:
    """The other shards of a sweep, in words. A damaged file may say that there are a trillion."""
    if not there:
        return ""
    count, numbers = there[0].count, {shard.number for shard in there}
    named = list(islice((i for i in range(1, count + 1) if i not in numbers), MOST_NAMED))
    num_others = count - len(numbers) - len(named)
    return ", ".join(f"{i}/{count}" for i in named) + (
        f" and {num_others:,} others" if num_others else ""
    )


def merged(of_shards: Iterable[Result]) -> Result:
    """One model's results in several shards as one result."""
    first, *others = of_shards
    for other in others:
        names = (*LM_EVAL_KEYS, "tasks", "runs", "documents")
        both = {name: getattr(first, name) | getattr(other, name) for name in names}
        first = replace(first, cost=first.cost or other.cost, **both)
    return first
