"""What the architectures differ in: where a model keeps its parts, and what its config says layer
by layer.

One table row per `config.model_type`; nothing is ever decided by a model's name or path. An
architecture without a row works where transformers itself says all that a row would.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from patching.auto_class import predicts_masked_tokens
from patching.empty_model import check_same_layer, empty_model
from patching.recipe import Parent, Recipe


@dataclass(frozen=True)
class Family:
    """Module paths inside a language model; all that is not named here goes with the embedding."""

    layers: str
    norm: str | None
    """Behind the last layer; None where each layer ends with a norm of its own."""
    head: str = "lm_head"
    """All that makes logits of the last hidden state: more than a projection in an encoder."""
    between_norm_and_head: tuple[str, ...] = ()
    position_dependent_flags: tuple[str, ...] = ()
    """Config flags that make a layer's arithmetic depend on its position: refused when set."""
    longest_text: Callable[[PreTrainedConfig], int] | None = None
    """Tokens that a table of learned positions has room for; None where positions are computed."""
    takes_packed_rows: bool = True
    """Whether a 4-D attention mask and explicit position ids decide alone which tokens a token sees
    and where it stands, so that continuations of one context can share a row.
    """

    def source_of(self, name: str, recipe: Recipe) -> tuple[Parent, str]:
        """Parent, and the name there, of a tensor of the assembled model called `name`."""
        position = self.layer_of(name)
        if position is not None:
            parent, layer_idx = recipe.layers[position]
            rest = name.removeprefix(f"{self.layers}.{position}.")
            return parent, f"{self.layers}.{layer_idx}.{rest}"
        return (recipe.head if self.goes_with_head(name) else recipe.embedding), name

    def layer_of(self, name: str) -> int | None:
        """Position of the layer that a tensor belongs to, None for one outside the layers."""
        if not name.startswith(f"{self.layers}."):
            return None
        return int(name.removeprefix(f"{self.layers}.").partition(".")[0])

    def goes_with_head(self, name: str) -> bool:
        """Whether a tensor outside the layers comes from the model that supplies the last layer."""
        paths = (self.norm, *self.between_norm_and_head, self.head)
        return name.startswith(tuple(f"{path}." for path in paths if path is not None))


def _all_positions(config: PreTrainedConfig) -> int:
    return config.max_position_embeddings


def _positions_behind_padding(config: PreTrainedConfig) -> int:
    """RoBERTa's first token has the position behind that of the padding token."""
    return config.max_position_embeddings - config.pad_token_id - 1


LLAMA_LAYOUT = Family(layers="model.layers", norm="model.norm")

FAMILIES: dict[str, Family] = {
    "bert": Family(layers="bert.encoder.layer", norm=None, head="cls", longest_text=_all_positions),
    "gemma2": LLAMA_LAYOUT,
    "gemma3_text": LLAMA_LAYOUT,
    "gpt2": Family(
        layers="transformer.h",
        norm="transformer.ln_f",
        position_dependent_flags=("scale_attn_by_inverse_layer_idx",),
        longest_text=_all_positions,
    ),
    "gpt_neox": Family(layers="gpt_neox.layers", norm="gpt_neox.final_layer_norm"),
    "granite": LLAMA_LAYOUT,
    "llama": LLAMA_LAYOUT,
    "mistral": LLAMA_LAYOUT,
    "mixtral": LLAMA_LAYOUT,
    "olmo2": LLAMA_LAYOUT,
    "olmo3": LLAMA_LAYOUT,
    "opt": Family(
        layers="model.decoder.layers",
        norm="model.decoder.final_layer_norm",
        between_norm_and_head=("model.decoder.project_out",),
        longest_text=_all_positions,
    ),
    "phi3": LLAMA_LAYOUT,
    "qwen2": LLAMA_LAYOUT,
    "qwen3": LLAMA_LAYOUT,
    "qwen3_moe": LLAMA_LAYOUT,
    "roberta": Family(
        layers="roberta.encoder.layer", norm=None, longest_text=_positions_behind_padding
    ),
    "smollm3": LLAMA_LAYOUT,
    "stablelm": LLAMA_LAYOUT,
}

PER_LAYER_LISTS = ("layer_types", "mlp_layer_types", "no_rope_layers")
"""Config lists with one entry per layer: an entry follows its layer."""

LAYERS_THAT_SHARE = ("num_kv_shared_layers", "per_layer_config")
"""Config fields that, when set, tie layers to others or to their position: refused."""

LOGIT_FIELDS = {"final_logit_softcapping": None, "logits_scaling": 1.0, "logit_scale": 1.0}
"""Config fields that scale or cap what the head returns, and the value at which they do nothing."""

MAY_DIFFER = frozenset(PreTrainedConfig().to_dict()) | {
    # Bookkeeping of any model, above, and what changes neither the forward pass nor the shape of a
    # layer.
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
    "initializer_range",
    "init_std",
    "use_cache",
    "attention_dropout",
    "attention_probs_dropout_prob",
    "hidden_dropout",
    "hidden_dropout_prob",
    "classifier_dropout",
    "dropout",
    "layerdrop",
    "attn_pdrop",
    "embd_pdrop",
    "resid_pdrop",
    "output_router_logits",
    "router_aux_loss_coef",
    "router_jitter_noise",
    "summary_activation",
    "summary_first_dropout",
    "summary_proj_to_labels",
    "summary_type",
    "summary_use_proj",
    "type_vocab_size",  # of a table that is the embedding's own
    "tie_word_embeddings",  # worked out anew for every recipe
    "max_window_layers",  # only what it says layer by layer counts: see `layer_types`
    "mlp_only_layers",  # the same, see `_is_dense`
    "decoder_sparse_step",
    *PER_LAYER_LISTS,
}

_declared: dict[type[PreTrainedConfig], Family] = {}
"""Rows that transformers supplied, by config class."""


def family_of(config: PreTrainedConfig) -> Family:
    """Where an architecture keeps its parts: its table row, or what transformers declares of it.

    Raises ValueError where neither says enough, and where a flag ties a layer to its position.
    """
    family = FAMILIES.get(config.model_type) or _declared.get(type(config))
    if family is None:
        family = _declared[type(config)] = declared_family(config)
    for flag in family.position_dependent_flags:
        if getattr(config, flag):
            raise ValueError(
                f"{flag}=True in the {config.model_type} config: a layer's arithmetic then depends "
                "on its position, so it cannot be moved; only models with this flag off can be "
                "pruned and patched"
            )
    if predicts_masked_tokens(config) and config.is_decoder:
        raise ValueError(
            f"is_decoder=True in the {config.model_type} config: this model predicts the next "
            "token; only encoders, with is_decoder off, are supported of this architecture"
        )
    values = config.to_dict()
    for name in LAYERS_THAT_SHARE:
        if values.get(name):
            raise ValueError(
                f"{name}={values[name]} in the {config.model_type} config: layers then differ "
                "by position or share their keys and values, so they cannot be moved; such models "
                "cannot be pruned and patched"
            )
    if values.get("quantization_config"):
        raise ValueError(
            f"the {config.model_type} checkpoint is quantized: name the original in floating point"
        )
    return family


def declared_family(config: PreTrainedConfig) -> Family:
    """A row for an architecture outside the table, from what transformers declares and an empty
    model shows.

    Raises ValueError, naming what is missing, unless the base model is an input embedding, one list
    of layers and a final norm, in this sequence, under a linear head.
    """

    def refuse(missing: str) -> ValueError:
        return ValueError(
            f"model_type={config.model_type}: this architecture is not supported, {missing}; "
            "choose one of "
            f"{', '.join(sorted(FAMILIES))} or add a row to FAMILIES in patching/families.py"
        )

    values = config.to_dict()
    depth = values.get(depth_field(config))
    for name in (depth_field(config), "tie_word_embeddings"):
        if values.get(name) is None:
            raise refuse(f"its config has no {name}")
    try:
        model = empty_model(config)
    except Exception as error:  # whatever the library's code may raise
        first_line = str(error).partition("\n")[0]
        raise refuse(
            f"transformers builds no causal language model of it ({first_line})"
        ) from error
    if config.is_encoder_decoder or model.base_model is model:
        raise refuse("it is not a base model under a head")
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    if not isinstance(head, nn.Linear) or not isinstance(embedding, nn.Embedding):
        raise refuse("it has no standard input and output embeddings")
    children = list(model.base_model.children())
    lists = [part for part in children if isinstance(part, nn.ModuleList) and len(part) == depth]
    if len(lists) != 1:
        raise refuse(f"its base model has {len(lists)} lists of {depth} layers where one is needed")
    (layers,) = lists
    norms = [part for part in children if "norm" in type(part).__name__.lower()]
    others = [part for part in children if part not in (layers, embedding, *norms)]
    paths = {module: name for name, module in model.named_modules()}
    if (
        embedding not in children
        or len(norms) != 1
        or any(True for part in others for _ in part.parameters())
        or not children.index(embedding) < children.index(layers) < children.index(norms[0])
    ):
        names = ", ".join(paths[part] for part in children)
        raise refuse(
            f"of its parts ({names}) it is not clear which stand before the layers and which "
            "behind them"
        )
    outside = {name.partition(".")[0] for name, _ in model.named_parameters(remove_duplicate=False)}
    outside -= {model.base_model_prefix, paths[head]}
    if outside or model.base_model_prefix not in paths.values():
        raise refuse(f"it has parts beside base model and head ({', '.join(sorted(outside))})")
    return Family(
        layers=paths[layers], norm=paths[norms[0]], head=paths[head], takes_packed_rows=False
    )


def changes_logits(config: PreTrainedConfig) -> list[str]:
    """Config fields that make logits something else than the head's output, such as
    `final_logit_softcapping=30.0`.
    """
    return [
        f"{name}={getattr(config, name)}"
        for name, neutral in LOGIT_FIELDS.items()
        if getattr(config, name, neutral) not in (neutral, None)
    ]


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
    names = declared - MAY_DIFFER - {depth_field(teacher)}
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

    Raises ValueError where only one of the parents says something of its layers.
    """
    base = parents[recipe.embedding]
    values = base.to_dict()
    if base.model_type not in FAMILIES:
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
                "patching/families.py if it does"
            )


def _is_dense(config: PreTrainedConfig, layer_idx: int) -> bool:
    """Whether a layer of a mixture-of-experts model has a plain MLP, as Qwen's configs write it."""
    step = config.decoder_sparse_step
    return layer_idx in config.mlp_only_layers or (layer_idx + 1) % step != 0


def longest_text(config: PreTrainedConfig) -> int | None:
    """Tokens that a model can read at once; None where no table of positions sets a limit."""
    count = family_of(config).longest_text
    return None if count is None else count(config)


def depth_field(config: PreTrainedConfig) -> str:
    """The depth as this config writes it, `n_layer` for GPT-2."""
    return config.attribute_map.get("num_hidden_layers", "num_hidden_layers")


def check_recipe(
    model: PreTrainedModel, recipe: Recipe, parents: Mapping[Parent, PreTrainedModel]
) -> None:
    """Raise ValueError unless every layer computes in `model` what it does in its parent, and all
    fits.

    `model` is the recipe's, built from `config_for`. All of them may be empty: tensors are not
    read. What a config cannot express about a layer at its new position shows up here, whatever the
    architecture.
    """
    family = family_of(model.config)
    layers = model.get_submodule(family.layers)
    sources = {parent: parents[parent].get_submodule(family.layers) for parent in recipe.parents}
    for position, (parent, layer_idx) in enumerate(recipe.layers):
        check_same_layer(
            sources[parent][layer_idx],
            layers[position],
            f"model_type={model.config.model_type}: layer {layer_idx} of the {parent} at "
            f"position {position}",
        )
    shapes = {
        parent: {name: tensor.shape for name, tensor in parents[parent].state_dict().items()}
        for parent in recipe.parents
    }
    for name, tensor in model.state_dict().items():
        if family.layer_of(name) is None:
            parent, parent_name = family.source_of(name, recipe)
            if shapes[parent].get(parent_name) != tensor.shape:
                raise ValueError(
                    f"model_type={model.config.model_type}: {name} has shape "
                    f"{tuple(tensor.shape)} in a model of "
                    f"{recipe.depth} layers and {tuple(shapes[parent].get(parent_name, ()))} in "
                    f"the {parent}, so this "
                    "architecture cannot be cut and joined"
                )
