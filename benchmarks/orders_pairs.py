"""Orders of patching on small trained pairs: what each costs, and how far it is from the best.

    python -m benchmarks.orders_pairs train llama --folder F       # teacher and student
    python -m benchmarks.orders_pairs compare llama --folder F     # orders, on two samples of text
    python -m benchmarks.orders_pairs kept llama --folder F        # kept layers: auto or default

`llama` learns from the standard library and keeps the layers of a Llama by default, `gpt_neox` from
WikiText-2 (the folder that BOOMERANG_DATA names) and keeps every third; `demo` is the shipped
teacher, whose student `train` distils. Documents to learn from, to calibrate on and to evaluate on
are different ones. Both teachers have 12 layers; training them takes --seconds.
"""

import argparse
import json
import math
import os
import random
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
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
from examples.stdlib.corpus import Module, is_held_out, iter_modules
from examples.stdlib.demo import DISTILLATION, TEACHER
from examples.stdlib.train_teacher import loss_of, token_stream, train_tokenizer
from patching.arguments import FamilyArguments
from patching.blocks import as_layer_list
from patching.family import Family
from patching.files.texts import BLANK_LINES
from patching.recipe import patched_model

ROOT = Path(__file__).parents[1]
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
"""Of each pair its text, and what its distillation has different from the demo's."""
NUM_CALIBRATION, NUM_HELD_OUT = 64, 64
PASSAGE_CHARACTERS = 800


def write_texts(kind: str, folder: Path) -> None:
    """`train.jsonl`, `calibration.jsonl` (two samples) and `heldout.jsonl`, no document in two."""
    if kind == "stdlib":
        modules = list(iter_modules())
        train = [module.text for module in modules if not is_held_out(module.name)]
        others = [module.text for module in modules if is_held_out(module.name)]
    else:
        data = Path(os.environ["BOOMERANG_DATA"], "wikitext-2")
        train, others = (
            [text for text in BLANK_LINES.split((data / name).read_text()) if len(text) > 200]
            for name in ("test.txt", "valid.txt")
        )
    calibration, held_out = (passages(documents) for documents in (others[::2], others[1::2]))
    parts = {"train": train, "calibration": calibration, "heldout": held_out}
    if len(set(train) | set(calibration) | set(held_out)) < sum(
        len(set(texts)) for texts in parts.values()
    ):
        raise ValueError(f"{kind}: a document stands in two parts")
    folder.mkdir(parents=True, exist_ok=True)
    for name, texts in parts.items():
        lines = (json.dumps({"text": text}) + "\n" for text in texts)
        (folder / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")


def passages(documents: Iterable[str]) -> list[str]:
    """Documents cut at line ends into passages of some length, in a new sequence."""
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


def new_teacher(name: str, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    ids = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    shape = SHAPE | ids | {"vocab_size": len(tokenizer)}
    if name == "llama":
        return LlamaForCausalLM(LlamaConfig(**shape, num_key_value_heads=2))
    return GPTNeoXForCausalLM(GPTNeoXConfig(**shape))


def train_teacher(name: str, folder: Path, seconds: float) -> None:
    """Matrices by Muon, the rest by AdamW, the learning rate linear in time down to zero."""
    torch.manual_seed(0)
    modules = [Module(str(i), text) for i, text in enumerate(texts_of(folder / "train.jsonl"))]
    tokenizer = train_tokenizer(modules, vocab_size=2048)
    tokenizer.model_max_length = SHAPE["max_position_embeddings"]
    stream = torch.cat(token_stream(modules, tokenizer))
    rows_RT = stream[: len(stream) // ROW_TOKENS * ROW_TOKENS].view(-1, ROW_TOKENS)
    model = new_teacher(name, tokenizer)
    matrices = [p for key, p in model.named_parameters() if p.ndim == 2 and ".layers." in key]
    others = [p for key, p in model.named_parameters() if p.ndim != 2 or ".layers." not in key]
    optimizers = {
        0.02: torch.optim.Muon(matrices, lr=0.02, weight_decay=0.01),
        0.004: torch.optim.AdamW(others, lr=0.004, betas=(0.9, 0.95), weight_decay=0.0),
    }
    compiled_loss = torch.compile(lambda tokens_BT: loss_of(model, tokens_BT), dynamic=False)
    compiled_loss(rows_RT[:ROWS_PER_STEP]).backward()  # compiled before the clock starts
    model.zero_grad()
    started, step = time.time(), 0
    while (passed := (time.time() - started) / seconds) < 1:
        loss = compiled_loss(rows_RT[torch.randint(len(rows_RT), (ROWS_PER_STEP,))])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for rate, optimizer in optimizers.items():
            for group in optimizer.param_groups:
                group["lr"] = rate * min((step + 1) / 50, 1 - passed)
            optimizer.step()
            optimizer.zero_grad()
        if step % 50 == 0:
            print(f"step {step} loss {loss.item():.3f} {passed * seconds:.0f} s", flush=True)
        step += 1
    print(f"{step} steps of {ROWS_PER_STEP * ROW_TOKENS} tokens, last loss {loss.item():.3f}")
    model.to(torch.bfloat16).save_pretrained(folder / "teacher")
    tokenizer.save_pretrained(folder / "teacher")


def distil(name: str, folder: Path, student: str, *flags: str) -> None:
    settings = DISTILLATION | PAIRS[name]["student"]
    run(
        *("train.train", "--teacher_model_name_or_path", teacher_of(name, folder)),
        *("--dataset", folder / "train.jsonl", "--eval_dataset", folder / "heldout.jsonl"),
        *("--save_directory", folder / student),
        *(part for flag, value in settings.items() for part in (f"--{flag}", value)),
        *flags,
    )


def teacher_of(name: str, folder: Path) -> Path:
    return TEACHER if name == "demo" else folder / "teacher"


def run(module: str, *arguments: object) -> None:
    words = [sys.executable, "-m", module, *map(str, arguments)]
    subprocess.run(words, cwd=ROOT, check=True)


def search(name: str, folder: Path, student: str, out: str, *flags: object) -> dict[str, Any]:
    """What patching.orders finds, every set measured."""
    run(
        *("patching.orders", "--teacher_model_name_or_path", teacher_of(name, folder)),
        *("--student_model_name_or_path", folder / student, "--save_directory", folder / out),
        *("--calibration", folder / "calibration.jsonl"),
        *("--calibration_texts", NUM_CALIBRATION, "--exact", "--beam", 3, *flags),
    )
    return json.loads((folder / out / "order.json").read_text())


def bits_per_byte(
    family: Family, sets: Iterable[frozenset[int]], texts: Sequence[str]
) -> dict[frozenset[int], float]:
    """Of every set's model on whole texts, all in one tree."""
    recipes = {as_layer_list(sorted(s)): (s, patched_model(family.layer_map, s)) for s in sets}
    lm = FamilyLM(
        {name: recipe for name, (_, recipe) in recipes.items()},
        **family.load(["teacher", "student"], torch.float32),
        tokenizer=family.tokenizer,
        batch_size=8,
    )
    requests = [
        Instance("loglikelihood_rolling", doc={}, arguments=(text,), idx=i)
        for i, text in enumerate(texts)
    ]
    num_bytes = sum(len(text.encode()) for text in texts)
    found = {}
    for name, (patched, _) in recipes.items():
        lm.activate(name)
        nats = -sum(lm.loglikelihood_rolling(requests, disable_tqdm=True))
        found[patched] = nats / math.log(2) / num_bytes
    return found


def held_out_of(found: dict[str, Any], family: Family, folder: Path) -> dict[str, list[float]]:
    """Bits per byte of each order's sizes on text that no search has seen."""
    texts = texts_of(folder / "heldout.jsonl")
    sets = {
        name: [frozenset(member["patched_layers"]) for member in order["members"]]
        for name, order in found["orders"].items()
    }
    sets["best sets"] = [frozenset(member["patched_layers"]) for member in found["best_sets"]]
    bits = bits_per_byte(family, set().union(*sets.values()), texts[:NUM_HELD_OUT])
    return {name: [bits[patched] for patched in of_name] for name, of_name in sets.items()}


def compare(name: str, folder: Path) -> None:
    arguments = FamilyArguments(str(teacher_of(name, folder)), str(folder / "student"))
    family = Family.from_pretrained(arguments)
    samples = [
        search(name, folder, "student", "orders"),
        search(name, folder, "student", "orders_2", "--calibration_skip", NUM_CALIBRATION),
    ]
    held_out = held_out_of(samples[0], family, folder)
    measured = json.loads((folder / "orders" / "order_kl.json").read_text())["kl"]
    print(f"\n{name}\n\n{orders_table(samples[0], held_out)}\n")
    print(samples_table(samples, measured))
    (folder / "compared.json").write_text(
        json.dumps({"samples": samples, "held_out_bits_per_byte": held_out}, indent=1) + "\n"
    )


def orders_table(found: dict[str, Any], held_out: dict[str, list[float]]) -> str:
    """KL and held-out bits per byte of the sizes between student and teacher, orders of the same
    models in one row.
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
        f"{ends[-1]:.4f}. Area of klpatch at most that of the better of first and last: "
        f"{areas['klpatch'] <= min(areas['first'], areas['last'])}."
    )


def samples_table(samples: Sequence[dict[str, Any]], measured: dict[str, float]) -> str:
    """Orders found on each sample of texts; those of the second also with the mean KL that they
    have on the first, by what was `measured` there.
    """
    rows = []
    for order in samples[0]["orders"]:
        first, second = (sample["orders"][order] for sample in samples)
        sets = [as_layer_list(member["patched_layers"]) for member in second["members"][1:-1]]
        there = sum(measured[patched] for patched in sets) / len(sets)
        layers = [as_layer_list(result["order"]) for result in (first, second)]
        rows.append([order, *layers, f"{first['mean_kl']:.4f}", f"{there:.4f}"])
    header = ["order", "found on the first sample", "on the second", "mean KL on the first"]
    return markdown([*header, "there, of the second's"], rows, num_words=3)


def markdown(header: Sequence[str], rows: Iterable[Sequence[str]], num_words: int) -> str:
    """A table whose columns behind the first ones are numbers."""
    lines = [header, ["---"] * num_words + ["---:"] * (len(header) - num_words), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def kept(name: str, folder: Path) -> None:
    """The default student beside one with chosen layers, distilled alike: each along its own best
    order.
    """
    if not (folder / "student_auto" / "config.json").is_file():
        text = ("--calibration", str(folder / "calibration.jsonl"))
        distil(name, folder, "student_auto", *text, "--kept_layers", "auto")
    for student, out in (("student", "orders"), ("student_auto", "orders_auto")):
        family = Family.from_pretrained(
            FamilyArguments(str(teacher_of(name, folder)), str(folder / student))
        )
        found = search(name, folder, student, out)
        held_out = held_out_of(found, family, folder)
        print(f"\n{name}, {student}, kept {as_layer_list(family.layer_map.kept)}")
        for order in ("last", "first", "klpatch", "exact"):
            members = found["orders"][order]["members"]
            cells = [f"{m['layers']}: {b:.4f}" for m, b in zip(members, held_out[order])]
            print(f"| {order} | {' | '.join(cells)} |")


def main(arguments: argparse.Namespace) -> None:
    folder = (arguments.folder / arguments.family).resolve()
    if arguments.what == "train":
        write_texts(PAIRS[arguments.family]["text"], folder)
        if arguments.family != "demo":
            train_teacher(arguments.family, folder, arguments.seconds)
        distil(arguments.family, folder, "student")
    elif arguments.what == "compare":
        compare(arguments.family, folder)
    else:
        kept(arguments.family, folder)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("train", "compare", "kept"))
    parser.add_argument("pair", choices=sorted(PAIRS))
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=200.0, help="that a teacher learns for")
    main(parser.parse_args())
