"""Flags that name one size of a family, or several at once.

Declaring flags must stay fast, so nothing here imports torch or transformers.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from patching.cli.units import parse_bytes, parse_count, parse_number, parse_ranges, parse_sizes

if TYPE_CHECKING:
    from patching.family import Family

WAYS_TO_NAME_A_SIZE = (
    "num_layers_to_patch",
    "target_params",
    "target_bytes",
    "target_memory",
    "target_active_params",
    "patched_layers",
)


@dataclass
class SizeArguments:
    _argument_group_name = "the size"

    num_layers_to_patch: str | None = field(
        default=None,
        metadata={
            "help": "how many student layers to replace by their teacher blocks: 4; with several, "
            "such as 1,3,5 or all, a folder is written for each size"
        },
    )
    target_params: str | None = field(
        default=None,
        metadata={"help": "the deepest member with at most this many parameters stored: 3.1B"},
    )
    target_active_params: str | None = field(
        default=None,
        metadata={
            "help": "the deepest member in which a token uses at most this many parameters, which "
            "leaves out experts that are not chosen: 3.1B"
        },
    )
    target_bytes: str | None = field(
        default=None,
        metadata={"help": "the deepest member whose weights fit: 6GB (10^9 each), 6GiB (2^30)"},
    )
    target_memory: str | None = field(
        default=None,
        metadata={
            "help": "the deepest member whose weights and key-value cache fit, for --batch texts "
            "of --context tokens: 6GB, 6GiB"
        },
    )
    context: int | None = field(
        default=None,
        metadata={"help": "with --target_memory or --list: tokens in the cache of each text"},
    )
    batch: int = field(
        default=1, metadata={"help": "with --context: how many texts are in the cache at once"}
    )
    patched_layers: str | None = field(
        default=None,
        metadata={"help": "replace these student layers by teacher blocks: 3,5,16-18"},
    )

    @property
    def ways_given(self) -> list[str]:
        """The flags given that name a size."""
        return [name for name in WAYS_TO_NAME_A_SIZE if getattr(self, name) is not None]

    @property
    def names_several(self) -> bool:
        """Whether `--num_layers_to_patch` holds more than one number, even if the sizes are one."""
        text = self.num_layers_to_patch
        return text is not None and not text.strip().removeprefix("-").isdecimal()

    def check_size(self, is_listing: bool) -> list[str]:
        """Problems with these flags, one line each."""
        given, problems = self.ways_given, []
        if is_listing and given:
            problems.append(f"--list shows every size: leave out --{' and --'.join(given)}")
        elif not is_listing and len(given) != 1:
            flags = " or ".join(f"--{name}" for name in WAYS_TO_NAME_A_SIZE)
            both = f", not both --{' and --'.join(given)}" if given else ""
            problems.append(f"name one size with {flags}{both}")
        if self.target_memory is not None and self.context is None:
            problems.append("--target_memory needs --context: how many tokens the cache holds")
        if self.target_memory is None and not is_listing and self.context is not None:
            problems.append("--context belongs to --target_memory or --list")
        if self.context is None and self.batch != 1:
            problems.append("--batch belongs to --context")
        return problems

    def members(self, family: Family, max_shard_bytes: int) -> dict[int | None, frozenset[int]]:
        """The patched layers of each member that the flags name: by k if there may be several, else
        under None. Raises ValueError if there is none.
        """
        if self.names_several:
            sizes = parse_sizes(self.num_layers_to_patch, family.max_layers_to_patch)
            return {k: family.patched_layers(k) for k in sizes}
        named = {name: getattr(self, name) for name in self.ways_given}
        parse = {
            "num_layers_to_patch": lambda text, name: parse_number(text.strip(), name),
            "patched_layers": parse_ranges,
            "target_params": parse_count,
            "target_active_params": parse_count,
            "target_bytes": parse_bytes,
            "target_memory": parse_bytes,
        }
        size = {name: parse[name](text, name) for name, text in named.items()}
        return {
            None: family.patched_layers(
                **size, context=self.context, batch=self.batch, max_shard_bytes=max_shard_bytes
            )
        }
