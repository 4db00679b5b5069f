"""What the architectures differ in: where a model keeps its parts, and what its config says layer
by layer.

One table row per `config.model_type`; nothing is ever decided by a model's name or path. An
architecture without a row works where transformers itself says all that a row would.
"""

from collections.abc import Callable
from dataclasses import dataclass

from transformers import PreTrainedConfig

from patching.recipe import Parent, Recipe


@dataclass(frozen=True)
class Architecture:
    """Module paths inside a language model; all that is not named here goes with the embedding."""

    layers: str
    norm: str | None
    """Behind the last layer; None where each layer ends with a norm of its own."""
    head: str = "lm_head"
    """All that makes logits of the last hidden state: more than a projection in an encoder."""
    between_norm_and_head: tuple[str, ...] = ()
    position_dependent_flags: tuple[str, ...] = ()
    """Config flags that make a layer's arithmetic depend on its position: refused when set."""
    count_positions: Callable[[PreTrainedConfig], int] | None = None
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


def _positions_after_padding(config: PreTrainedConfig) -> int:
    """RoBERTa's first token has the position behind that of the padding token."""
    return config.max_position_embeddings - config.pad_token_id - 1


LLAMA_LAYOUT = Architecture(layers="model.layers", norm="model.norm")

ARCHITECTURES: dict[str, Architecture] = {
    "bert": Architecture(
        layers="bert.encoder.layer", norm=None, head="cls", count_positions=_all_positions
    ),
    "gemma2": LLAMA_LAYOUT,
    "gemma3_text": LLAMA_LAYOUT,
    "gpt2": Architecture(
        layers="transformer.h",
        norm="transformer.ln_f",
        position_dependent_flags=("scale_attn_by_inverse_layer_idx",),
        count_positions=_all_positions,
    ),
    "gpt_neox": Architecture(layers="gpt_neox.layers", norm="gpt_neox.final_layer_norm"),
    "granite": LLAMA_LAYOUT,
    "llama": LLAMA_LAYOUT,
    "mistral": LLAMA_LAYOUT,
    "mixtral": LLAMA_LAYOUT,
    "olmo2": LLAMA_LAYOUT,
    "olmo3": LLAMA_LAYOUT,
    "opt": Architecture(
        layers="model.decoder.layers",
        norm="model.decoder.final_layer_norm",
        between_norm_and_head=("model.decoder.project_out",),
        count_positions=_all_positions,
    ),
    "phi3": LLAMA_LAYOUT,
    "qwen2": LLAMA_LAYOUT,
    "qwen3": LLAMA_LAYOUT,
    "qwen3_moe": LLAMA_LAYOUT,
    "roberta": Architecture(
        layers="roberta.encoder.layer", norm=None, count_positions=_positions_after_padding
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
