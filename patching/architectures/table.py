"""The supported architectures: where each keeps its parts, and what its config fields mean.

To add an architecture, add a row to ARCHITECTURES, under its `config.model_type`. A model's name or
path never decides anything. An architecture without a row is supported if transformers declares
everything that a row would say (see `lookup.declared_architecture`).
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

from transformers import PreTrainedConfig

from patching.architectures.rescaling import Rescaling
from patching.recipe import Parent, Recipe

WRITERS = (
    *("o_proj", "out_proj", "c_proj", "dense"),
    *("down_proj", "fc2", "dense_4h_to_h", "output_linear"),
)
"""Usual names of the modules whose output a layer adds to the residual stream: projections of
attention and of other mixers, then those of MLPs and experts. They hold wherever each layer reads
the stream through a norm and adds to it without one, which is shown before a model is rescaled: see
`patching.running.rescaled`.
"""


@dataclass(frozen=True)
class Architecture:
    """Module paths of a language model's parts, and what is special about it.

    Modules that are not named here, such as rotary tables, go with the embedding.
    """

    layers: str
    norm: str | None
    """The final norm. None if each layer ends with its own norm."""
    head: str = "lm_head"
    """The module that computes logits. In an encoder it is more than a projection."""
    between_norm_and_head: tuple[str, ...] = ()
    carried: tuple[str, ...] = ()
    """What surrounds the language model in a multimodal one, such as a vision tower. It is never
    mixed, and comes from the teacher wherever a recipe takes anything from it.
    """
    predicts_masked_tokens: bool = False
    """Whether the model is an encoder that predicts masked tokens, not the next token."""
    position_dependent_flags: tuple[str, ...] = ()
    """Config flags that make what a layer computes depend on its position. They must be off."""
    count_positions: Callable[[PreTrainedConfig], int] | None = None
    """Return the most tokens the model can read. None if positions are computed, not learned."""
    embeddings: tuple[str, ...] = ("model.embed_tokens",)
    """What the residual stream begins with: the embeddings of tokens and positions."""
    writers: tuple[str, ...] = WRITERS
    """Names of the modules, at any depth in a layer, that write to the residual stream: the last
    ones with parameters before it.
    """
    readers: tuple[str, ...] = ()
    """Names of those that read it without a norm before them."""
    norm_offset: float = 0.0
    """What norms add to their weight, if they are the writers."""
    takes_packed_rows: bool = True
    """Whether a 4-D attention mask and explicit position ids fully determine what each token sees,
    so that several continuations of one context can share a row.
    """
    masks_by_position: bool = True
    """Whether transformers masks attention between documents whose position ids start over. If not,
    the mask is made in `patching.running.documents`.
    """

    def source_of(self, name: str, recipe: Recipe) -> tuple[Parent, str]:
        """Return the parent of tensor `name` of an assembled model, and the name it has there."""
        position = self.layer_of(name)
        if position is not None:
            parent, layer_idx, _ = recipe.layers[position]
            rest = name.removeprefix(f"{self.layers}.{position}.")
            return parent, f"{self.layers}.{layer_idx}.{rest}"
        if name.startswith(tuple(f"{path}." for path in self.carried)):
            return ("teacher" if "teacher" in recipe.parents else "student"), name
        return (recipe.head if self.goes_with_head(name) else recipe.embedding), name

    def rescaling_of(self, name: str, recipe: Recipe) -> Rescaling | None:
        """Return how tensor `name` of an assembled model follows from its source, None for a tensor
        that is equal to it.
        """
        position = self.layer_of(name)
        if position is None:
            is_scaled = name.startswith(tuple(f"{path}." for path in self.embeddings))
            scale = recipe.embedding_scale if is_scaled else 1.0
            return None if scale == 1 else Rescaling(scale)
        scale = recipe.layers[position].scale
        if scale == 1:
            return None
        modules = set(name.removeprefix(f"{self.layers}.").split("."))
        if modules & set(self.writers):
            return Rescaling(scale, self.norm_offset)
        if modules & set(self.readers) and "bias" not in modules:
            return Rescaling(1 / scale)
        return None

    def layer_of(self, name: str) -> int | None:
        """Return the position of the layer a tensor belongs to, None for a tensor outside them."""
        if not name.startswith(f"{self.layers}."):
            return None
        return int(name.removeprefix(f"{self.layers}.").partition(".")[0])

    def goes_with_head(self, name: str) -> bool:
        """Return whether a tensor outside the layers comes from the parent of the last layer."""
        paths = (self.norm, *self.between_norm_and_head, self.head)
        return name.startswith(tuple(f"{path}." for path in paths if path is not None))


def _all_positions(config: PreTrainedConfig) -> int:
    return config.max_position_embeddings


def _positions_after_padding(config: PreTrainedConfig) -> int:
    """RoBERTa numbers positions from `pad_token_id + 1`."""
    return config.max_position_embeddings - config.pad_token_id - 1


LLAMA_LAYOUT = Architecture(layers="model.layers", norm="model.norm")
NORMS_AFTER = ("post_attention_layernorm", "post_feedforward_layernorm")
"""Norms between the projections of a layer and the residual stream."""
GEMMA_LAYOUT = replace(LLAMA_LAYOUT, writers=NORMS_AFTER, norm_offset=1.0)
OLMO_LAYOUT = replace(
    LLAMA_LAYOUT,
    writers=NORMS_AFTER,
    readers=("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"),
)
TEXT_TOWER = Architecture(
    layers="model.language_model.layers",
    norm="model.language_model.norm",
    takes_packed_rows=False,
    masks_by_position=False,
)
"""The language model of a multimodal one."""

ARCHITECTURES: dict[str, Architecture] = {
    "bert": Architecture(
        layers="bert.encoder.layer",
        norm=None,
        head="cls",
        predicts_masked_tokens=True,
        count_positions=_all_positions,
        masks_by_position=False,
    ),
    "gemma2": GEMMA_LAYOUT,
    "gemma3": replace(TEXT_TOWER, carried=("model.vision_tower", "model.multi_modal_projector")),
    "gemma3_text": GEMMA_LAYOUT,
    "gpt2": Architecture(
        layers="transformer.h",
        norm="transformer.ln_f",
        embeddings=("transformer.wte", "transformer.wpe"),
        position_dependent_flags=("scale_attn_by_inverse_layer_idx",),
        count_positions=_all_positions,
    ),
    "gpt_neox": Architecture(
        layers="gpt_neox.layers",
        norm="gpt_neox.final_layer_norm",
        embeddings=("gpt_neox.embed_in",),
    ),
    "granite": LLAMA_LAYOUT,
    "llama": LLAMA_LAYOUT,
    "mistral": LLAMA_LAYOUT,
    "mixtral": LLAMA_LAYOUT,
    "olmo2": OLMO_LAYOUT,
    "olmo3": OLMO_LAYOUT,
    "opt": Architecture(
        layers="model.decoder.layers",
        norm="model.decoder.final_layer_norm",
        between_norm_and_head=("model.decoder.project_out",),
        embeddings=("model.decoder.embed_tokens", "model.decoder.embed_positions"),
        count_positions=_all_positions,
        masks_by_position=False,
    ),
    "phi3": LLAMA_LAYOUT,
    "qwen2": LLAMA_LAYOUT,
    "qwen2_5_vl": replace(TEXT_TOWER, carried=("model.visual",)),
    "qwen2_vl": replace(TEXT_TOWER, carried=("model.visual",)),
    "qwen3": LLAMA_LAYOUT,
    "qwen3_moe": LLAMA_LAYOUT,
    "roberta": Architecture(
        layers="roberta.encoder.layer",
        norm=None,
        predicts_masked_tokens=True,
        count_positions=_positions_after_padding,
        masks_by_position=False,
    ),
    "smollm3": LLAMA_LAYOUT,
    "stablelm": LLAMA_LAYOUT,
}

PER_LAYER_LISTS = ("layer_types", "mlp_layer_types", "no_rope_layers")
"""Config fields with one entry per layer. An entry moves with its layer."""

SIZES_OF_EMBEDDINGS = ("type_vocab_size",)
"""Config fields that size a table which moves with the embedding. Parents may differ in them."""

LAYERS_THAT_SHARE = ("num_kv_shared_layers", "per_layer_config")
"""Config fields that tie a layer to other layers or to its position. They must not be set."""

MAY_DIFFER = frozenset(PreTrainedConfig().to_dict()) | {
    # The bookkeeping fields of every config, above. Below, fields that change neither the forward
    # pass in eval mode nor the shape of a layer.
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
    *SIZES_OF_EMBEDDINGS,
    # Fields that `config_for` computes for each recipe.
    "tie_word_embeddings",
    "max_window_layers",
    "mlp_only_layers",
    "decoder_sparse_step",
    *PER_LAYER_LISTS,
}
"""Config fields in which a student may differ from its teacher."""
