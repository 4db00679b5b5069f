"""TODO."""

from collections.abc import Callable, Mapping
from typing import Any

from transformers import PreTrainedConfig

from patching.architectures.table import (
    ARCHITECTURES,
    MAY_DIFFER,
    PER_LAYER_LISTS,
)
from patching.recipe import Parent, Recipe


def config_for(recipe: Recipe, parents: Mapping[Parent, PreTrainedConfig]) -> PreTrainedConfig:
    """The config of the model a recipe makes: depth, per-layer entries and tying follow the recipe.

    Embedding and head stay tied only where one tied model supplies both. Otherwise the config says
    they are not, or every loader would tie them again and silently change the model.

    Raises ValueError where only one of the parents says something of its layers.
    """
    base = parents[recipe.embedding]
    values = base.to_dict()
    if base.model_type not in ARCHITECTURES:
        for parent in recipe.parents:
            _check_lists(parents[parent])
    values[depth_field(base)] = recipe.depth

    def follow(read: Callable[[PreTrainedConfig, int], Any]) -> list[Any]:
        """What each layer's own config says of it."""
        return [read(parents[source.parent], source.layer_idx) for source in recipe.layers]

    stored = {parent: parents[parent].to_dict() for parent in recipe.parents}
    for name in PER_LAYER_LISTS:
        stated = {stored[parent].get(name) is not None for parent in recipe.parents}
        if len(stated) == 2:
            raise ValueError(f"{name} stands in only one of the two configs: they do not match")
        if stated == {True}:
            values[name] = follow(
                lambda config, layer_idx, name=name: getattr(config, name)[layer_idx]
            )
    if values.get("max_window_layers") is not None and values.get("layer_types"):
        # A threshold: restated for the new layers, though `layer_types` outranks it.
        values["max_window_layers"] = next(
            (i for i, kind in enumerate(values["layer_types"]) if kind != "full_attention"),
            recipe.depth,
        )
    if values.get("mlp_only_layers") is not None and "decoder_sparse_step" in values:
        values["mlp_only_layers"] = [i for i, dense in enumerate(follow(_is_dense)) if dense]
        values["decoder_sparse_step"] = 1
    values["tie_word_embeddings"] = recipe.embedding == recipe.head and base.tie_word_embeddings
    return type(base).from_dict(values)


def _check_lists(config: PreTrainedConfig) -> None:
    """Raise ValueError where a config may have an entry per layer that nothing here knows of."""
    values = config.to_dict()
    for name in sorted(type(config)().to_dict().keys() & values.keys() - MAY_DIFFER):
        if isinstance(values[name], list) and len(values[name]) == config.num_hidden_layers:
            raise ValueError(
                f"model_type={config.model_type}: this architecture is not supported, {name} in "
                "its config may "
                "have an entry for each layer and transformers does not declare it; add it to "
                "PER_LAYER_LISTS in "
                "patching/architectures/table.py if it does"
            )


def _is_dense(config: PreTrainedConfig, layer_idx: int) -> bool:
    """Whether a layer of a mixture-of-experts model has a plain MLP, as Qwen's configs write it."""
    step = config.decoder_sparse_step
    return layer_idx in config.mlp_only_layers or (layer_idx + 1) % step != 0


def depth_field(config: PreTrainedConfig) -> str:
    """The depth as this config writes it, `n_layer` for GPT-2."""
    return config.attribute_map.get("num_hidden_layers", "num_hidden_layers")
