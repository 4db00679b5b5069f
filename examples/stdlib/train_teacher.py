"""Train the demo's teacher and its tokenizer on the standard library.

    python -m examples.stdlib.train_teacher --save_directory my_teacher

This is how `examples/stdlib/teacher` was made. The model is a Qwen3, small enough to ship and deep
enough for its layers to matter. Training takes an hour or two on two CPU cores.

Shapes: R rows, B rows of a batch, T positions.
"""

import argparse
import math
from collections.abc import Iterator
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from examples.stdlib.corpus import Module, is_held_out, iter_modules
from examples.stdlib.training import Batch, held_out_loss, next_token_loss, save, train
from patching.cli.command_line import run_command

END_OF_TEXT = "<|endoftext|>"
BLOCK_TOKENS = 512
SHORT_BLOCK_TOKENS = 256


def train_tokenizer(modules: list[Module], vocab_size: int) -> PreTrainedTokenizerFast:
    """Train byte-level BPE on the modules. The end-of-text token also pads, as in Qwen3's base
    models.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((module.text for module in modules), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END_OF_TEXT,
        pad_token=END_OF_TEXT,
        model_max_length=BLOCK_TOKENS,
        clean_up_tokenization_spaces=False,
    )


def tokenize(modules: list[Module], tokenizer: PreTrainedTokenizerFast) -> list[Tensor]:
    """The token ids of each module, followed by end of text."""
    ids = tokenizer([module.text for module in modules], return_attention_mask=False)["input_ids"]
    return [torch.tensor([*document, tokenizer.eos_token_id]) for document in ids]


def cut_into_rows(documents: list[Tensor], row_tokens: int = BLOCK_TOKENS) -> Tensor:
    """Join the documents and cut them into full rows, shape (R, T). The remainder is dropped."""
    stream = torch.cat(documents)
    return stream[: len(stream) // row_tokens * row_tokens].view(-1, row_tokens)


def shuffled_rows(documents: list[Tensor], generator: torch.Generator) -> Tensor:
    """Shuffle the documents, cut them into rows and shuffle the rows, shape (R, T)."""
    order = torch.randperm(len(documents), generator=generator).tolist()
    rows_RT = cut_into_rows([documents[i] for i in order])
    return rows_RT[torch.randperm(len(rows_RT), generator=generator)]


def training_batches(
    documents: list[Tensor], rows_per_batch: int, steps: int, generator: torch.Generator
) -> Iterator[Batch]:
    """Full batches of rows, epoch after epoch.

    Rows are cut in half for the first three quarters of the steps, because shorter rows cost less
    attention.
    """
    step = 0
    while True:
        for batch_BT in shuffled_rows(documents, generator).split(rows_per_batch):
            if len(batch_BT) == rows_per_batch:
                is_short = step < steps * 3 // 4
                yield (batch_BT.view(-1, SHORT_BLOCK_TOKENS) if is_short else batch_BT,)
                step += 1


def new_teacher(tokenizer: PreTrainedTokenizerFast) -> Qwen3ForCausalLM:
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=12,
        num_attention_heads=3,
        num_key_value_heads=1,
        head_dim=64,
        max_position_embeddings=BLOCK_TOKENS,
        tie_word_embeddings=True,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
        attn_implementation="eager",  # faster on CPU under torch.compile than its attention kernel
    )
    return Qwen3ForCausalLM(config)


def main(arguments: argparse.Namespace) -> None:
    torch.manual_seed(arguments.seed)
    generator = torch.Generator().manual_seed(arguments.seed)
    modules = list(iter_modules())
    train_modules = [module for module in modules if not is_held_out(module.name)]
    held_out_modules = [module for module in modules if is_held_out(module.name)]
    tokenizer = train_tokenizer(train_modules, vocab_size=4096)
    train_documents = tokenize(train_modules, tokenizer)
    held_out_documents = tokenize(held_out_modules, tokenizer)
    epoch_tokens = sum(map(len, train_documents))
    held_out_bytes = sum(len(module.text.encode()) for module in held_out_modules)
    bytes_per_token = held_out_bytes / sum(map(len, held_out_documents))
    steps = math.ceil(arguments.tokens / (arguments.batch_size * BLOCK_TOKENS))
    print(
        f"{epoch_tokens} tokens per epoch, {bytes_per_token:.3f} bytes per token, {steps} steps",
        flush=True,
    )
    model = new_teacher(tokenizer)
    held_out = [(rows_BT,) for rows_BT in cut_into_rows(held_out_documents).split(16)]
    run = train(
        model,
        next_token_loss,
        training_batches(train_documents, arguments.batch_size, steps, generator),
        steps=steps,
        warmup_steps=max(1, steps // 50),
        muon_lr=arguments.muon_lr,
        adam_lr=arguments.adam_lr,
        held_out=held_out,
    )
    nats = held_out_loss(model, next_token_loss, held_out)
    measured = {
        "epoch_tokens": epoch_tokens,
        "held_out_nats_per_token": nats,
        "held_out_bits_per_byte": nats / math.log(2) / bytes_per_token,
    }
    print(measured)
    save(arguments.save_directory, model, tokenizer, vars(arguments), run, **measured)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--save_directory", type=Path, required=True)
    parser.add_argument("--tokens", type=float, default=16e6, help="tokens to train on, in total")
    parser.add_argument("--batch_size", type=int, default=8, help="rows of 512 tokens per step")
    parser.add_argument("--muon_lr", type=float, default=0.02)
    parser.add_argument("--adam_lr", type=float, default=4e-3)
    parser.add_argument("--seed", type=int, default=0)
    run_command(lambda: main(parser.parse_args()), "the same command starts again")
