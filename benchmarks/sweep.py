"""Time of a sweep over all sizes, relative to lm-eval with one model per size.

There are two families: the demo's (the shipped teacher and the student made by `make demo`), and a
random pair with 24 layers of hidden size 512 and a vocabulary of 4,096. Our sweep runs every
distinct prefix of layers once per batch, and the context of a question once for all its choices. It
is compared with lm-eval's HFLM on one model after another, task by task in the same process, and
with one `lm_eval` command per size on saved checkpoints.

    python -m benchmarks.sweep --student demo_output/student

With `--generation` it measures generation instead, in fp32, where texts are the same: prompts run
once for all sizes, which then write together. With `--vocabulary 151936 --length 4096` it measures
rolling log-likelihoods of rows of that many tokens, by a random pair with that vocabulary.
"""

import argparse
import contextlib
import io
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
from operator import eq
from pathlib import Path
from typing import Any

import torch
import transformers
from lm_eval.models.huggingface import HFLM
from transformers import AutoTokenizer, Qwen3Config, Qwen3ForCausalLM

from evaluate.family import FamilyLM
from evaluate.harness import Harness
from evaluate.tasks import load_tasks
from examples.stdlib.corpus import is_held_out, iter_modules
from examples.stdlib.tasks import write_task, write_tasks
from patching.assemble import assemble
from patching.blocks import LayerMap
from patching.family import Family
from patching.recipe import Recipe, initial_student
from patching.running.peak_memory import peak_bytes_during, resident_bytes
from patching.running.prefix_tree import PrefixTree
from patching.student_config import StudentConfig

ROOT = Path(__file__).parents[1]
TEACHER = ROOT / "examples" / "stdlib" / "teacher"
MIB = 2**20
CONTEXT_CHARACTERS, CHOICE_CHARACTERS = 720, 60
ROLLING = {
    "output_type": "loglikelihood_rolling",
    "doc_to_text": "",
    "doc_to_target": "{{text}}",
    "metric_list": [{"metric": "bits_per_byte"}],
}
CHOICE = {
    "output_type": "multiple_choice",
    "doc_to_text": f"{{{{text[:{CONTEXT_CHARACTERS}]}}}}",
    "doc_to_choice": "{{choices}}",
    "doc_to_target": 0,
    "target_delimiter": "",
    "metric_list": [{"metric": "acc"}],
}


GENERATION = {
    "output_type": "generate_until",
    "doc_to_text": f"{{{{text[:{CONTEXT_CHARACTERS}]}}}}",
    "doc_to_target": "",
    "generation_kwargs": {"until": ["\n\n"], "max_gen_toks": 48, "do_sample": False},
    "metric_list": [{"metric": "exact_match"}],
}


def random_pair(folder: Path, vocab_size: int = 4096, length: int = 1024) -> tuple[Path, Path]:
    """Save a teacher and a student with the demo's tokenizer, kept layers 0,2,...,22,23 of 24. They
    read `length` tokens at once.
    """
    config = Qwen3Config(
        vocab_size=vocab_size,
        hidden_size=512,
        intermediate_size=1536,
        num_hidden_layers=24,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=64,
        max_position_embeddings=length,
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


def write_random_pairs_tasks(folder: Path, num_documents: int, num_prompts: int) -> None:
    """Write tasks with pieces of modules: texts to score and contexts with four continuations, and
    contexts to continue, which may be more.
    """
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
    prompts = [{"text": cut(draw.randint(piece // 4, piece))} for _ in range(num_prompts)]
    write_task(folder, "rolling", documents, ROLLING)
    write_task(folder, "choice", documents, CHOICE)
    write_task(folder, "generation", prompts, GENERATION)


def write_long_texts_task(folder: Path, num_documents: int, num_characters: int) -> None:
    """Write a task with texts of that many characters, made of modules one after the other."""
    text = "".join(module.text for module in iter_modules())
    documents = [
        {"text": text[i * num_characters : (i + 1) * num_characters]} for i in range(num_documents)
    ]
    write_task(folder, "rolling", documents, ROLLING)


def timed(run: Callable[..., Any], *arguments: object) -> tuple[float, float, Any]:
    """The wall and CPU time of a call in seconds, and what it returns."""
    start, cpu_start = time.perf_counter(), time.process_time()
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        returned = run(*arguments)
    return time.perf_counter() - start, time.process_time() - cpu_start, returned


def answers_in(found: dict[str, Any]) -> list[Any]:
    """What a model answered, from what lm-eval finds on a task."""
    return [sample["resps"] for samples in found["samples"].values() for sample in samples]


class LayerCalls:
    """Counts the layers that run."""

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
    """Compare with HFLM on one model after another. Parents are loaded once for both sides."""
    recipes = recipes_of(family)
    parents = family.parents.load(["teacher", "student"])
    options = {"tokenizer": family.tokenizer, "batch_size": settings.batch_size}
    ours = FamilyLM(PrefixTree(recipes, **parents), **options)
    models = [assemble(recipe, **parents) for recipe in recipes.values()]
    joint = (joint.model for joint in ours.tree.joint_models if len(joint.places) > 1)
    calls = LayerCalls([*ours.tree.models.values(), *joint]), LayerCalls(models)

    def run_ours(task: str) -> list[Any]:
        answers = []
        for member in recipes:
            ours.activate(member)
            answers += answers_in(Harness().score(ours, loaded[task]))
        ours.forget()
        return answers

    def run_theirs(task: str) -> list[Any]:
        return [
            answer
            for model in models
            for answer in answers_in(
                Harness().score(HFLM(pretrained=model, **options), loaded[task])
            )
        ]

    loaded, _ = load_tasks(tasks, str(include_path))
    depths = sum(recipe.depth for recipe in recipes.values())
    for task in tasks:
        times = []
        for count in calls:
            count.layers = 0
        for _ in range(settings.repeats):
            *of_ours, our_answers = timed(run_ours, task)
            *of_theirs, their_answers = timed(run_theirs, task)
            times.append((*of_ours, *of_theirs))
        ratio = statistics.median(theirs / own for own, _, theirs, _ in times)
        of_cpu = statistics.median(theirs / own for _, own, _, theirs in times)
        own, _, theirs, _ = (statistics.median(side) for side in zip(*times))
        num_equal = sum(map(eq, our_answers, their_answers))
        same = f"; {num_equal} of {len(our_answers)} texts are the same"
        print(
            f"{name}, {family.order}, {task}: {own:.1f} s, HFLM on one model after another "
            f"{theirs:.1f} s, {ratio:.2f} x faster ({of_cpu:.2f} x in CPU time); layers per batch "
            f"{ours.tree.num_layer_forwards} instead of {depths}, in all "
            f"{calls[0].layers // settings.repeats:,} instead of "
            f"{calls[1].layers // settings.repeats:,}{same if task == 'generation' else ''}",
            flush=True,
        )


def open_family(
    teacher: Path, student: Path, order: str | None = None, dtype: torch.dtype = torch.bfloat16
) -> Family:
    return Family.from_pretrained(teacher, student, order, dtype=dtype, device="cpu")


def recipes_of(family: Family) -> dict[str, Recipe]:
    return {f"family_k{k}": family.recipe(k) for k in range(len(family))}


def one_process_a_size(
    name: str,
    parents: tuple[Path, Path],
    include_path: Path,
    tasks: list[str],
    folder: Path,
    settings: argparse.Namespace,
) -> None:
    """Compare our command with one `lm_eval` command per size, on checkpoints saved beforehand."""
    family = open_family(*parents)
    flags = [
        *("--teacher_model_name_or_path", parents[0], "--student_model_name_or_path", parents[1])
    ]
    saved = [folder / name / member for member in recipes_of(family)]
    for k, path in enumerate(saved):
        number = ["--num_layers_to_patch", k, "--dtype", "bfloat16"]
        run("patching.patch", *flags, *number, "--save_directory", path, cwd=ROOT)
    what = ["--tasks", ",".join(tasks), "--include_path", include_path.resolve()]
    size = str(settings.batch_size)
    theirs = 0.0
    for path in saved:
        theirs += run(
            *("lm_eval", "--model", "hf", "--device", "cpu", "--batch_size", size, *what),
            *("--model_args", f"pretrained={path},dtype=bfloat16", "--output_path", folder / "out"),
            cwd=folder,  # where no folder hides Hugging Face's package `evaluate`
        )
    own = run(
        *("evaluate.evaluate", *flags, *what, "--eval_batch_size", size),
        *("--device", "cpu", "--save_directory", folder / f"{name}_ours"),
        cwd=ROOT,
    )
    print(
        f"{name}, {family.order}, whole commands: {own:.1f} s, {len(saved)} lm_eval commands "
        f"{theirs:.1f} s, {theirs / own:.2f} x faster",
        flush=True,
    )


def run(*command: object, cwd: Path) -> float:
    """Run a Python module; return its wall time in seconds."""
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


def report_memory(teacher: Path, student: Path, include_path: Path, batch_size: int) -> None:
    """Print what all members hold beyond their parents, and the peak of a whole run."""
    hush()
    family = open_family(teacher, student)
    tokenizer = family.tokenizer
    before = resident_bytes()
    parents = family.parents.load(["teacher", "student"])
    weights = sum(
        parameter.untyped_storage().nbytes()
        for model in parents.values()
        for parameter in model.parameters()
    )
    for model in parents.values():  # weights files are mapped: read them now
        for parameter in model.parameters():
            parameter.data = parameter.data.clone()
    loaded = resident_bytes()
    recipes = recipes_of(family)
    tree = PrefixTree(recipes, **parents)
    lm = FamilyLM(tree, tokenizer=tokenizer, batch_size=batch_size)
    with_members = resident_bytes()

    def score_all() -> None:
        for task in load_tasks(["rolling", "choice"], str(include_path))[0].values():
            for member in recipes:
                lm.activate(member)
                Harness().score(lm, task)

    with contextlib.redirect_stderr(io.StringIO()):
        peak = peak_bytes_during(score_all)
    print(
        f"memory: teacher and student {weights / MIB:,.0f} MiB of weights "
        f"({(loaded - before) / MIB:,.0f} resident); all {len(recipes)} members "
        f"{(with_members - loaded) / MIB:+,.0f} MiB, {(with_members - loaded) / weights:.1%}; "
        f"activations, requests and results at most {peak / MIB:,.0f} MiB",
        flush=True,
    )


def hush() -> None:
    """Turn off progress bars and lm-eval's advice."""
    transformers.logging.disable_progress_bar()
    logging.getLogger("lm_eval").setLevel(logging.ERROR)


def large_vocabulary(settings: argparse.Namespace) -> None:
    """Compare long rows and a large vocabulary, in both orders."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        pair = random_pair(folder, settings.vocabulary, settings.length)
        # The demo's tokens have fewer than 6 characters on average, so each text fills a row.
        write_long_texts_task(folder / "tasks", settings.num_documents, 6 * settings.length)
        for order in ("last", "first"):
            what = f"24 layers, {settings.vocabulary:,} tokens, rows of {settings.length:,}"
            in_one_process(what, open_family(*pair, order), folder / "tasks", ["rolling"], settings)


def main(settings: argparse.Namespace) -> None:
    if settings.vocabulary:
        large_vocabulary(settings)
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        pair = random_pair(folder)
        write_random_pairs_tasks(folder / "tasks", settings.num_documents, settings.num_prompts)
        demo = settings.student and (TEACHER, settings.student.resolve())
        if settings.generation:
            for name, parents in (("demo", demo), ("24 layers", pair)):
                for order in ("last", "first") if parents else ():
                    family = open_family(*parents, order, torch.float32)
                    in_one_process(name, family, folder / "tasks", ["generation"], settings)
            return
        with multiprocessing.get_context("spawn").Pool(1) as fresh:  # where nothing was freed yet
            fresh.apply(report_memory, (*pair, folder / "tasks", settings.batch_size))
        tasks = ["rolling", "choice"]
        for order in ("last", "first"):
            family = open_family(*pair, order)
            in_one_process("24 layers", family, folder / "tasks", tasks, settings)
        families = [("24 layers", pair, folder / "tasks", tasks)]
        if demo:
            write_tasks(
                (module for module in iter_modules() if is_held_out(module.name)),
                folder / "demo_tasks",
            )
            tasks = ["stdlib_bits_per_byte", "stdlib_next_line"]
            in_one_process("demo", open_family(*demo), folder / "demo_tasks", tasks, settings)
            families.append(("demo", demo, folder / "demo_tasks", tasks))
        for family in families:
            one_process_a_size(*family, folder, settings)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--student", type=Path, help="the demo's student, to measure its family too"
    )
    parser.add_argument(
        "--num_documents", type=int, default=12, help="documents in each task of the random pair"
    )
    parser.add_argument("--num_prompts", type=int, default=16, help="prompts to continue")
    parser.add_argument("--generation", action="store_true", help="measure generation instead")
    parser.add_argument(
        "--vocabulary", type=int, help="measure long rows by a random pair with this vocabulary"
    )
    parser.add_argument("--length", type=int, default=4096, help="tokens in each of those rows")
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=3)
    hush()
    main(parser.parse_args())
