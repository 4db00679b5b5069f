"""The config of the model a recipe makes: the one place that knows which config fields depend on
depth or on single layers.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from transformers import PreTrainedConfig

from patching.architectures.table import (
    ARCHITECTURES,
    MAY_DIFFER,
    PER_LAYER_LISTS,
    SIZES_OF_EMBEDDINGS,
)
from patching.recipe import Parent, Recipe


def config_for(recipe: Recipe, parents: Mapping[Parent, PreTrainedConfig]) -> PreTrainedConfig:
    """Return the config of the model a recipe makes. In that of a multimodal model, only the
    settings of the text tower follow the recipe.

    Depth, per-layer entries and tying follow the recipe. Embedding and head stay tied only if one
    tied model supplies both and the embedding is not rescaled. Otherwise the config must say that
    they are not tied, or every loader would tie them again and silently change the model. All other
    fields are the teacher's where its config is given.

    Raises ValueError if a parent lacks a layer of the recipe, or if a per-layer list is in the
    config of only one parent.
    """
    embedding = parents[recipe.embedding]
    tied = recipe.may_tie and bool(embedding.tie_word_embeddings)
    towers = {parent: config.get_text_config() for parent, config in parents.items()}
    whole = parents.get("teacher", embedding)
    tower = _tower_config_for(recipe, towers, tied)
    if whole.get_text_config() is whole:
        return tower
    values = whole.to_dict() | {"text_config": tower.to_dict(), "tie_word_embeddings": tied}
    return type(whole).from_dict(values)


def _tower_config_for(
    recipe: Recipe, parents: Mapping[Parent, PreTrainedConfig], tied: bool
) -> PreTrainedConfig:
    for parent, layer_idx, _ in recipe.layers:
        if layer_idx >= parents[parent].num_hidden_layers:
            raise ValueError(
                f"the recipe takes layer {layer_idx} of the {parent}, which has layers "
                f"0-{parents[parent].num_hidden_layers - 1}"
            )
    embedding = parents[recipe.embedding]
    base = parents.get("teacher", embedding)
    values = base.to_dict()
    values |= {name: getattr(embedding, name) for name in SIZES_OF_EMBEDDINGS if name in values}
    if base.model_type not in ARCHITECTURES:
        for parent in recipe.parents:
            _check_lists(parents[parent])
    values[depth_field(base)] = recipe.depth

    def follow(read: Callable[[PreTrainedConfig, int], Any]) -> list[Any]:
        """Read a value for each layer from the config of its parent."""
        return [read(parents[source.parent], source.layer_idx) for source in recipe.layers]

    stored = {parent: parents[parent].to_dict() for parent in recipe.parents}
    for name in PER_LAYER_LISTS:
        stated = {stored[parent].get(name) is not None for parent in recipe.parents}
        if len(stated) == 2:
            raise ValueError(f"{name} is in only one of the two configs: they do not match")
        if stated == {True}:
            values[name] = follow(
                lambda config, layer_idx, name=name: getattr(config, name)[layer_idx]
            )
    stored_threshold = values.get("max_window_layers")
    if stored_threshold is not None and values.get("layer_types"):
        # This threshold repeats what `layer_types` says, so it must agree with the new list.
        first = _first_with_window(values["layer_types"])
        if first != _first_with_window(base.layer_types):
            none_has = max(stored_threshold, recipe.depth)
            values["max_window_layers"] = none_has if first is None else first
    if values.get("mlp_only_layers") is not None and "decoder_sparse_step" in values:
        values["mlp_only_layers"] = [i for i, dense in enumerate(follow(_is_dense)) if dense]
        values["decoder_sparse_step"] = 1
    values["tie_word_embeddings"] = tied
    return type(base).from_dict(values)


def _check_lists(config: PreTrainedConfig) -> None:
    """Raise ValueError if a list in the config may have one entry per layer and is not in
    PER_LAYER_LISTS.
    """
    values = config.to_dict()
    for name in sorted(type(config)().to_dict().keys() & values.keys() - MAY_DIFFER):
        if isinstance(values[name], list) and len(values[name]) == config.num_hidden_layers:
            raise ValueError(
                f"model_type={config.model_type}: this architecture is not supported, because "
                f"{name} in its config may have one entry per layer; if it does, add it to "
                "PER_LAYER_LISTS in patching/architectures/table.py"
            )


def _first_with_window(kinds: Sequence[str]) -> int | None:
    """Return the first layer without full attention, None if there is none."""
    return next((i for i, kind in enumerate(kinds) if kind != "full_attention"), None)


def _is_dense(config: PreTrainedConfig, layer_idx: int) -> bool:
    """Return whether a layer of a mixture-of-experts model has a plain MLP, by Qwen's fields."""
    step = config.decoder_sparse_step
    return layer_idx in config.mlp_only_layers or (layer_idx + 1) % step != 0


def untie(config: PreTrainedConfig) -> None:
    """Say that head and embedding are two matrices, in a multimodal model's config and in that of
    its text tower: where one says that they are tied, transformers may tie them.
    """
    config.tie_word_embeddings = config.get_text_config().tie_word_embeddings = False


def depth_field(config: PreTrainedConfig) -> str:
    """Return the name of the config's field for its depth, such as `n_layer` for GPT-2."""
    return config.attribute_map.get("num_hidden_layers", "num_hidden_layers")
