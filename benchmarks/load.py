"""How time and memory grow where there is much of something.

    python -m benchmarks.load [CASE ...] [--folder /somewhere/with/2GB]

Each case runs at several sizes, each in a process of its own: `stream` reads documents as training
does, `shards` saves a model from checkpoints of many files, `layers` lists the sizes of a deep
family, `experts` those of a mixture of experts, `sets` measures sets of layers, `vocabulary` takes
one step of distillation, `tasks` draws the report of 18 sizes, `compared` evaluates models of a
folder next to a family. The table has the CPU seconds of the work itself, without imports and
without making what it reads, and the most memory held beyond what was held before. A small run
comes first, so that lazy imports do not count.
"""

import argparse
import contextlib
import io
import json
import multiprocessing
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy
import torch
from safetensors.torch import save_file
from transformers import (
    AutoTokenizer,
    PreTrainedConfig,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    logging,
)

from benchmarks.distill_step import Side, models, teacher_config
from evaluate import evaluate, report
from evaluate.documents import add_documents
from evaluate.result import FinishedTask, Parameters, Result, Run, update_result
from patching import patch
from patching.architectures.config import config_for
from patching.assemble import assemble
from patching.blocks import LayerMap, default_kept_layers
from patching.orders import __main__ as orders
from patching.recipe import initial_student
from patching.running.peak_memory import peak_bytes_during
from patching.student_config import StudentConfig
from train.data import load_rows
from train.data_args import DataArguments
from train.speed import reuse_freed_memory

TOKENIZER = Path(__file__).parents[1] / "examples" / "stdlib" / "teacher"
MIB = 2**20
Work = Callable[[], str | None]
"""What is measured. May return a further figure."""


def small_config(num_layers: int, **changes: int) -> PreTrainedConfig:
    shape = {
        "vocab_size": 4096, "hidden_size": 64, "intermediate_size": 128, "head_dim": 16,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512,
    }  # fmt: skip
    return Qwen3Config(num_hidden_layers=num_layers, dtype="float32", **shape | changes)


def save_tokenizer(folder: Path) -> None:
    AutoTokenizer.from_pretrained(TOKENIZER).save_pretrained(folder)


def save_pair(folder: Path, num_layers: int, alternate_every: int = 2) -> tuple[str, ...]:
    """Save a small random pair. Return the flags that name it."""
    torch.manual_seed(0)
    layer_map = LayerMap(default_kept_layers(num_layers, alternate_every, 1, 1), num_layers)
    teacher = Qwen3ForCausalLM(small_config(num_layers)).eval()
    student = assemble(initial_student(layer_map), teacher=teacher)
    for name, model in (("teacher", teacher), ("student", student)):
        model.save_pretrained(folder / name)
        save_tokenizer(folder / name)
    StudentConfig(layer_map).save(folder / "student")
    return names_of_pair(folder)


def names_of_pair(folder: Path) -> tuple[str, ...]:
    return (
        *("--teacher_model_name_or_path", str(folder / "teacher")),
        *("--student_model_name_or_path", str(folder / "student")),
    )


def save_text(folder: Path, num_documents: int, num_words: int = 4) -> Path:
    path = folder / "text.jsonl"
    with path.open("w") as file:
        for i in range(num_documents):
            words = " ".join(f"w{(i * 7 + j) % 9973}" for j in range(num_words))
            file.write(f'{{"text": "{words} {i}"}}\n')
    return path


def stream(num_documents: int, folder: Path) -> Work:
    """One pass over a file of short documents, and the start of a run that resumes at its end."""
    path = save_text(folder, num_documents)
    arguments = DataArguments(
        dataset=str(path), streaming=True, heldout_documents=0, max_length=512
    )
    tokenizer = AutoTokenizer.from_pretrained(TOKENIZER)

    def rows():
        return load_rows(arguments, tokenizer, seed=0).train

    def read() -> str:
        first, last = rows(), None
        for _ in first:
            if first.position["pass"] == 1:
                break
            last = first.position
        again, start = rows(), time.process_time()
        again.resume(last)
        next(iter(again))
        return f"{time.process_time() - start:.1f} s to resume at the end"

    return read


def shards(num_files: int, folder: Path) -> Work:
    """A teacher whose layers lie in a file each, and a model of it in as many files."""
    flags = save_pair(folder, num_files)
    teacher = folder / "teacher"
    tensors = Qwen3ForCausalLM.from_pretrained(teacher).state_dict()
    (teacher / "model.safetensors").unlink()
    files: dict[int, dict[str, torch.Tensor]] = {}
    for name, tensor in tensors.items():
        _, is_layer, rest = name.partition("layers.")
        files.setdefault(int(rest.split(".")[0]) if is_layer else 0, {})[name] = tensor
    index = {}
    for i, of_file in files.items():
        file_name = f"model-{i + 1:05}-of-{len(files):05}.safetensors"
        save_file(of_file, teacher / file_name, metadata={"format": "pt"})
        index |= dict.fromkeys(of_file, file_name)
    text = json.dumps({"metadata": {}, "weight_map": index})
    (teacher / "model.safetensors.index.json").write_text(text)
    size = ("--num_layers_to_patch", str(num_files // 4), "--max_shard_size", "170KB")
    out = folder / "out"

    def save() -> str:
        quietly(patch.main, [*flags, *size, "--save_directory", str(out)])
        return f"{len(list(out.glob('*.safetensors')))} files written"

    return save


def layers(num_layers: int, folder: Path) -> Work:
    """The list of all sizes of a family with the widths of Qwen3-32B, from configs alone."""
    teacher = Qwen3Config(
        num_hidden_layers=num_layers, hidden_size=5120, intermediate_size=25600, head_dim=128,
        num_attention_heads=64, num_key_value_heads=8, vocab_size=151936, dtype="bfloat16",
    )  # fmt: skip
    teacher.architectures = ["Qwen3ForCausalLM"]
    return list_sizes(teacher, folder)


def experts(num_layers: int, folder: Path) -> Work:
    """The same with the widths of Qwen3-235B-A22B, whose layers have 128 experts."""
    teacher = Qwen3MoeConfig(
        num_hidden_layers=num_layers, hidden_size=4096, moe_intermediate_size=1536, head_dim=128,
        num_attention_heads=64, num_key_value_heads=4, vocab_size=151936, dtype="bfloat16",
        num_experts=128, num_experts_per_tok=8,
    )  # fmt: skip
    teacher.architectures = ["Qwen3MoeForCausalLM"]
    return list_sizes(teacher, folder)


def list_sizes(teacher: PreTrainedConfig, folder: Path) -> Work:
    num_layers = teacher.num_hidden_layers
    layer_map = LayerMap(default_kept_layers(num_layers, 2, 1, 2), num_layers)
    student = config_for(initial_student(layer_map), {"teacher": teacher})
    for name, config in (("teacher", teacher), ("student", student)):
        config.save_pretrained(folder / name)
    StudentConfig(layer_map).save(folder / "student")
    return lambda: quietly(patch.main, [*names_of_pair(folder), "--list"])


def sets(num_sets: int, folder: Path) -> Work:
    """An exact search over all sets of patchable layers."""
    num_patchable = num_sets.bit_length() - 1
    flags = save_pair(folder, 2 * num_patchable + 1)
    text = save_text(folder, 2)
    found = folder / "found"
    more = ("--calibration", str(text), "--exact", "--match_scale", "False")
    more += ("--dtype", "float32", "--save_directory", str(found))

    def search() -> str:
        quietly(orders.main, [*flags, *more])
        measured = json.loads((found / "order_kl.json").read_text())["kl"]
        return f"{len(measured):,} sets measured"

    return search


def vocabulary(vocab_size: int, folder: Path) -> Work:
    """One step of distillation on 1,024 tokens with a hidden size of 256."""
    reuse_freed_memory()
    shape = argparse.Namespace(shape="qwen3", vocab_size=vocab_size, hidden_size=256, num_layers=4)
    student, teacher, layer_map = models(teacher_config(shape), "cpu")
    side = Side("ours", student, teacher, layer_map, torch.randint(vocab_size, (4, 256)))
    side.step()  # makes gradients and the states of the optimizer, which stay

    def step() -> None:
        side.step()

    return step


def tasks(num_tasks: int, folder: Path) -> Work:
    """The report on 18 sizes with a score for each of 500 documents of each task."""
    numbers = numpy.random.default_rng(0)
    for k in range(18):
        result = Result("family", k, 19 + k, Parameters(10**9 + 10**8 * k, 10**9 + 10**8 * k))
        result.max_layers_to_patch, result.order = 17, list(range(17))
        for i in range(num_tasks):
            name = f"task_{i}"
            correct = numbers.random(500) < 0.3 + 0.02 * k
            scores = {"acc,none": correct.mean(), "acc_stderr,none": 0.02}
            result.add_scores(
                {name: FinishedTask(1.0, False, {"prompts": name}, [name])},
                Run({"limit": None}, {}, {}),
                {
                    "results": {name: scores},
                    "higher_is_better": {name: {"acc": True}},
                    "n-samples": {name: {"original": 500, "effective": 500}},
                    "versions": {name: 1.0},
                },
            )
            add_documents(folder, f"family_k{k}", {f"{name}/acc,none": correct.astype(float)})
        update_result(folder, f"family_k{k}", lambda _, result=result: result)
    return lambda: quietly(report.main, [str(folder)])


def compared(num_models: int, folder: Path) -> Work:
    """A family at one size, and all the models of a folder, on one task of 8 questions."""
    flags = save_pair(folder, 4)
    for i in range(num_models):
        torch.manual_seed(i)
        other = folder / "others" / f"model_{i}"
        Qwen3ForCausalLM(small_config(2)).save_pretrained(other)
        save_tokenizer(other)
    questions = [{"question": f"w{i}", "choices": [" a", " b"], "answer": i % 2} for i in range(8)]
    data = folder / "questions.jsonl"
    data.write_text("".join(json.dumps(question) + "\n" for question in questions))
    task = {
        "task": "choice", "dataset_path": "json", "test_split": "test",
        "dataset_kwargs": {"data_files": {"test": str(data)}},
        "output_type": "multiple_choice", "doc_to_text": "{{question}}",
        "doc_to_choice": "{{choices}}", "doc_to_target": "{{answer}}",
    }  # fmt: skip
    (folder / "choice.yaml").write_text(json.dumps(task))  # JSON is YAML
    more = ("--tasks", "choice", "--include_path", str(folder), "--num_layers_to_patch", "1")
    more += ("--compare", str(folder / "others"), "--dtype", "float32")
    more += ("--save_directory", str(folder / "results"))
    return lambda: quietly(evaluate.main, [*flags, *more])


def quietly(main: Callable[[list[str]], None], flags: list[str]) -> None:
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        main(flags)


class Case(NamedTuple):
    prepare: Callable[[int, Path], Work]
    sizes: tuple[int, ...]
    smallest: int
    """The size of the run that comes first."""


CASES = {
    "stream": Case(stream, (500_000, 1_000_000, 5_000_000), 2_000),
    "shards": Case(shards, (50, 100, 200), 8),
    "layers": Case(layers, (32, 64, 128), 8),
    "experts": Case(experts, (24, 48, 94), 8),
    "sets": Case(sets, (256, 1024, 4096), 8),
    "vocabulary": Case(vocabulary, (65_536, 131_072, 262_144), 4096),
    "tasks": Case(tasks, (5, 10, 25), 2),
    "compared": Case(compared, (50, 100, 200), 2),
}


def measured(name: str, size: int, place: str | None) -> tuple[float, float, str]:
    """Return the seconds and the MiB of a case at a size, in a new process, and what it says."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_measured, (name, size, place))


def _measured(name: str, size: int, place: str | None) -> tuple[float, float, str]:
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    case, figures = CASES[name], []
    for each in (case.smallest, size):
        with tempfile.TemporaryDirectory(dir=place) as folder:
            work = case.prepare(each, Path(folder))
            start = time.process_time()
            peak = peak_bytes_during(lambda work=work: figures.append(work()))
            seconds = time.process_time() - start
    return seconds, peak / MIB, figures[-1] or ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("cases", nargs="*", metavar="CASE", help=f"of {', '.join(CASES)}")
    parser.add_argument("--folder", help="where to write (default: the folder for such files)")
    parser.add_argument("--sizes", help="other sizes than each case's own: 10,100")
    arguments = parser.parse_args()
    if unknown := set(arguments.cases) - CASES.keys():
        parser.error(f"{', '.join(unknown)}: choose from {', '.join(CASES)}")
    for name in arguments.cases or CASES:
        sizes = map(int, arguments.sizes.split(",")) if arguments.sizes else CASES[name].sizes
        print(f"{name:>10}  CPU s    MiB", flush=True)
        for size in sizes:
            seconds, mib, figure = measured(name, size, arguments.folder)
            print(f"{size:10,}  {seconds:7.2f}  {mib:,.0f}  {figure}", flush=True)


if __name__ == "__main__":
    main()
