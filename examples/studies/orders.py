"""Compare patch orders on small trained pairs: how good each one is, and how far from the best.

    python -m examples.studies.orders train llama --folder F     # train teacher and student
    python -m examples.studies.orders compare llama --folder F   # orders, on two samples of text
    python -m examples.studies.orders kept llama --folder F      # default or chosen kept layers

`llama` is trained on the standard library and keeps a Llama's default layers. `gpt_neox` is trained
on WikiText-2 (from the folder in BOOMERANG_DATA) and keeps every third layer. `demo` is the shipped
teacher with a new student. All teachers have 12 layers. Training, calibration and evaluation use
different documents.
"""

import argparse
import json
import math
import random
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from lm_eval.api.instance import Instance
from transformers import (
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from evaluate.family import FamilyLM
from examples.commands import run
from examples.smollm2.text import data_folder
from examples.stdlib.corpus import Module, is_held_out, iter_modules
from examples.stdlib.demo import DISTILLATION, TEACHER, as_flags
from examples.stdlib.train_teacher import cut_into_rows, tokenize, train_tokenizer
from examples.stdlib.training import Batch, next_token_loss, save, train
from examples.studies.record import keep_settings
from patching.blocks import as_layer_list
from patching.cli.command_line import run_command, user_errors
from patching.family import Family
from patching.files.texts import BLANK_LINES
from patching.running.prefix_tree import PrefixTree

ROW_TOKENS = 128
ROWS_PER_STEP = 16
SHAPE = {
    "hidden_size": 128,
    "intermediate_size": 384,
    "num_hidden_layers": 12,
    "num_attention_heads": 4,
    "max_position_embeddings": 256,
    "tie_word_embeddings": True,
    "bos_token_id": None,
}
PAIRS: dict[str, dict[str, Any]] = {
    "demo": {"text": "stdlib", "student": {}},
    "llama": {"text": "stdlib", "student": {"max_length": ROW_TOKENS, "learning_rate": 1e-3}},
    "gpt_neox": {
        "text": "wikitext",
        "student": {
            "max_length": ROW_TOKENS,
            "learning_rate": 1e-3,
            "alternate_every_n_layers": 3,
        },
    },
}
"""Each pair's text, and the distillation settings that differ from the demo's."""
NUM_CALIBRATION, NUM_HELD_OUT = 64, 64
TEXTS = ("train", "calibration", "heldout")
PASSAGE_CHARACTERS = 800


def check_text(kind: str, folder: Path) -> None:
    """Raise ValueError if the text of a pair is not in its folder and cannot be written either."""
    is_there = (folder / "heldout.jsonl").is_file()
    if kind == "wikitext" and not is_there and data_folder() is None:
        raise ValueError("BOOMERANG_DATA names no folder, which must hold wikitext-2/test.txt")


def write_texts(kind: str, folder: Path) -> None:
    """Write `train.jsonl`, `calibration.jsonl` (two samples) and `heldout.jsonl`.

    Raises ValueError if they share a document.
    """
    if kind == "stdlib":
        modules = list(iter_modules())
        training = [module.text for module in modules if not is_held_out(module.name)]
        others = [module.text for module in modules if is_held_out(module.name)]
    else:
        files = data_folder() / "wikitext-2"
        training, others = (
            [text for text in BLANK_LINES.split((files / name).read_text()) if len(text) > 200]
            for name in ("test.txt", "valid.txt")
        )
    calibration, held_out = (passages(documents) for documents in (others[::2], others[1::2]))
    parts = dict(zip(TEXTS, (training, calibration, held_out)))
    if len(set().union(*parts.values())) < sum(len(set(texts)) for texts in parts.values()):
        raise ValueError(f"{kind}: a document is in two parts")
    folder.mkdir(parents=True, exist_ok=True)
    for name, texts in parts.items():
        lines = (json.dumps({"text": text}) + "\n" for text in texts)
        (folder / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")


def passages(documents: Iterable[str]) -> list[str]:
    """Cut documents at line ends into passages of about PASSAGE_CHARACTERS, and shuffle them."""
    found = []
    for document in documents:
        start = 0
        while start < len(document):
            stop = document.find("\n", start + PASSAGE_CHARACTERS) + 1 or len(document)
            found.append(document[start:stop])
            start = stop
    random.Random(0).shuffle(found)
    return found


def texts_of(path: Path) -> list[str]:
    return [json.loads(line)["text"] for line in path.open(encoding="utf-8")]


def new_teacher(pair: str, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    ids = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    shape = SHAPE | ids | {"vocab_size": len(tokenizer)}
    if pair == "llama":
        return LlamaForCausalLM(LlamaConfig(**shape, num_key_value_heads=2))
    return GPTNeoXForCausalLM(GPTNeoXConfig(**shape))


def train_teacher(pair: str, folder: Path, steps: int, seed: int) -> None:
    torch.manual_seed(seed)
    modules = [Module(str(i), text) for i, text in enumerate(texts_of(folder / "train.jsonl"))]
    tokenizer = train_tokenizer(modules, vocab_size=2048)
    tokenizer.model_max_length = SHAPE["max_position_embeddings"]
    rows_RT = cut_into_rows(tokenize(modules, tokenizer), ROW_TOKENS)
    model = new_teacher(pair, tokenizer)
    settings = {"steps": steps, "warmup_steps": 50, "muon_lr": 0.02, "adam_lr": 0.004}
    record = train(model, next_token_loss, random_batches(rows_RT), **settings)
    save(folder / "teacher", model, tokenizer, settings | {"seed": seed}, record)


def random_batches(rows_RT: torch.Tensor) -> Iterator[Batch]:
    while True:
        yield (rows_RT[torch.randint(len(rows_RT), (ROWS_PER_STEP,))],)


def distill(pair: str, folder: Path, student: str, *flags: object) -> None:
    run(*distillation(pair, folder, student), *flags)


def distillation(pair: str, folder: Path, student: str, **changed: object) -> list[object]:
    """The module and arguments that distill a student into `folder/student`. `changed` are settings
    that differ from the pair's, None for those to leave out.
    """
    settings = DISTILLATION | PAIRS[pair]["student"]
    settings |= {"eval_dataset": folder / "heldout.jsonl"} | changed
    return [
        *("train.train", "--teacher_model_name_or_path", teacher_of(pair, folder)),
        *("--dataset", folder / "train.jsonl", "--save_directory", folder / student),
        *("--resume_from_checkpoint", "last"),
        *as_flags({flag: value for flag, value in settings.items() if value is not None}),
    ]


def teacher_of(pair: str, folder: Path) -> Path:
    return TEACHER if pair == "demo" else folder / "teacher"


def search(pair: str, folder: Path, student: str, out: str, *flags: object) -> dict[str, Any]:
    """Search the orders with patching.orders, measuring every set of layers. Return order.json."""
    run(
        *("patching.orders", "--teacher_model_name_or_path", teacher_of(pair, folder)),
        *("--student_model_name_or_path", folder / student, "--save_directory", folder / out),
        *("--calibration", folder / "calibration.jsonl"),
        *("--calibration_texts", NUM_CALIBRATION, "--exact", "--beam", 3, *flags),
    )
    return json.loads((folder / out / "order.json").read_text())


def family_of(pair: str, folder: Path, student: str) -> Family:
    return Family.from_pretrained(teacher_of(pair, folder), folder / student, dtype="float32")


def bits_per_byte(
    family: Family, sets: Iterable[frozenset[int]], texts: Sequence[str]
) -> dict[frozenset[int], float]:
    """The score of each set's model on whole texts, all computed in one prefix tree."""
    names = {patched: as_layer_list(sorted(patched)) for patched in sets}
    recipes = {name: family.recipe(patched_layers=patched) for patched, name in names.items()}
    tree = PrefixTree(recipes, **family.parents.load(("teacher", "student")))
    lm = FamilyLM(tree, tokenizer=family.tokenizer, batch_size=8)
    requests = [
        Instance("loglikelihood_rolling", doc={}, arguments=(text,), idx=i)
        for i, text in enumerate(texts)
    ]
    num_bytes = sum(len(text.encode()) for text in texts)
    bits = {}
    for patched, name in names.items():
        lm.activate(name)
        nats = -sum(lm.loglikelihood_rolling(requests, disable_tqdm=True))
        bits[patched] = nats / math.log(2) / num_bytes
    return bits


def held_out_bits(found: dict[str, Any], family: Family, folder: Path) -> dict[str, list[float]]:
    """Bits per byte of each order's members on text that no search has seen."""
    texts = texts_of(folder / "heldout.jsonl")
    sets = {
        name: [frozenset(member["patched_layers"]) for member in order["members"]]
        for name, order in found["orders"].items()
    }
    sets["best sets"] = [frozenset(member["patched_layers"]) for member in found["best_sets"]]
    bits = bits_per_byte(family, set().union(*sets.values()), texts[:NUM_HELD_OUT])
    return {name: [bits[patched] for patched in of_order] for name, of_order in sets.items()}


def compare(pair: str, folder: Path) -> None:
    """Search orders on two samples of text, print both tables and write `compared.json`."""
    samples = [
        search(pair, folder, "student", "orders"),
        search(pair, folder, "student", "orders_2", "--calibration_skip", NUM_CALIBRATION),
    ]
    held_out = held_out_bits(samples[0], family_of(pair, folder, "student"), folder)
    measured = json.loads((folder / "orders" / "order_kl.json").read_text())["kl"]
    print(f"\n{pair}\n\n{orders_table(samples[0], held_out)}\n")
    print(samples_table(samples, measured))
    (folder / "compared.json").write_text(
        json.dumps({"samples": samples, "held_out_bits_per_byte": held_out}, indent=1) + "\n"
    )


def orders_table(found: dict[str, Any], held_out: dict[str, list[float]]) -> str:
    """KL and held-out bits per byte of the sizes between student and teacher. Orders that give the
    same models share a row.
    """
    rows: dict[tuple[str, ...], list[str]] = {}
    for order, result in found["orders"].items():
        kl = [member["kl"] for member in result["members"]]
        sums = [result[key] for key in ("mean_kl", "area", "regret", "regret_of_best_sets")]
        numbers = [*kl[1:-1], *sums, *held_out[order][1:-1]]
        cells = (as_layer_list(result["order"]), *(f"{number:.4f}" for number in numbers))
        rows.setdefault(cells, []).append(order)
    best = [f"{member['kl']:.4f}" for member in found["best_sets"]]
    mean = sum(member["kl"] for member in found["best_sets"]) / len(best)
    bits = [f"{value:.4f}" for value in held_out["best sets"]]
    rows["", *best, f"{mean:.4f}", "", "", "", *bits] = ["best set of each size"]
    sizes = [f"k = {k}" for k in range(1, len(best) + 1)]
    sums = ["mean KL", "area", "regret", "to best sets"]
    header = ["order", "layers", *sizes, *sums, *(f"bits, {size}" for size in sizes)]
    student, ends = found["orders"]["last"]["members"][0], held_out["last"]
    areas = {order: result["area"] for order, result in found["orders"].items()}
    named = ([" = ".join(of_row), *cells] for cells, of_row in rows.items())
    return (
        f"{markdown(header, named, num_words=2)}\n\n"
        f"The student has KL {student['kl']:.4f} and {ends[0]:.4f} bits per byte, the teacher "
        f"{ends[-1]:.4f}. The area of klpatch is at most that of the better of first and last: "
        f"{areas['klpatch'] <= min(areas['first'], areas['last'])}."
    )


def samples_table(samples: Sequence[dict[str, Any]], measured: dict[str, float]) -> str:
    """The orders found on each sample of text, with their mean KL on the first sample.

    `measured` is the KL of every set of layers on the first sample.
    """
    rows = []
    for order in samples[0]["orders"]:
        first, second = (sample["orders"][order] for sample in samples)
        sets = [as_layer_list(member["patched_layers"]) for member in second["members"][1:-1]]
        of_second = sum(measured[patched] for patched in sets) / len(sets)
        layers = [as_layer_list(result["order"]) for result in (first, second)]
        rows.append([order, *layers, f"{first['mean_kl']:.4f}", f"{of_second:.4f}"])
    header = ["order", "found on sample 1", "found on sample 2"]
    header += ["mean KL on sample 1, of order 1", "of order 2"]
    return markdown(header, rows, num_words=3)


def markdown(header: Sequence[str], rows: Iterable[Sequence[str]], num_words: int) -> str:
    """A table. The first `num_words` columns are text, the others numbers."""
    lines = [header, ["---"] * num_words + ["---:"] * (len(header) - num_words), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def kept(pair: str, folder: Path, seed: int) -> None:
    """Compare the default student with one whose kept layers were chosen by `--kept_layers auto`.
    Both are distilled alike.
    """
    if not (folder / "student_auto" / "config.json").is_file():
        text = ("--calibration", folder / "calibration.jsonl")
        distill(pair, folder, "student_auto", *text, "--kept_layers", "auto", "--seed", seed)
    for student, out in (("student", "orders"), ("student_auto", "orders_auto")):
        family = family_of(pair, folder, student)
        found = search(pair, folder, student, out)
        held_out = held_out_bits(found, family, folder)
        print(f"\n{pair}, {student}, kept {as_layer_list(family.layer_map.kept)}")
        for order in ("last", "first", "klpatch", "exact"):
            members = found["orders"][order]["members"]
            cells = [f"{m['layers']}: {b:.4f}" for m, b in zip(members, held_out[order])]
            print(f"| {order} | {' | '.join(cells)} |")


def main(argv: list[str] | None = None) -> None:
    arguments = parser().parse_args(argv)
    folder = (arguments.folder / arguments.pair).resolve()
    if arguments.what == "train":
        with user_errors():
            settings = {"teacher_steps": arguments.steps, "seed": arguments.seed}
            has_texts = all((folder / f"{name}.jsonl").is_file() for name in TEXTS)
            keep_settings(folder, settings, is_earlier=has_texts)
            check_text(PAIRS[arguments.pair]["text"], folder)
        write_texts(PAIRS[arguments.pair]["text"], folder)
        if arguments.pair != "demo":
            train_teacher(arguments.pair, folder, arguments.steps, arguments.seed)
        distill(arguments.pair, folder, "student", "--seed", arguments.seed)
    elif arguments.what == "compare":
        compare(arguments.pair, folder)
    else:
        kept(arguments.pair, folder, arguments.seed)


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("train", "compare", "kept"))
    parser.add_argument("pair", choices=sorted(PAIRS))
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=1000, help="training steps of the teacher")
    parser.add_argument("--seed", type=int, default=0)
    return parser


if __name__ == "__main__":
    run_command(main, "the same command starts again")
