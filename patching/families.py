"""What the architectures differ in: where a model keeps its parts, and what its config says about
depth.

One table row per `config.model_type`. Nothing is ever decided by a model's name or path.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from transformers import PreTrainedConfig

from patching.recipe import LayerSource, Parent, Recipe


@dataclass(frozen=True)
class Family:
    """Module paths inside a causal language model; all that is not named here goes with the
    embedding.
    """

    layers: str
    norm: str
    head: str = "lm_head"
    position_dependent_flags: tuple[str, ...] = ()
    """Config flags that make a layer's arithmetic depend on its position: refused when set."""

    def source_of(self, name: str, recipe: Recipe) -> tuple[Parent, str]:
        """Parent, and the name there, of a tensor of the assembled model called `name`."""
        if name.startswith(f"{self.layers}."):
            position, _, rest = name.removeprefix(f"{self.layers}.").partition(".")
            parent, layer_idx = recipe.layers[int(position)]
            return parent, f"{self.layers}.{layer_idx}.{rest}"
        if name.startswith((f"{self.norm}.", f"{self.head}.")):
            return recipe.head, name
        return recipe.embedding, name


LLAMA_LAYOUT = Family(layers="model.layers", norm="model.norm")

FAMILIES: dict[str, Family] = {
    "llama": LLAMA_LAYOUT,
    "mistral": LLAMA_LAYOUT,
    "qwen2": LLAMA_LAYOUT,
    "qwen3": LLAMA_LAYOUT,
    "gpt_neox": Family(layers="gpt_neox.layers", norm="gpt_neox.final_layer_norm"),
    "gpt2": Family(
        layers="transformer.h",
        norm="transformer.ln_f",
        position_dependent_flags=("scale_attn_by_inverse_layer_idx",),
    ),
}

PER_LAYER_LISTS = ("layer_types",)
"""Config lists with one entry per layer: an entry follows its layer."""

MAY_DIFFER = frozenset(PreTrainedConfig().to_dict()) | {
    # Bookkeeping of any model, above, and what changes neither the forward pass nor the shape of a
    # layer.
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
    "initializer_range",
    "use_cache",
    "attention_dropout",
    "hidden_dropout",
    "classifier_dropout",
    "attn_pdrop",
    "embd_pdrop",
    "resid_pdrop",
    "summary_activation",
    "summary_first_dropout",
    "summary_proj_to_labels",
    "summary_type",
    "summary_use_proj",
    "tie_word_embeddings",  # worked out anew for every recipe
    "max_window_layers",  # only what it says layer by layer counts: see `layer_types`
    *PER_LAYER_LISTS,
}


def family_of(config: PreTrainedConfig) -> Family:
    """The table row of an architecture.

    Raises ValueError for an architecture without a row, and where a flag ties a layer to its
    position.
    """
    family = FAMILIES.get(config.model_type)
    if family is None:
        raise ValueError(
            f"model_type={config.model_type}: this architecture is not supported, choose one of "
            f"{', '.join(sorted(FAMILIES))} or add a row to FAMILIES in patching/families.py"
        )
    for flag in family.position_dependent_flags:
        if getattr(config, flag):
            raise ValueError(
                f"{flag}=True in the {config.model_type} config: a layer's arithmetic then depends "
                "on its position, so it cannot be moved; only models with this flag off can be "
                "pruned and patched"
            )
    return family


def check_parents_match(student: PreTrainedConfig, teacher: PreTrainedConfig) -> None:
    """Raise ValueError, naming the fields, unless layers of one model can stand between layers of
    the other.
    """
    if student.model_type != teacher.model_type:
        raise ValueError(
            f"the student is a {student.model_type} model and the teacher a {teacher.model_type} "
            "model: a student must have been distilled from this teacher"
        )
    student_values, teacher_values = student.to_dict(), teacher.to_dict()
    declared = set(
        type(teacher)().to_dict()
    )  # what only a config file holds, no forward pass reads
    names = declared - MAY_DIFFER - {_depth_field(teacher)}
    different = [
        f"{name} is {student_values.get(name)} in the student and {teacher_values.get(name)} "
        "in the teacher"
        for name in sorted(names)
        if student_values.get(name) != teacher_values.get(name)
    ]
    if different:
        raise ValueError(
            f"{'; '.join(different)}: a student must have been distilled from this teacher"
        )


def config_for(recipe: Recipe, parents: Mapping[Parent, PreTrainedConfig]) -> PreTrainedConfig:
    """The config of the model a recipe makes: depth, per-layer entries and tying follow the recipe.

    Embedding and head stay tied only where one tied model supplies both. Otherwise the config says
    they are not, or every loader would tie them again and silently change the model.
    """
    base = parents[recipe.embedding]
    values = base.to_dict()
    values[_depth_field(base)] = recipe.depth
    for name in PER_LAYER_LISTS:
        if values.get(name) is not None:
            values[name] = [_entry(parents, source, name) for source in recipe.layers]
    if (
        "max_window_layers" in values
    ):  # a threshold: restated for the new layers, though `layer_types` outranks it
        layer_types = values["layer_types"]
        values["max_window_layers"] = next(
            (i for i, kind in enumerate(layer_types) if kind != "full_attention"), recipe.depth
        )
    values["tie_word_embeddings"] = recipe.embedding == recipe.head and base.tie_word_embeddings
    return type(base).from_dict(values)


def _entry(parents: Mapping[Parent, PreTrainedConfig], source: LayerSource, name: str) -> str:
    return getattr(parents[source.parent], name)[source.layer_idx]


def _depth_field(config: PreTrainedConfig) -> str:
    """The depth as this config writes it, `n_layer` for GPT-2."""
    return config.attribute_map.get("num_hidden_layers", "num_hidden_layers")
