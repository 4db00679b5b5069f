"""A sweep over all sizes, ours against the stock harness.

Two families: the demo's (shipped teacher, its student by `make demo`), and a random pair of 24
layers of hidden size 512 with a vocabulary of 4,096. Ours runs every distinct prefix of layers once
per batch, and the context of a question once for its choices. It is compared with one stock harness
after another in one process, task by task and in turn, and with one stock process per size on saved
checkpoints, as whole commands.

    python -m benchmarks.sweep --student demo_output/student
"""

import argparse
import contextlib
import io
import json
import logging
import multiprocessing
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
import transformers
import yaml
from lm_eval.models.huggingface import HFLM
from transformers import AutoTokenizer, Qwen3Config, Qwen3ForCausalLM

from evaluate.family import FamilyLM
from evaluate.sweep import Harness, SeriesMember
from evaluate.tasks import load_tasks
from examples.stdlib.corpus import is_held_out, iter_modules
from examples.stdlib.tasks import write_tasks
from patching.arguments import FamilyArguments
from patching.assemble import assemble
from patching.blocks import LayerMap
from patching.family import Family
from patching.recipe import initial_student
from patching.student_config import StudentConfig

ROOT = Path(__file__).parents[1]
TEACHER = ROOT / "examples" / "stdlib" / "teacher"
MIB = 2**20
CONTEXT_CHARACTERS, CHOICE_CHARACTERS = 720, 60


def random_pair(folder: Path) -> tuple[Path, Path]:
    """Teacher and student with the demo's tokenizer, kept layers 0,2,...,22,23 of 24."""
    config = Qwen3Config(
        vocab_size=4096,
        hidden_size=512,
        intermediate_size=1536,
        num_hidden_layers=24,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=64,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    teacher = Qwen3ForCausalLM(config).bfloat16()
    layer_map = LayerMap((*range(0, 23, 2), 23), 24)
    student = assemble(initial_student(layer_map), teacher=teacher)
    tokenizer = AutoTokenizer.from_pretrained(TEACHER)
    for name, model in (("teacher", teacher), ("student", student)):
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    StudentConfig(layer_map).save(folder / "student")
    return folder / "teacher", folder / "student"


def write_random_pairs_tasks(folder: Path, num_documents: int) -> None:
    """Pieces of modules as texts to score, and as contexts with four possible continuations."""
    draw = random.Random(0)
    texts = [module.text for module in iter_modules() if len(module.text) > 4000]
    piece = CONTEXT_CHARACTERS + CHOICE_CHARACTERS

    def cut(length: int) -> str:
        text = draw.choice(texts)
        start = draw.randrange(len(text) - length)
        return text[start : start + length]

    documents = [
        {"text": cut(piece), "choices": [cut(CHOICE_CHARACTERS) for _ in range(4)]}
        for _ in range(num_documents)
    ]
    folder.mkdir()
    data = (folder / "documents.jsonl").resolve()
    data.write_text("".join(json.dumps(document) + "\n" for document in documents))
    shared = {
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(data)}},
        "test_split": "test",
    }
    tasks = {
        "rolling": {
            "output_type": "loglikelihood_rolling",
            "doc_to_text": "",
            "doc_to_target": "{{text}}",
            "metric_list": [{"metric": "bits_per_byte"}],
        },
        "choice": {
            "output_type": "multiple_choice",
            "doc_to_text": f"{{{{text[:{CONTEXT_CHARACTERS}]}}}}",
            "doc_to_choice": "{{choices}}",
            "doc_to_target": 0,
            "target_delimiter": "",
            "metric_list": [{"metric": "acc"}],
        },
    }
    for name, task in tasks.items():
        (folder / f"{name}.yaml").write_text(yaml.safe_dump({"task": name} | task | shared))


def seconds(run: Callable[..., None], *arguments: object) -> float:
    start = time.perf_counter()
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        run(*arguments)
    return time.perf_counter() - start


class LayerCalls:
    """Counts the layers that compute, and the forward passes through whole models."""

    def __init__(self, models) -> None:
        self.layers = 0
        for model in models:
            for layer in model.model.layers:
                layer.self_attn.register_forward_hook(self._count)

    def _count(self, *_) -> None:
        self.layers += 1


def in_one_process(
    name: str, family: Family, include_path: Path, tasks: list[str], settings: argparse.Namespace
) -> None:
    """Ours against one stock harness after another, parents loaded once for each."""
    members = members_of(family)
    parents = family.load(["teacher", "student"], torch.bfloat16, torch.device("cpu"))
    options = {"tokenizer": family.tokenizer, "batch_size": settings.batch_size}
    ours = family_lm(members, **parents, **options)
    stock = [assemble(member.recipe, **parents) for member in members]
    calls = LayerCalls(ours.tree.models.values()), LayerCalls(stock)

    def run_ours(task: str) -> None:
        for member in members:
            Harness().score(ours, member, loaded[task])
        ours.forget()

    def run_stock(task: str) -> None:
        for member, model in zip(members, stock):
            Harness().score(HFLM(pretrained=model, **options), member, loaded[task])

    loaded, _ = load_tasks(tasks, str(include_path))
    depths = sum(member.recipe.depth for member in members)
    for task in tasks:
        times = []
        for count in calls:
            count.layers = 0
        for _ in range(settings.repeats):
            times.append((seconds(run_ours, task), seconds(run_stock, task)))
        ratio = statistics.median(theirs / own for own, theirs in times)
        own, theirs = (statistics.median(side) for side in zip(*times))
        print(
            f"{name}, {family.order}, {task}: {own:.1f} s, one stock harness after another "
            f"{theirs:.1f} s, {ratio:.2f} x faster; layers per batch "
            f"{ours.tree.num_layer_forwards} instead of {depths}, in all "
            f"{calls[0].layers // settings.repeats:,} instead of "
            f"{calls[1].layers // settings.repeats:,}",
            flush=True,
        )


def members_of(family: Family) -> list[SeriesMember]:
    sizes = range(family.layer_map.max_layers_to_patch + 1)
    return [SeriesMember("family", k, family.recipe(k)) for k in sizes]


def family_lm(members: list[SeriesMember], **options) -> FamilyLM:
    return FamilyLM({member.name: member.recipe for member in members}, **options)


def one_process_a_size(
    name: str,
    arguments: FamilyArguments,
    include_path: Path,
    tasks: list[str],
    folder: Path,
    settings: argparse.Namespace,
) -> None:
    """Our command against the stock one for each size, its checkpoint saved beforehand."""
    family = Family.from_pretrained(arguments)
    parents = [
        *("--teacher_model_name_or_path", arguments.teacher_model_name_or_path),
        *("--student_model_name_or_path", arguments.student_model_name_or_path),
    ]
    saved = [folder / name / member.name for member in members_of(family)]
    for k, path in enumerate(saved):
        number = ["--num_layers_to_patch", k, "--dtype", "bfloat16"]
        run("patching.patch", *parents, *number, "--save_directory", path, cwd=ROOT)
    what = [
        *("--tasks", ",".join(tasks), "--include_path", include_path.resolve()),
    ]
    size = str(settings.batch_size)
    theirs = 0.0
    for path in saved:
        theirs += run(
            *("lm_eval", "--model", "hf", "--device", "cpu", "--batch_size", size, *what),
            *("--model_args", f"pretrained={path},dtype=bfloat16", "--output_path", folder / "out"),
            cwd=folder,  # where no folder hides Hugging Face's package `evaluate`
        )
    own = run(
        *("evaluate.evaluate", *parents, *what, "--eval_batch_size", size),
        *("--device", "cpu", "--save_directory", folder / f"{name}_ours"),
        cwd=ROOT,
    )
    print(
        f"{name}, {family.order}, whole commands: {own:.1f} s, {len(saved)} stock processes "
        f"{theirs:.1f} s, {theirs / own:.2f} x faster",
        flush=True,
    )


def run(*command: object, cwd: Path) -> float:
    """Run a module of Python; its wall time in seconds."""
    start = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-m", *map(str, command)],
        cwd=cwd,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"},
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise RuntimeError(f"{command} failed:\n{done.stderr[-3000:]}")
    return time.perf_counter() - start


def report_memory(arguments: FamilyArguments, include_path: Path, batch_size: int) -> None:
    """What all members hold together beyond their two parents, and the most of a whole run."""
    hush()
    family = Family.from_pretrained(arguments)
    tokenizer = family.tokenizer
    before = status_bytes("VmRSS")
    parents = family.load(["teacher", "student"], torch.bfloat16, torch.device("cpu"))
    weights = sum(
        parameter.untyped_storage().nbytes()
        for model in parents.values()
        for parameter in model.parameters()
    )
    for model in parents.values():  # weights files are mapped: read them now
        for parameter in model.parameters():
            parameter.data = parameter.data.clone()
    loaded = status_bytes("VmRSS")
    members = members_of(family)
    lm = family_lm(members, **parents, tokenizer=tokenizer, batch_size=batch_size)
    with_members = status_bytes("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM from here on
    with contextlib.redirect_stderr(io.StringIO()):
        for task in load_tasks(["rolling", "choice"], str(include_path))[0].values():
            for member in members:
                Harness().score(lm, member, task)
    peak = status_bytes("VmHWM")
    print(
        f"memory: teacher and student {weights / MIB:,.0f} MiB of weights "
        f"({(loaded - before) / MIB:,.0f} resident); all {len(lm.tree.names)} members "
        f"{(with_members - loaded) / MIB:+,.0f} MiB, {(with_members - loaded) / weights:.1%}; "
        f"activations, requests and results at most {(peak - with_members) / MIB:,.0f} MiB",
        flush=True,
    )


def hush() -> None:
    """No progress bars and advice between the figures."""
    transformers.logging.disable_progress_bar()
    logging.getLogger("lm_eval").setLevel(logging.ERROR)


def status_bytes(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(name))


def main(settings: argparse.Namespace) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        teacher, student = random_pair(folder)
        write_random_pairs_tasks(folder / "tasks", settings.num_documents)
        arguments = FamilyArguments(str(teacher), str(student))
        with multiprocessing.get_context("spawn").Pool(1) as fresh:  # where nothing was freed yet
            fresh.apply(report_memory, (arguments, folder / "tasks", settings.batch_size))
        for order in ("last", "first"):
            family = Family.from_pretrained(
                FamilyArguments(str(teacher), str(student), order=order)
            )
            in_one_process("24 layers", family, folder / "tasks", ["rolling", "choice"], settings)
        families = [("24 layers", arguments, folder / "tasks", ["rolling", "choice"])]
        if settings.student is not None:
            write_tasks(
                (module for module in iter_modules() if is_held_out(module.name)),
                folder / "demo_tasks",
            )
            demo = FamilyArguments(str(TEACHER), str(settings.student.resolve()))
            tasks = ["stdlib_bits_per_byte", "stdlib_next_line"]
            in_one_process(
                "demo", Family.from_pretrained(demo), folder / "demo_tasks", tasks, settings
            )
            families.append(("demo", demo, folder / "demo_tasks", tasks))
        for family in families:
            one_process_a_size(*family, folder, settings)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--student", type=Path, help="the demo's, for its family too")
    parser.add_argument("--num_documents", type=int, default=12, help="of the random pair's tasks")
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=3)
    hush()
    main(parser.parse_args())
