"""Run a teacher over a text and keep its predictions."""

from collections.abc import Iterator
from contextlib import nullcontext
from itertools import chain, islice

import torch
from tqdm import tqdm
from transformers import PreTrainedConfig, PreTrainedModel

from patching.architectures.models import load_model, predicts_masked_tokens
from patching.checkpoints.tokenizers import read_tokenizer
from patching.cli.command_line import user_errors
from patching.devices import usable_device, warn_if_slow
from patching.files.columns import UnusableText
from patching.recipe import Reference
from patching.running.hidden_states import hidden_states_at
from patching.running.logits import LogitChange
from train.batches import collate, to_device
from train.cache_teacher import CacheArguments
from train.data import Rows, load_rows
from train.data_args import DataArguments
from train.loss import IGNORED_LABEL
from train.packing import check_attention
from train.run import read_teacher_config
from train.speed import reuse_freed_memory
from train.stream import TextChanged
from train.student import cast_parameters
from train.teacher_cache import CacheWriter, key_of_row, origin_of_rows, settings_of, top_tokens


def run(arguments: CacheArguments, data_args: DataArguments) -> None:
    """Write the cache. What a user can get wrong ends the process before weights load."""
    reference = Reference(arguments.teacher_model_name_or_path, arguments.revision)
    with user_errors():
        config, change = read_teacher_config(arguments, data_args.max_length)
        check_can_be_cached(config, arguments.top_k)
        tokenizer = read_tokenizer(reference, config, arguments.trust_remote_code)
        made_by = settings_of(reference, config, tokenizer, arguments.temperature)
        made_by["top_k"] = arguments.top_k
        origin = origin_of_rows(data_args, arguments.seed)
        writer = CacheWriter(arguments.teacher_cache, made_by, origin)
        rows = load_rows(data_args, tokenizer, arguments.seed, data_args.num_set_aside)
        if rows.is_stream and arguments.max_rows is None:
            raise ValueError(
                "max_rows: a stream has no end, give as many rows as the run will read"
            )
        if rows.is_stream:
            rows.train.check(1)
        device = usable_device(None)
        check_attention(arguments.attn_implementation, config, data_args.packing, device)
        dtype = torch.bfloat16 if arguments.bf16 else torch.float32
        warn_if_slow(device, dtype, "--bf16 False")
        teacher = load_model(
            reference, "auto", arguments.trust_remote_code, arguments.attn_implementation
        )
        writer.begin()
    if device.type == "cpu":
        reuse_freed_memory()
    cast_parameters(teacher, dtype)
    num_before = len(writer.rows)
    teacher.to(device).eval()
    missing = missing_rows(rows, writer, arguments.max_rows)
    unusable = (TextChanged, UnusableText, FloatingPointError)
    with user_errors(unusable), tqdm(unit=" rows") as progress:
        while batch := list(islice(missing, arguments.batch_size)):
            add_rows(writer, teacher, change, batch, arguments)
            progress.update(len(batch))
    writer.finish(arguments.max_rows)
    num_rows = len(writer.rows)
    print(f"{num_rows:,} rows in {arguments.teacher_cache}, {num_rows - num_before:,} of them new")


def check_can_be_cached(config: PreTrainedConfig, top_k: int) -> None:
    """Raise ValueError for a masked language model, or for more tokens than there are."""
    if predicts_masked_tokens(config):
        raise ValueError(
            f"teacher_cache: a {config.model_type} model hides other tokens at every step, so its "
            "predictions cannot be kept"
        )
    if top_k > config.vocab_size:
        raise ValueError(f"top_k={top_k}: the vocabulary has {config.vocab_size} tokens")


def missing_rows(
    rows: Rows, writer: CacheWriter, max_rows: int | None
) -> Iterator[dict[str, list[int]]]:
    """Yield the held-out rows, and up to `max_rows` to train on, that are not in the cache."""
    for row in chain(rows.held_out or (), islice(rows.train, max_rows)):
        if key_of_row(row) not in writer.rows:
            yield row


def add_rows(
    writer: CacheWriter,
    teacher: PreTrainedModel,
    change: LogitChange,
    rows: list[dict[str, list[int]]],
    arguments: CacheArguments,
) -> None:
    """Run the teacher on some rows and add its predictions."""
    batch = to_device(collate(rows), teacher.device)
    autocast = torch.autocast(teacher.device.type, torch.bfloat16) if arguments.bf16 else None
    with torch.no_grad(), autocast or nullcontext():
        (hidden_BTD,) = hidden_states_at(
            teacher,
            [teacher.config.num_hidden_layers],
            batch["input_ids"],
            batch.get("attention_mask"),
            batch.get("position_ids"),
            batch.get("num_documents"),
        )
        head = teacher.get_output_embeddings()
        for row, labels_T, hidden_TD in zip(rows, batch["labels"], hidden_BTD):
            hidden_ND = hidden_TD[labels_T != IGNORED_LABEL]
            top = top_tokens(hidden_ND, head, change, arguments.top_k, arguments.temperature)
            if top.log_q.isnan().any():
                raise FloatingPointError(
                    "the teacher's predictions are not finite: check its weights, or try "
                    "--bf16 False"
                )
            writer.add(key_of_row(row), top)
