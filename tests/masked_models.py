"""Small random encoders, a tokenizer for them, and texts."""

import random
from collections.abc import Iterable

import torch
from conftest import tiny_model
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    BertConfig,
    DistilBertConfig,
    DistilBertForMaskedLM,
    PreTrainedConfig,
    PreTrainedTokenizerFast,
    RobertaConfig,
)

WORDS = [f"w{i}" for i in range(40)]
SPECIAL_TOKENS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
VOCAB_SIZE = len(SPECIAL_TOKENS) + len(WORDS)
NUM_POSITIONS = 24
SHAPE = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "pad_token_id": 0,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}


def word_tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer with one token per word and BERT's special tokens around a text."""
    vocab = {word: i for i, word in enumerate([*SPECIAL_TOKENS, *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        special_tokens=[(token, vocab[token]) for token in ("[CLS]", "[SEP]")],
    )
    names = ("pad_token", "unk_token", "cls_token", "sep_token", "mask_token")
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, **dict(zip(names, SPECIAL_TOKENS)), model_max_length=100
    )


def encoder_config(model_type: str, num_layers: int, tied: bool = True) -> PreTrainedConfig:
    depth = {"num_hidden_layers": num_layers, "tie_word_embeddings": tied}
    if model_type == "roberta":
        return RobertaConfig(max_position_embeddings=NUM_POSITIONS + 1, **SHAPE, **depth)
    return BertConfig(max_position_embeddings=NUM_POSITIONS, **SHAPE, **depth)


def tiny_distilbert(num_layers: int, tied: bool = True, seed: int = 0) -> DistilBertForMaskedLM:
    config = DistilBertConfig(
        vocab_size=VOCAB_SIZE,
        dim=32,
        n_heads=4,
        hidden_dim=48,
        n_layers=num_layers,
        max_position_embeddings=NUM_POSITIONS,
        dropout=0.0,
        attention_dropout=0.0,
        tie_word_embeddings=tied,
    )
    return tiny_model(config, seed)


def texts_of(lengths: Iterable[int], seed: int = 0) -> list[str]:
    """Return random texts with the given numbers of words."""
    draw = random.Random(seed)
    return [" ".join(draw.choice(WORDS) for _ in range(length)) for length in lengths]


def ids_and_mask() -> tuple[torch.Tensor, torch.Tensor]:
    """Return two rows of random tokens, the second one padded, and their mask."""
    generator = torch.Generator().manual_seed(0)
    ids_BT = torch.randint(5, VOCAB_SIZE, (2, 11), generator=generator)
    mask_BT = torch.ones_like(ids_BT)
    mask_BT[1, 7:] = 0
    return ids_BT, mask_BT
