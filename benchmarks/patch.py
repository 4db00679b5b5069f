"""Saving a patched model: file to file, the straightforward way, and plain `cp`, in one run.

    python -m benchmarks.patch --folder /somewhere/with/20GB

The models have Qwen3-1.7B's shape and random weights, made here. Each save runs in its own process,
with imports done before the clock starts. For all three ways the inputs are in the page cache, and
memory for the output was freed just before. Rounds are interleaved. The table has the median of
each way and of splice / cp within a round; the straightforward way runs once per size. A whole
command, imports included, is timed at the end.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, models
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, Qwen3Config
from transformers.utils import logging

from patching.architectures.config import config_for
from patching.blocks import LayerMap, default_kept_layers
from patching.checkpoints.layout import layout_of, tensors_of
from patching.checkpoints.save import plan_save
from patching.family import Family
from patching.recipe import initial_student, whole_model
from patching.running.peak_memory import peak_resident_bytes
from patching.student_config import StudentConfig

TEACHER = Qwen3Config(
    num_hidden_layers=28,
    hidden_size=2048,
    intermediate_size=6144,
    num_attention_heads=16,
    num_key_value_heads=8,
    head_dim=128,
    vocab_size=151936,
    tie_word_embeddings=True,
    dtype="bfloat16",
)
LAYER_MAP = LayerMap(default_kept_layers(28, 2, 1, 2), 28)
Parents = tuple[str, str]
"""Folders of teacher and student."""


def make_pair(folder: Path) -> Parents:
    """Write a teacher and a student with random weights."""
    student = config_for(initial_student(LAYER_MAP), {"teacher": TEACHER})
    for name, config, seed in (("teacher", TEACHER, 0), ("student", student, 1)):
        if (folder / name / "config.json").exists():
            continue
        generator = torch.Generator().manual_seed(seed)
        recipe = whole_model(config.num_hidden_layers)
        layouts = {"teacher": layout_of(config, torch.bfloat16)}
        tensors = {
            tensor.name: torch.empty(tensor.shape, dtype=torch.bfloat16).normal_(
                std=0.02, generator=generator
            )
            for tensor, *_ in tensors_of(recipe, layouts)
        }
        (folder / name).mkdir()
        save_file(tensors, folder / name / "model.safetensors", metadata={"format": "pt"})
        tokenizer = Tokenizer(models.WordLevel({"<eos>": 0}, unk_token="<eos>"))
        PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>").save_pretrained(
            folder / name
        )
        StudentConfig(LAYER_MAP).save(folder / name)
        config.architectures = ["Qwen3ForCausalLM"]
        config.save_pretrained(folder / name)
    return str(folder / "teacher"), str(folder / "student")


def splice(parents: Parents, num_layers_to_patch: int, out: Path) -> None:
    """Save a complete checkpoint by copying bytes."""
    family = Family.from_pretrained(*parents)
    plan_save(family, family.patched_layers(num_layers_to_patch), out).save(out, out.name, {})


def straightforward(parents: Parents, num_layers_to_patch: int, out: Path) -> None:
    """Load both models, put their layers into a new one, and call `save_pretrained`."""
    family = Family.from_pretrained(*parents)
    recipe = family.recipe(num_layers_to_patch)
    models = {
        parent: AutoModelForCausalLM.from_pretrained(name, dtype=torch.bfloat16)
        for parent, name in zip(("teacher", "student"), parents)
    }
    config = family.config(recipe)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.model.embed_tokens = models[recipe.embedding].model.embed_tokens
    for position, (parent, layer_idx, _) in enumerate(recipe.layers):
        layer = models[parent].model.layers[layer_idx]
        model.model.layers[position].load_state_dict(layer.state_dict())
    model.model.norm = models[recipe.head].model.norm
    model.lm_head = models[recipe.head].lm_head
    model.save_pretrained(out)


WAYS: dict[str, Callable[[Parents, int, Path], None]] = {
    "splice": splice,
    "straightforward": straightforward,
}


def child(way: str, folder: Path, num_layers_to_patch: int, out: Path) -> None:
    """Save once, and print the seconds and the peak memory as JSON."""
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    parents = str(folder / "teacher"), str(folder / "student")
    # The architecture's code, and transformers' table of how tensors are named in all of them.
    tuple(layout_of(Qwen3Config(num_hidden_layers=1), torch.bfloat16).tensors)
    prepare(folder, out)
    before = peak_resident_bytes()
    start = time.perf_counter()
    WAYS[way](parents, num_layers_to_patch, out)
    seconds = time.perf_counter() - start
    print(json.dumps({"seconds": seconds, "peak": peak_resident_bytes(), "imports": before}))


def run_child(way: str, folder: Path, num_layers_to_patch: int, out: Path) -> dict[str, float]:
    command = [sys.executable, "-m", "benchmarks.patch", "--folder", str(folder)]
    command += ["--way", way, "--num_layers_to_patch", str(num_layers_to_patch)]
    done = subprocess.run([*command, "--out", str(out)], capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def cp(folder: Path, out: Path) -> float:
    """Seconds that `cp` takes for the same bytes."""
    prepare(folder, out)
    start = time.perf_counter()
    subprocess.run(["cp", "-r", folder / "reference", out], check=True)
    return time.perf_counter() - start


def prepare(folder: Path, out: Path) -> None:
    """Start every way from the same state: inputs in the page cache, and as much memory just freed
    as the output takes. A system may clear its cache, or take idle memory away, at any time.
    """
    for name in ("teacher", "student", "reference"):
        for path in (folder / name).glob("*.safetensors"):
            with path.open("rb") as file:
                while file.read(2**20):
                    pass
    remove(out)
    if (folder / "reference").exists():
        shutil.copytree(folder / "reference", out)
        remove(out)


def remove(folder: Path) -> None:
    """Remove an output and wait until the disk has written what it was given."""
    shutil.rmtree(folder, ignore_errors=True)
    os.sync()


def measure(folder: Path, num_layers_to_patch: int, repeats: int) -> None:
    """Print the table row of one size."""
    out, reference = folder / "out", folder / "reference"
    splice_once = ("splice", folder, num_layers_to_patch)
    remove(reference)
    run_child(*splice_once, reference)
    num_bytes = sum(path.stat().st_size for path in reference.glob("*.safetensors"))
    rounds = []
    for i in range(repeats):
        if i % 2:  # take turns, since the first may find the disk busier
            copied = cp(folder, out)
            spliced = run_child(*splice_once, out)
        else:
            spliced = run_child(*splice_once, out)
            copied = cp(folder, out)
        rounds.append((spliced, copied))
    loaded = run_child(
        "straightforward", folder, num_layers_to_patch, out
    )  # ten times slower, so only once
    remove(out)
    remove(reference)
    splice_seconds = statistics.median(spliced["seconds"] for spliced, _ in rounds)
    cp_seconds = statistics.median(copied for _, copied in rounds)
    ratio = statistics.median(spliced["seconds"] / copied for spliced, copied in rounds)
    cells = (
        str(num_layers_to_patch),
        f"{num_bytes / 1e9:.2f} GB",
        f"{splice_seconds:.2f} s",
        f"{cp_seconds:.2f} s",
        f"{loaded['seconds']:.1f} s",
        f"{ratio:.2f}",
        f"1/{loaded['seconds'] / splice_seconds:.0f}",
        f"{max(spliced['peak'] for spliced, _ in rounds) / 1e6:.0f} MB",
        f"{max(spliced['peak'] - spliced['imports'] for spliced, _ in rounds) / 1e6:.0f} MB",
        f"{loaded['peak'] / 1e6:.0f} MB",
    )
    print("| " + " | ".join(cells) + " |", flush=True)


def measure_command(folder: Path, num_layers_to_patch: int) -> None:
    """Print what the whole command takes, imports included."""
    out = folder / "out"
    remove(out)
    command = [sys.executable, "-m", "patching.patch", "--save_directory", str(out)]
    command += ["--teacher_model_name_or_path", str(folder / "teacher")]
    command += ["--student_model_name_or_path", str(folder / "student")]
    command += ["--num_layers_to_patch", str(num_layers_to_patch)]
    start = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    peak = 0
    while process.poll() is None:
        peak = max(peak, peak_resident_bytes(process.pid))
        time.sleep(0.01)
    seconds = time.perf_counter() - start
    assert process.returncode == 0
    remove(out)
    print(
        f"\nThe whole command at k = {num_layers_to_patch}: {seconds:.1f} s, at most "
        f"{peak / 1e6:.0f} MB resident, mapped libraries included."
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument(
        "--folder", type=Path, help="folder for 12 GB of models (default: a temporary one)"
    )
    parser.add_argument("--sizes", default="1,6,12", help="sizes k to measure")
    parser.add_argument("--repeats", type=int, default=5, help="rounds per size")
    parser.add_argument("--way", choices=WAYS, help="one save of this kind; used by the benchmark")
    parser.add_argument("--num_layers_to_patch", type=int, help="with --way")
    parser.add_argument("--out", type=Path, help="with --way")
    arguments = parser.parse_args()
    if arguments.way:
        child(arguments.way, arguments.folder, arguments.num_layers_to_patch, arguments.out)
        return
    logging.set_verbosity_error()
    if arguments.folder:
        arguments.folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=arguments.folder, prefix="patch-benchmark-") as name:
        folder = Path(name)
        make_pair(folder)
        sizes = [int(k) for k in arguments.sizes.split(",")]
        columns = "k | weights | splice | cp | straightforward | splice / cp | splice / straight"
        columns += " | peak memory | of it after imports | straightforward's"
        print(f"| {columns} |")
        print("| ---: " * len(columns.split("|")) + "|", flush=True)
        for k in sizes:
            measure(folder, k, arguments.repeats)
        measure_command(folder, sizes[-1])


if __name__ == "__main__":
    main()
