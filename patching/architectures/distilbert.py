"""A DistilBERT read as what it is, a BERT of fewer layers, so that it needs no code anywhere else.

Its tensors are BERT's under other names. It has no token types (a table of zeros adds nothing), and
no pooler, which BERT's masked language model does not have either.
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
"""BERT's names of what DistilBERT's config says."""

LAYER_NORM_EPS = 1e-12
"""Not in DistilBERT's config: its code has this number."""

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
"""Parts of BERT's names of tensors and DistilBERT's for them; where several stand in a name, the
earlier ones here are replaced first.
"""

TOKEN_TYPES = "bert.embeddings.token_type_embeddings.weight"
UNUSED_BIAS = "cls.predictions.bias"
"""In a BERT a second name of the decoder's bias, which is all that DistilBERT has."""


def distilbert_name(name: str) -> str:
    """DistilBERT's name of a tensor that BERT calls `name`."""
    for bert, distilbert in NAMES.items():
        name = name.replace(bert, distilbert)
    return name


def as_bert_config(config: PreTrainedConfig) -> PreTrainedConfig:
    """The config of the same model as a BERT; any other architecture's as it is."""
    if config.model_type != "distilbert":
        return config
    return BertConfig(
        **{bert: getattr(config, distilbert) for bert, distilbert in CONFIG_FIELDS.items()},
        layer_norm_eps=LAYER_NORM_EPS,
        name_or_path=config.name_or_path,
    )


def as_bert(model: PreTrainedModel) -> PreTrainedModel:
    """The same model as a BERT that shares its tensors; any other architecture's as it is.

    Its logits are DistilBERT's, to the last bit. Raises ValueError for a DistilBERT without its
    masked language modelling head.
    """
    if model.config.model_type != "distilbert":
        return model
    if not isinstance(model, DistilBertForMaskedLM):
        raise ValueError(
            f"a {type(model).__name__} has no masked language modelling head: load it with "
            "AutoModelForMaskedLM"
        )
    config = as_bert_config(model.config)
    config._attn_implementation = model.config._attn_implementation
    with init_empty_weights(include_buffers=False):  # positions are in no state dict
        bert = BertForMaskedLM(config)
    tensors = model.state_dict()
    state = {}
    for name, empty in bert.state_dict().items():
        if name == TOKEN_TYPES:
            state[name] = torch.zeros(empty.shape, dtype=model.dtype, device=model.device)
        elif name == UNUSED_BIAS:
            state[name] = tensors["vocab_projector.bias"]
            if not config.tie_word_embeddings:
                # Two tensors that are one would be stored as one, and read back as one too few.
                state[name] = state[name].clone()
        else:
            state[name] = tensors[distilbert_name(name)]
    bert.load_state_dict(state, assign=True)
    bert.tie_weights()
    return bert.to(model.device).train(model.training)
