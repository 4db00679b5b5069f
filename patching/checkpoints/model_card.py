"""The README.md of a patched model: what it was made from and how to load it, with the hub's
metadata on top.
"""

from collections.abc import Mapping
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from huggingface_hub.repocard import metadata_load
from transformers import PreTrainedConfig
from transformers.utils import cached_file
from transformers.utils.hub import extract_commit_hash

from patching.architectures.models import auto_class, predicts_masked_tokens
from patching.checkpoints.sizes import Size
from patching.cli.units import bytes_text, count_text
from patching.recipe import Parent, Recipe, Reference

FILE_NAME = "README.md"
PAPER = "https://arxiv.org/abs/2510.05064"
ABSENT_IS_FINE = {
    "_raise_exceptions_for_missing_entries": False,
    "_raise_exceptions_for_connection_errors": False,
}


class Origin(NamedTuple):
    """Where a parent came from, as far as it can be told."""

    name_or_path: str
    revision: str | None
    commit: str | None
    """The hub's commit; None for a folder."""
    license: str | None
    """As the parent's own card states it."""

    @property
    def is_folder(self) -> bool:
        return Path(self.name_or_path).is_dir()

    @property
    def title(self) -> str:
        """How a reader elsewhere knows it: the repository, or the folder's last name."""
        return Path(self.name_or_path).resolve().name if self.is_folder else self.name_or_path


def origin_of(reference: Reference) -> Origin:
    """Read what a parent says of itself; what it does not say stays None."""
    name_or_path, revision = reference
    config = cached_file(name_or_path, "config.json", revision=revision, **ABSENT_IS_FINE)
    card = cached_file(name_or_path, FILE_NAME, revision=revision, **ABSENT_IS_FINE)
    commit = None if Path(name_or_path).is_dir() else extract_commit_hash(config, None)
    return Origin(name_or_path, revision, commit, _license(card))


def _license(card: str | None) -> str | None:
    if card is None:
        return None
    try:
        metadata = metadata_load(card) or {}
    except (ValueError, OSError, yaml.YAMLError):  # a card is prose: it may hold anything
        return None
    stated = metadata.get("license")
    if stated == "other":
        stated = metadata.get("license_name", stated)
    return ", ".join(map(str, stated)) if isinstance(stated, list) else stated


def model_card(
    title: str,
    recipe: Recipe,
    size: Size,
    origins: Mapping[Parent, Origin],
    config: PreTrainedConfig,
) -> str:
    """The card's text; `config` is the model's, or a parent's of the same architecture."""
    task = "fill-mask" if predicts_masked_tokens(config) else "text-generation"
    loader = auto_class(config).__name__
    metadata: dict[str, Any] = {"library_name": "transformers", "pipeline_tag": task}
    metadata["tags"] = ["boomerang-distillation", "layer-patching"]
    repositories = [origin.name_or_path for origin in origins.values() if not origin.is_folder]
    if repositories:
        metadata["base_model"] = repositories
    licenses = {origin.license for origin in origins.values() if origin.license}
    if len(licenses) == 1:
        metadata["license"] = licenses.pop()
    elif licenses:
        metadata |= {"license": "other", "license_name": "those-of-both-parents"}
    lines = [
        "---",
        yaml.safe_dump(metadata, sort_keys=False).rstrip(),
        "---",
        "",
        f"# {title}",
        "",
        f"A model of {size.depth} layers between a student and its teacher, made by putting "
        "blocks of teacher "
        f"layers in place of single student layers, with no further training ([paper]({PAPER})).",
        "",
        "| | parent | revision | licence |",
        "| --- | --- | --- | --- |",
    ]
    for parent in sorted(origins, reverse=True):
        origin = origins[parent]
        revision = origin.commit or origin.revision or ""
        stated = origin.license or "not stated in its card"
        lines.append(f"| {parent} | {origin.title} | {revision} | {stated} |")
    lines += ["", "| layers | from |", "| --- | --- |", f"| embedding | {recipe.embedding} |"]
    lines += [f"| {layers} | {source} |" for layers, source in runs(recipe)]
    lines += [
        f"| final norm and head | {recipe.head} |",
        "",
        "| size | |",
        "| --- | --- |",
        "| parameters, embedding and head both counted | "
        f"{count_text(size.parameters.both_counted)} |",
        f"| parameters stored | {count_text(size.parameters.stored)} |",
        f"| weights on disk | {bytes_text(size.bytes_on_disk)} |",
        f"| key-value cache per token | {bytes_text(size.kv_cache_bytes_per_token)} |",
        f"| FLOPs per token | {count_text(size.flops_per_token)} |",
        "",
        "It is an ordinary checkpoint:",
        "",
        "```python",
        f"from transformers import {loader}, AutoTokenizer",
        "",
        f'model = {loader}.from_pretrained("{title}")',
        f'tokenizer = AutoTokenizer.from_pretrained("{title}")',
        "```",
        "",
    ]
    return "\n".join(lines)


def runs(recipe: Recipe) -> list[tuple[str, str]]:
    """Layers as runs, `0-3` and `student 0-3`: this model's layers, and whose they were."""
    found = []
    layers = enumerate(recipe.layers)
    # Layers run on while the parent stays and its own numbers follow each other.
    for (parent, _), run in groupby(layers, key=lambda item: (item[1][0], item[1][1] - item[0])):
        members = list(run)
        positions = [position for position, _ in members]
        numbers = [source.layer_idx for _, source in members]
        found.append((_range(positions), f"{parent} {_range(numbers)}"))
    return found


def _range(numbers: list[int]) -> str:
    first, last = numbers[0], numbers[-1]
    return str(first) if first == last else f"{first}-{last}"
