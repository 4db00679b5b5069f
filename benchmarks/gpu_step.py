"""A micro-batch of distillation on a GPU, in variants: compiled layers, attention within documents,
Liger kernels, a teacher in FP8.

A variant names its parts, joined by `+`. `straightforward` is the loss as one would first write it
(see benchmarks.distill_step) on rows without documents. Each variant has its own models and is
measured after the others, because the GPU does not hold two.

    python -m benchmarks.gpu_step
    python -m benchmarks.gpu_step --profile compiled+documents+varlen
    python -m benchmarks.gpu_step --shape qwen3-0.6b --variants compiled,compiled+fp8
"""

import argparse
import gc
import random
import statistics
from collections.abc import Callable
from types import SimpleNamespace
from typing import NamedTuple

import torch
from torch.profiler import ProfilerActivity, profile
from transformers import Qwen3Config

from benchmarks.distill_step import (
    COMPILED,
    MIB,
    WEIGHTS,
    models,
    seconds,
    straightforward_loss,
)
from patching.running.varlen import VARLEN
from train.batches import Batch, collate, to_device
from train.distillation import install_distillation_forward
from train.estimate import flops_per_token
from train.fp8 import use_fp8
from train.hardware_peak import measured_flops_per_second, peak_flops_per_second
from train.loss import count
from train.speed import speed_up

SHAPES = {
    "qwen3-4b": (2560, 9728, 36, 32, 8),
    "qwen3-0.6b": (1024, 3072, 28, 16, 8),
    "tiny": (256, 768, 4, 4, 2),
}
"""Hidden size, width of the MLP, layers, heads, and heads of keys and values."""
ATTENTION = ("sdpa", VARLEN, "flex_attention", "flash_attention_2")
PARTS = ("straightforward", "compiled", "documents", "liger", "fp8", *ATTENTION)
VARIANTS = (
    "straightforward",
    "sdpa",
    "documents+sdpa",
    "documents+varlen",
    "compiled+sdpa",
    "compiled+documents+sdpa",
    "compiled+documents+varlen",
    "compiled+documents+varlen+fp8",
    "compiled+documents+varlen+liger",
    "compiled+documents+flex_attention",
)
MEDIAN_DOCUMENT = 500
"""Tokens of the median document. Lengths are log-normal, with a deviation of 1."""
WARM_UP = 3


class Measured(NamedTuple):
    first_seconds: float
    """Of the first micro-batch, with compiling."""
    seconds: list[float]
    peak_mib: float
    """With weights and gradients, without the states of an optimizer."""
    flops: float
    """As training counts them: products alone, and nothing that is computed again."""
    loss: float


def config_of(shape: str, vocab_size: int, attention: str) -> Qwen3Config:
    hidden, intermediate, layers, heads, key_value_heads = SHAPES[shape]
    return Qwen3Config(
        vocab_size=vocab_size,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=key_value_heads,
        head_dim=128,
        tie_word_embeddings=True,
        attn_implementation=attention,
    )


def make_batch(settings: argparse.Namespace, has_documents: bool) -> Batch:
    """Return rows of random tokens on the GPU, cut into documents if asked for."""
    draw = random.Random(0)
    rows = []
    for _ in range(settings.rows):
        row = {"input_ids": [draw.randrange(settings.vocab_size) for _ in range(settings.length)]}
        if has_documents:
            lengths, left = [], settings.length
            while left:
                lengths.append(min(left, 1 + int(MEDIAN_DOCUMENT * draw.lognormvariate(0, 1))))
                left -= lengths[-1]
            row["document_lengths"] = lengths
        rows.append(row)
    return to_device(collate(rows), torch.device("cuda"))


def prepare(settings: argparse.Namespace, variant: str) -> tuple[Callable[[], torch.Tensor], float]:
    """Return what computes the loss of a variant's micro-batch, and its FLOPs."""
    parts = set(variant.split("+"))
    (attention,) = parts & {*ATTENTION} or {"sdpa"}
    config = config_of(settings.shape, settings.vocab_size, attention)
    student, teacher, layer_map = models(config, "cuda")
    batch = make_batch(settings, "documents" in parts)
    flops = flops_per_token(student.config, teacher.config, WEIGHTS).of_batch(batch)
    if "straightforward" in parts:
        ids = batch["input_ids"]
        return lambda: straightforward_loss(student, teacher, layer_map, ids), flops
    flags = vars(COMPILED) | {"torch_compile": "compiled" in parts, "liger_kernel_config": None}
    flags = SimpleNamespace(**flags | {"use_liger_kernel": "liger" in parts})
    weights = WEIGHTS
    if flags.torch_compile:
        weights = WEIGHTS._replace(compile_backend=flags.torch_compile_backend)
    if "fp8" in parts:
        use_fp8(teacher)
    for model in (student, teacher):
        speed_up(model, flags)
    install_distillation_forward(student, teacher, layer_map, weights)
    counts = count(batch["labels"])
    return lambda: student(**batch, counts=counts).loss, flops


def backward(loss: Callable[[], torch.Tensor]) -> torch.Tensor:
    with torch.autocast("cuda", dtype=torch.bfloat16):
        value = loss()
    value.backward()
    return value.detach()


def measure(settings: argparse.Namespace, variant: str) -> Measured:
    loss, flops = prepare(settings, variant)
    first = seconds(lambda: backward(loss), "cuda")
    value = float(backward(loss))
    for _ in range(WARM_UP - 2):
        backward(loss)
    torch.cuda.reset_peak_memory_stats()
    times = [seconds(lambda: backward(loss), "cuda") for _ in range(settings.repeats)]
    peak = torch.cuda.max_memory_allocated() / MIB
    if variant == settings.profile:
        activities = [ProfilerActivity.CPU, ProfilerActivity.CUDA]
        with profile(activities=activities) as profiled:
            backward(loss)
            torch.cuda.synchronize()
        table = profiled.key_averages().table(
            sort_by="self_device_time_total", row_limit=40, max_name_column_width=90
        )
        print(table, flush=True)
    return Measured(first, times, peak, flops, value)


def report(settings: argparse.Namespace) -> None:
    print(
        f"{torch.cuda.get_device_name()}, PyTorch {torch.__version__}, {settings.shape}, "
        f"{settings.rows} rows of {settings.length} tokens"
    )
    device = torch.device("cuda")
    measured_peak = measured_flops_per_second(device, torch.bfloat16)
    vendors_peak = peak_flops_per_second(device, torch.bfloat16)
    print(f"one product: {measured_peak / 1e12:.0f} TFLOP/s, vendor's {vendors_peak / 1e12:.0f}")
    num_tokens = settings.rows * settings.length
    print(f"{'variant':38} ms (least, most)   tokens/s  MFU  peak MiB  first s  loss", flush=True)
    for variant in settings.variants:
        try:
            found = measure(settings, variant)
        except (ImportError, RuntimeError, ValueError) as error:
            print(f"{variant:38} {type(error).__name__}: {str(error)[:300]}", flush=True)
            continue
        finally:
            gc.collect()
            torch.cuda.empty_cache()
        median = statistics.median(found.seconds)
        mfu = found.flops / median / vendors_peak
        print(
            f"{variant:38} {median * 1e3:6.1f} ({min(found.seconds) * 1e3:.1f}, "
            f"{max(found.seconds) * 1e3:.1f})  {num_tokens / median:8,.0f}  {mfu:4.0%}  "
            f"{found.peak_mib:7,.0f}  {found.first_seconds:5.1f}  {found.loss:.4f}",
            flush=True,
        )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=SHAPES, default="qwen3-4b")
    parser.add_argument("--variants", default=",".join(VARIANTS), help="separated by commas")
    parser.add_argument("--profile", help="a variant whose kernels are listed")
    parser.add_argument("--vocab_size", type=int, default=151936)
    parser.add_argument("--rows", type=int, default=2)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--repeats", type=int, default=10)
    parsed = parser.parse_args()
    parsed.variants = parsed.variants.split(",")
    for name in parsed.variants:
        if unknown := {*name.split("+")} - {*PARTS}:
            parser.error(
                f"--variants: {', '.join(sorted(unknown))}: choose from {', '.join(PARTS)}"
            )
    report(parsed)
