"""The model card (README.md) of a patched model: what it was made from, how to load it, and the
hub's metadata.
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
    """Where a parent came from, as far as that is known."""

    name_or_path: str
    revision: str | None
    commit: str | None
    """The hub's commit; None for a folder."""
    license: str | None
    """The license that the parent's own card states."""

    @property
    def is_folder(self) -> bool:
        return not self.name_or_path or Path(self.name_or_path).is_dir()

    @property
    def title(self) -> str:
        """The name to show on the card: the repository, or the last part of a folder's path."""
        if not self.name_or_path:
            return "a model in memory"
        return Path(self.name_or_path).resolve().name if self.is_folder else self.name_or_path


def origin_of(reference: Reference) -> Origin:
    """Read where a parent came from. What it does not say stays None."""
    name_or_path, revision = reference
    if not name_or_path:
        return Origin(name_or_path, revision, None, None)
    config = cached_file(name_or_path, "config.json", revision=revision, **ABSENT_IS_FINE)
    card = cached_file(name_or_path, FILE_NAME, revision=revision, **ABSENT_IS_FINE)
    commit = None if Path(name_or_path).is_dir() else extract_commit_hash(config, None)
    return Origin(name_or_path, revision, commit, _license(card))


def _license(card: str | None) -> str | None:
    if card is None:
        return None
    try:
        metadata = metadata_load(card) or {}
    except (ValueError, OSError, yaml.YAMLError):  # a card is free text and may hold anything
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
    """Return the text of the card. `config` is that of the model, or of a parent."""
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
        f"A model of {size.depth} layers between a student and its teacher. Single student layers "
        f"were replaced by blocks of teacher layers, with no further training ([paper]({PAPER})).",
        "",
        "| | parent | revision | license |",
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
        f"| parameters active per token | {count_text(size.active_parameters)} |",
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
    """Return runs of layers, such as `0-3` from `student 0-3`: positions in the model and
    sources.
    """
    found = []
    layers = enumerate(recipe.layers)
    # A run continues while the parent is the same and its layer numbers are consecutive.
    for (parent, _), run in groupby(layers, key=lambda item: (item[1][0], item[1][1] - item[0])):
        members = list(run)
        positions = [position for position, _ in members]
        numbers = [source.layer_idx for _, source in members]
        found.append((_range(positions), f"{parent} {_range(numbers)}"))
    return found


def _range(numbers: list[int]) -> str:
    first, last = numbers[0], numbers[-1]
    return str(first) if first == last else f"{first}-{last}"
