"""The model card (README.md) of a patched model: what it was made from, how to load it, and the
hub's metadata.
"""

from collections.abc import Mapping
from itertools import groupby
from typing import Any

import yaml
from transformers import PreTrainedConfig

from patching.architectures.lookup import architecture_of
from patching.architectures.models import auto_class
from patching.checkpoints.origin import Origin, license_of_all
from patching.checkpoints.sizes import Size
from patching.cli.units import bytes_text, count_text
from patching.recipe import Parent, Recipe

PAPER = "https://arxiv.org/abs/2510.05064"
TASKS = {
    "AutoModelForCausalLM": "text-generation",
    "AutoModelForImageTextToText": "image-text-to-text",
    "AutoModelForMaskedLM": "fill-mask",
}


def model_card(
    title: str,
    recipe: Recipe,
    size: Size,
    origins: Mapping[Parent, Origin],
    config: PreTrainedConfig,
    matched_scale: Mapping[str, Any] | None = None,
) -> str:
    """Return the text of the card. `config` is that of the model, or of a parent, and
    `matched_scale` says how its student layers were rescaled, if they were.
    """
    loader = auto_class(config).__name__
    task = TASKS[loader]
    metadata: dict[str, Any] = {"library_name": "transformers", "pipeline_tag": task}
    metadata["tags"] = ["boomerang-distillation", "layer-patching"]
    repositories = [origin.repository for origin in origins.values() if origin.repository]
    if repositories:
        metadata["base_model"] = repositories
        if len(origins) > 1:
            metadata["base_model_relation"] = "merge"
    license_ = license_of_all([origin.license for origin in origins.values()])
    if license_ is not None:
        metadata |= license_.metadata
    owner = "teacher" if "teacher" in recipe.parents else "student"
    carried = [path.rpartition(".")[2] for path in architecture_of(config).carried]
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
        revision = origin.commit or origin.revision or origin.fingerprint or ""
        stated = origin.license or "not stated in its card"
        lines.append(f"| {parent} | {origin.title} | {revision} | {stated} |")
    scale = recipe.embedding_scale
    embedding = recipe.embedding if scale == 1 else f"{recipe.embedding}, times {scale:g}"
    lines += ["", "| layers | from |", "| --- | --- |", f"| embedding | {embedding} |"]
    lines += [f"| {layers} | {source} |" for layers, source in runs(recipe)]
    lines += [
        f"| final norm and head | {recipe.head} |",
        *(f"| {name}, unchanged | {owner} |" for name in carried),
        *([] if matched_scale is None else how_scaled(matched_scale)),
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
        *how_to_load(title, loader),
        "",
    ]
    return "\n".join(lines)


def how_to_load(title: str, loader: str) -> list[str]:
    """Return the lines of a card that load a model with the transformers class `loader`."""
    return [
        "It is an ordinary checkpoint:",
        "",
        "```python",
        f"from transformers import {loader}, AutoTokenizer",
        "",
        f'model = {loader}.from_pretrained("{title}")',
        f'tokenizer = AutoTokenizer.from_pretrained("{title}")',
        "```",
    ]


def how_scaled(matched_scale: Mapping[str, Any]) -> list[str]:
    """Return the lines of a card about factors, given what provenance.json says about them."""
    before, after, error = (matched_scale[name] for name in ("kl_before", "kl", "gain_error"))
    return [
        "",
        "What student layers write to the residual stream is multiplied by the factors above, so "
        "that teacher layers read a stream of the length they know. The factors have the lowest KL "
        f"from the teacher on {matched_scale['found_on'].get('text', 'calibration text')}: "
        f"{after:.4f} nats per token, and {before:.4f} without them (standard error of the "
        f"difference {error:.4f}).",
    ]


def runs(recipe: Recipe) -> list[tuple[str, str]]:
    """Return runs of layers, such as `0-3` from `student 0-3`: positions in the model and
    sources.
    """
    found = []
    layers = enumerate(recipe.layers)
    # A run continues while parent and factor are the same and its layer numbers are consecutive.
    for (parent, scale, _), run in groupby(
        layers, key=lambda item: (item[1].parent, item[1].scale, item[1].layer_idx - item[0])
    ):
        members = list(run)
        positions = [position for position, _ in members]
        numbers = [source.layer_idx for _, source in members]
        times = "" if scale == 1 else f", times {scale:g}"
        found.append((_range(positions), f"{parent} {_range(numbers)}{times}"))
    return found


def _range(numbers: list[int]) -> str:
    first, last = numbers[0], numbers[-1]
    return str(first) if first == last else f"{first}-{last}"
