"""Chat models of the demo's size: a small chat task, a chat teacher, and a study of their students.

    python -m examples.stdlib.chat data --save_directory chat_data
    python -m examples.stdlib.chat teacher --data chat_data --save_directory chat_teacher
    python -m examples.stdlib.chat study --data chat_data --chat_teacher chat_teacher \\
        --save_directory chat_study --seeds 0,1,2

`data` writes chats with exact answers, the text of the standard library, and lm-eval tasks over
modules, words and numbers that are not in the chats (see `examples.stdlib.chat_data`). `teacher`
trains the shipped teacher on the chats, so that a base model and its chat variant exist.

`study` compares students of the chat teacher: distilled on text and then chats, on text alone, on
chats alone, and a base student moved to the chat teacher by `train.weight_delta`, or not moved at
all. Every size of each is evaluated on the chat tasks, through the template, and on held-out text.
A third teacher, trained on the chats from random weights, is what weight deltas refuse.
"""

import argparse
import json
from collections.abc import Iterator
from itertools import cycle, islice
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from examples.stdlib.chat_data import TASK_NAMES, TEMPLATE, write_chats, write_tasks
from examples.stdlib.corpus import is_held_out, iter_modules, write_corpus
from examples.stdlib.demo import DISTILLATION, TEACHER, run
from examples.stdlib.tasks import write_tasks as write_text_tasks
from examples.stdlib.training import Batch, save, train
from train.batches import collate
from train.chats.rows import rows_of_chats
from train.loss import CONTEXT, IGNORED_LABEL
from train.stream import Row

ROW_TOKENS = 256
NUM_CHATS, NUM_DOCUMENTS = 30_000, 200
TRAINING_SEED, TEST_SEED = 0, 1
TEXT_TASK = "stdlib_bits_per_byte"


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
    with torch.autocast("cpu", dtype=torch.bfloat16):
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


def study(arguments: argparse.Namespace) -> None:
    """Distill and evaluate everything, for each seed, and print the scores by size."""
    data, chat = arguments.data.resolve(), arguments.chat_teacher.resolve()
    folder = arguments.save_directory.resolve()
    other = folder / "other_teacher"
    if not other.exists():
        run(
            *("examples.stdlib.chat", "teacher", "--data", data, "--save_directory", other),
            *("--steps", arguments.steps, "--random_initialization"),
        )
    for seed in arguments.seeds:
        of_seed = folder / f"seed_{seed}"
        distill = {"data": data, "steps": arguments.steps, "seed": seed}
        students = {
            "two_phases": distilled(of_seed / "two_phases", chat, sft_share=0.5, **distill),
            "text_alone": distilled(of_seed / "text_alone", chat, **distill),
            "chats_alone": distilled(of_seed / "chats_alone", chat, sft_share=1.0, **distill),
            "base_student": distilled(of_seed / "base_student", TEACHER, **distill),
        }
        moved = of_seed / "weight_delta"
        if not moved.exists():
            run(*weight_delta(students["base_student"], chat, moved))
        students["weight_delta"] = moved
        for name, student in students.items():
            evaluated(of_seed / f"results_{name}", chat, student, data)
        refused = of_seed / "weight_delta_other"
        if not refused.exists():
            run(*weight_delta(students["base_student"], other, refused, "--min_cosine", "-1"))
        evaluated(of_seed / "results_weight_delta_other", other, refused, data)
    print(table_of(folder, arguments.seeds))


def weight_delta(student: Path, teacher: Path, folder: Path, *flags: str) -> tuple[object, ...]:
    return (
        *("train.weight_delta", "--student", student, "--teacher_from", TEACHER),
        *("--teacher_to", teacher, "--save_directory", folder, *flags),
    )


def distilled(
    folder: Path, teacher: Path, data: Path, steps: int, seed: int, sft_share: float | None = None
) -> Path:
    """Return a student's folder, distilled unless it is there already."""
    settings = DISTILLATION | {
        "teacher_model_name_or_path": teacher,
        "save_directory": folder,
        "dataset": data / "corpus" / "train.jsonl",
        "max_steps": steps,
        "seed": seed,
        "measure_order": False,
    }
    if sft_share is not None:
        settings |= {"sft_dataset": data / "chats.jsonl", "sft_share": sft_share}
    if not (folder / "config.json").exists():
        del settings["per_device_eval_batch_size"]  # nothing is held out of the text
        words = [part for name, value in settings.items() for part in (f"--{name}", value)]
        run("train.train", *words, "--heldout_documents", 0)
    return folder


def evaluated(folder: Path, teacher: Path, student: Path, data: Path) -> None:
    """Evaluate all sizes on chats through the template, and on text without it."""
    common = (
        *("evaluate.evaluate", "--teacher_model_name_or_path", teacher),
        *("--student_model_name_or_path", student, "--num_layers_to_patch", "all"),
        *("--include_path", data / "tasks", "--eval_batch_size", 16),
    )
    chat_flags = ("--apply_chat_template", "--system_instruction", "Answer with the result alone.")
    run(*common, "--save_directory", folder, "--tasks", ",".join(TASK_NAMES), *chat_flags)
    run(*common, "--save_directory", folder.with_name(f"{folder.name}_text"), "--tasks", TEXT_TASK)


def table_of(folder: Path, seeds: list[int]) -> str:
    """Return mean exact match over the chat tasks, and bits per byte, by student and size."""
    lines = ["seed  student             k  exact match  bits per byte  failed answers"]
    for seed in seeds:
        for path in sorted((folder / f"seed_{seed}").glob("results_*/family_k*.json")):
            if path.parent.name.endswith("_text"):
                continue
            found = json.loads(path.read_text())
            text_path = path.parent.with_name(f"{path.parent.name}_text") / path.name
            text = json.loads(text_path.read_text())["results"][TEXT_TASK]["bits_per_byte,none"]
            scores = [found["results"][task]["exact_match,none"] for task in TASK_NAMES]
            failures = found["generation_failures"].values()
            failed = sum(of["failed"] for of in failures) / sum(of["answers"] for of in failures)
            name = path.parent.name.removeprefix("results_")
            lines.append(
                f"{seed:4}  {name:18} {found['num_layers_to_patch']:2}  "
                f"{sum(scores) / len(scores):11.3f}  {text:13.3f}  {failed:14.1%}"
            )
    return "\n".join(lines)


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
    teacher.add_argument("--steps", type=int, default=600)
    teacher.add_argument("--batch_size", type=int, default=16, help="rows of 256 tokens per step")
    teacher.add_argument("--muon_lr", type=float, default=0.005)
    teacher.add_argument("--adam_lr", type=float, default=1e-3)
    teacher.add_argument("--seed", type=int, default=0)
    teacher.add_argument("--random_initialization", action="store_true")
    teacher.set_defaults(run=train_teacher)
    chosen = commands.add_parser("study")
    chosen.add_argument("--data", type=Path, required=True)
    chosen.add_argument("--chat_teacher", type=Path, required=True)
    chosen.add_argument("--save_directory", type=Path, required=True)
    chosen.add_argument("--steps", type=int, default=240)
    chosen.add_argument(
        "--seeds", type=lambda text: [int(seed) for seed in text.split(",")], default=[0, 1, 2]
    )
    chosen.set_defaults(run=study)
    arguments = parser.parse_args(argv)
    arguments.run(arguments)


if __name__ == "__main__":
    main()
