"""Training from a cache of the teacher's predictions, against training with the teacher.

The demo's teacher, or that of --teacher, and a student read the demo's corpus, with cross entropy
and KL. The command `train.cache_teacher` writes the predictions. Then both sides take turns in one
process, from the same student and on the same rows: a step of one, a step of the other. At the end
the whole KL from the teacher, over all tokens of the vocabulary, is measured for both students on
held-out rows. The weights that each side holds are counted in a process of its own.

    python -m benchmarks.cached_teacher
    python -m benchmarks.cached_teacher --teacher smollm2_output/teacher --batch_size 8 --steps 20

--compile compiles both sides, as `train.train` does in long runs on a CPU.
"""

import argparse
import copy
import gc
import multiprocessing
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from datasets import Dataset
from torch._subclasses.fake_tensor import is_fake
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from benchmarks.distill_step import COMPILED
from benchmarks.ratios import ratio_of_pairs
from examples.stdlib.corpus import write_corpus
from examples.stdlib.demo import as_flags
from patching.blocks import LayerMap, default_kept_layers
from patching.running.peak_memory import peak_bytes_during
from train import cache_teacher
from train.batches import Batch, collate
from train.data import Rows, load_rows
from train.data_args import DataArguments
from train.distillation import install_distillation_forward
from train.loss import LossWeights, StepCounts, count
from train.speed import reuse_freed_memory, speed_up
from train.student import new_student
from train.teacher_cache import TeacherCache

TEACHER = Path(__file__).parents[1] / "examples" / "stdlib" / "teacher"
WITH, FROM = "with the teacher", "from the cache"
MIB = 2**20


class Side:
    """A student, and how it learns: from the teacher, or from the cache if there is none."""

    def __init__(
        self,
        student: PreTrainedModel,
        teacher: PreTrainedModel | None,
        layer_map: LayerMap,
        weights: LossWeights,
        cache: TeacherCache,
    ) -> None:
        self.student = student.train()
        self._complete = cache.add_to if teacher is None else lambda batch: batch
        if weights.compile_backend is not None:
            for model in filter(None, (student, teacher)):
                speed_up(model, COMPILED)
        install_distillation_forward(student, teacher, layer_map, weights)
        self._optimizer = torch.optim.AdamW(
            student.parameters(), lr=5e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True
        )

    def step(self, batch: Batch) -> None:
        counts = count(batch["labels"])
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = self.student(**self._complete(batch), counts=counts).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.student.parameters(), 1.0)
        self._optimizer.step()
        self._optimizer.zero_grad()


def models(folder: Path) -> tuple[PreTrainedModel, PreTrainedModel, LayerMap]:
    """Return the teacher in bf16 and its untrained student in fp32."""
    teacher = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    num_layers = teacher.config.num_hidden_layers
    layer_map = LayerMap(default_kept_layers(num_layers, 2, 1, 2), num_layers)
    return new_student(teacher, layer_map), teacher, layer_map


def write_cache(folder: Path, settings: argparse.Namespace) -> Rows:
    """Keep the teacher's predictions of as many rows as training reads, and return these rows."""
    write_corpus(folder)
    text = {
        "dataset": str(folder / "train.jsonl"),
        "max_length": settings.max_length,
        "heldout_documents": settings.heldout_documents,
        "measure_order": False,
    }
    num_rows = settings.steps * settings.batch_size
    flags = text | {
        "teacher_model_name_or_path": settings.teacher,
        "teacher_cache": folder / "cache",
        "max_rows": num_rows,
        "top_k": settings.top_k,
    }
    cache_teacher.main([*map(str, as_flags(flags))])
    rows = load_rows(DataArguments(**text), AutoTokenizer.from_pretrained(settings.teacher), seed=0)
    return Rows(rows.train.select(range(num_rows)).shuffle(seed=0), rows.held_out)


def batches(rows: Dataset, batch_size: int) -> list[Batch]:
    """Return the whole batches of the rows."""
    starts = range(0, len(rows) - batch_size + 1, batch_size)
    return [collate(list(rows.select(range(i, i + batch_size)))) for i in starts]


@torch.no_grad()
def held_out_kl(
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    layer_map: LayerMap,
    weights: LossWeights,
    rows: Dataset,
) -> float:
    """Return the mean KL from the teacher over held-out tokens, in nats."""
    install_distillation_forward(student.eval(), teacher, layer_map, weights)
    total = num_targets = 0.0
    for batch in batches(rows, min(16, len(rows))):
        counts = count(batch["labels"])
        one = torch.ones(())
        with torch.autocast("cpu", dtype=torch.bfloat16):
            total += float(student(**batch, counts=StepCounts(one, one)).kl)
        num_targets += float(counts.targets)
    return total / num_targets


def seconds(run: Callable[[], None]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def memory_of(name: str, folder: Path, settings: argparse.Namespace) -> tuple[int, int]:
    """Return the bytes of weights that one side holds while it trains, and the most that a step
    needs beyond what stays.
    """
    torch.set_num_threads(settings.threads)
    reuse_freed_memory()
    student, teacher, layer_map = models(settings.teacher)
    teacher = teacher if name == WITH else None
    weights, cache = weights_of(settings), TeacherCache(folder / "cache")
    side = Side(student, teacher, layer_map, weights, cache)
    rows = torch.load(folder / "rows.pt", weights_only=True)
    first = collate(rows)
    side.step(first)
    gc.collect()
    held = {
        found.untyped_storage().data_ptr(): found.untyped_storage().nbytes()
        for found in gc.get_objects()
        if type(found) is torch.nn.Parameter and not is_fake(found)
    }
    return sum(held.values()), peak_bytes_during(lambda: side.step(first))


def weights_of(settings: argparse.Namespace) -> LossWeights:
    backend = COMPILED.torch_compile_backend if settings.compile else None
    kl_weight = settings.kl_loss_weight
    return LossWeights(1.0, kl_weight, cosine=0.0, temperature=1.0, compile_backend=backend)


def main(settings: argparse.Namespace) -> None:
    torch.set_num_threads(settings.threads)
    reuse_freed_memory()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        rows = write_cache(folder, settings)
        cache, weights = TeacherCache(folder / "cache"), weights_of(settings)
        num_bytes = sum(path.stat().st_size for path in (folder / "cache").iterdir())
        num_tokens = sum(len(ids) for part in filter(None, rows) for ids in part["input_ids"])
        print(f"cache: {settings.top_k} tokens each, {num_bytes / num_tokens:.0f} bytes per token")

        student, teacher, layer_map = models(settings.teacher)
        before = held_out_kl(copy.deepcopy(student), teacher, layer_map, weights, rows.held_out)
        sides = {
            WITH: Side(copy.deepcopy(student), teacher, layer_map, weights, cache),
            FROM: Side(student, None, layer_map, weights, cache),
        }
        times: dict[str, list[float]] = {name: [] for name in sides}
        for batch in batches(rows.train, settings.batch_size):
            for name, side in sides.items():
                times[name].append(seconds(lambda: side.step(dict(batch))))  # noqa: B023
        times = {name: values[settings.warm_up :] for name, values in times.items()}
        ratios = [a / b for a, b in zip(*times.values())]
        medians = ", ".join(f"{name} {statistics.median(of):.3f} s" for name, of in times.items())
        print(f"step of {settings.batch_size} rows of {settings.max_length}: {medians}")
        parts = [ratios[i :: settings.parts] for i in range(settings.parts)]
        print(f"      {ratio_of_pairs([statistics.median(part) for part in parts])}")

        kl = {
            name: held_out_kl(side.student, teacher, layer_map, weights, rows.held_out)
            for name, side in sides.items()
        }
        found = ", ".join(f"{name} {value:.4f}" for name, value in kl.items())
        print(f"KL on held-out text: before {before:.4f}, {found}: {kl[FROM] / kl[WITH] - 1:+.1%}")

        torch.save([rows.train[i] for i in range(settings.batch_size)], folder / "rows.pt")
        for name in sides:
            with multiprocessing.get_context("spawn").Pool(1) as pool:
                held, peak = pool.apply(memory_of, (name, folder, settings))
            print(
                f"{name}: holds {held / MIB:.1f} MiB of weights, a step {peak / MIB:.0f} MiB more"
            )
    num_bytes = sum(parameter.nbytes for parameter in teacher.parameters())
    print(f"the teacher's weights are {num_bytes / MIB:.1f} MiB")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--teacher", type=Path, default=TEACHER, help="a folder")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--max_length", type=int, default=256)
    parser.add_argument("--heldout_documents", type=int, default=20)
    parser.add_argument("--top_k", type=int, default=64)
    parser.add_argument("--kl_loss_weight", type=float, default=0.1)
    parser.add_argument("--compile", action="store_true", help="compile both sides")
    parser.add_argument("--warm_up", type=int, default=2, help="first steps that are not counted")
    parser.add_argument("--parts", type=int, default=5, help="medians to print, of every n-th step")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    main(parser.parse_args())
