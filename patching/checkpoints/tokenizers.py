"""Read the tokenizer that comes with a model."""

from typing import Any

from transformers import AutoTokenizer, PreTrainedConfig, PreTrainedTokenizerBase

from patching.recipe import Reference


def read_tokenizer(
    reference: Reference,
    config: PreTrainedConfig,
    trust_remote_code: bool = False,
    **settings: Any,
) -> PreTrainedTokenizerBase:
    """Return the tokenizer of a model with this config. `settings` are those of `from_pretrained`.

    Raises ValueError if it cannot be read, or has more tokens than the model has embeddings.
    """
    name, revision = reference
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            name, revision=revision, trust_remote_code=trust_remote_code, **settings
        )
    except Exception as error:  # the tokenizers library raises Exception itself
        raise ValueError(
            f"the tokenizer of {name} cannot be read ({error}): download or save its files again"
        ) from error
    if tokenizer.vocab_size <= len(tokenizer.all_special_tokens):
        # transformers makes an empty tokenizer for a folder without files of one.
        raise ValueError(
            f"the tokenizer of {name} cannot be read: there is no text among its tokens; put its "
            "files (tokenizer.json) next to the weights"
        )
    vocab_size = config.get_text_config().vocab_size
    # Added tokens may lie beyond the embeddings of models that never see them.
    num_tokens = max(tokenizer.vocab_size, 1 + (tokenizer.eos_token_id or 0))
    if num_tokens > vocab_size:
        raise ValueError(
            f"the tokenizer of {name} has {num_tokens} tokens and the model's vocabulary has "
            f"{vocab_size}: put the tokenizer that it was trained with next to its weights"
        )
    return tokenizer
