"""Train the demo's teacher and its tokenizer on the standard library: what made
`examples/stdlib/teacher`.

    python -m examples.stdlib.train_teacher --save_directory my_teacher

A Qwen3 model small enough to ship and deep enough that its layers matter. Matrices learn by Muon,
the rest by AdamW, the learning rate falls linearly to zero. An hour or two on two CPU cores.
"""

import argparse
import json
import math
import time
from functools import partial
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from examples.stdlib.corpus import Module, is_held_out, iter_modules

END_OF_TEXT = "<|endoftext|>"
BLOCK_TOKENS = 512
SHORT_BLOCK_TOKENS = 256


def train_tokenizer(modules: list[Module], vocab_size: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE over the training modules; end of text is also the padding, as in Qwen3's base
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


def token_stream(modules: list[Module], tokenizer: PreTrainedTokenizerFast) -> list[torch.Tensor]:
    """Token ids of each module, end of text behind each."""
    ids = tokenizer([module.text for module in modules], return_attention_mask=False)["input_ids"]
    return [torch.tensor([*document, tokenizer.eos_token_id]) for document in ids]


def blocks(documents: list[torch.Tensor], generator: torch.Generator) -> torch.Tensor:
    """The documents in a new order, joined and cut into shuffled rows of BLOCK_TOKENS, shape (rows,
    BLOCK_TOKENS).
    """
    order = torch.randperm(len(documents), generator=generator).tolist()
    rows_RT = cut(torch.cat([documents[i] for i in order]))
    return rows_RT[torch.randperm(len(rows_RT), generator=generator)]


def cut(stream: torch.Tensor) -> torch.Tensor:
    """A stream of token ids as full rows of BLOCK_TOKENS, the remainder dropped."""
    return stream[: len(stream) // BLOCK_TOKENS * BLOCK_TOKENS].view(-1, BLOCK_TOKENS)


def new_teacher(tokenizer: PreTrainedTokenizerFast) -> Qwen3ForCausalLM:
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=12,
        num_attention_heads=3,
        num_key_value_heads=1,
        head_dim=64,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
        attn_implementation="eager",  # under torch.compile faster on CPU than its attention kernel
    )
    return Qwen3ForCausalLM(config)


@torch.no_grad()
def held_out_nats_per_token(model, documents: list[torch.Tensor]) -> float:
    """Mean cross entropy over consecutive blocks of the held-out modules, in nats per token."""
    batches = cut(torch.cat(documents)).split(16)
    total = sum(loss_of(model, batch).item() * len(batch) for batch in batches)
    return total / sum(len(batch) for batch in batches)


def loss_of(model, tokens_BT: torch.Tensor) -> torch.Tensor:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits_BTV = model(input_ids=tokens_BT, use_cache=False).logits
    return torch.nn.functional.cross_entropy(
        logits_BTV[:, :-1].float().flatten(0, 1), tokens_BT[:, 1:].flatten()
    )


def main(arguments: argparse.Namespace) -> None:
    torch.manual_seed(arguments.seed)
    generator = torch.Generator().manual_seed(arguments.seed)
    modules = list(iter_modules())
    train_modules = [module for module in modules if not is_held_out(module.name)]
    held_out_modules = [module for module in modules if is_held_out(module.name)]
    tokenizer = train_tokenizer(train_modules, vocab_size=4096)
    train_documents = token_stream(train_modules, tokenizer)
    held_out_documents = token_stream(held_out_modules, tokenizer)
    epoch_tokens = sum(len(document) for document in train_documents)
    bytes_per_token = sum(len(module.text.encode()) for module in held_out_modules) / sum(
        len(document) for document in held_out_documents
    )
    tokens_per_step = arguments.batch_size * BLOCK_TOKENS
    steps = math.ceil(arguments.tokens / tokens_per_step)
    print(
        f"{epoch_tokens} tokens an epoch, {bytes_per_token:.3f} bytes a token, {steps} steps",
        flush=True,
    )

    model = new_teacher(tokenizer)
    matrices = [p for p in model.model.layers.parameters() if p.ndim == 2]
    others = [p for p in model.parameters() if p.ndim != 2] + [model.model.embed_tokens.weight]
    optimizers = [
        torch.optim.Muon(matrices, lr=arguments.muon_lr, weight_decay=0.01),
        torch.optim.AdamW(others, lr=arguments.adam_lr, betas=(0.9, 0.95), weight_decay=0.0),
    ]
    warmup_steps = max(1, steps // 50)
    schedules = [
        torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: min((step + 1) / warmup_steps, 1 - step / steps)
        )
        for optimizer in optimizers
    ]
    compiled_loss = torch.compile(partial(loss_of, model), dynamic=False)

    batches, log, started = iter(()), [], time.time()
    for step in range(steps):
        batch = next(batches, None)
        if batch is None or len(batch) < arguments.batch_size:
            batches = iter(blocks(train_documents, generator).split(arguments.batch_size))
            batch = next(batches)
        if (
            step < steps * 3 // 4
        ):  # short rows cost less attention, long ones come in the last quarter
            batch = batch.view(-1, SHORT_BLOCK_TOKENS)
        loss = compiled_loss(batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer, schedule in zip(optimizers, schedules):
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
        if step % 25 == 0:
            speed = (step + 1) * tokens_per_step / (time.time() - started)
            log.append({"step": step, "loss": round(loss.item(), 4)})
            print(f"step {step}/{steps} loss {loss.item():.3f} {speed:.0f} tokens/s", flush=True)
        if step % 500 == 499:
            print(f"held-out {held_out_nats_per_token(model, held_out_documents):.4f}", flush=True)

    model = model.to(torch.bfloat16)
    held_out = held_out_nats_per_token(model, held_out_documents)
    bits_per_byte = held_out / math.log(2) / bytes_per_token
    print(f"held-out {held_out:.4f} nats per token, {bits_per_byte:.4f} bits per byte")
    model.save_pretrained(arguments.save_directory)
    tokenizer.save_pretrained(arguments.save_directory)
    record = {
        "arguments": {k: str(v) for k, v in vars(arguments).items()},
        "torch": torch.__version__,
        "epoch_tokens": epoch_tokens,
        "trained_tokens": steps * tokens_per_step,
        "seconds": round(time.time() - started),
        "held_out_nats_per_token": held_out,
        "held_out_bits_per_byte": bits_per_byte,
        "log": log,
    }
    (arguments.save_directory / "training.json").write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--save_directory", type=Path, required=True)
    parser.add_argument("--tokens", type=float, default=16e6, help="training tokens in all")
    parser.add_argument("--batch_size", type=int, default=8, help="blocks of 512 tokens in a step")
    parser.add_argument("--muon_lr", type=float, default=0.02)
    parser.add_argument("--adam_lr", type=float, default=4e-3)
    parser.add_argument("--seed", type=int, default=0)
    main(parser.parse_args())
