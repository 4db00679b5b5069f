"""Which kind of language model an architecture is: the one place that chooses the class to load or
build it with.
"""

from transformers import AutoModelForCausalLM, AutoModelForMaskedLM, PreTrainedConfig

MASKED_LANGUAGE_MODELS = frozenset({"bert", "distilbert", "roberta"})
"""Encoders by `config.model_type`: they predict masked tokens, where all others predict the
next.
"""


def predicts_masked_tokens(config: PreTrainedConfig) -> bool:
    return config.model_type in MASKED_LANGUAGE_MODELS


def auto_class(
    config: PreTrainedConfig,
) -> type[AutoModelForCausalLM] | type[AutoModelForMaskedLM]:
    """transformers' class for a config's language model."""
    return AutoModelForMaskedLM if predicts_masked_tokens(config) else AutoModelForCausalLM
