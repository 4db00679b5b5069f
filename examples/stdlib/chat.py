"""A small chat task, and a chat teacher of the demo's size.

    python -m examples.stdlib.chat data --save_directory chat_data
    python -m examples.stdlib.chat teacher --data chat_data --save_directory chat_teacher

`data` writes chats with exact answers, the text of the standard library, and lm-eval tasks over
strings, numbers and modules that are not in the chats (see `examples.stdlib.chat_data`). `teacher`
trains the shipped teacher on the chats, so that a base model and its chat variant exist. What
students of the two are like is measured in `examples.studies.chats`.
"""

import argparse
import json
from collections.abc import Iterator
from itertools import cycle, islice
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from examples.stdlib.chat_data import TEMPLATE, write_chats, write_tasks
from examples.stdlib.corpus import is_held_out, iter_modules, write_corpus
from examples.stdlib.demo import TEACHER
from examples.stdlib.tasks import write_tasks as write_text_tasks
from examples.stdlib.training import Batch, autocast, save, train
from patching.cli.command_line import run_command
from train.batches import collate
from train.chats.rows import rows_of_chats
from train.loss import CONTEXT, IGNORED_LABEL
from train.stream import Row

ROW_TOKENS = 256
NUM_CHATS, NUM_DOCUMENTS = 10_000, 40
TRAINING_SEED, TEST_SEED = 0, 1


def write_data(arguments: argparse.Namespace) -> None:
    folder = arguments.save_directory
    write_corpus(folder / "corpus")
    modules = list(iter_modules())
    held_out = [module for module in modules if is_held_out(module.name)]
    seen = [module for module in modules if not is_held_out(module.name)]
    write_chats(seen, folder / "chats.jsonl", arguments.num_chats, TRAINING_SEED)
    end_of_turn = AutoTokenizer.from_pretrained(TEACHER).eos_token
    tasks = folder / "tasks"
    write_tasks(held_out, tasks, TEST_SEED, arguments.num_documents, end_of_turn)
    write_text_tasks(held_out, tasks)
    print(f"{arguments.num_chats:,} chats, and tasks, in {folder}")


def train_teacher(arguments: argparse.Namespace) -> None:
    """Train on chats, and in every fourth step on text, so that the model keeps what it knows."""
    torch.manual_seed(arguments.seed)
    tokenizer = AutoTokenizer.from_pretrained(TEACHER)
    tokenizer.chat_template = TEMPLATE
    model = AutoModelForCausalLM.from_pretrained(
        TEACHER, dtype=torch.float32, attn_implementation="eager"
    )
    if arguments.random_initialization:
        model = AutoModelForCausalLM.from_config(
            model.config, dtype=torch.float32, attn_implementation="eager"
        )
    size = arguments.batch_size
    chats = [json.loads(line) for line in (arguments.data / "chats.jsonl").open()]
    columns = rows_of_chats(chats, tokenizer, ROW_TOKENS, "documents", CONTEXT).columns
    rows = [dict(zip(columns, values)) for values in zip(*columns.values())]
    run = train(
        model,
        labelled_loss,
        alternating(
            batches(rows, size, arguments.seed),
            batches(text_rows(arguments.data, tokenizer), size, arguments.seed),
        ),
        steps=arguments.steps,
        warmup_steps=max(1, arguments.steps // 20),
        muon_lr=arguments.muon_lr,
        adam_lr=arguments.adam_lr,
    )
    save(arguments.save_directory, model, tokenizer, vars(arguments) | {"run": None}, run)


def labelled_loss(
    model: PreTrainedModel, ids_BT: Tensor, positions_BT: Tensor, labels_BT: Tensor
) -> Tensor:
    """Mean cross entropy of the tokens that have a label, in nats."""
    with autocast():
        logits_BTV = model(input_ids=ids_BT, position_ids=positions_BT, use_cache=False).logits
    targets_BT = labels_BT[:, 1:].where(labels_BT[:, 1:] >= 0, IGNORED_LABEL)
    return nn.functional.cross_entropy(
        logits_BTV[:, :-1].float().flatten(0, 1), targets_BT.flatten(), ignore_index=IGNORED_LABEL
    )


def batches(rows: list[Row], size: int, seed: int) -> Iterator[Batch]:
    """Endless batches of one shape, in a new order on each pass."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        order = torch.randperm(len(rows), generator=generator).tolist()
        for start in range(0, len(rows) - size + 1, size):
            batch = collate([rows[i] for i in order[start : start + size]])
            padding = (0, ROW_TOKENS - batch["input_ids"].shape[1])
            names = {"input_ids": 0, "position_ids": 0, "labels": IGNORED_LABEL}
            yield tuple(
                nn.functional.pad(batch[name], padding, value=value)
                for name, value in names.items()
            )


def text_rows(data: Path, tokenizer) -> list[Row]:
    """Full rows of the standard library's text."""
    with (data / "corpus" / "train.jsonl").open() as file:
        texts = [json.loads(line)["text"] for line in islice(file, 400)]
    documents = tokenizer(texts, verbose=False)["input_ids"]
    ids = [token for document in documents for token in [*document, tokenizer.eos_token_id]]
    starts = range(0, len(ids) - ROW_TOKENS, ROW_TOKENS)
    return [
        {"input_ids": ids[start : start + ROW_TOKENS], "document_lengths": [ROW_TOKENS]}
        for start in starts
    ]


def alternating(chats: Iterator[Batch], text: Iterator[Batch]) -> Iterator[Batch]:
    for source in cycle((chats, chats, chats, text)):
        yield next(source)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(required=True)
    data = commands.add_parser("data")
    data.add_argument("--save_directory", type=Path, required=True)
    data.add_argument("--num_chats", type=int, default=NUM_CHATS)
    data.add_argument("--num_documents", type=int, default=NUM_DOCUMENTS, help="per task")
    data.set_defaults(run=write_data)
    teacher = commands.add_parser("teacher")
    teacher.add_argument("--data", type=Path, required=True)
    teacher.add_argument("--save_directory", type=Path, required=True)
    teacher.add_argument("--steps", type=int, default=200)
    teacher.add_argument("--batch_size", type=int, default=16, help="rows of 256 tokens per step")
    teacher.add_argument("--muon_lr", type=float, default=0.005)
    teacher.add_argument("--adam_lr", type=float, default=1e-3)
    teacher.add_argument("--seed", type=int, default=0)
    teacher.add_argument("--random_initialization", action="store_true")
    teacher.set_defaults(run=train_teacher)
    arguments = parser.parse_args(argv)
    arguments.run(arguments)


if __name__ == "__main__":
    run_command(main, "the same command starts again")
