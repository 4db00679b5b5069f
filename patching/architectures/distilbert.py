"""Convert a DistilBERT to the equivalent BERT with fewer layers, so that no other code treats it
specially.

Its tensors are BERT's under other names. It has no token types (a table of zeros adds nothing) and
no pooler (nor has BERT's masked language model).
"""

import torch
from accelerate import init_empty_weights
from transformers import (
    BertConfig,
    BertForMaskedLM,
    DistilBertForMaskedLM,
    PreTrainedConfig,
    PreTrainedModel,
)

CONFIG_FIELDS = {
    "vocab_size": "vocab_size",
    "max_position_embeddings": "max_position_embeddings",
    "hidden_size": "dim",
    "num_hidden_layers": "n_layers",
    "num_attention_heads": "n_heads",
    "intermediate_size": "hidden_dim",
    "hidden_act": "activation",
    "hidden_dropout_prob": "dropout",
    "attention_probs_dropout_prob": "attention_dropout",
    "initializer_range": "initializer_range",
    "pad_token_id": "pad_token_id",
    "bos_token_id": "bos_token_id",
    "eos_token_id": "eos_token_id",
    "tie_word_embeddings": "tie_word_embeddings",
    "chunk_size_feed_forward": "chunk_size_feed_forward",
    "dtype": "dtype",
}
"""BERT's config fields and DistilBERT's names for them."""

LAYER_NORM_EPS = 1e-12
"""A constant in DistilBERT's code, not in its config."""

NAMES = {
    "bert.embeddings.": "distilbert.embeddings.",
    "bert.encoder.layer.": "distilbert.transformer.layer.",
    ".attention.self.query.": ".attention.q_lin.",
    ".attention.self.key.": ".attention.k_lin.",
    ".attention.self.value.": ".attention.v_lin.",
    ".attention.output.dense.": ".attention.out_lin.",
    ".attention.output.LayerNorm.": ".sa_layer_norm.",
    ".intermediate.dense.": ".ffn.lin1.",
    ".output.dense.": ".ffn.lin2.",
    ".output.LayerNorm.": ".output_layer_norm.",
    "cls.predictions.transform.dense.": "vocab_transform.",
    "cls.predictions.transform.LayerNorm.": "vocab_layer_norm.",
    "cls.predictions.decoder.": "vocab_projector.",
}
"""Parts of BERT's tensor names and DistilBERT's names for them, replaced in this sequence."""

TOKEN_TYPES = "bert.embeddings.token_type_embeddings.weight"
UNUSED_BIAS = "cls.predictions.bias"
"""BERT's second name for the decoder's bias. DistilBERT has only one."""


def distilbert_name(name: str) -> str:
    """Return DistilBERT's name for the tensor that BERT calls `name`."""
    for bert, distilbert in NAMES.items():
        name = name.replace(bert, distilbert)
    return name


def as_bert_config(config: PreTrainedConfig) -> PreTrainedConfig:
    """Return the config of the equivalent BERT. Any other config is returned unchanged."""
    if config.model_type != "distilbert":
        return config
    return BertConfig(
        **{bert: getattr(config, distilbert) for bert, distilbert in CONFIG_FIELDS.items()},
        layer_norm_eps=LAYER_NORM_EPS,
        name_or_path=config.name_or_path,
    )


def as_bert(model: PreTrainedModel) -> PreTrainedModel:
    """Return the equivalent BERT. Any other model is returned unchanged.

    The BERT shares the model's tensors and gives exactly the same logits.

    Raises ValueError if a DistilBERT has no masked language modeling head.
    """
    if model.config.model_type != "distilbert":
        return model
    if not isinstance(model, DistilBertForMaskedLM):
        raise ValueError(
            f"a {type(model).__name__} has no masked language modeling head: load it with "
            "AutoModelForMaskedLM"
        )
    config = as_bert_config(model.config)
    config._attn_implementation = model.config._attn_implementation
    with init_empty_weights(include_buffers=False):  # position ids are in no state dict
        bert = BertForMaskedLM(config)
    tensors = model.state_dict()
    state = {}
    for name, empty in bert.state_dict().items():
        if name == TOKEN_TYPES:
            state[name] = torch.zeros(empty.shape, dtype=model.dtype, device=model.device)
        elif name == UNUSED_BIAS:
            state[name] = tensors["vocab_projector.bias"]
            if not config.tie_word_embeddings:
                # Names that share a tensor are saved as one, and loading would lack the other.
                state[name] = state[name].clone()
        else:
            state[name] = tensors[distilbert_name(name)]
    bert.load_state_dict(state, assign=True)
    bert.tie_weights()
    return bert.to(model.device).train(model.training)
